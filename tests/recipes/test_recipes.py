"""What holds for every recipe, whatever it raises."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ascents import PORTRAIT, canvas, run, weights
from command_line import cli
from conftest import write_joint
from PIL import Image
from torch import Tensor

from antidiffusion import Picture, protect
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.picture import PictureError
from antidiffusion.recipes import RECIPES
from antidiffusion.recipes.attention import EarlyAttention
from antidiffusion.recipes.diffusion_guard import FirstStepNoise
from antidiffusion.recipes.latents import LatentShift
from antidiffusion.recipes.mist import LATENT, Fused, pattern
from antidiffusion.recipes.objectives import Denoising, LatentTarget
from antidiffusion.recipes.photoguard_diffusion import EditTarget
from antidiffusion.recipes.simac import DenoisingFeature

SHORT: dict[str, dict[str, Any]] = {
    "advdm": {"steps": 2},
    "sds-minus": {"steps": 2},
    "sds-plus": {"steps": 2},
    "photoguard": {"steps": 2},
    "photoguard-diffusion": {"steps": 2, "denoising_steps": 2},
    "mist": {"steps": 2},
    "fsmg": {"steps": 2, "tuning_steps": 1},
    "aspl": {"rounds": 1, "steps": 1, "tuning_steps": 1},
    "simac": {"rounds": 1, "steps": 1, "tuning_steps": 0, "selection_steps": 1, "candidates": 2},
    "diffusion-guard": {"steps": 2},
    "attention": {"steps": 2, "draws": 2},
    "latents": {"steps": 2},
}
GREY = torch.full((1, 3, 128, 128), 0.5)


def short(name: str, **options: Any) -> Any:
    return replace(RECIPES[name], **{**SHORT[name], **options})  # type: ignore[type-var]


def test_every_baseline_is_in_the_table() -> None:
    assert list(RECIPES) == ["anti-diffusion", "official", "random-sign", *SHORT]
    assert {recipe.budget for recipe in RECIPES.values()} == {8}


@pytest.mark.parametrize("name", SHORT)
def test_the_budget_holds_at_every_step_on_every_architecture(
    surrogate: Surrogate, pixels: np.ndarray, name: str
) -> None:
    pictures = [pixels[:, :64], pixels[:32, :, :1]]  # two shapes, the second one grey
    canvases = [canvas(picture) for picture in pictures]
    before = [weight.clone() for weight in weights(surrogate)]
    seen: list[tuple[str, int, int]] = []

    def inside(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        for one in canvases:
            assert one.delta.abs().max() <= 2.5
            assert ((one.clean + one.delta).clamp(0, 255) == one.clean + one.delta).all()

    trace = run(short(name, budget=2.5), surrogate, *canvases, progress=inside)
    assert len({one.size for one in canvases}) == 2
    for one, picture in zip(canvases, pictures, strict=True):
        moved = np.abs(one.pixels(Linf(2.5)).astype(int) - picture)
        assert moved.max() in (1, 2) and (moved > 0).mean() > 0.2
    assert [done for _, done, _ in seen] == list(range(1, trace.total + 1))
    assert seen[-1][2] == trace.total
    assert all(math.isfinite(value) for values in trace.losses.values() for value in values)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(surrogate), strict=True))
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights(surrogate))
    assert not any(module._forward_hooks for module in surrogate.denoiser.modules())


@pytest.mark.parametrize("name", SHORT)
def test_the_seed_decides_every_byte(tiny: Surrogate, pixels: np.ndarray, name: str) -> None:
    def delta(seed: int) -> Tensor:
        one = canvas(pixels)
        run(short(name, **({"tuning_steps": 0} if name == "aspl" else {})), tiny, one, seed=seed)
        return one.delta

    torch.manual_seed(0)
    first = delta(0)
    torch.manual_seed(1)  # the global generator has no say
    assert torch.equal(delta(0), first) and not torch.equal(delta(1), first)


HELD_OUT: dict[str, Callable[[Surrogate, Tensor], Any]] = {  # what a recipe should raise
    "advdm": lambda s, x: Denoising(s, s.embed(["a photo"])),
    "sds-plus": lambda s, x: Denoising(s, s.embed(["a portrait photo"])),
    "sds-minus": lambda s, x: lambda y, g: -Denoising(s, s.embed(["a portrait photo"]))(y, g),
    "photoguard": lambda s, x: LatentTarget(s, GREY),
    "photoguard-diffusion": lambda s, x: EditTarget(s, s.embed([""]), GREY, denoising_steps=2),
    "mist": lambda s, x: Fused(s, s.embed(["a photo"]), pattern(128, 128), LATENT / 1e4),
    "fsmg": lambda s, x: Denoising(s, s.embed(["a photo of sks person"])),
    "aspl": lambda s, x: Denoising(s, s.embed(["a photo of sks person"])),
    "simac": lambda s, x: DenoisingFeature(s, s.embed(["a photo of sks person"]), x, [torch.arange(1000)]),
    "diffusion-guard": lambda s, x: FirstStepNoise(s, s.embed([""])),
    "attention": lambda s, x: EarlyAttention(s, s.embed([""]), "entropy", x),
    "latents": lambda s, x: LatentShift(s, x),
}
LONGER: dict[str, dict[str, Any]] = {
    "photoguard-diffusion": {"steps": 3, "denoising_steps": 2},
    "fsmg": {"steps": 4, "tuning_steps": 1},
    "aspl": {"rounds": 2, "steps": 2, "tuning_steps": 1},
    "simac": {"rounds": 1, "steps": 4, "tuning_steps": 1, "selection_steps": 1, "candidates": 2},
}


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_raises_what_it_says(mini: Surrogate, name: str) -> None:
    one = canvas(PORTRAIT, side=128)
    objective = HELD_OUT[name](mini, one.clean_view)
    run(replace(RECIPES[name], **LONGER.get(name, {"steps": 5}), step_size=2), mini, one)  # type: ignore[type-var]
    generator = torch.Generator()

    @torch.no_grad()
    def mean(x: Tensor) -> float:
        generator.manual_seed(999)
        return sum(objective(x, generator).item() for _ in range(3)) / 3

    rise = mean(one.view()) - mean(one.clean_view)
    random = canvas(PORTRAIT, side=128)
    run(RECIPES["random-sign"], mini, random)
    assert rise > 0 and rise > 2 * (mean(random.view()) - mean(one.clean_view))


@pytest.mark.parametrize("name", ["advdm", "mist"])
def test_the_command_line_runs_a_baseline(loaded: Path, name: str) -> None:
    result = cli("protect", "photos", "--recipe", name, "--steps", "1", "--together", "--json")
    assert result.code == 0, result.err
    cards = [json.loads(line) for line in result.out.splitlines()]
    assert [card["recipe"]["name"] for card in cards] == [name] * 2
    assert all(1 <= card["budget"]["measured"] <= 8 for card in cards)


@pytest.mark.parametrize("option", [["--rounds", "2"], ["--tuning", "lora"]])
def test_options_that_a_baseline_lacks(unused: Path, option: list[str]) -> None:
    result = cli("protect", "photos", "--recipe", "advdm", *option)
    assert result.code == 2
    assert f"expected options of the recipe advdm, got {option[0]}; leave it out" in result.err


JOINT: dict[str, dict[str, Any]] = SHORT | {  # what protects against transformers
    "anti-diffusion": {"rounds": 1, "steps": 2, "prompt_steps": 2, "tuning_steps": 1, "sdl_weight": 1.0},
    "random-sign": {},
    "fsmg": SHORT["fsmg"] | {"tuning": "lora"},
    "aspl": SHORT["aspl"] | {"tuning": "lora", "steps": 3},
}
REFUSED = {
    "official": "expected Stable Diffusion 1, 2 or XL, whose maps of 16 x 16 positions",
    "simac": "expected a model with a UNet for its features",
    "diffusion-guard": "expected a model whose first step sees something of the picture",
}


@pytest.fixture(scope="module", params=["sd3", "flux-dev"])
def transformer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint(request.param, tmp_path_factory.mktemp("transformer"))))


@pytest.mark.parametrize("name", [name for name in JOINT if name not in REFUSED])
def test_transformers_are_protected_against(transformer: Surrogate, pixels: np.ndarray, name: str) -> None:
    one, before = canvas(pixels), [weight.clone() for weight in weights(transformer)]
    trace = run(replace(RECIPES[name], **JOINT[name]), transformer, one)  # type: ignore[type-var]
    assert 1 < one.delta.abs().max() <= 8 and one.delta.abs().mean() > 0.5
    assert all(math.isfinite(value) for values in trace.losses.values() for value in values)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(transformer), strict=True))
    assert not any(module._forward_pre_hooks for module in transformer.denoiser.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_for_transformers_is_refused(transformer: Surrogate, pixels: np.ndarray, name: str) -> None:
    one = canvas(pixels)
    with pytest.raises(ValueError, match=REFUSED[name]):
        run(RECIPES[name], transformer, one)
    assert not one.delta.any()


@pytest.mark.parametrize("name", RECIPES)
def test_low_memory_changes_memory_only(
    tiny: Surrogate, pixels: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antidiffusion.card.HELD_OUT_STEPS", 1)
    options = {**SHORT, "anti-diffusion": {"rounds": 1, "steps": 2, "prompt_steps": 1, "tuning_steps": 1}}
    options |= {"official": options["anti-diffusion"], "simac": SHORT["simac"] | {"tuning_steps": 1}}
    recipe, before = replace(RECIPES[name], **options.get(name, {})), tiny.sha256  # type: ignore[type-var]
    kept, lean = (protect([Picture(pixels)], recipe, surrogate=tiny, low_memory=flag)[0] for flag in (False, True))
    assert (kept.picture.pixels == lean.picture.pixels).mean() > 0.99
    card = json.loads(json.dumps(lean.card))
    assert card["recipe"]["name"] == name and card["recipe"]["budget"] == 8
    assert lean.card["model"]["sha256"] == before == type(tiny).sha256.func(tiny)  # type: ignore[attr-defined]


@pytest.fixture
def masked(here: Path) -> Path:
    mask = np.zeros((64, 70, 3), np.uint8)
    mask[10:50, 20:60] = 255
    Image.fromarray(mask).save("mask.png")
    return Path("photos/a.png")


@pytest.mark.parametrize("name", RECIPES)
def test_a_mask_and_luma_confine_the_perturbation(tiny: Surrogate, masked: Path, name: str) -> None:
    options = {**SHORT, "anti-diffusion": {"rounds": 0, "steps": 3, "prompt_steps": 0}}
    options["official"] = {"rounds": 1, "steps": 2, "prompt_steps": 0, "tuning_steps": 0}
    recipe = replace(RECIPES[name], **options.get(name, {}))  # type: ignore[type-var]
    (protected,) = protect([masked], recipe, surrogate=tiny, mask="mask.png", luma=True)
    moved = protected.picture.pixels.astype(int) - protected.original.pixels
    assert np.abs(moved[10:50, 20:60]).max() > 0 and (moved == moved[..., :1]).all()
    moved[10:50, 20:60] = 0
    assert not moved.any()
    assert protected.card["budget"]["luma"] and protected.card["budget"]["mask_share"] == pytest.approx(0.357, abs=1e-3)


def test_a_mask_that_does_not_fit(tiny: Surrogate, masked: Path) -> None:
    Image.new("L", (64, 64), 255).save("small.png")
    Image.new("L", (70, 64)).save("black.png")
    for name, message in (
        ("small.png", "a mask of 70 x 64 as the picture, got 64 x 64; resize the mask"),
        ("black.png", "a mask with white where the picture may change, got none; paint"),
    ):
        with pytest.raises(ValueError, match=message):
            protect([masked], "random-sign", surrogate=tiny, mask=name)
    with pytest.raises(PictureError, match=r"missing\.png"):
        protect([masked], "random-sign", surrogate=tiny, mask="missing.png")


def test_the_command_line_takes_mask_and_luma(loaded: Path, masked: Path) -> None:
    options = ("--recipe", "random-sign", "--mask", "mask.png", "--luma", "--json")
    result = cli("protect", masked, *options)
    assert result.code == 0, result.err
    assert json.loads(result.out)["budget"]["luma"] and json.loads(result.out)["budget"]["mask_share"] < 0.5
    assert cli("protect", masked, "--mask", "missing.png", "-o", "other").code == 2
