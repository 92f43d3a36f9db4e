"""What a recipe maximises: functions of the picture the surrogate sees."""

from typing import Protocol

from torch import Generator, Tensor


class Objective(Protocol):
    """Maps pictures `x: (B, 3, h, w)` in [0, 1] to one loss a picture, `(B,)`, differentiable in x."""

    def __call__(self, x: Tensor, generator: Generator) -> Tensor: ...
