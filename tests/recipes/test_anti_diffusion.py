import copy
import hashlib
import math
from dataclasses import replace
from functools import partial
from typing import Any

import ascents
import numpy as np
import pytest
import torch
from ascents import PORTRAIT, run, seeded, slope
from torch import Tensor

from antidiffusion.card import effect
from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import silent
from antidiffusion.recipes import PERTURBATION, PROMPT, TUNING, AntiDiffusion, OfficialAntiDiffusion, RandomSign, Recipe
from antidiffusion.recipes.anti_diffusion import BALANCE_EVERY, DenoisingSemantic
from antidiffusion.recipes.semantic import SDL

UNET_SDL = [name for name in SDL if name != "mass"]
TINY = {"rounds": 1, "steps": 2, "prompt_steps": 1, "tuning_steps": 2}
canvas = partial(ascents.canvas, side=128)


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate.from_pretrained("mini")


def protect(recipe: Recipe, surrogate: Surrogate, seed: int = 0) -> Canvas:
    result = canvas()
    run(recipe, surrogate, result, seed=seed)
    return result


def sha256(surrogate: Surrogate) -> str:
    digest = hashlib.sha256()
    for module in surrogate.modules:
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@torch.no_grad()
def held_out(surrogate: Surrogate, x: Tensor, draws: int = 32) -> tuple[float, float]:
    """Return L_ldm of the untouched model on noise that no recipe saw, and the attention mass off the first token."""
    generator = seeded(999)
    z = surrogate.posterior(x).mean.expand(draws, -1, -1, -1)
    n, t = surrogate.draw(z, generator)
    with record_attention(surrogate, surrogate.map_layers()) as maps:
        loss = surrogate.denoising_loss(z, n, t, surrogate.embed([""]))
    return loss.mean().item(), 1 - mean_map(maps)[..., 0].mean().item()


def test_anti_diffusion_stays_in_its_budget_at_every_step_on_pictures_of_any_size(surrogate: Surrogate) -> None:
    pictures = [PORTRAIT, PORTRAIT[:, ::-1], PORTRAIT[:96, :70], np.kron(PORTRAIT, np.ones((2, 2, 1), np.uint8))]
    pictures += [PORTRAIT[..., :1], np.full((40, 90, 3), 255, np.uint8)]
    canvases = [canvas(pixels) for pixels in pictures]
    recipe = AntiDiffusion(budget=2.5, step_size=2, **TINY)

    def inside(stage: str, done: int, total: int) -> None:
        for one in canvases:
            moved = one.clean + one.delta
            assert one.delta.abs().max() <= 2.5
            assert moved.min() >= 0
            assert moved.max() <= 255

    run(recipe, surrogate, *canvases, progress=inside)
    assert len({one.size for one in canvases}) > 2
    for one, pixels in zip(canvases, pictures, strict=True):
        written = one.pixels(Linf(2.5))
        assert written.shape == pixels.shape
        assert np.abs(written.astype(int) - pixels).max() == 2


def test_the_perturbation_of_a_grey_picture_is_grey(surrogate: Surrogate) -> None:
    grey = canvas(PORTRAIT[..., :1])
    run(AntiDiffusion(**TINY), surrogate, grey)
    assert grey.delta.shape == (1, 1, 128, 128)
    assert held_out(surrogate, grey.view())[0] > held_out(surrogate, grey.clean_view)[0]


@pytest.mark.parametrize(
    "recipe", [AntiDiffusion(**TINY), replace(OfficialAntiDiffusion(), **TINY), RandomSign()], ids=repr
)
def test_the_seed_decides_every_byte(surrogate: Surrogate, recipe: Recipe) -> None:
    torch.manual_seed(0)
    first = protect(recipe, surrogate).delta
    torch.manual_seed(1)  # the global generator has no say
    assert torch.equal(protect(recipe, surrogate).delta, first)
    assert not torch.equal(protect(recipe, surrogate, seed=1).delta, first)


