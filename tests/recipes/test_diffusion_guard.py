import pytest
import torch
from ascents import ask, draws, seeded, slope
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.recipes.diffusion_guard import FirstStepNoise, RandomlyMasked, shrink


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


def test_first_step_noise_is_the_norm_at_the_first_of_four_steps(
    tiny: Surrogate, x: Tensor, embedding: Embedding
) -> None:
    z, n = draws(tiny, x, seeded())
    expected = ask(tiny, z, n, torch.tensor([751, 751]), embedding).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(FirstStepNoise(tiny, embedding)(x, seeded()), expected)


def disc(side: int = 64, radius: float = 20) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((x - side / 2) ** 2 + (y - side / 2) ** 2 < radius**2).float()[None, None]


def test_random_masks_lie_inside_and_vary() -> None:
    mask = disc()
    areas = []
    for seed in range(30):
        smaller = shrink(mask, seeded(seed))
        assert set(smaller.unique().tolist()) == {0, 1} and (smaller <= mask).all()
        assert torch.equal(shrink(mask, seeded(seed)), smaller)
        areas.append((smaller.sum() / mask.sum()).item())
    assert 0.1 < min(areas) < 0.5 < max(areas) < 1  # 0.22 to 0.95 on the author's machine
    assert len(set(areas)) > 20


@pytest.mark.parametrize("radius", [1.0, 3.0])
def test_a_small_mask_is_never_emptied(radius: float) -> None:
    assert all(shrink(disc(radius=radius), seeded(seed)).any() for seed in range(20))
    assert not shrink(torch.zeros(1, 1, 8, 8), seeded()).any()


def test_a_masked_objective_does_not_see_the_rest(x: Tensor) -> None:
    seen: list[Tensor] = []

    def total(y: Tensor, generator: Generator) -> Tensor:
        seen.append(y.detach())
        return y.sum((1, 2, 3))

    gradient = slope(RandomlyMasked(total, disc()), x, seed=4)
    mask = shrink(disc(), seeded(4)).expand_as(x)
    assert torch.equal(gradient, mask)
    torch.testing.assert_close(seen[0], torch.where(mask > 0, x, torch.full_like(x, 0.5)))
