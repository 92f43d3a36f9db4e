"""Backdrops: plain, a vertical gradient, a vignette, or blurred blotches, all of one colour."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from portraits.colours import BACKGROUND, linear
from portraits.scene import Scene


def brightness(kind: str, seed: int, side: int) -> NDArray[np.float64]:
    """Return the backdrop's brightness (side, side), about 1 in the middle.

    Arguments:
        kind: "plain", "gradient", "vignette" or "blurred".
        seed: Of the blotches.
        side: Pixels.
    """
    y, x = np.linspace(0, 1, side)[:, None], np.linspace(0, 1, side)[None, :]
    if kind == "plain":
        return np.ones((side, side))
    if kind == "gradient":
        return np.broadcast_to(1.25 - 0.6 * y, (side, side))
    if kind == "vignette":
        return 1.25 - 1.3 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)
    if kind == "blurred":
        blotches = Image.fromarray((np.random.default_rng(seed).random((6, 6)) * 255).astype(np.uint8))
        return np.asarray(blotches.resize((side, side), Image.Resampling.BICUBIC)).astype(float) / 255 * 0.7 + 0.65
    raise ValueError(f"expected a background of plain, gradient, vignette or blurred, got {kind!r}")


def backdrop(scene: Scene, side: int) -> NDArray[np.float64]:
    """Return the scene's backdrop as linear light (side, side, 3) in [0, 1]."""
    colour = linear(BACKGROUND[scene.background]) * scene.background_brightness
    shape = brightness(scene.background_kind, scene.seed + 1, side)  # another seed than the grain's
    return np.ascontiguousarray(np.clip(colour * shape[..., None], 0, 1.0))
