import copy
from dataclasses import replace

import pytest
import torch
from ascents import ask, draws, seeded
from torch import Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import PREDICTIONS, Straight, target
from antidiffusion.recipes.ascent import Among
from antidiffusion.recipes.objectives import Denoising, LatentTarget, predicted_noise


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.fixture
def grey() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=seeded(9))


def test_denoising_is_the_mean_squared_error_of_the_noise(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator = seeded()
    z, n = draws(tiny, x, generator)
    t = torch.randint(1000, (2,), generator=generator)
    expected = (ask(tiny, z, n, t, embedding) - n).square().mean((1, 2, 3))
    torch.testing.assert_close(Denoising(tiny, embedding)(x, seeded()), expected)


def test_denoising_looks_where_it_is_told(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    z, n = draws(tiny, x, seeded())
    t = torch.tensor([7, 400])
    expected = (ask(tiny, z, n, t, embedding) - n).square().mean((1, 2, 3))
    torch.testing.assert_close(Denoising(tiny, embedding, Among(t.split(1)))(x, seeded()), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_predicted_noise_of_a_perfect_model_is_the_noise(tiny: Surrogate, prediction: str) -> None:
    z, n = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    perfect, t = copy.copy(tiny), torch.tensor([100, 700])
    if prediction == "flow":
        perfect.schedule, t = Straight({}), t / 1000
    else:
        perfect.schedule = replace(tiny.schedule, scheduler={**tiny.schedule.scheduler, "prediction_type": prediction})
    perfect.predict = lambda z_t, t, embedding: target(perfect.schedule, z, n, t)
    torch.testing.assert_close(predicted_noise(perfect, z, n, t, tiny.embed([""])), n, rtol=1e-3, atol=1e-4)


def test_latent_target_is_the_distance_of_the_means(tiny: Surrogate, x: Tensor, grey: Tensor) -> None:
    mean, goal = (tiny.vae.encode(2 * y - 1).latent_dist.mean for y in (x, grey))
    expected = -(tiny.vae.config.scaling_factor * (mean - goal)).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(LatentTarget(tiny, grey)(x, seeded()), expected)
    torch.testing.assert_close(LatentTarget(tiny, x)(x, seeded()), torch.zeros(2))
