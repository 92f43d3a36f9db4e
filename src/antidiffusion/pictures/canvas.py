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


def _fitting(mask: np.ndarray, pixels: np.ndarray) -> Tensor:
    """Return a mask `(1, 1, H, W)` float32 of zeros and ones that fits the picture."""
    (height, width), (got_height, got_width) = pixels.shape[:2], mask.shape
    if (height, width) != (got_height, got_width):
        raise ValueError(
            f"expected a mask of {width} x {height} as the picture, got {got_width} x {got_height}; resize the mask"
        )
    if not mask.any():
        raise ValueError("expected a mask with white where the picture may change, got none; paint some white")
    return torch.from_numpy(mask.astype(np.float32))[None, None]


class Canvas:
    """One picture with its perturbation at full size and its view at the model's.

    Arguments:
        pixels: `(H, W, C)` uint8, C = 3, or 1 for a grey picture, whose perturbation then is grey too.
        size: The view's (height, width).
        device: Where the perturbation and the view live.
        mask: `(H, W)` bool, where the perturbation may be; anywhere if None.
        luma: Move the channels of a pixel alike, so that its colour stays.

    Raises:
        ValueError: If the mask has another size or is empty.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        size: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        mask: np.ndarray | None = None,
        luma: bool = False,
    ) -> None:
        self.size = size
        self.clean = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
        self.darkest = self.brightest = self.clean
        if luma:
            self.darkest, self.brightest = self.clean.amin(1, keepdim=True), self.clean.amax(1, keepdim=True)
        self.delta = torch.zeros(self.darkest.shape, dtype=torch.float32, device=device)
        self.mask = None if mask is None else _fitting(mask, pixels).to(device)
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
        """Carry a gradient at the view, `(1, 3, h, w)`, to the perturbation, `(1, C, H, W)`: the filter's transpose.

        Raises:
            NotFiniteError: If the gradient has an entry that is no number, which has no sign.
        """
        expect_finite(gradient, "the gradient")
        if self.delta.shape[1] == 1:
            gradient = gradient.sum(1, keepdim=True)
        if tuple(self.clean.shape[-2:]) == self.size:
            return gradient.clone()
        return self._rows.T @ gradient @ self._columns

    def pixels(self, budget: Linf) -> np.ndarray:
        """Return the protected picture, `(H, W, C)` uint8, inside the budget."""
        return budget.quantise(self.delta, self.clean)[0].permute(1, 2, 0).cpu().numpy()
