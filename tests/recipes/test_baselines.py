import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from antidiffusion.objectives.denoising import Denoising
from antidiffusion.objectives.editing import EditTarget
from antidiffusion.objectives.feature import DenoisingFeature
from antidiffusion.objectives.first_step import FirstStepNoise
from antidiffusion.objectives.latent import Fused, LatentTarget
from command_line import cli
from PIL import Image
from torch import Generator, Tensor

import antidiffusion.card
import antidiffusion.recipes.simac
from antidiffusion import Picture, protect
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.picture import PictureError
from antidiffusion.recipes import (
    ASPL,
    FSMG,
    PERTURBATION,
    RECIPES,
    DiffusionGuard,
    Mist,
    PhotoGuard,
    Recipe,
    SimAC,
    Trace,
)
from antidiffusion.recipes.anti_dreambooth import learner
from antidiffusion.recipes.ascent import scatter
from antidiffusion.recipes.base import climb
from antidiffusion.recipes.mist import LATENT, pattern
from antidiffusion.recipes.simac import SELECTION

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
}
PORTRAIT = np.array(Image.open(Path(__file__).parents[1] / "data/portrait.png").convert("RGB"))
GREY = torch.full((1, 3, 128, 128), 0.5)


def silent(stage: str, done: int, total: int) -> None:
    pass


def short(name: str, **options: Any) -> Any:
    return replace(RECIPES[name], **{**SHORT[name], **options})  # type: ignore[type-var]


def canvas(pixels: np.ndarray, side: int = 64) -> Canvas:
    return Canvas(pixels, view_size(*pixels.shape[:2], side=side, multiple=32))


def run(
    recipe: Recipe,
    surrogate: Surrogate,
    *canvases: Canvas,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = silent,
) -> Trace:
    return recipe(canvases, surrogate, Generator().manual_seed(seed), progress)


def weights(surrogate: Surrogate) -> list[Tensor]:
    return [weight for module in surrogate.modules for weight in module.parameters()]


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
    assert not any(module._forward_hooks for module in surrogate.unet.modules())


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


@pytest.mark.parametrize("name", SHORT)
def test_a_card_names_the_recipe(
    tiny: Surrogate, pixels: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 1)
    (protected,) = protect([Picture(pixels)], short(name), surrogate=tiny)
    card = json.loads(json.dumps(protected.card))
    assert card["recipe"]["name"] == name and card["recipe"]["budget"] == 8


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
    generator = Generator()

    @torch.no_grad()
    def mean(x: Tensor) -> float:
        generator.manual_seed(999)
        return sum(objective(x, generator).item() for _ in range(3)) / 3

    rise = mean(one.view()) - mean(one.clean_view)
    random = canvas(PORTRAIT, side=128)
    run(RECIPES["random-sign"], mini, random)
    assert rise > 0 and rise > 2 * (mean(random.view()) - mean(one.clean_view))


def test_a_random_start_fills_the_budget_and_decides_the_rest(tiny: Surrogate, pixels: np.ndarray) -> None:
    one = canvas(np.full((64, 64, 3), 128, np.uint8))
    scatter([one], Linf(4), Generator().manual_seed(0))
    assert 3.9 < one.delta.abs().max() <= 4 and abs(one.delta.mean()) < 0.1
    assert one.delta.abs().mean() == pytest.approx(2, abs=0.05)
    still = replace(PhotoGuard(), steps=1, step_size=0)
    run(still, tiny, one, seed=3)
    assert one.delta.std() > 4


def test_a_decaying_step_ends_at_a_hundredth() -> None:
    reached: list[float] = []
    one = canvas(np.full((64, 64, 3), 128, np.uint8))

    def look(stage: str, done: int, total: int) -> None:
        reached.append(one.delta.mean().item())

    def brightness(x: Tensor, generator: Generator) -> Tensor:
        return x.sum((1, 2, 3))

    for decay, last in ((True, 1 - 0.99 * 0.75), (False, 1)):
        reached.clear()
        one.delta.zero_()
        recipe = PhotoGuard(budget=64, steps=4, step_size=1)
        climb(recipe, lambda clean: brightness, [one], Generator(), look, decay=decay)
        assert reached[0] == pytest.approx(1)
        assert reached[-1] - reached[-2] == pytest.approx(last, abs=1e-5)