class Interrupt:
    """Presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("after", [None, 1, 2, 4, 6], ids=["whole", "prompt", "first", "tuning", "second"])
def test_the_model_comes_back_bit_for_bit(surrogate: Surrogate, tuning: str, after: int | None) -> None:
    before, processors = sha256(surrogate), surrogate.denoiser.attn_processors
    recipe = AntiDiffusion(tuning=tuning, **TINY)
    if after is None:
        protect(recipe, surrogate)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, surrogate, canvas(), progress=Interrupt(after))
    assert sha256(surrogate) == before
    assert surrogate.denoiser.attn_processors == processors
    assert not any(
        weight.requires_grad or weight.grad is not None for m in surrogate.modules for weight in m.parameters()
    )
    assert not any("lora" in name for name, _ in surrogate.denoiser.named_modules())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_tuning_moves_the_weights_that_the_perturbation_then_meets(surrogate: Surrogate, tuning: str) -> None:
    unet = surrogate.denoiser
    before = {name.replace(".base_layer", ""): weight.clone() for name, weight in unet.named_parameters()}
    moved: set[str] = set()

    def look(stage: str, done: int, total: int) -> None:
        if done == total:
            for name, weight in unet.named_parameters():
                if "lora_A" not in name and not torch.equal(
                    weight, before.get(name.replace(".base_layer", ""), weight * 0)
                ):
                    moved.add(name)

    run(AntiDiffusion(tuning=tuning, **TINY), surrogate, canvas(), progress=look)
    if tuning == "lora":
        assert moved == {f"{name}" for name in moved if "lora_B" in name}
        assert len(moved) == 2 * 4 * sum(".attn2." in name for name in unet.attn_processors)
    else:
        assert moved == set(before)


def test_weights_that_are_not_tuned_may_be_of_any_precision() -> None:
    half = Surrogate.from_pretrained("mini", dtype=torch.bfloat16)
    target = canvas()
    with pytest.raises(ValueError, match="expected float32 weights for full tuning"):
        AntiDiffusion(**TINY, tuning="full")([target], half, seeded(), silent)
    recipe = AntiDiffusion(**TINY | {"tuning_steps": 0}, tuning="full")
    recipe([target], half, seeded(), silent)
    assert 0 < target.delta.abs().max() <= 8


@pytest.mark.parametrize("cut", [{"rounds": 0}, {"tuning_steps": 0}, {"prompt_steps": 0}, {"sdl_weight": 0.0}], ids=str)
@pytest.mark.parametrize("kind", [AntiDiffusion, OfficialAntiDiffusion])
def test_progress_counts_every_step_of_every_stage(surrogate: Surrogate, kind: Any, cut: dict[str, Any]) -> None:
    recipe = kind(**{**TINY, **cut})
    seen: list[tuple[str, int, int]] = []
    trace = run(recipe, surrogate, canvas(), progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(1, trace.total + 1))
    assert {total for *_, total in seen} == {trace.total}
    expected = {
        PROMPT: recipe.prompt_steps * max(1, recipe.rounds),
        PERTURBATION: recipe.steps * (1 + recipe.rounds),
        TUNING: recipe.tuning_steps * recipe.rounds,
    }
    assert {stage: len(values) for stage, values in trace.losses.items()} == {k: v for k, v in expected.items() if v}
    assert all(math.isfinite(value) for values in trace.losses.values() for value in values)


def test_protection_raises_the_denoising_loss_far_above_random_noise(surrogate: Surrogate) -> None:
    recipe = AntiDiffusion(rounds=1, steps=10, step_size=1, prompt_steps=4, tuning_steps=3)
    clean, random, protected = (
        held_out(surrogate, x)[0]
        for x in (
            canvas().view(),
            protect(RandomSign(recipe.budget), surrogate).view(),
            protect(recipe, surrogate).view(),
        )
    )
    # 0.061, 0.062 and 0.119 on the author's machine
    assert random < 1.2 * clean
    assert protected > 1.7 * random


@pytest.mark.parametrize("sdl", UNET_SDL)
def test_the_semantic_term_moves_attention_that_the_denoising_loss_alone_does_not(
    surrogate: Surrogate, sdl: str
) -> None:
    recipe = AntiDiffusion(rounds=0, steps=10, prompt_steps=0, sdl=sdl)
    without, full = (protect(replace(recipe, sdl_weight=weight), surrogate).view() for weight in (0, 10))
    moved = [effect(surrogate, canvas().view(), view, seed=0)["attention_mass_moved"] for view in (without, full)]
    assert moved[1] > 1.5 * moved[0]  # 2.1, 2.5 and 2.4 times on the author's machine
    if sdl == "semantic":
        assert held_out(surrogate, full)[1] < held_out(surrogate, without)[1]


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.mark.parametrize("name", UNET_SDL)
def test_ascent_moves_the_surrogate_s_attention(tiny: Surrogate, x: Tensor, embedding: Embedding, name: str) -> None:
    """Steps on the picture, at one draw of the noise, raise SDL."""

    def disturbance(picture: Tensor) -> Tensor:
        generator = seeded()
        z = tiny.encode(picture, generator)
        n, t = tiny.draw(z, generator)
        recorded = []
        for latent in (z, tiny.posterior(x).mean):
            with record_attention(tiny, tiny.map_layers()) as found:
                tiny.denoising_loss(latent, n, t, embedding)
            recorded.append(mean_map(found))
        return SDL[name](*recorded)

    objective = DenoisingSemantic(tiny, embedding, weight=1e3, sdl=name, clean=x)
    moved = x.clone()
    for _ in range(4):
        moved = (moved + 2 / 255 * slope(objective, moved).sign()).clamp(0, 1)
    with torch.no_grad():
        assert (disturbance(moved) > disturbance(x)).all()


@pytest.mark.parametrize("weight", [0.5, 3.0])
@pytest.mark.parametrize("name", UNET_SDL)
def test_the_two_gradients_are_balanced_at_the_latent(
    tiny: Surrogate, x: Tensor, embedding: Embedding, name: str, weight: float
) -> None:
    fixed = copy.copy(tiny)
    z = tiny.encode(x, seeded(7)).detach()
    fixed.encode = lambda latent, generator: latent
    plain = slope(DenoisingSemantic(fixed, embedding, weight=0), z)
    objective = DenoisingSemantic(fixed, embedding, weight=weight, sdl=name, clean=x)
    both = slope(objective, z)
    term, norm = (both - plain).flatten(1).norm(dim=1), plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(term, weight * norm, rtol=1e-3, atol=0)
    first = objective.ratio
    for seed in range(1, BALANCE_EVERY):
        slope(objective, z, seed=seed)
        assert torch.equal(objective.ratio, first)
    slope(objective, z, seed=BALANCE_EVERY)
    alone = DenoisingSemantic(fixed, embedding, weight=weight, sdl=name, clean=x)
    slope(alone, z, seed=BALANCE_EVERY)
    torch.testing.assert_close(objective.ratio, (first * alone.ratio).sqrt())


def test_weight_zero_is_the_denoising_loss(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator = seeded()
    z = tiny.encode(x, generator)
    expected = tiny.denoising_loss(z, *tiny.draw(z, generator), embedding)
    assert torch.equal(DenoisingSemantic(tiny, embedding, weight=0)(x, seeded()), expected)
    weighted = DenoisingSemantic(tiny, embedding, weight=1)(x, seeded())
    assert (weighted > expected).all()


def test_the_clean_answer_is_the_answer_for_the_clean_picture(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator, protected = seeded(), (x + 0.05).clamp(0, 1)
    z = tiny.encode(protected, generator)
    n, t = tiny.draw(z, generator)
    answers = [tiny.predict(noised(tiny.schedule, a, n, t), t, embedding) for a in (z, tiny.posterior(x).mean)]
    expected = (answers[0] - answers[1]).square().mean((1, 2, 3))
    for weight in (0.0, 1.0):
        objective = DenoisingSemantic(tiny, embedding, weight, "divergence", x, noise_weight=0, clean_weight=1)
        value = objective(protected, seeded())
        if not weight:
            torch.testing.assert_close(value, expected)
        assert (value >= expected * (1 - 1e-5)).all()
        assert not torch.equal(slope(objective, protected), torch.zeros_like(x))
    both = DenoisingSemantic(tiny, embedding, 0.0, clean=x, noise_weight=0.5, clean_weight=1)(protected, seeded())
    torch.testing.assert_close(both, expected + DenoisingSemantic(tiny, embedding, 0.0)(protected, seeded()) / 2)


def test_settings_that_make_no_sense_are_refused(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    for options, fragment in (
        ({"sdl": "one"}, "expected sdl of zero, semantic, divergence, entropy, mass, got 'one'"),
        ({"noise_weight": 0.0}, "expected noise_weight and clean_weight of at least 0, not both 0"),
        ({"noise_weight": -1.0, "clean_weight": 1.0}, "expected noise_weight and clean_weight of at least 0"),
        ({"clean_weight": 1.0}, "expected the clean pictures for clean_weight, got None"),
    ):
        with pytest.raises(ValueError, match=fragment):
            DenoisingSemantic(tiny, embedding, **options)


def test_an_objective_is_deterministic_and_restores_the_unet(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    before = tiny.denoiser.attn_processors
    first, second = (slope(DenoisingSemantic(tiny, embedding, sdl="divergence", clean=x), x) for _ in range(2))
    assert torch.equal(first, second) and tiny.denoiser.attn_processors == before
    assert all(parameter.grad is None for parameter in tiny.denoiser.parameters())


@pytest.mark.parametrize("sdl", [name for name in SDL if name != "semantic"])
def test_transformers_attention_moves_with_the_weight(joint: Surrogate, x: Tensor, sdl: str) -> None:
    told = joint.embed(["a photo"])
    plain, weighted = (DenoisingSemantic(joint, told, weight, sdl, x) for weight in (0.0, 1.0))
    with torch.no_grad():
        for recorded in weighted._answer(joint.posterior(x).mean, *_at(joint, x))[1:]:
            assert recorded is not None and 0 < recorded.sum(2).max() < 1  # the rest is on the picture
    first, second = slope(plain, (x + 0.02).clamp(0, 1)), slope(weighted, (x + 0.02).clamp(0, 1))
    assert second.isfinite().all() and (first.sign() != second.sign()).float().mean() > 0.05


def _at(surrogate: Surrogate, x: Tensor) -> tuple[Tensor, Tensor]:
    z = surrogate.posterior(x).mean
    return surrogate.draw(z, seeded())
