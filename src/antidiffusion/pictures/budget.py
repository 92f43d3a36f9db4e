"""The set of allowed perturbations."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linf:
    """At most `radius` in every channel of every pixel, around the untouched picture.

    Arguments:
        radius: In 1/255 units, from 1 to 64. A fraction is cut to the whole 8-bit levels inside it when the picture is
            written: 7.65 allows 7.

    Raises:
        ValueError: If the radius is outside that range.
    """

    radius: float

    def __post_init__(self) -> None:
        if not 1 <= self.radius <= 64:
            raise ValueError(
                f"expected a budget from 1 to 64 (in 1/255 units), got {self.radius:g}; "
                "below 1 nothing is left after rounding to 8 bit, above 64 the picture is spoilt; try 8"
            )

    @property
    def levels(self) -> int:
        """The whole 8-bit levels that fit into the radius."""
        return math.floor(self.radius)

    def project_(self, delta: Tensor, clean: Tensor, brightest: Tensor | None = None) -> Tensor:
        """Clamp `delta` in place so that |delta| <= radius and clean + delta stays in [0, 255].

        Arguments:
            delta: Perturbation in 1/255 units, float32, any shape.
            clean: Untouched pixels, uint8, the same shape; where one number moves several, the darkest of them.
            brightest: The brightest of them, if it is another.

        Returns:
            `delta`.
        """
        delta.clamp_(-self.radius, self.radius)
        torch.maximum(delta, -clean.to(delta.dtype), out=delta)
        brightest = clean if brightest is None else brightest
        return torch.minimum(delta, 255 - brightest.to(delta.dtype), out=delta)

    def quantise(self, delta: Tensor, clean: Tensor) -> Tensor:
        """Return the protected pixels, uint8, at most `levels` away from `clean` (arguments as in `project_`)."""
        whole = delta.round().clamp_(-self.levels, self.levels)
        return (clean.to(torch.float32) + whole).clamp_(0, 255).to(torch.uint8)