def test_one_round_of_aspl_is_fsmg(tiny: Surrogate, pixels: np.ndarray) -> None:
    fsmg, aspl, untuned = (canvas(pixels) for _ in range(3))
    run(FSMG(steps=1, tuning_steps=1), tiny, fsmg)
    run(ASPL(rounds=1, steps=1, tuning_steps=1), tiny, aspl)
    run(FSMG(steps=1, tuning_steps=0), tiny, untuned)
    assert torch.equal(fsmg.delta, aspl.delta) and not torch.equal(fsmg.delta, untuned.delta)


def test_aspl_drops_the_copy_tuned_on_clean_pictures(tiny: Surrogate, pixels: np.ndarray) -> None:
    """AdamW's first step moves every weight by the learning rate: after a round it is one such step, not two."""
    before = [weight.clone() for weight in tiny.unet.parameters()]
    moved: list[float] = []

    def look(stage: str, done: int, total: int) -> None:
        pairs = zip(before, tiny.unet.parameters(), strict=True)
        moved.append(max((new - old).abs().max().item() for old, new in pairs) / 1e-4)

    run(
        ASPL(rounds=2, steps=1, tuning_steps=1, tuning="full"),
        replace(tiny, learning_rate=1e-4),
        canvas(pixels),
        progress=look,
    )
    # tuned copy, perturbation, tuned itself, second round's copy on top, perturbation, tuned itself
    assert [round(value) for value in moved] == [1, 1, 1, 2, 2, 2]
    assert moved[2] < 1.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_full_tuning_includes_the_text_encoder(tiny: Surrogate, method: str) -> None:
    text = list(tiny.text_encoders[0].parameters())
    before = [weight.clone() for weight in text]
    with learner(tiny, method) as (tuned, _):
        found = {id(weight) for weight in tuned}
        assert all(id(weight) in found for weight in text) == (method == "full")
        if method == "full":
            text[0].data += 1
    assert all(torch.equal(a, b) for a, b in zip(before, text, strict=True))


