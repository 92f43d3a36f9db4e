"""Hair and beards, grown on the template head: hair.npz. Two variants of 16 styles, our own code, no assets."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from portraits.files import write_arrays
from portraits.model import HeadModel
from portraits.strands import Array, Flow, Skin, chin_and_lip, curl, cut, forelock, grow, part, scalp, unit, upper_lip

SKULL = np.array([0, 7.55, 0.5])  # the centre that an afro grows away from
DOWN = np.array([0, -1, -0.05])
SHARE = 0.72  # of the strands that are kept, a little wider, as they cost most of a picture's time
WIDER = np.float32(1.2)
# Points that are kept of strands of 20 that do not wave: dense at the root, where they bend.
LONG_POINTS = [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 19]
PONYTAIL_POINTS = [0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 17, 19]

Style = tuple[str, Array, Array]  # name, strands (N, K, 3), widths (N, K) in decimetres
Roots = tuple[Array, Array]


def widths(strands: Array, root: float, tip: float) -> Array:
    """Taper strands from root to tip."""
    return np.repeat(np.linspace(root, tip, strands.shape[1])[None], len(strands), 0)


def steady(direction: Array, along_normal: float = 0.0) -> Flow:
    """Flow everywhere in one direction, plus a share of the normal."""
    return lambda points, normals, time: unit(normals * along_normal + direction)


def short(skin: Skin, rng: Generator, variant: int) -> Iterator[Style]:
    """Buzz cut, short with a parting, swept back."""
    roots = skin.roots(rng, scalp, 3000)
    flow = steady(np.array([0, -0.3, 0.2]), 0.6)
    strands = grow(skin, rng, roots, 0.09, 3, flow, gravity=0, stiffness=0.6, clearance=0.0, noise=0.1)
    yield "buzz", strands, widths(strands, 0.04, 0.03)

    roots = skin.roots(rng, scalp, 2600)
    height = np.clip(roots[0][:, 1] - 7.2, 0, 1.2)
    lengths = np.clip(0.28 + 0.32 * height, 0.2, 0.75) * rng.uniform(0.8, 1.15, len(height))
    flow = part((0.32, -0.32)[variant], (0.35, -0.3)[variant], -0.15)
    strands = grow(skin, rng, roots, lengths, 7, flow, gravity=0.12, stiffness=0.45, clearance=0.07, noise=0.18)
    yield "short", strands, widths(strands, 0.05, 0.025)

    def back(points: Array, normals: Array, time: float) -> Array:
        ones = np.ones(len(points))
        backward = np.stack([points[:, 0] * 0.25, ones * (0.25, 0.55)[variant], ones * -0.9], 1)
        return unit(backward - 0.6 * normals * (normals @ np.array([0, 0.4, -0.9]))[:, None])

    strands = grow(skin, rng, roots, lengths * 1.15, 7, back, gravity=0.05, stiffness=0.5, clearance=0.09, noise=0.2)
    yield "sweptback", strands, widths(strands, 0.05, 0.025)


def round_cuts(skin: Skin, rng: Generator, variant: int) -> Iterator[Style]:
    """Short curls and an afro, which stand off the head."""
    roots = skin.roots(rng, scalp, 1800)
    lengths = rng.uniform(0.45, 0.75, 1800)

    def tousled(points: Array, normals: Array, time: float) -> Array:
        return unit(normals + 0.2 * rng.normal(size=points.shape))

    strands = grow(skin, rng, roots, lengths, 14, tousled, gravity=0.03, stiffness=0.7, clearance=0.1, noise=0.3)
    yield "curly", curl(strands, rng, 0.09, 22), widths(strands, 0.055, 0.04)

    def outward(points: Array, normals: Array, time: float) -> Array:
        return unit(0.6 * normals + unit(points - SKULL))

    roots = skin.roots(rng, scalp, 2200)
    lengths = rng.uniform(0.75, 0.95, 2200) + 0.15 * variant
    strands = grow(skin, rng, roots, lengths, 14, outward, gravity=0.0, stiffness=0.7, clearance=0.05, noise=0.25)
    yield "afro", curl(strands, rng, 0.07, 26, 2), widths(strands, 0.06, 0.05)


def clear_face(strands: Array) -> Array:
    """Push strands in front of the face to its sides."""
    x, y, z = np.moveaxis(strands, -1, 0)
    limit = np.interp(y, [5.6, 6.2, 7.0, 7.9, 8.1], [0.50, 0.62, 0.70, 0.62, 0.0])
    inside = (z > 0.75) & (np.abs(x) < limit) & (y > 5.6) & (y < 8.05)
    return np.stack([np.where(inside, np.sign(x + 1e-6) * limit, x), y, z], -1)


def long_cuts(skin: Skin, rng: Generator, variant: int) -> Iterator[Style]:
    """Long hair, straight, wavy and curly, and a bob; the straight ones also with bangs."""
    parted = part((0.0, 0.28)[variant], -0.28, -0.25)

    def falling(points: Array, normals: Array, time: float) -> Array:
        fall = min(1, time * 2.2)
        return unit(parted(points, normals, time) * (1 - fall) + DOWN * fall)

    roots = skin.roots(rng, scalp, 2600)
    lengths = rng.uniform(3.0, 3.5, 2600)
    clearance = 0.09 + 0.12 * rng.random()
    strands = grow(
        skin, rng, roots, lengths, 20, falling, gravity=0.35, stiffness=0.35, clearance=clearance, noise=0.04
    )
    strands = clear_face(strands)
    yield "long", strands, widths(strands, 0.055, 0.03)
    yield "longwavy", curl(strands, rng, 0.07, 4.2, 0.5), widths(strands, 0.055, 0.03)
    yield "longcurly", curl(cut(strands, rng, 5.4, 0.2), rng, 0.12, 9, 0.9), widths(strands, 0.06, 0.045)
    yield "bob", cut(strands, rng, 6.15, 0.05), widths(strands, 0.055, 0.04)

    def over_forehead(points: Array, normals: Array, time: float) -> Array:
        ones = np.ones(len(points))
        return unit(np.stack([points[:, 0] * 0.3, ones * -0.55, ones * (0.7 * (1 - time))], 1))

    roots = skin.roots(rng, forelock, 420)
    lengths = rng.uniform(0.55, 0.68, 420)
    bangs = grow(skin, rng, roots, lengths, 20, over_forehead, gravity=0.2, stiffness=0.5, clearance=0.05, noise=0.05)
    strands_and_bangs = np.concatenate([strands, bangs])
    cut_and_bangs = np.concatenate([cut(strands, rng, 6.15, 0.05), bangs])
    yield "bobfringe", cut_and_bangs, widths(cut_and_bangs, 0.055, 0.035)
    yield "longfringe", strands_and_bangs, widths(strands_and_bangs, 0.055, 0.03)


def gather(skin: Skin, roots: Array, tie: Array, points: int) -> Array:
    """Lay strands along the head from their roots to a tie."""
    strands = [roots]
    for k in range(1, points):
        time = k / (points - 1)
        strands.append(skin.push_out(roots + (tie - roots) * time**0.9, 0.05 + 0.03 * np.sin(time * 3.14)))
    return np.stack(strands, 1)


def bun_ball(rng: Generator, radius: float) -> Array:
    """Wind 700 strands of 12 points round a ball above the head, as arcs of great circles."""
    count = 700
    start = unit(rng.normal(size=(count, 3)))
    onward = unit(np.cross(start, rng.normal(size=(count, 3)) * [1, 0.3, 1]))
    angle = np.linspace(0, 1.6, 12)[None, :, None]
    arcs = start[:, None] * np.cos(angle) + onward[:, None] * np.sin(angle)
    return np.array([0, 8.48 + 0.27, 0.05]) + arcs * (radius * rng.uniform(0.9, 1.0, count))[:, None, None]


def tail(rng: Generator, tie: Array, side: int) -> Array:
    """Lay 700 strands of 20 points from a tie behind the head over a shoulder, side 1 or -1."""
    count, points = 700, 20
    corners = np.array(
        [
            tie,
            tie + np.array([side * 0.35, 0.1, -0.1]),
            tie + np.array([side * 0.85, -0.35, 0.1]),
            [side * 1.02, 6.9, 0.12],
            [side * 0.98, 6.1, 0.35],
            [side * 0.9, 5.5, 0.85],
            [side * 0.86, 4.7, 1.25],
        ]
    )
    time = np.linspace(0, 6, points)
    path = np.stack([np.interp(time, np.arange(7), corners[:, k]) for k in range(3)], 1)
    for _ in range(2):
        path[1:-1] = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
    offset = rng.normal(size=(count, 3)) * [0.12, 0.06, 0.12]
    swell = np.sin(np.clip(np.linspace(0.05, 1, points) * 2.6, 0, 3.0)) ** 0.6
    stray = rng.normal(size=(count, points, 3)) * 0.006
    return path[None] + offset[:, None] * (0.25 + swell)[None, :, None] + stray


def tied(skin: Skin, rng: Generator, variant: int) -> Iterator[Style]:
    """A bun and a ponytail."""
    roots = skin.roots(rng, scalp, 2200)[0]
    strands = gather(skin, roots, np.array([0, 8.48, 0.1]), 12)
    strands = np.concatenate([strands, bun_ball(rng, 0.36 + 0.05 * variant)])
    yield "bun", strands, widths(strands, 0.055, 0.05)

    tie = np.array([0.0, 7.9, -0.42])
    strands = np.concatenate([gather(skin, roots, tie, 20), tail(rng, tie, (1, -1)[variant])])
    yield "ponytail", strands, widths(strands, 0.055, 0.035)


def beards(skin: Skin, rng: Generator, variant: int) -> Iterator[Style]:
    """A beard, a long beard and a moustache; no variant differs but by its draws."""
    down = steady(np.array([0, -0.8, 0.15]), 0.4)
    points, _ = roots = skin.roots(rng, chin_and_lip, 1500)
    lengths = np.where(points[:, 1] > 6.45, 0.10, 0.22) * rng.uniform(0.7, 1.2, 1500)
    strands = grow(skin, rng, roots, lengths, 5, down, gravity=0.1, stiffness=0.5, clearance=0.02, noise=0.2)
    yield "beard", strands, widths(strands, 0.035, 0.02)
    lengths = np.where(points[:, 1] < 6.4, 0.55, 0.11) * rng.uniform(0.7, 1.2, 1500)
    strands = grow(skin, rng, roots, lengths, 6, down, gravity=0.15, stiffness=0.5, clearance=0.03, noise=0.15)
    yield "longbeard", strands, widths(strands, 0.04, 0.02)

    def sideways(points: Array, normals: Array, time: float) -> Array:
        ones = np.ones(len(points))
        return unit(np.stack([np.sign(points[:, 0]) * 0.9, ones * -0.4, ones * 0.2], 1) + 0.3 * normals)

    roots = skin.roots(rng, upper_lip, 380)
    strands = grow(skin, rng, roots, 0.15, 5, sideways, gravity=0.0, stiffness=0.5, clearance=0.02, noise=0.15)
    yield "moustache", strands, widths(strands, 0.035, 0.02)


def thin(name: str, strands: NDArray[np.float32], width: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """Drop the points and strands of hair that a picture of 128 pixels does not need."""
    if name in ("long", "longfringe", "bob", "bobfringe"):
        strands, width = strands[:, LONG_POINTS], width[:, LONG_POINTS]
    elif name == "ponytail":
        strands, width = strands[:, PONYTAIL_POINTS], width[:, PONYTAIL_POINTS]
    kept = np.random.default_rng(3).random(len(strands)) < SHARE
    return strands[kept], width[kept] * WIDER


def build_hair(path: Path, model: HeadModel) -> None:
    """Write hair.npz: for every style and variant NAME, NAME_strands (N, K, 3) and NAME_widths (N, K) float32."""
    skin = Skin.of(model)
    arrays = {}
    for variant in range(2):
        rng = np.random.default_rng(10 + variant)
        for family in (short, round_cuts, long_cuts, tied, beards):
            for name, grown, tapered in family(skin, rng, variant):
                strands, width = grown.astype(np.float32), tapered.astype(np.float32)
                if family is not beards:
                    strands, width = thin(name, strands, width)
                arrays[f"{name}{variant}_strands"] = np.ascontiguousarray(strands)
                arrays[f"{name}{variant}_widths"] = np.ascontiguousarray(width)
    write_arrays(path, **arrays)


@cache
def load_hair(folder: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Load hair.npz from the folder of assets, once: style and variant -> strands (N, K, 3), widths (N, K)."""
    path = folder / "hair.npz"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, found nothing; run `python -m portraits assets {folder}`")
    with np.load(path) as arrays:
        names = [name.removesuffix("_strands") for name in arrays.files if name.endswith("_strands")]
        return {name: (arrays[name + "_strands"], arrays[name + "_widths"]) for name in names}
