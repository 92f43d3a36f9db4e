"""Growing strands of hair on the template head: bundles of N strands of K points, arrays (N, K, 3) in decimetres."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from portraits.model import (
    BEARD_BOTTOM_Y,
    BEARD_BOTTOM_Z,
    BEARD_TOP_Y,
    BEARD_TOP_Z,
    BODY,
    HAIRLINE_Y,
    HAIRLINE_Z,
    HeadModel,
)

Array = NDArray[np.float64]
Region = Callable[[Array], NDArray[np.bool_]]  # points (N, 3) -> inside? (N,)
Flow = Callable[[Array, Array, float], Array]  # points, normals (N, 3), time in [0, 1] -> directions (N, 3)


def unit(vectors: ArrayLike) -> Array:
    """Scale vectors (..., 3) to length 1."""
    v = np.asarray(vectors)
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


def scalp(points: Array) -> NDArray[np.bool_]:
    """Above the hairline and not on an ear."""
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    ear = (x > 0.70) & (y > 6.8) & (y < 7.37) & (z > 0.28) & (z < 0.72)
    return (y > np.interp(z, HAIRLINE_Z, HAIRLINE_Y)) & ~ear


def forelock(points: Array) -> NDArray[np.bool_]:
    """The front of the scalp, where bangs grow."""
    return scalp(points) & (points[:, 2] > 0.95)


def chin_and_lip(points: Array) -> NDArray[np.bool_]:
    """Where a full beard grows: jaw, upper lip and the bridge between them."""
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    below = y < np.interp(z, BEARD_TOP_Z, BEARD_TOP_Y)
    jaw = below & (z > 0.55) & (y > np.interp(z, BEARD_BOTTOM_Z, BEARD_BOTTOM_Y))
    lip = (x < 0.34) & (y > 6.69) & (y < 6.86) & (z > 1.3)
    side = (x > 0.26) & (x < 0.36) & (y < 6.8) & (y > 6.4) & (z > 1.2)
    return jaw | lip | side


def upper_lip(points: Array) -> NDArray[np.bool_]:
    """Where a moustache grows."""
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    return (x < 0.36) & (y > 6.69) & (y < 6.85) & (z > 1.3)


@dataclass(frozen=True, eq=False)
class Skin:
    """The template's skin, as roots for strands and as an obstacle to them."""

    vertices: NDArray[np.float32]  # (V, 3)
    normals: NDArray[np.float32]  # (V, 3)
    triangles: NDArray[np.int32]  # (T, 3), skin only
    areas: NDArray[np.float32]  # (T,), doubled
    obstacle: NDArray[np.int64]  # vertices of head and shoulders that strands must stay out of
    tree: cKDTree  # of the obstacle

    @classmethod
    def of(cls, model: HeadModel) -> "Skin":
        """Collect the skin of the template."""
        v = model.vertices
        triangles = model.triangles[model.materials == BODY]
        faces = np.cross(v[triangles[:, 1]] - v[triangles[:, 0]], v[triangles[:, 2]] - v[triangles[:, 0]])
        normals = np.zeros_like(v)
        for k in range(3):
            np.add.at(normals, triangles[:, k], faces)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        x, y, z = v.T
        cavity = (np.abs(x) < 0.5) & (y > 6.2) & (y < 7.6) & (z > 0.5) & (z < 1.25)  # of mouth and eyes
        obstacle = np.flatnonzero(model.body & (y > 4) & ~cavity)
        return cls(v, normals, triangles, np.linalg.norm(faces, axis=1), obstacle, cKDTree(v[obstacle]))

    def roots(self, rng: Generator, region: Region, count: int) -> tuple[Array, Array]:
        """Draw points (N, 3) of a region evenly over its area, with their normals."""
        weights = self.areas * region(self.vertices[self.triangles].mean(1))
        chosen = self.triangles[rng.choice(len(self.triangles), count, p=weights / weights.sum())]
        corners = rng.dirichlet([1, 1, 1], count)
        points = np.einsum("nk,nkd->nd", corners, self.vertices[chosen])
        normals = np.einsum("nk,nkd->nd", corners, self.normals[chosen])
        return points, normals / np.linalg.norm(normals, axis=1, keepdims=True)

    def nearest_normals(self, points: Array) -> NDArray[np.float32]:
        """Return the normals (N, 3) of the nearest vertices."""
        return self.normals[self.obstacle[self.tree.query(points)[1]]]

    def push_out(self, points: Array, clearance: ArrayLike) -> Array:
        """Move points (N, 3) out of the head until they clear the nearest vertex's plane."""
        nearest = self.obstacle[self.tree.query(points)[1]]
        normals = self.normals[nearest]
        height = ((points - self.vertices[nearest]) * normals).sum(1)
        return points + np.minimum(np.maximum(clearance - height, 0), 0.5)[:, None] * normals


