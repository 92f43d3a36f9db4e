"""What all attacks share: one call, `attack(pictures, prompts, surrogate, seed)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.progress import Progress, silent

Texts = str | Sequence[str]


@dataclass(frozen=True)
class Prompts:
    """What an attacker asks for.

    Arguments:
        target: Edits: what the edited pictures should show, one text for all or one for each. Tuning: what to draw with
            the tuned model, one picture for each text.
        source: Edits: what the pictures show, one text for all or one for each; only edits that invert a picture read
            it. Tuning: the one text that the person is tuned to.
        mask: Where inpainting may redraw, `(1, 1, H, W)` or `(B, 1, H, W)` in [0, 1], 1 to redraw; others ignore it.
    """

    target: Texts
    source: Texts = ""
    mask: Tensor | None = None


class Attack(Protocol):
    """A misuse of pictures: a frozen dataclass whose fields are the method's settings, with its paper's defaults.

    Arguments:
        x: Pictures `(B, 3, H, W)` float32 in [0, 1], sides multiples of `surrogate.multiple`.
        prompts: What the attacker asks for.
        surrogate: The attacker's model; its weights are afterwards what they were.
        seed: Decides every random draw.
        progress: Called after every step.

    Returns:
        Edits: the B edited pictures, as `x`. Tuning: one picture for each target text.

    Raises:
        ValueError: If the sizes, the texts or a setting do not fit.
    """

    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor: ...


def one_or_each(texts: Texts, count: int) -> list[str]:
    """Return the one text for all pictures or the texts for each.

    Raises:
        ValueError: If there is another number of texts.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(texts) not in (1, count):
        raise ValueError(f"expected one text, or one for each of {count} pictures, got {len(texts)}")
    return texts


def embed_each(texts: Texts, count: int, surrogate: Surrogate) -> Embedding:
    """Embed one text for all pictures (batch 1) or one for each (batch `count`).

    Raises:
        ValueError: If there is another number of texts.
    """
    return surrogate.embed(one_or_each(texts, count))


def usual(steps: int | None, guidance: float | None, surrogate: Surrogate) -> tuple[int, float]:
    """Return the steps and the scale of guidance that an attack draws with: those usual for the model where None."""
    return surrogate.steps if steps is None else steps, surrogate.guidance if guidance is None else guidance


def check_steps(steps: int | None) -> None:
    """Raise ValueError unless there is a step, or None for the usual number."""
    if steps is not None and steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}; leave it out for the model's usual number")


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless a share of the noising is in (0, 1]."""
    if not 0 < share <= 1:  # so that NaN fails too
        raise ValueError(f"expected a {name} in (0, 1], got {share}; try 0.5")
