"""Scalar helpers of the shading kernels: value noise, smooth steps, polylines, vectors.

After an edit delete the folder __pycache__: numba's cache looks only at the file of the outermost kernel.
"""

import math

from numpy.typing import NDArray

from portraits.raster import jit

RGB = tuple[float, float, float]


@jit
def lattice(i: int, j: int, k: int) -> float:
    """Hash a lattice point to [0, 1]; multipliers as in Wyvill's and Perlin's integer hashes."""
    h = (i * 374761393 + j * 668265263 + k * 2147483647) & 0x7FFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65535.0


@jit
def noise(x: float, y: float, z: float) -> float:
    """Interpolate random values in [0, 1] between the points of the integer lattice."""
    i, j, k = math.floor(x), math.floor(y), math.floor(z)
    fx, fy, fz = x - i, y - j, z - k
    fx = fx * fx * (3 - 2 * fx)
    fy = fy * fy * (3 - 2 * fy)
    fz = fz * fz * (3 - 2 * fz)
    total = 0.0
    for a in range(2):
        for b in range(2):
            for c in range(2):
                weight = (fx if a else 1 - fx) * (fy if b else 1 - fy) * (fz if c else 1 - fz)
                total += lattice(i + a, j + b, k + c) * weight
    return total


@jit
def smooth_step(low: float, high: float, x: float) -> float:
    """Rise from 0 at low to 1 at high, with zero slope at both ends."""
    t = (x - low) / (high - low)
    t = 0.0 if t < 0 else (1.0 if t > 1 else t)
    return t * t * (3 - 2 * t)


@jit
def polyline(x: float, xs: NDArray, ys: NDArray) -> float:
    """Interpolate linearly between the points (xs, ys), constant beyond the ends."""
    if x <= xs[0]:
        return ys[0]
    for i in range(1, len(xs)):
        if x <= xs[i]:
            return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[-1]


@jit
def mix(colour: RGB, paint: RGB, amount: float) -> RGB:
    """Cover a colour with a paint, amount 1 for wholly."""
    rest = 1 - amount
    return (
        colour[0] * rest + paint[0] * amount,
        colour[1] * rest + paint[1] * amount,
        colour[2] * rest + paint[2] * amount,
    )


@jit
def darken(colour: RGB, amount: float, r: float, g: float, b: float) -> RGB:
    """Take from each channel its share, times an amount."""
    return colour[0] * (1 - r * amount), colour[1] * (1 - g * amount), colour[2] * (1 - b * amount)


@jit
def scaled(colour: RGB, factor: float) -> RGB:
    """Multiply a colour by a factor."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


@jit
def normalised(x: float, y: float, z: float) -> RGB:
    """Scale a vector to length 1."""
    length = math.sqrt(x * x + y * y + z * z) + 1e-9
    return x / length, y / length, z / length
