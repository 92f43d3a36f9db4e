import copy
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import ascents
import pytest
import torch
from ascents import PORTRAIT, run, seeded, slope
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from reference_official import attention_loss, cross_attention, protect_official
from torch import Tensor

from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import VP, noised
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes import RECIPES, OfficialAntiDiffusion, Recipe
from antidiffusion.recipes.official import Official

SHORT = {"rounds": 1, "steps": 4, "prompt_steps": 4, "tuning_steps": 3}
canvas = partial(ascents.canvas, side=128)


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate.from_pretrained("mini")


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


def protect(recipe: Recipe, surrogate: Surrogate, seed: int = 0) -> Canvas:
    result = canvas()
    run(recipe, surrogate, result, seed=seed)
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def ddim(surrogate: Surrogate) -> DDIMScheduler:
    return DDIMScheduler.from_config(dict(surrogate.schedule.scheduler))


def reference(surrogate: Surrogate, **options: Any) -> Tensor:
    """Return the perturbation of the independent implementation, in 1/255 units."""
    x = torch.from_numpy(PORTRAIT).permute(2, 0, 1)[None] / 127.5 - 1
    (encoder,), (tokenizer,) = surrogate.text_encoders, surrogate.tokenizers
    return (
        protect_official(surrogate.vae, surrogate.denoiser, encoder, tokenizer, ddim(surrogate), x, **options) - x
    ) * 127.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_official_equals_an_independent_implementation(surrogate: Surrogate, prediction: str) -> None:
    schedule = VP({**surrogate.schedule.scheduler, "prediction_type": prediction})
    surrogate = replace(surrogate, schedule=schedule)
    # a hundred times the released code's learning rate, so that wrong tuning would show
    recipe = replace(OfficialAntiDiffusion(), **SHORT, learning_rate=5e-5)
    expected = reference(surrogate, **SHORT, learning_rate=5e-5)
    assert correlation(protect(recipe, surrogate, seed=42).delta, expected) > 0.999  # 1.000000 on the author's machine


def test_the_attention_term_of_official_equals_the_reference(surrogate: Surrogate) -> None:
    # Compared alone, on sharpened attention: as trained, every token holds more than 1 % and the term is constant.
    sharp = replace(surrogate, denoiser=deepcopy(surrogate.denoiser))
    for name, module in sharp.denoiser.named_modules():
        if name.endswith("attn2.to_q"):
            module.weight.mul_(20)
    x, embedding = canvas().view(), surrogate.embed(["a photo of a woman with red hair"])
    with torch.no_grad():
        without, whole = (Official(sharp, embedding, weight)(x, seeded(3)).item() for weight in (0.0, 1.0))
        sharp.denoiser.set_attn_processor(AttnProcessor())
        generator = seeded(3)
        z = sharp.encode(x, generator)
        n, t = sharp.draw(z, generator)
        with cross_attention(sharp.denoiser) as maps:
            sharp.denoiser(noised(sharp.schedule, z, n, t), t, encoder_hidden_states=embedding.tokens)
    expected = attention_loss(maps).item()
    assert 0.1 < expected < 0.9
    assert without - whole == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_official_equals_an_independent_implementation_over_the_whole_schedule(surrogate: Surrogate) -> None:
    delta = protect(RECIPES["official"], surrogate, seed=42).delta
    assert correlation(delta, reference(surrogate)) > 0.99  # 0.999997 on the author's machine
    assert delta.abs().max() <= 7.65 + 1e-4


@pytest.mark.parametrize(("rounds", "steps"), [(0, 3), (2, 6)])
def test_official_drifts_by_one_ball_a_round(surrogate: Surrogate, rounds: int, steps: int) -> None:
    recipe = OfficialAntiDiffusion(rounds=rounds, steps=steps, prompt_steps=0, tuning_steps=0)
    bound = (1 + rounds) * min(steps * 2e-3, 1e-2) * 255 / 2
    largest = protect(recipe, surrogate).delta.abs().max().item()
    assert largest == pytest.approx(bound, abs=1e-4)


def test_the_budget_of_official_holds_whatever_the_rounds_add_up_to(surrogate: Surrogate) -> None:
    recipe = OfficialAntiDiffusion(budget=2, rounds=2, steps=5, prompt_steps=0, tuning_steps=0)
    assert protect(recipe, surrogate).delta.abs().max().item() == 2


@pytest.mark.parametrize("sharpness", [0.0, 100.0])
def test_official_gives_no_gradient_to_tokens_above_one_percent(
    tiny: Surrogate, x: Tensor, embedding: Embedding, sharpness: float
) -> None:
    surrogate = copy.copy(tiny)
    surrogate.denoiser = deepcopy(tiny.denoiser)
    for name, layer in surrogate.denoiser.named_modules():
        if name.endswith("attn2.to_q"):
            layer.weight.mul_(sharpness)  # 0: uniform maps, 3 % a token
    plain, full = (Official(surrogate, embedding, weight, positions=16) for weight in (0.0, 1.0))
    same = torch.equal(slope(plain, x), slope(full, x))
    assert same == (sharpness == 0)
    if same:
        torch.testing.assert_close(plain(x, seeded()) - full(x, seeded()), torch.ones(2))


def test_official_is_the_released_formula(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator = seeded()
    z = tiny.encode(x, generator)
    n, t = tiny.draw(z, generator)
    with record_attention(tiny, [name for name in tiny.cross_layers() if not name.startswith("mid")]) as found:
        output = tiny.predict(noised(tiny.schedule, z, n, t), t, embedding)
    halves = [layer[:, layer.shape[1] // 2 :].mean(1) for layer in found if layer.shape[2] == 16]
    term = (100 * torch.stack(halves).mean(0)).clamp(0, 1).square().mean((1, 2))
    expected = (output - n).square().mean((1, 2, 3)) - 0.3 * term
    torch.testing.assert_close(Official(tiny, embedding, 0.3, positions=16)(x, seeded()), expected)


def test_official_is_the_denoising_loss_where_no_layer_has_its_positions(surrogate: Surrogate, x: Tensor) -> None:
    embedding, generator = surrogate.embed([""]), seeded()
    z = surrogate.encode(x, generator)
    expected = surrogate.denoising_loss(z, *surrogate.draw(z, generator), embedding)
    torch.testing.assert_close(Official(surrogate, embedding)(x, seeded()), expected)  # at most 8 x 8 at 64 pixels
