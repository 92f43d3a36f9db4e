"""A smaller picture with the same metadata."""

from dataclasses import replace

import numpy as np
from PIL import Image

from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.picture import MIN_SIDE, Picture


def resized(picture: Picture, longest: int) -> Picture:
    """Return a picture whose longer side is at most `longest` pixels; one that is small enough stays as it is.

    Lanczos' filter; colours are weighted with their alpha, so that what is transparent does not bleed.

    Raises:
        PictureError: If the shorter side would be too short.
    """
    height, width, colours = picture.pixels.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if min(size) < MIN_SIDE:
        got = f"{size[0]} x {size[1]} from {width} x {height}"
        raise PictureError(
            f"{picture.source}: expected {MIN_SIDE} px or more on each side, got {got}; use a larger --resize"
        )
    layers = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    image = Image.fromarray(layers[..., 0] if layers.shape[2] == 1 else layers)
    array = np.atleast_3d(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    note = (
        f"resized from {width} x {height} to {size[0]} x {size[1]}; the budget is measured against the resized original"
    )
    return replace(
        picture,
        pixels=np.ascontiguousarray(array[..., :colours]),
        alpha=None if picture.alpha is None else array[..., colours].copy(),
        notes=(*picture.notes, note),
    )
