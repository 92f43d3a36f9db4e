import math

import pytest
import torch
from ascents import seeded
from torch import Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.recipes.semantic import SDL, divergence, entropy, mass, semantic, variant, zero

TOKENS = 32


def maps(seed: int = 0, sharpness: float = 2.0) -> Tensor:
    return (sharpness * torch.randn(2, 16, TOKENS, generator=seeded(seed))).softmax(-1)


JOINT = [0.7 * maps(seed) for seed in (0, 1)]  # 30 % of the mass is on the picture
MOVES = {  # what raising a variant does to the map
    "zero": lambda now, before, clean: (
        (now.square().sum() < before.square().sum()) & (now.amax(-1).sum() < before.amax(-1).sum())
    ),
    "semantic": lambda now, before, clean: now[..., 0].mean() > before[..., 0].mean(),
    "divergence": lambda now, before, clean: (now - clean).abs().sum() > (before - clean).abs().sum(),
    "entropy": lambda now, before, clean: (now / now.sum(-1, keepdim=True)).amax(-1).sum() < maps().amax(-1).sum(),
    "mass": lambda now, before, clean: now.sum() < before.sum(),
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", SDL)
def test_raising_a_variant_moves_the_mass_as_it_says(name: str, joint: bool) -> None:
    if name == "mass" and not joint:
        pytest.skip("a row that is all on the text stays there")
    before, clean = JOINT if joint else (maps(0), maps(1))
    picture = 1 - before.sum(-1, keepdim=True) if joint else before.new_zeros(2, 16, 1)
    logits = torch.cat([before, picture], -1).log().requires_grad_()
    value = SDL[name](logits.softmax(-1)[..., :-1], clean)
    assert value.shape == (2,)
    (direction,) = torch.autograd.grad(value.sum(), logits)
    now = (logits + 5 * direction.nan_to_num()).softmax(-1)[..., :-1]
    assert (SDL[name](now, clean) > value).all() and MOVES[name](now, before, clean)


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


def test_known_values_of_joint_maps() -> None:
    even, nothing = torch.full((2, 16, TOKENS), 0.5 / TOKENS), torch.zeros(2, 16, TOKENS)
    torch.testing.assert_close(mass(even, None), torch.full((2,), -0.5))
    torch.testing.assert_close(entropy(even, None), torch.full((2,), math.log(TOKENS)))
    torch.testing.assert_close(entropy(torch.eye(TOKENS)[:16].expand(2, -1, -1) / 3, None), torch.zeros(2))
    assert torch.equal(entropy(nothing, None), torch.zeros(2))
    torch.testing.assert_close(divergence(even, nothing), torch.full((2,), 0.5))  # what moved to the picture counts


def test_variants_without_meaning_are_refused(tiny: Surrogate, joint: Surrogate) -> None:
    assert variant("mass", joint) is mass and variant("semantic", tiny) is semantic
    for name, model, message in (
        ("mass", tiny, "expected a model whose text and picture share one softmax for mass, got a UNet; take entropy"),
        ("semantic", joint, "expected a UNet for semantic, since other models have no sink token; take mass"),
        ("one", tiny, "expected sdl of zero, semantic, divergence, entropy, mass, got 'one'"),
    ):
        with pytest.raises(ValueError, match=message):
            variant(name, model)
