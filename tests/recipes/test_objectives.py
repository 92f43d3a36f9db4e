from dataclasses import replace

import pytest
import torch
from antidiffusion.objectives.denoising import Denoising, Mean, predicted_noise, with_slope
from antidiffusion.objectives.distillation import Distillation
from antidiffusion.objectives.editing import EditTarget
from antidiffusion.objectives.feature import DenoisingFeature, record_features
from antidiffusion.objectives.first_step import FirstStepNoise, RandomlyMasked, shrink
from antidiffusion.objectives.latent import Fused, LatentTarget
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import SUPPORTED, Embedding, NoiseSchedule, Surrogate


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.fixture
def target() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=seeded(9))


def test_denoising_is_the_mean_squared_error_of_the_noise(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator = seeded()
    z, n = draws(tiny, x, generator)
    t = torch.randint(1000, (2,), generator=generator)
    expected = (ask(tiny, z, n, t, embedding) - n).square().mean((1, 2, 3))
    torch.testing.assert_close(Denoising(tiny, embedding)(x, seeded()), expected)


def test_mean_averages_values_and_gradients_over_consecutive_draws(
    tiny: Surrogate, x: Tensor, embedding: Embedding
) -> None:
    objective, generator, leaf = Denoising(tiny, embedding), seeded(), x.clone().requires_grad_()
    losses = torch.stack([objective(leaf, generator) for _ in range(3)]).mean(0)
    torch.testing.assert_close(Mean(objective, 3)(x, seeded()), losses)
    torch.testing.assert_close(Mean(objective, 3)(leaf, seeded()), losses)
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    torch.testing.assert_close(slope(Mean(objective, 3), x), expected, rtol=1e-3, atol=1e-7)


def test_with_slope() -> None:
    x, gradient = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3)
    value = with_slope(torch.tensor([1.0, 2.0]), x, gradient)
    assert value.tolist() == [1, 2]
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], gradient)


@pytest.mark.parametrize("prediction", SUPPORTED)
def test_the_predicted_noise_of_a_perfect_model_is_the_noise(tiny: Surrogate, prediction: str) -> None:
    z, n = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    t = torch.tensor([100, 700])
    if prediction == "flow_prediction":  # straight paths
        noise = torch.linspace(0.001, 0.999, 1000)
        schedule = NoiseSchedule(1 - noise, noise, prediction)
    else:
        schedule = replace(tiny.schedule, prediction=prediction)
    perfect = replace(tiny)
    perfect.schedule = schedule
    perfect.predict = lambda z_t, t, embedding: schedule.target(z, n, t)
    found = predicted_noise(perfect, schedule.add_noise(z, n, t), t, tiny.embed([""]))
    torch.testing.assert_close(found, n, rtol=1e-3, atol=1e-4)


def test_latent_target_is_the_distance_of_the_means(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    mean, goal = (tiny.vae.encode(2 * y - 1).latent_dist.mean for y in (x, target))
    expected = -(tiny.vae.config.scaling_factor * (mean - goal)).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(LatentTarget(tiny, target)(x, seeded()), expected)
    torch.testing.assert_close(LatentTarget(tiny, x)(x, seeded()), torch.zeros(2))