def grow(
    skin: Skin,
    rng: Generator,
    roots: tuple[Array, Array],
    lengths: ArrayLike,
    points: int,
    flow: Flow,
    *,
    gravity: float,
    stiffness: float,
    clearance: float,
    noise: float,
) -> Array:
    """Grow strands step by step along a flow, around the head.

    Arguments:
        skin: The obstacle.
        rng: Gives every strand its own bias.
        roots: Points and normals (N, 3).
        lengths: One length or N of them, in decimetres.
        points: K, the points of a strand.
        flow: The direction that hair at a place wants to take.
        gravity: Weight of the downward pull, which sets in over the first third.
        stiffness: How much of its direction a strand keeps in a step, in [0, 1].
        clearance: Distance to the skin in decimetres.
        noise: Standard deviation of a strand's bias.

    Returns:
        Strands (N, K, 3).
    """
    point, normal = roots
    direction = unit(normal * 0.7 + 0.3 * flow(point, normal, 0))
    bias = rng.normal(size=point.shape) * noise
    step = np.broadcast_to(np.asarray(lengths) / (points - 1), len(point))[:, None]
    strands = [point]
    for k in range(1, points):
        time = k / (points - 1)
        wanted = flow(point, normal, time)
        pull = np.array([0, -1, 0]) * gravity * min(1, time * 3)
        direction = unit(direction * stiffness + wanted * (1 - stiffness) + pull + bias * 0.5)
        point = skin.push_out(point + direction * step, clearance)
        normal = skin.nearest_normals(point)
        strands.append(point)
    return np.stack(strands, 1)


def part(x: float, forward: float, down: float) -> Flow:
    """Flow away from a parting at x, mostly along the skin."""

    def flow(points: Array, normals: Array, time: float) -> Array:
        side = np.sign(points[:, 0] - x)
        side[side == 0] = 1
        ones = np.ones(len(points))
        direction = np.stack([side * ones, ones * down, ones * forward], 1)
        return unit(direction - (direction * normals).sum(1, keepdims=True) * normals * 0.85)

    return flow


def curl(strands: Array, rng: Generator, amplitude: float, frequency: float, spread: float = 1.0) -> Array:
    """Wind strands into helices: amplitude in decimetres, frequency in radians a decimetre.

    Roots that are close share a phase up to `spread` radians, so that locks form.
    """
    count = len(strands)
    tangent = np.zeros_like(strands)
    tangent[:, 1:-1] = strands[:, 2:] - strands[:, :-2]
    tangent[:, 0] = strands[:, 1] - strands[:, 0]
    tangent[:, -1] = strands[:, -1] - strands[:, -2]
    tangent = unit(tangent)
    across = unit(np.cross(tangent, np.array([0.31, 0.2, 0.93])))
    other = np.cross(tangent, across)
    steps = np.linalg.norm(strands[:, 1:] - strands[:, :-1], axis=2)
    length = np.concatenate([np.zeros((count, 1)), np.cumsum(steps, 1)], 1)
    # The usual one-line hash of a shader, sin(dot) * 43758.5453, here of the cell that the root lies in.
    cell = np.sin(np.floor(strands[:, 0] * 3.2) @ np.array([12.9, 78.2, 37.7])) * 43758.5
    phase = (cell - np.floor(cell)) * 6.28 + rng.normal(size=count) * spread
    angle = length * frequency + phase[:, None]
    radius = np.minimum(1, length / 0.35) * amplitude
    return strands + (np.cos(angle) * radius)[..., None] * across + (np.sin(angle) * radius)[..., None] * other


def cut(strands: Array, rng: Generator, height: float, spread: float) -> Array:
    """Shorten strands to where they first fall below a height (give or take `spread`), keeping their K points."""
    points = strands.shape[1]
    out = strands.copy()
    heights = height + rng.normal(size=len(strands)) * spread
    for i, strand in enumerate(strands):
        below = np.where(strand[:, 1] < heights[i])[0]
        if len(below) and below[0] > 0:
            time = np.linspace(0, below[0], points)
            lower = np.floor(time).astype(int).clip(0, below[0] - 1)
            share = (time - lower)[:, None]
            out[i] = strand[lower] * (1 - share) + strand[lower + 1] * share
    return out
