"""The recipe of latent spaces: it moves latents in all of them, more than noise, through resize and JPEG."""

import numpy as np
import pytest
import torch
from latent_spaces import write

from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces, load_latents
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes.latents import PROCESSINGS, Latents, LatentShift, compressed, rescaled
from antidiffusion.recipes.random_sign import RandomSign


def silent(stage: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> LatentSpaces:
    return load_latents(str(write(tmp_path_factory.mktemp("spaces"), {"a": 4, "b": 16})), device=torch.device("cpu"))


def protected(recipe: Latents | RandomSign, model: object, pixels: np.ndarray, seed: int = 0) -> Canvas:
    canvas = Canvas(pixels, (64, 96))
    recipe([canvas], model, torch.Generator().manual_seed(seed), silent)
    return canvas


def test_every_space_moves_more_than_by_noise(spaces: LatentSpaces, pixels: np.ndarray) -> None:
    canvas, noise = (protected(recipe, spaces, pixels) for recipe in (Latents(steps=12), RandomSign()))
    assert canvas.delta.abs().max() <= 8
    for name, moved in spaces.shifts(canvas.clean_view, canvas.view()).items():
        assert moved > 1.5 * spaces.shifts(noise.clean_view, noise.view())[name], name


def test_a_whole_model_is_one_space(tiny: Surrogate, pixels: np.ndarray) -> None:
    canvas, noise = (protected(recipe, tiny, pixels) for recipe in (Latents(steps=6), RandomSign()))
    moved = [
        (tiny.posterior(c.view()).mean - tiny.posterior(c.clean_view).mean).square().mean() for c in (canvas, noise)
    ]
    assert moved[0] > moved[1]


def test_same_seed_same_bytes(spaces: LatentSpaces, pixels: np.ndarray) -> None:
    first, again, other = (protected(Latents(steps=4), spaces, pixels, seed).pixels(Linf(8)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_spaces_take_turns(spaces: LatentSpaces, x: torch.Tensor) -> None:
    objective, generator = LatentShift(spaces, x, ("none",)), torch.Generator().manual_seed(0)
    values = [objective(1 - x, generator) for _ in range(4)]
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[3])
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("name", PROCESSINGS)
def test_clean_pictures_have_no_shift_and_others_a_gradient(spaces: LatentSpaces, x: torch.Tensor, name: str) -> None:
    objective, generator = LatentShift(spaces, x, (name,)), torch.Generator().manual_seed(0)
    assert objective(x, generator).abs().max() == 0
    other = (1 - x).requires_grad_()
    (slope,) = torch.autograd.grad(objective(other, generator).sum(), other)
    assert slope.isfinite().all()
    assert slope.flatten(1).norm(dim=1).min() > 0


def test_processings_are_what_attackers_do(x: torch.Tensor) -> None:
    sides = {rescaled(x, torch.Generator().manual_seed(seed)).shape[-1] for seed in range(30)}
    assert min(sides) < 64 < max(sides)
    assert all(side % 8 == 0 and 40 <= side <= 88 for side in sides)
    smooth = torch.linspace(0.1, 0.9, 64).expand(1, 3, 64, 64)
    lossy = compressed(smooth, torch.Generator().manual_seed(0))
    assert 0 < (lossy - smooth).abs().max() < 0.1
