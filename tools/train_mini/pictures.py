"""Pictures that are no portraits, each from its seed alone: dead leaves with textured leaves, and pages of letters.

References:
    Occlusion Models for Natural Images, Lee, Mumford and Huang, 2001
    Learning to See by Looking at Noise, Baradad et al., 2021, arXiv 2106.05963
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from train_mini.settings import SIZE

Floats = NDArray[np.float32]
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
SMALLEST, LARGEST = 2.0, 48.0  # pixels, radii of leaves, whose density falls with the third power
TEXTURES, LETTERS = 77, 78  # first words of the seeds


def coloured_noise(rng: Generator, exponent: float) -> Floats:
    """Draw noise (SIZE, SIZE, 3) of variance 1 whose power falls with the frequency to the 2 x `exponent`."""
    squared = np.fft.rfftfreq(SIZE)[None, :] ** 2 + np.fft.fftfreq(SIZE)[:, None] ** 2
    amplitude = np.where(squared > 0, np.maximum(squared, 1e-9) ** (-exponent / 2), 0)[..., None]
    shape = (*amplitude.shape[:2], 3)
    noise = np.fft.irfft2(amplitude * (rng.normal(size=shape) + 1j * rng.normal(size=shape)), (SIZE, SIZE), (0, 1))
    return (noise / (noise.std((0, 1)) + 1e-9)).astype(np.float32)


def fill(rng: Generator) -> Floats:
    """Draw a texture (SIZE, SIZE, 3) around 0, in 8-bit steps: noise, stripes, checks or nothing."""
    kind = rng.integers(4)
    if kind == 0:
        return coloured_noise(rng, rng.uniform(0.3, 2.0)) * np.float32(rng.uniform(4, 40))
    if kind == 1:
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(0.1, 2.2)
        wave = np.sin((X * np.cos(angle) + Y * np.sin(angle)) * frequency + rng.uniform(0, 6))
    elif kind == 2:
        across, down = rng.uniform(0.15, 1.5, 2)
        wave = np.sign(np.sin(X * across) * np.sin(Y * down))
    else:
        wave = np.zeros_like(X)
    return (wave[..., None] * rng.uniform(5, 60, 3)).astype(np.float32)


def leaf(rng: Generator) -> tuple[tuple[slice, slice], Floats]:
    """Draw where a leaf is, and its coverage there: an ellipse, rectangle or triangle, in [0, 1], with a soft edge."""
    low, high = SMALLEST**-2, LARGEST**-2
    radius = (low + rng.uniform() * (high - low)) ** -0.5  # inverse of the power law's distribution
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.5, 2.5)
    x, y, reach = rng.uniform(0, SIZE), rng.uniform(0, SIZE), 4 * radius + 3  # a triangle's tip is the farthest
    place = tuple(slice(max(0, int(middle - reach)), int(middle + reach) + 1) for middle in (y, x))
    dx, dy = X[place] - x, Y[place] - y
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = (dy * np.cos(angle) - dx * np.sin(angle)) * squeeze
    distances = (np.hypot(u, v), np.maximum(abs(u), abs(v)), np.maximum(-v, abs(u) * 0.87 + v * 0.5))
    edge = rng.uniform(0.7, 2.5)
    return place, np.clip((radius - distances[rng.integers(3)]) / edge + 0.5, 0, 1)[..., None].astype(np.float32)


def dead_leaves(index: int) -> NDArray[np.uint8]:
    """Draw leaves of power-law sizes upon each other: (SIZE, SIZE, 3), sRGB."""
    rng = np.random.default_rng([TEXTURES, index])
    base = coloured_noise(rng, rng.uniform(0.8, 2)) * np.float32(rng.uniform(10, 50))
    base = base + rng.uniform(30, 225, 3).astype(np.float32)
    fills = [fill(rng) for _ in range(5)]
    for _ in range(int(rng.integers(10, 160))):
        place, cover = leaf(rng)
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        base[place] += cover * (colour + fills[rng.integers(len(fills))][place] - base[place])
    grey = base.mean(-1, keepdims=True)  # photos are less colourful than independent channels
    return np.clip(grey + rng.uniform(0.15, 1) * (base - grey), 0, 255).astype(np.uint8)


def letters(index: int) -> NDArray[np.uint8]:
    """Draw lines of random words in random sizes and colours on a plain or noisy page: (SIZE, SIZE, 3), sRGB."""
    rng = np.random.default_rng([LETTERS, index])
    page = rng.uniform(0, 255, 3) + coloured_noise(rng, 1.5) * rng.choice([0, 0, 12])
    picture = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
    draw, y = ImageDraw.Draw(picture), float(rng.integers(-6, 10))
    while y < SIZE:
        size = float(rng.uniform(7, 26))
        words = ["".join(chr(c) for c in rng.integers(33, 127, rng.integers(2, 10))) for _ in range(8)]
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.text((float(rng.integers(-10, 20)), y), " ".join(words), fill=colour, font=ImageFont.load_default(size))
        y += size * 1.2
    return np.asarray(picture)
