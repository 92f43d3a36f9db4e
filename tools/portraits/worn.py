"""What a person wears, as meshes fitted to the head: glasses, a beanie, the edge of the clothing."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from portraits.model import FRAME, HAT, LENS, Floats, HeadModel

# Half width, half height in decimetres, exponent of the superellipse.
FRAMES = {"round": (0.27, 0.25, 2.0), "square": (0.30, 0.21, 4.5), "aviator": (0.31, 0.26, 2.6)}
CLOTH_OFFSET = {"shirt": 0.07, "turtleneck": 0.10, "vneck": 0.07}  # decimetres off the skin
HAT_CENTRE = np.array([0, 7.75, 0.55], np.float32)


class Part(NamedTuple):
    """A mesh that follows the head: vertices N, triangles M."""

    vertices: Floats  # (N, 3), on this person's head at rest
    triangles: NDArray[np.int64]  # (M, 3)
    materials: NDArray[np.int32]  # (M,)
    reference: Floats  # (N, 3), the places on the template that patterns follow
    clip: Floats  # (N,), negative where the part is cut away
    hem: Floats  # (N,), distance to the edge


def tube(path: ArrayLike, radius: float, closed: bool = False, sides: int = 6) -> tuple[NDArray, NDArray]:
    """Sweep a polygon along a path (P, 3): vertices (P * sides, 3), triangles (M, 3)."""
    path = np.asarray(path, float)
    count = len(path)
    tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    if not closed:
        tangent[0], tangent[-1] = path[1] - path[0], path[-1] - path[-2]
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
    across = np.cross(tangent, [0.1, 0.25, 1.0])  # a direction that no part of a frame follows
    across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-9
    other = np.cross(tangent, across)
    angle = (np.arange(sides) / sides * 2 * np.pi)[None, :, None]
    vertices = path[:, None] + radius * (np.cos(angle) * across[:, None] + np.sin(angle) * other[:, None])
    triangles = []
    for i in range(count if closed else count - 1):
        here, there = i * sides, (i + 1) % count * sides
        for j in range(sides):
            k = (j + 1) % sides
            triangles += [[here + j, here + k, there + j], [here + k, there + k, there + j]]
    return vertices.reshape(-1, 3), np.array(triangles)


def glasses(model: HeadModel, vertices: Floats, style: str, dark: bool) -> Part:
    """Build glasses in front of the eyes, with temples to the ears and, if dark, lenses.

    Arguments:
        model: The head model.
        vertices: The person's vertices (V, 3) with their expression.
        style: A key of FRAMES.
        dark: Whether they are sunglasses.
    """
    _, y, z = model.vertices.T
    half_width, half_height, exponent = FRAMES[style]
    front = max(vertices[eye][:, 2].max() for eye in model.eyes) + 0.19
    temple = model.body & (np.abs(y - 7.33) < 0.12) & (z < 1.1) & (z > 0.75)
    half_head = np.abs(vertices[temple][:, 0]).max() + 0.06
    angle = np.linspace(0, 2 * np.pi, 33)[:-1]
    cosine, sine = np.cos(angle), np.sin(angle)

    def bow(across: NDArray) -> NDArray:
        return front - 0.35 * np.maximum(0, np.abs(across) - 0.25) ** 1.5

    pieces, centres = [], []
    for eye, side in zip(model.eyes, (1, -1), strict=True):
        middle = (vertices[eye].min(0) + vertices[eye].max(0)) / 2
        cx, cy = middle[0] + side * 0.015, middle[1] - 0.03
        rim_x = cx + half_width * np.sign(cosine) * np.abs(cosine) ** (2 / exponent)
        rim_y = cy + half_height * np.sign(sine) * np.abs(sine) ** (2 / exponent)
        rim = np.stack([rim_x, rim_y, bow(rim_x)], 1)
        pieces.append((*tube(rim, 0.02 if style == "aviator" else 0.026, closed=True), FRAME))
        if dark:
            count = len(rim)
            fan = np.array([[count, i, (i + 1) % count] for i in range(count)])
            pieces.append((np.concatenate([rim, rim.mean(0, keepdims=True) + np.array([[0, 0, 0.03]])]), fan, LENS))
        centres.append((cx, cy, side))
    (left_x, left_y, _), (right_x, right_y, _) = centres
    bridge = [
        [right_x + half_width, right_y + 0.05, front + 0.01],
        [0, left_y + 0.09, front + 0.01 + 0.03],
        [left_x - half_width, left_y + 0.05, front + 0.01],
    ]
    pieces.append((*tube(bridge, 0.024), FRAME))
    for cx, cy, side in centres:
        hinge = cx + side * half_width
        arm = [
            [hinge, cy + 0.06, bow(hinge)],
            [side * max(half_head, abs(hinge)), cy + 0.06, 1.05],
            [side * (half_head + 0.02), cy + 0.05, 0.5],
        ]
        pieces.append((*tube(arm, 0.024), FRAME))

    starts = np.cumsum([0] + [len(piece[0]) for piece in pieces[:-1]])
    points = np.concatenate([piece[0] for piece in pieces]).astype(np.float32)
    triangles = np.concatenate([piece[1] + start for piece, start in zip(pieces, starts, strict=True)])
    materials = np.concatenate([np.full(len(piece[1]), piece[2], np.int32) for piece in pieces])
    ones, zeros = np.ones(len(points), np.float32), np.zeros(len(points), np.float32)
    return Part(points, triangles, materials, points, ones, zeros)


def beanie(model: HeadModel, vertices: Floats, fit: NDArray[np.float64]) -> Part:
    """Lift a shell off the scalp.

    Arguments:
        model: The head model.
        vertices: The person's vertices (V, 3) at rest.
        fit: The affine map (4, 3) from the template's head to this person's.
    """
    used, corners = np.unique(model.triangles[model.hat_triangles], return_inverse=True)
    template = model.vertices[used]
    outward = template - HAT_CENTRE
    outward = outward / np.linalg.norm(outward, axis=1, keepdims=True)
    top = np.clip((template[:, 1] - 8.0) / 0.5, 0, 1)
    shell = template + outward * (0.16 + 0.09 * top[:, None])
    shell[:, 1] += 0.12 * top**2
    residual = vertices[used] - homogeneous(template) @ fit  # what the affine map misses of this head
    fitted = (homogeneous(shell) @ fit).astype(np.float32) + residual * 0.6
    height = (template[:, 1] - hat_edge(template, 7.52, 0.19)).astype(np.float32)
    triangles = corners.reshape(-1, 3)
    materials = np.full(len(triangles), HAT, np.int32)
    return Part(fitted.astype(np.float32), triangles, materials, template, height, height)


def hat_edge(points: NDArray, height: float, slope: float) -> NDArray:
    """Return the height of the hat's edge over points (..., 3), which rises to the front."""
    return height + slope * np.clip(points[..., 2] - 0.2, 0, 1.3)


def homogeneous(points: NDArray) -> NDArray[np.float64]:
    """Append a 1 to points (N, 3)."""
    return np.c_[points, np.ones(len(points))]


def neckline(points: Floats, cloth: str) -> NDArray:
    """Return how far template points (N, 3) lie below the clothing's edge; negative ones are bare."""
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    shoulder = np.maximum(0, x - 0.75) * 2
    if cloth == "turtleneck":
        return 6.02 - y - 0.12 * (z < 0.2)
    if cloth == "vneck":
        return (5.72 - y + 0.1) - np.maximum(0, 0.55 - x * 1.25) * 1.5 * (z > 0.3) + shoulder
    return 5.74 - y + shoulder - 0.12 * (z > 0.4)
