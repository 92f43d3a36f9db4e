import pytest
import torch
from ascents import draws, seeded
from torch import Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.recipes import Mist
from antidiffusion.recipes.mist import LATENT, Fused, pattern
from antidiffusion.recipes.objectives import Denoising


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.fixture
def target() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=seeded(9))


def test_fused_is_the_denoising_loss_less_the_weighted_distance(
    tiny: Surrogate, x: Tensor, target: Tensor, embedding: Embedding
) -> None:
    plain = Denoising(tiny, embedding)(x, seeded())
    z, _ = draws(tiny, x, seeded())
    goal = tiny.vae.config.scaling_factor * tiny.vae.encode(2 * target - 1).latent_dist.mean
    expected = plain - 3 * (z - goal).square().mean((1, 2, 3))
    torch.testing.assert_close(Fused(tiny, embedding, target, 3.0)(x, seeded()), expected)
    torch.testing.assert_close(Fused(tiny, embedding, target, 0.0)(x, seeded()), plain)


def test_mist_pulls_towards_a_pattern_of_black_and_white() -> None:
    target = pattern(64, 96)
    assert target.shape == (1, 3, 64, 96) and set(target.unique().tolist()) == {0, 1}
    assert target.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (target[..., 1:] != target[..., :-1]).float().mean() > 0.2
    assert Mist().rate == LATENT / 1.6384
