"""The model-size view of a picture of any size, and the way a gradient goes back up to the full size.

An attacker scales a photo to the model's size first. The view does the same with an antialiased filter, the
perturbation lives at full size, and since the filter is linear its transpose carries gradients back exactly.
"""

import math

import numpy as np
import torch
from torch import Tensor

from antidiffusion.failures import expect_finite
from antidiffusion.pictures.budget import Linf

LONGEST = 4  # a view's side, in units of the model's: a longer panorama is squeezed rather than run out of memory


def view_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Choose the view's height and width in pixels: about `side`^2 in area, the picture's aspect, whole multiples.

    Arguments:
        height, width: The picture's size in pixels.
        side: The square the model was trained on.
        multiple: Both results are multiples of this.
    """
    sides = (side * math.sqrt(height / width), side * math.sqrt(width / height))
    rounded = [multiple * max(1, min(round(s / multiple), LONGEST * side // multiple)) for s in sides]
    return rounded[0], rounded[1]


def filter_matrix(inputs: int, outputs: int) -> Tensor:
    """Return the rows, `(outputs, inputs)` float32 summing to 1, of bilinear interpolation with antialiasing.

    The triangle is as wide as the coarser of both grids, as in Pillow and in torch's `antialias=True`. Two products
    with such matrices resize a picture, and with their transposes a gradient, many times faster than torch's kernels
    on large pictures.
    """
    scale = inputs / outputs
    centres = (torch.arange(outputs, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(inputs, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
    weights = (1 - distance / max(scale, 1)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


class Canvas:
    """One picture with its perturbation at full size and its view at the model's.

    Arguments:
        pixels: `(H, W, C)` uint8, C = 3, or 1 for a grey picture, whose perturbation then is grey too.
        size: The view's (height, width).
        device: Where the perturbation and the view live.
    """

    def __init__(self, pixels: np.ndarray, size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.size = size
        self.clean = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
        self.delta = torch.zeros(self.clean.shape, dtype=torch.float32, device=device)
        sides = zip(self.clean.shape[-2:], size, strict=True)
        self._rows, self._columns = (filter_matrix(full, view).to(device) for full, view in sides)
        self.clean_view = self._down(self.clean.float())

    def _down(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.size:
            x = self._rows @ x @ self._columns.T
        return x.expand(-1, 3, -1, -1) / 255

    def view(self) -> Tensor:
        """Return what the model sees now, `(1, 3, h, w)` float32 in [0, 1]."""
        return (self.clean_view + self._down(self.delta)).clamp_(0, 1)

    def full_gradient(self, gradient: Tensor) -> Tensor:
        """Carry a gradient at the view, `(1, 3, h, w)`, to the perturbation, `(1, C, H, W)`: the filter's transpose."""
        if self.clean.shape[1] == 1:
            gradient = gradient.sum(1, keepdim=True)
        if tuple(self.clean.shape[-2:]) == self.size:
            return gradient.clone()
        return self._rows.T @ gradient @ self._columns

    def ascend(self, gradient: Tensor, step_size: float, budget: Linf) -> None:
        """Take one sign step of `step_size` (1/255 units) up the gradient at the view and project to the budget.

        Raises:
            NotFiniteError: If the gradient has an entry that is no number, which has no sign.
        """
        expect_finite(gradient, "the gradient")
        self.delta.add_(self.full_gradient(gradient).sign_(), alpha=step_size)
        budget.project_(self.delta, self.clean)

    def pixels(self, budget: Linf) -> np.ndarray:
        """Return the protected picture, `(H, W, C)` uint8, inside the budget."""
        return budget.quantise(self.delta, self.clean)[0].permute(1, 2, 0).cpu().numpy()
