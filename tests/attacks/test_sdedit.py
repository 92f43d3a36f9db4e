from typing import Any

import pytest
import torch
from diffusers_pipelines import pipeline
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import Surrogate

PROMPT = "a portrait of a person wearing a hat"


def compare(x: Tensor, surrogate: Surrogate, strength: float) -> None:
    options: Any = {"strength": strength, "generator": Generator().manual_seed(3)}
    options |= {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}
    theirs = pipeline(surrogate, "Img2Img")([PROMPT] * len(x), image=x, **options).images
    ours = SDEdit(strength=strength, guidance=4, steps=10)(x, Prompts(PROMPT), surrogate, seed=3)
    assert ours.shape == x.shape
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - x).abs().max() > 0.01


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_equals_diffusers(surrogate: Surrogate, x: Tensor, strength: float) -> None:
    compare(x, surrogate, strength)


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_equals_diffusers_with_the_embedded_model(mini: Surrogate, x: Tensor, strength: float) -> None:
    compare(x[:1], mini, strength)


def test_the_seed_decides_the_edit(tiny: Surrogate, x: Tensor) -> None:
    first, same, other = (SDEdit(steps=4)(x, Prompts(PROMPT), tiny, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize(("strength", "run"), [(0.1, 1), (0.29, 2), (0.5, 5), (1.0, 10)])
def test_strength_is_the_share_of_steps(tiny: Surrogate, x: Tensor, strength: float, run: int) -> None:
    calls: list[tuple[int, int]] = []
    options: Any = {"strength": strength, "steps": 10, "guidance": 1.0}
    SDEdit(**options)(x, Prompts(PROMPT), tiny, 0, progress=lambda *call: calls.append(call[1:]))
    assert calls == [(done, run) for done in range(1, run + 1)]


def test_little_strength_keeps_the_picture(mini: Surrogate) -> None:
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64)
    edits = [SDEdit(strength=s, steps=10)(ramp, Prompts(PROMPT), mini, seed=0) for s in (0.1, 0.9)]
    weak, strong = ((edit - ramp).square().mean() for edit in edits)
    assert weak < strong


@pytest.mark.parametrize("strength", [0, -0.5, 1.1, float("nan")])
def test_impossible_strengths(strength: float) -> None:
    with pytest.raises(ValueError, match=r"expected a strength in \(0, 1\], got .*; try 0\.5"):
        SDEdit(strength=strength)


def test_a_strength_of_no_step(tiny: Surrogate, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a strength in \(0, 1\] that runs a step, got 0.01 of 50 steps"):
        SDEdit(strength=0.01)(x, Prompts(PROMPT), tiny, seed=0)


def test_what_is_left_out_is_usual_for_the_model(tiny: Surrogate, x: Tensor) -> None:
    asked: list[tuple[str, int, int]] = []
    expected = SDEdit(strength=0.1, guidance=7.5, steps=50)(x, Prompts(PROMPT), tiny, seed=0)
    found = SDEdit(strength=0.1)(x, Prompts(PROMPT), tiny, seed=0, progress=lambda *call: asked.append(call))
    assert torch.equal(found, expected) and asked[-1][1:] == (5, 5)


def test_impossible_sizes(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match="multiples of 64, got 100 x 64; resize"):
        SDEdit()(torch.rand(1, 3, 64, 100), Prompts(PROMPT), tiny, seed=0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_text_or_one_for_each_picture(tiny: Surrogate, x: Tensor, count: int) -> None:
    edit = SDEdit(steps=2, strength=1)
    texts = [PROMPT, "a red hat", PROMPT][:count]
    if count == 1:
        assert torch.equal(edit(x, Prompts(texts), tiny, 0), edit(x, Prompts(PROMPT), tiny, 0))
    else:
        with pytest.raises(ValueError, match=f"expected one text, or one for each of 2 pictures, got {count}"):
            edit(x, Prompts(texts), tiny, 0)


def test_each_picture_follows_its_own_text(tiny: Surrogate, x: Tensor) -> None:
    edit = SDEdit(steps=2, strength=1)
    each, one = (edit(x, Prompts(texts), tiny, 0) for texts in ([PROMPT, "a red hat"], PROMPT))
    torch.testing.assert_close(each[0], one[0], rtol=1e-4, atol=1e-4)
    assert (each[1] - one[1]).abs().max() > 1e-3
