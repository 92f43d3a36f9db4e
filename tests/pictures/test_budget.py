import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antidiffusion.pictures.budget import Linf

radii = st.floats(1, 64)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A perturbation that may be far outside every ball, and 8-bit pixels with both ends of their range."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    delta = random.normal(0, draw(st.floats(0.1, 100)), (3, 4, 5)).astype(np.float32)
    return torch.from_numpy(delta), torch.from_numpy(random.choice([0, 1, 100, 254, 255], (3, 4, 5)).astype(np.uint8))


@given(pairs(), radii)
def test_projection_is_inside_and_idempotent(pair: tuple[torch.Tensor, torch.Tensor], radius: float) -> None:
    delta, clean = pair
    before = delta.clone()
    projected = Linf(radius).project_(delta, clean)
    assert projected is delta
    assert delta.abs().max() <= np.float32(radius)
    assert (clean + delta).min() >= 0 and (clean + delta).max() <= 255
    assert torch.equal(Linf(radius).project_(delta.clone(), clean), delta)
    inside = (before.abs() <= radius) & (clean + before >= 0) & (clean + before <= 255)
    assert torch.equal(delta[inside], before[inside])


@given(pairs(), radii)
def test_quantised_pixels_are_inside_the_whole_levels(pair: tuple[torch.Tensor, torch.Tensor], radius: float) -> None:
    delta, clean = pair
    budget = Linf(radius)
    pixels = budget.quantise(budget.project_(delta, clean), clean)
    moved = pixels.int() - clean.int()
    assert pixels.dtype == torch.uint8
    assert moved.abs().max() <= budget.levels <= radius < budget.levels + 1
    assert torch.equal(budget.quantise(moved.float(), clean), pixels)


@pytest.mark.parametrize(("radius", "levels"), [(7.65, 7), (7.999, 7), (8, 8), (1, 1), (64, 64)])
def test_a_fraction_is_cut_to_whole_levels(radius: float, levels: int) -> None:
    clean = torch.full((1, 3, 1, 2), 128, dtype=torch.uint8)
    delta = torch.tensor([radius, -radius]).expand(1, 3, 1, 2)
    assert (Linf(radius).quantise(delta, clean).int() - 128).unique().tolist() == [-levels, levels]


@given(pairs())
def test_quantising_rounds_to_the_nearest_level(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    delta, clean = pair
    budget = Linf(64)
    delta = budget.project_(delta, clean)
    assert (budget.quantise(delta, clean) - clean.float() - delta).abs().max() <= 0.5


@pytest.mark.parametrize("radius", [0, 0.5, 65, -8, float("nan"), float("inf")])
def test_a_radius_outside_the_range_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match=r"expected a budget from 1 to 64 \(in 1/255 units\), got .*; .*try 8"):
        Linf(radius)
