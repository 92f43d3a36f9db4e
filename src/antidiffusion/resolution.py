"""The model-size view of a picture of any size, and the way a gradient goes back up to the full size.

An attacker scales a photo to the model's size first. The view does the same with an antialiased filter, the
perturbation lives at full size, and since the filter is linear its transpose carries gradients back exactly.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antidiffusion.budget import Linf

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


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(B, C, H, W)` float to `(B, C, *size)`, bilinear with antialiasing; identity at the same size."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


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
        self.clean_view = self._down(self.clean.float())

    def _down(self, x: Tensor) -> Tensor:
        return resize(x, self.size).expand(-1, 3, -1, -1) / 255

    def view(self) -> Tensor:
        """Return what the model sees now, `(1, 3, h, w)` float32 in [0, 1]."""
        return (self.clean_view + self._down(self.delta)).clamp_(0, 1)

    def full_gradient(self, gradient: Tensor) -> Tensor:
        """Carry a gradient at the view, `(1, 3, h, w)`, to the perturbation, `(1, C, H, W)`: the filter's transpose."""
        if self.clean.shape[1] == 1:
            gradient = gradient.sum(1, keepdim=True)
        if tuple(self.clean.shape[-2:]) == self.size:
            return gradient
        leaf = torch.zeros_like(self.delta, requires_grad=True)
        (full,) = torch.autograd.grad(resize(leaf, self.size), leaf, gradient)
        return full

    def ascend(self, gradient: Tensor, step_size: float, budget: Linf) -> None:
        """Take one sign step of `step_size` (1/255 units) up the gradient at the view and project to the budget."""
        self.delta.add_(self.full_gradient(gradient).sign_(), alpha=step_size)
        budget.project_(self.delta, self.clean)

    def pixels(self, budget: Linf) -> np.ndarray:
        """Return the protected picture, `(H, W, C)` uint8, inside the budget."""
        return budget.quantise(self.delta, self.clean)[0].permute(1, 2, 0).cpu().numpy()
