import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from antidiffusion.failures import NotFiniteError
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import LONGEST, Canvas, filter_matrix, view_size
from antidiffusion.recipes.ascent import move

SIZES = [(64, 64), (96, 64), (64, 128)]


def canvas(channels: int, size: tuple[int, int], shape: tuple[int, int] = (90, 131)) -> Canvas:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    return Canvas(pixels, size)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(64, 4000),
    st.floats(-math.log(6), math.log(6)),
    st.sampled_from([(128, 32), (512, 64), (768, 64), (1024, 32)]),
)
def test_view_size_keeps_area_and_aspect(height: int, stretch: float, model: tuple[int, int]) -> None:
    side, multiple = model
    width = round(height * math.exp(stretch))
    h, w = view_size(height, width, side, multiple)
    assert h % multiple == w % multiple == 0
    exact = side * math.sqrt(height / width), side * math.sqrt(width / height)
    assert all(abs(got - want) <= multiple / 2 for got, want in zip((h, w), exact, strict=True) if want > multiple / 2)
    assert view_size(width, height, side, multiple) == (w, h)


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_view_size_is_bounded_for_every_picture(height: int, width: int) -> None:
    sides = view_size(height, width, 512, 64)
    assert all(side % 64 == 0 and 64 <= side <= LONGEST * 512 for side in sides)
    assert math.prod(sides) <= 1.5 * 512**2


@pytest.mark.parametrize(
    ("shape", "view"),
    [((512, 512), (512, 512)), ((3000, 4000), (448, 576)), ((64, 6400), (64, 2048)), ((6400, 64), (2048, 64))],
)
def test_view_size_of_known_pictures(shape: tuple[int, int], view: tuple[int, int]) -> None:
    assert view_size(*shape, 512, 64) == view


@pytest.mark.parametrize(("inputs", "outputs"), [(131, 64), (4000, 96), (64, 128), (90, 90)])
def test_filter_matrix_is_torchs_antialiased_resize(inputs: int, outputs: int) -> None:
    line = normal(1, 1, 1, inputs)
    expected = F.interpolate(line, (1, outputs), mode="bilinear", antialias=True)
    torch.testing.assert_close(filter_matrix(inputs, outputs) @ line.flatten(), expected.flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [*SIZES, (90, 131)])
def test_full_gradient_is_the_transpose_of_the_view(channels: int, size: tuple[int, int]) -> None:
    picture = canvas(channels, size)
    delta, slope = normal(*picture.delta.shape), normal(1, 3, *size, seed=1)
    down = resize(delta.double(), size).expand(-1, 3, -1, -1)
    full = picture.full_gradient(slope)
    assert full.shape == picture.delta.shape
    torch.testing.assert_close((down * slope).sum(), (delta.double() * full).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [*SIZES, (90, 131)])
def test_the_view_follows_the_perturbation(channels: int, size: tuple[int, int]) -> None:
    picture = canvas(channels, size)
    clean = picture.clean.float().expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(picture.view(), resize(clean, size))
    picture.delta.copy_(Linf(20).project_(20 * normal(*picture.delta.shape), picture.clean))
    protected = (picture.clean + picture.delta).expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(picture.view(), resize(protected, size))
    assert picture.view().shape == (1, 3, *size) and picture.view().min() >= 0 and picture.view().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_ascend_steps_along_the_sign_and_stays_in_the_budget(channels: int) -> None:
    picture, budget = canvas(channels, (64, 96)), Linf(3.5)
    slope = normal(1, 3, 64, 96)
    move(picture, slope, 1.0, budget)
    inside = (picture.clean > 0) & (picture.clean < 255)
    assert torch.equal(picture.delta[inside], picture.full_gradient(slope).sign()[inside])
    for _ in range(5):
        move(picture, slope, 1.0, budget)
    assert picture.delta.abs().max() == 3.5
    moved = picture.pixels(budget).astype(int) - picture.clean[0].permute(1, 2, 0).numpy()
    assert moved.shape == (90, 131, channels) and np.abs(moved).max() == 3


def test_a_canvas_shares_nothing_with_the_picture_given(pixels: np.ndarray) -> None:
    before, source = pixels.copy(), pixels.copy()
    picture = Canvas(source, (64, 96))
    move(picture, normal(1, 3, 64, 96), 8, Linf(8))
    assert np.array_equal(source, before)
    picture.delta.zero_()
    source[:] = 0
    assert np.array_equal(picture.pixels(Linf(8)), before)


def test_a_gradient_that_is_no_number_has_no_sign() -> None:
    one, gradient = canvas(3, (64, 96)), torch.ones(1, 3, 64, 96)
    gradient[0, 1, 2, 3] = math.nan
    with pytest.raises(NotFiniteError, match="expected finite numbers in the gradient"):
        one.full_gradient(gradient)
