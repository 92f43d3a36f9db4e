from typing import Any

import pytest
import torch
from diffusers_pipelines import pipeline
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.inpaint import Inpaint
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import Surrogate

PROMPT = "a portrait of a person wearing a hat"


@pytest.fixture
def mask() -> Tensor:
    """Redraw the left half, and a corner of the second picture."""
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :, :32] = 1
    mask[1, :, 40:, 24:] = 0.7
    return mask


def redrawn_by_diffusers(x: Tensor, mask: Tensor, surrogate: Surrogate, **options: Any) -> Tensor:
    size = {"height": x.shape[-2], "width": x.shape[-1], "output_type": "pt"}
    return pipeline(surrogate, "Inpaint")([PROMPT] * len(x), image=x, mask_image=mask, **size, **options).images


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_equals_diffusers(surrogate: Surrogate, x: Tensor, mask: Tensor, strength: float) -> None:
    options: Any = {"strength": strength, "generator": Generator().manual_seed(3)}
    theirs = redrawn_by_diffusers(x, mask, surrogate, num_inference_steps=5, guidance_scale=4.0, **options)
    ours = Inpaint(strength=strength, guidance=4, steps=5)(x, Prompts(PROMPT, mask=mask), surrogate, 3)
    assert ours.shape == x.shape
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - x).abs().max() > 0.01


def test_an_empty_mask_keeps_the_latents(tiny: Surrogate, x: Tensor) -> None:
    prompts = Prompts(PROMPT, mask=torch.zeros(1, 1, 64, 64))
    with torch.no_grad():
        expected = tiny.decode(tiny.encode(x, Generator().manual_seed(3)))
    assert torch.equal(Inpaint(steps=2)(x, prompts, tiny, 3), expected)
    assert torch.equal(Inpaint(steps=2, paste=True)(x, prompts, tiny, 3), x)


def test_a_full_mask_is_image_to_image(tiny: Surrogate, x: Tensor) -> None:
    prompts = Prompts(PROMPT, mask=torch.ones(1, 1, 64, 64))
    options: Any = {"strength": 0.5, "steps": 4}
    assert torch.equal(Inpaint(**options)(x, prompts, tiny, 3), SDEdit(**options)(x, prompts, tiny, 3))
    forgotten = [Inpaint(steps=4)(pictures, prompts, tiny, 3) for pictures in (x, x.flip(0))]
    assert torch.equal(*forgotten)


def test_paste_keeps_pixels_outside(tiny: Surrogate, x: Tensor, mask: Tensor) -> None:
    prompts, region = Prompts(PROMPT, mask=mask), (mask >= 0.5).expand_as(x)
    pasted, whole = (Inpaint(steps=2, paste=paste)(x, prompts, tiny, 3) for paste in (True, False))
    assert torch.equal(pasted[~region], x[~region]) and torch.equal(pasted[region], whole[region])
    assert not torch.equal(whole[~region], x[~region])


def test_the_seed_decides_and_sizes_need_not_be_square(tiny: Surrogate) -> None:
    x = torch.rand(1, 3, 64, 128, generator=Generator().manual_seed(0))
    prompts = Prompts([PROMPT], mask=(x[:, :1] > 0.5).float())
    calls: list[tuple[int, int]] = []
    edit = Inpaint(steps=4, strength=0.5)
    first = edit(x, prompts, tiny, 1, progress=lambda *call: calls.append(call[1:]))
    same, other = (edit(x, prompts, tiny, seed) for seed in (1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == x.shape and calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, r"expected a mask to redraw in, got none; set Prompts.mask, \(1, 1, 64, 64\)"),
        (torch.ones(1, 1, 64, 32), r"expected a mask of \(1, 1, 64, 64\) or \(2, 1, 64, 64\), got \(1, 1, 64, 32\)"),
        (torch.ones(3, 1, 64, 64), r"got \(3, 1, 64, 64\)"),
        (torch.ones(64, 64), r"got \(64, 64\)"),
        (torch.full((1, 1, 64, 64), 255.0), r"expected a mask in \[0, 1\], got 255 to 255; divide by 255"),
        (torch.full((1, 1, 64, 64), -1.0), r"expected a mask in \[0, 1\], got -1 to -1"),
        (torch.full((1, 1, 64, 64), torch.nan), r"expected a mask in \[0, 1\], got nan to nan"),
    ],
)
def test_impossible_masks(tiny: Surrogate, x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inpaint()(x, Prompts(PROMPT, mask=mask), tiny, 0)


@pytest.mark.parametrize("options", [{"steps": 0}, {"strength": 0}, {"strength": 1.1}])
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected a strength in \(0, 1\], got|expected at least 1 step, got 0"):
        Inpaint(**options)
