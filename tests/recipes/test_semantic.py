import copy

import pytest
import torch
from antidiffusion.objectives.semantic import (
    BALANCE_EVERY,
    SDL,
    DenoisingSemantic,
    Official,
    divergence,
    semantic,
    zero,
)
from torch import Generator, Tensor

from antidiffusion.models.attention import coarsest_layers, cross_attention_layers, mean_map, record_attention
from antidiffusion.models.base import Embedding, Surrogate

TOKENS = 32


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def maps(seed: int = 0, sharpness: float = 2.0) -> Tensor:
    return (sharpness * torch.randn(2, 16, TOKENS, generator=seeded(seed))).softmax(-1)


def slope(objective, x: Tensor, seed: int = 0) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, seeded(seed)).sum(), leaf)[0]


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


MOVES = {  # what raising a variant does to the map
    "zero": lambda now, before: (
        (now.square().sum() < before.square().sum()) & (now.amax(-1).sum() < before.amax(-1).sum())
    ),
    "semantic": lambda now, before: now[..., 0].mean() > before[..., 0].mean(),
    "divergence": lambda now, before: (now - maps(1)).abs().sum() > (before - maps(1)).abs().sum(),
}


@pytest.mark.parametrize("name", SDL)
def test_raising_a_variant_moves_the_mass_as_it_says(name: str) -> None:
    logits = maps().log().requires_grad_()
    value = SDL[name](logits.softmax(-1), maps(1))
    assert value.shape == (2,)
    (direction,) = torch.autograd.grad(value.sum(), logits)
    now = (logits + 5 * direction).softmax(-1)
    assert (SDL[name](now, maps(1)) > value).all() and MOVES[name](now, maps())


def test_known_values() -> None:
    uniform, peaked = torch.full((2, 16, TOKENS), 1 / TOKENS), torch.eye(TOKENS)[:16].expand(2, -1, -1)
    torch.testing.assert_close(zero(uniform, None), torch.full((2,), -1 / TOKENS))
    torch.testing.assert_close(zero(peaked, None), torch.full((2,), -1.0))
    torch.testing.assert_close(semantic(uniform, None), torch.full((2,), 1 / TOKENS))
    torch.testing.assert_close(semantic(peaked, None), torch.full((2,), 1 / 16))
    assert torch.equal(divergence(maps(), maps()), torch.zeros(2))
    torch.testing.assert_close(divergence(peaked, peaked.roll(1, -1)), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected the clean picture's attention, got None; give"):
        divergence(maps(), None)


@pytest.mark.parametrize("name", SDL)
def test_ascent_moves_the_surrogate_s_attention(tiny: Surrogate, x: Tensor, embedding: Embedding, name: str) -> None:
    """Steps on the picture, at one draw of the noise, raise SDL."""

    def disturbance(picture: Tensor) -> Tensor:
        generator = seeded()
        z = tiny.encode(picture, generator)
        n, t = tiny.draw(z, generator)
        recorded = []
        for latent in (z, tiny.posterior(x).mean):
            with record_attention(tiny.unet, coarsest_layers(tiny.unet)) as found:
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
@pytest.mark.parametrize("name", SDL)
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
    assert torch.equal(Official(tiny, embedding, weight=0)(x, seeded()), expected)
    weighted = DenoisingSemantic(tiny, embedding, weight=1)(x, seeded())
    assert (weighted > expected).all()


def test_the_clean_answer_is_the_answer_for_the_clean_picture(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator, protected = seeded(), (x + 0.05).clamp(0, 1)
    z = tiny.encode(protected, generator)
    n, t = tiny.draw(z, generator)
    answers = [tiny.predict(tiny.schedule.add_noise(a, n, t), t, embedding) for a in (z, tiny.posterior(x).mean)]
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
        ({"sdl": "one"}, "expected sdl of zero, semantic, divergence, got 'one'"),
        ({"noise_weight": 0.0}, "expected noise_weight and clean_weight of at least 0, not both 0"),
        ({"noise_weight": -1.0, "clean_weight": 1.0}, "expected noise_weight and clean_weight of at least 0"),
        ({"clean_weight": 1.0}, "expected the clean pictures for clean_weight, got None"),
    ):
        with pytest.raises(ValueError, match=fragment):
            DenoisingSemantic(tiny, embedding, **options)


def test_an_objective_is_deterministic_and_restores_the_unet(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    before = tiny.unet.attn_processors
    first, second = (slope(DenoisingSemantic(tiny, embedding, sdl="divergence", clean=x), x) for _ in range(2))
    assert torch.equal(first, second) and tiny.unet.attn_processors == before
    assert all(parameter.grad is None for parameter in tiny.unet.parameters())


@pytest.mark.parametrize("sharpness", [0.0, 100.0])
def test_official_gives_no_gradient_to_tokens_above_one_percent(
    tiny: Surrogate, x: Tensor, embedding: Embedding, sharpness: float
) -> None:
    surrogate = copy.copy(tiny)
    surrogate.unet = copy.deepcopy(tiny.unet)
    for name, layer in surrogate.unet.named_modules():
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
    with record_attention(tiny.unet, cross_attention_layers(tiny.unet)) as found:
        output = tiny.predict(tiny.schedule.add_noise(z, n, t), t, embedding)
    halves = [layer[:, layer.shape[1] // 2 :].mean(1) for layer in found if layer.shape[2] == 16]
    term = (100 * torch.stack(halves).mean(0)).clamp(0, 1).square().mean((1, 2))
    expected = (output - n).square().mean((1, 2, 3)) - 0.3 * term
    torch.testing.assert_close(Official(tiny, embedding, 0.3, positions=16)(x, seeded()), expected)


def test_official_is_the_denoising_loss_where_no_layer_has_its_positions(surrogate: Surrogate, x: Tensor) -> None:
    embedding, generator = surrogate.embed([""]), seeded()
    z = surrogate.encode(x, generator)
    expected = surrogate.denoising_loss(z, *surrogate.draw(z, generator), embedding)
    torch.testing.assert_close(Official(surrogate, embedding)(x, seeded()), expected)  # at most 8 x 8 at 64 pixels
