"""Palettes in 8-bit sRGB and their conversion to linear light. The names are the words that captions use."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour = tuple[int, int, int]

HAIR: dict[str, Colour] = {
    "black": (26, 21, 20),
    "brown": (88, 56, 36),
    "blond": (216, 176, 112),
    "red": (164, 66, 30),
    "grey": (150, 148, 147),
    "white": (226, 222, 214),
}
EYES: dict[str, Colour] = {
    "brown": (92, 54, 26),
    "blue": (86, 138, 200),
    "green": (84, 138, 78),
    "grey": (136, 146, 152),
}
FABRIC: dict[str, Colour] = {
    "white": (232, 230, 226),
    "black": (34, 34, 38),
    "grey": (128, 130, 134),
    "red": (178, 36, 40),
    "blue": (44, 84, 170),
    "green": (44, 124, 66),
    "yellow": (228, 188, 56),
    "orange": (224, 116, 36),
    "purple": (112, 60, 148),
    "pink": (232, 142, 170),
    "brown": (112, 74, 48),
}
BACKGROUND: dict[str, Colour] = {
    "white": (236, 236, 234),
    "grey": (140, 142, 146),
    "black": (28, 28, 30),
    "red": (170, 52, 50),
    "blue": (70, 116, 190),
    "green": (84, 150, 92),
    "yellow": (232, 206, 110),
    "orange": (226, 140, 70),
    "purple": (124, 88, 164),
    "pink": (236, 178, 196),
    "brown": (126, 94, 70),
}
FRAMES: tuple[Colour, ...] = ((18, 18, 20), (90, 50, 24), (150, 20, 24), (180, 150, 70), (40, 60, 120))
EYE_SHADOW: tuple[Colour, ...] = ((70, 50, 60), (60, 70, 110), (110, 70, 60), (90, 60, 100))
RED_LIPSTICK: Colour = (190, 40, 52)  # the only one that captions name
LIPSTICK: tuple[Colour, ...] = (RED_LIPSTICK, (205, 90, 100), (150, 40, 60), (190, 100, 90))

SKIN_MELANIN = (0.0, 0.22, 0.45, 0.7, 1.0)
SKIN: tuple[Colour, ...] = ((240, 206, 188), (230, 186, 160), (205, 150, 114), (150, 98, 68), (84, 52, 38))


def linear(colour: ArrayLike) -> NDArray[np.float64]:
    """Convert 8-bit sRGB (..., 3) in [0, 255] to linear light in [0, 1] (IEC 61966-2-1)."""
    c = np.asarray(colour, float) / 255.0
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert linear light, non-negative, to sRGB values on the scale of [0, 255], neither rounded nor clipped."""
    curve = 1.055 * np.maximum(light, 1e-8) ** (1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, light * 12.92, curve) * 255


def skin(melanin: float, tint: Sequence[float]) -> NDArray[np.float64]:
    """Return skin's linear colour (3,) for a melanin level in [0, 1], multiplied by a per-channel tint."""
    palette = linear(SKIN)
    return np.array([np.interp(melanin, SKIN_MELANIN, palette[:, k]) for k in range(3)]) * np.array(tint)
