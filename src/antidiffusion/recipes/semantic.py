"""The semantic disturbance loss (SDL): where a picture's positions look among the text's tokens.

A map is `(B, N, L)` float32: for N positions of the picture, or N positions of every head, the share of the attention
on each of L tokens. Where text and picture share one softmax the rows sum to less than 1.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
    VETO, 2026, arXiv 2607.27292 (entropy)
    DeContext, 2025, arXiv 2512.16625 (mass)
"""

from collections.abc import Callable

from torch import Tensor

from antidiffusion.models.base import Surrogate

TINY = 1e-8


def zero(attention: Tensor, clean: Tensor | None) -> Tensor:
    """The paper's loss, -mean(M^2), times the number of tokens: it pulls every probability towards zero and so spreads
    the mass evenly. The factor changes nothing once the gradients are balanced, and keeps float16 from underflowing.
    """
    return -attention.square().sum(2).mean(1)


def semantic(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the mass off every token but the begin-of-text one, the sink that describes nothing."""
    return attention[..., 0].mean(1)


def divergence(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the map away from the clean picture's at the same noise and time: total variation distance.

    The default of `AntiDiffusion`: of the variants it moved the most attention at the same loss within the errors of
    three pictures. Against no term at all it moves 0.5 % of the mass instead of 0.3 % (benchmarks/README.md). What is
    not on the text counts as one more token.
    """
    if clean is None:
        raise ValueError("expected the clean picture's attention, got None; give the objective the clean pictures")
    moved, left = attention - clean, attention.sum(2) - clean.sum(2)
    return (moved.abs().sum(2) + left.abs()).mean(1) / 2


def entropy(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Spread what is on the text evenly over its tokens: the entropy, in nats, of the rows made to sum to 1."""
    rows = attention / attention.sum(2, keepdim=True).clamp(min=TINY)
    return -(rows * rows.clamp(min=TINY).log()).sum(2).mean(1)


def mass(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the mass off the text to the picture, so that the prompt has less part in the answer."""
    return -attention.sum(2).mean(1)


Variant = Callable[[Tensor, Tensor | None], Tensor]
"""From the maps of the picture and of the clean one, or None, to what is raised, `(B,)`."""

SDL: dict[str, Variant] = {
    "zero": zero,
    "semantic": semantic,
    "divergence": divergence,
    "entropy": entropy,
    "mass": mass,
}


def variant(name: str, surrogate: Surrogate) -> Variant:
    """Return a variant of SDL that can move something in a model.

    Raises:
        ValueError: If there is no such variant, or it has no meaning for the model.
    """
    if name not in SDL:
        raise ValueError(f"expected sdl of {', '.join(SDL)}, got {name!r}; check the spelling")
    if name == "mass" and not surrogate.joint:
        raise ValueError("expected a model whose text and picture share one softmax for mass, got a UNet; take entropy")
    if name == "semantic" and surrogate.joint:
        raise ValueError("expected a UNet for semantic, since other models have no sink token; take mass")
    return SDL[name]
