"""How an attacker brings photos of any size to the model's."""

import numpy as np
import torch
from torch import Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.picture import Picture


def fitted(picture: Picture, surrogate: Surrogate) -> Tensor:
    """Scale a picture to about the model's area, aspect kept: `(1, 3, h, w)` in [0, 1], sides whole multiples."""
    height, width = picture.pixels.shape[:2]
    size = view_size(height, width, surrogate.size, surrogate.multiple)
    return Canvas(picture.pixels, size, surrogate.device).view()


def squared(picture: Picture, surrogate: Surrogate) -> Tensor:
    """Cut the centre square out and scale it to the model's side, as tuning scripts do: `(1, 3, s, s)` in [0, 1]."""
    height, width = picture.pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = picture.pixels[top : top + side, left : left + side]
    return Canvas(crop, (surrogate.size, surrogate.size), surrogate.device).view()


def fitted_mask(mask: Picture, picture: Picture, surrogate: Surrogate) -> Tensor:
    """Scale a black and white mask as its picture: `(1, 1, h, w)`, 1 where the mask is brighter than mid-grey.

    Raises:
        ValueError: If the mask has another size than the picture.
    """
    (height, width), (rows, columns) = picture.pixels.shape[:2], mask.pixels.shape[:2]
    if (rows, columns) != (height, width):
        raise ValueError(f"expected a mask of {width} x {height} pixels, got {columns} x {rows}; make it the picture's")
    white = np.where(mask.pixels.mean(-1, keepdims=True) > 127.5, 255, 0).astype(np.uint8)
    size = view_size(height, width, surrogate.size, surrogate.multiple)
    return (Canvas(white, size, surrogate.device).view()[:, :1] > 0.5).to(torch.float32)