def test_the_tuned_text_encoder_embeds_the_prompt_of_the_ascent(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = replace(tiny, learning_rate=1e-2)
    seen: list[Tensor] = []
    loss = Surrogate.denoising_loss

    def watched(self: Surrogate, z: Tensor, n: Tensor, t: Tensor, embedding: Any) -> Tensor:
        if not embedding.tokens.requires_grad:
            seen.append(embedding.tokens)
        return loss(self, z, n, t, embedding)

    monkeypatch.setattr(Surrogate, "denoising_loss", watched)
    run(ASPL(rounds=2, steps=1, tuning_steps=1), fast, canvas(pixels))
    untuned = tiny.embed(["a photo of sks person"]).tokens
    assert len(seen) == 2 and not any(torch.equal(tokens, untuned) for tokens in seen)
    assert not torch.equal(*seen)


def test_simac_keeps_the_steps_with_large_gradients(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def falling(objective: DenoisingFeature, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        asked.append(int(objective.steps[0]))
        return torch.full_like(x, 1000 - asked[-1]), torch.tensor([1000.0 - asked[-1]])

    monkeypatch.setattr(antidiffusion.recipes.simac, "gradient", falling)
    recipe, left, one = SimAC(), torch.ones(1000, dtype=torch.bool), canvas(pixels)
    losses = list(recipe._search(left, one, tiny, tiny.embed([""]), Generator().manual_seed(0)))
    kept = left.nonzero()[:, 0]
    assert 60 <= len(kept) <= 100 and kept.float().mean() < 200
    assert (900 / 40) <= len(losses) < 50
    assert losses[0] == 1000 - min(asked[:5]) and asked[5] == min(asked[:5])
    assert one.delta.abs().max() == 0  # the trial copy moves, the picture does not


def test_simac_perturbs_at_the_chosen_steps_only(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Sequence[Tensor]] = []

    def watched(*arguments: Any, **options: Any) -> DenoisingFeature:
        objective = DenoisingFeature(*arguments, **options)
        if objective.weight:
            built.append(objective.steps)
        return objective

    monkeypatch.setattr(antidiffusion.recipes.simac, "DenoisingFeature", watched)
    recipe = short("simac")
    trace = run(recipe, tiny, canvas(pixels), canvas(pixels))
    ((first, second),) = built
    assert 940 <= len(first) <= 980 and 940 <= len(second) <= 980 and not torch.equal(first, second)
    assert {stage: len(values) for stage, values in trace.losses.items()} == {SELECTION: 2, PERTURBATION: 1}


def test_the_total_follows_a_search_that_ends_early(tiny: Surrogate, pixels: np.ndarray) -> None:
    recipe = short("simac", neighbourhood=480)
    totals: list[int] = []
    run(
        replace(recipe, selection_steps=30),
        tiny,
        canvas(pixels),
        progress=lambda stage, done, total: totals.append(total),
    )
    assert totals[0] > totals[-1] == len(totals)


def test_mist_pulls_towards_a_pattern_of_black_and_white() -> None:
    target = pattern(64, 96)
    assert target.shape == (1, 3, 64, 96) and set(target.unique().tolist()) == {0, 1}
    assert target.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (target[..., 1:] != target[..., :-1]).float().mean() > 0.2
    assert Mist().rate == LATENT / 1.6384


@pytest.fixture
def masked(here: Path) -> Path:
    mask = np.zeros((64, 70, 3), np.uint8)
    mask[10:50, 20:60] = 255
    Image.fromarray(mask).save("mask.png")
    return Path("photos/a.png")


def test_a_mask_confines_the_perturbation(tiny: Surrogate, masked: Path) -> None:
    (protected,) = protect([masked], DiffusionGuard(steps=3, mask="mask.png"), surrogate=tiny)
    moved = np.abs(protected.picture.pixels.astype(int) - protected.original.pixels).max(-1)
    assert moved[20:40, 30:50].max() > 0
    outside = moved.copy()
    outside[8:52, 18:62] = 0  # the view's filter is two pixels wide
    assert outside.max() == 0


def test_a_mask_that_does_not_fit(tiny: Surrogate, masked: Path) -> None:
    Image.new("L", (64, 64), 255).save("small.png")
    Image.new("L", (70, 64)).save("black.png")
    for name, message in (
        ("small.png", "a mask of 70 x 64 as the picture, got 64 x 64; resize small.png"),
        ("black.png", "a mask with white on what to keep, got none in black.png; paint"),
    ):
        with pytest.raises(ValueError, match=message):
            protect([masked], DiffusionGuard(mask=name), surrogate=tiny)
    with pytest.raises(PictureError, match=r"missing\.png"):
        protect([masked], DiffusionGuard(mask="missing.png"), surrogate=tiny)


@pytest.mark.parametrize("name", ["advdm", "mist"])
def test_the_command_line_runs_a_baseline(loaded: Path, name: str) -> None:
    result = cli("protect", "photos", "--recipe", name, "--steps", "1", "--together", "--format", "json")
    assert result.code == 0, result.err
    cards = [json.loads(line) for line in result.out.splitlines()]
    assert [card["recipe"]["name"] for card in cards] == [name] * 2
    assert all(1 <= card["budget"]["measured"] <= 8 for card in cards)


@pytest.mark.parametrize("option", [["--rounds", "2"], ["--low-memory"], ["--tuning", "lora"]])
def test_options_that_a_baseline_lacks(unused: Path, option: list[str]) -> None:
    result = cli("protect", "photos", "--recipe", "advdm", *option)
    assert result.code == 2
    assert f"expected options of the recipe advdm, got {option[0]}; leave it out" in result.err
