"""Numba kernels that turn triangles and strands into fragments.

Screen coordinates are in pixels, x to the right, y down, z towards the viewer.

After an edit delete the folder __pycache__: numba's cache looks only at the file of the outermost kernel.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

FAR = -1e9
OUTSIDE = -1e-5  # barycentric weight; the slack closes the cracks between neighbours

jit = numba.njit(cache=True, fastmath=True, error_model="numpy")


class Fragments(NamedTuple):
    """The nearest triangle at every pixel (H, W)."""

    depth: Floats
    triangle: Ints  # -1 where there is none
    second: Floats  # barycentric weight of the triangle's second corner
    third: Floats  # and of its third


def empty_fragments(side: int) -> Fragments:
    """Return fragments without any triangle."""
    shape = (side, side)
    nothing = np.full(shape, -1, np.int32)
    return Fragments(np.full(shape, FAR, np.float32), nothing, np.zeros(shape, np.float32), np.zeros(shape, np.float32))


@jit
def rasterise(x: Floats, y: Floats, z: Floats, triangles: Ints, clip: Floats, fragments: Fragments, base: int) -> None:
    """Draw triangles into a depth buffer.

    Arguments:
        x, y, z: Screen coordinates of the vertices (V,); the larger z is nearer.
        triangles: Vertex indices (T, 3); both sides are drawn.
        clip: Per-vertex value (V,); where its interpolation is negative the triangle is cut away.
        fragments: Changed where a triangle is nearer.
        base: Added to the triangle's number.
    """
    depth, triangle, second, third = fragments
    height, width = depth.shape
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, x1, x2 = x[a], x[b], x[c]
        y0, y1, y2 = y[a], y[b], y[c]
        left, right = min(x0, x1, x2), max(x0, x1, x2)
        top, bottom = min(y0, y1, y2), max(y0, y1, y2)
        if right < 0 or bottom < 0 or left >= width or top >= height:
            continue
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        inverse = 1.0 / area
        first_column, last_column = max(0, math.ceil(left - 0.5)), min(width - 1, math.floor(right - 0.5))
        first_row, last_row = max(0, math.ceil(top - 0.5)), min(height - 1, math.floor(bottom - 0.5))
        if last_column < first_column or last_row < first_row:
            continue
        step1 = (y2 - y0) * inverse
        step2 = -(y1 - y0) * inverse
        for row in range(first_row, last_row + 1):
            py, px = row + 0.5, first_column + 0.5
            w1 = ((px - x0) * (y2 - y0) - (x2 - x0) * (py - y0)) * inverse - step1
            w2 = ((x1 - x0) * (py - y0) - (px - x0) * (y1 - y0)) * inverse - step2
            for column in range(first_column, last_column + 1):
                w1 += step1
                w2 += step2
                w0 = 1 - w1 - w2
                if w0 < OUTSIDE or w1 < OUTSIDE or w2 < OUTSIDE:
                    continue
                near = w0 * z[a] + w1 * z[b] + w2 * z[c]
                if near <= depth[row, column]:
                    continue
                if w0 * clip[a] + w1 * clip[b] + w2 * clip[c] < 0:
                    continue
                depth[row, column] = near
                triangle[row, column] = base + t
                second[row, column] = w1
                third[row, column] = w2


@jit
def vertex_normals(vertices: Floats, triangles: Ints) -> Floats:
    """Return unit normals (V, 3) of vertices (V, 3), the area-weighted mean of the triangles' (T, 3)."""
    normals = np.zeros_like(vertices)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        vx, vy, vz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(normals.shape[0]):
        length = math.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        normals[i, 0] /= length
        normals[i, 1] /= length
        normals[i, 2] /= length
    return normals


@jit
def ribbons(
    strands: Floats, widths: Floats, camera: Floats, vertices: Floats, triangles: Ints, tangents: Floats
) -> None:
    """Turn strands into ribbons that face the camera.

    Arguments:
        strands: Points (N, K, 3).
        widths: Widths (N, K).
        camera: Position (3,).
        vertices: Filled with the ribbons' edges (N * K * 2, 3).
        triangles: Filled with two triangles a segment (N * (K - 1) * 2, 3).
        tangents: Filled with the strands' directions at the vertices (N * K * 2, 3).
    """
    count, points, _ = strands.shape
    t = 0
    for i in range(count):
        for k in range(points):
            before, after = max(0, k - 1), min(points - 1, k + 1)
            tx = strands[i, after, 0] - strands[i, before, 0]
            ty = strands[i, after, 1] - strands[i, before, 1]
            tz = strands[i, after, 2] - strands[i, before, 2]
            length = math.sqrt(tx * tx + ty * ty + tz * tz) + 1e-9
            tx /= length
            ty /= length
            tz /= length
            ex, ey, ez = camera[0] - strands[i, k, 0], camera[1] - strands[i, k, 1], camera[2] - strands[i, k, 2]
            sx, sy, sz = ty * ez - tz * ey, tz * ex - tx * ez, tx * ey - ty * ex
            half = widths[i, k] * 0.5 / (math.sqrt(sx * sx + sy * sy + sz * sz) + 1e-9)
            v = (i * points + k) * 2
            for edge in range(2):
                offset = half if edge == 0 else -half
                vertices[v + edge, 0] = strands[i, k, 0] + sx * offset
                vertices[v + edge, 1] = strands[i, k, 1] + sy * offset
                vertices[v + edge, 2] = strands[i, k, 2] + sz * offset
                tangents[v + edge, 0] = tx
                tangents[v + edge, 1] = ty
                tangents[v + edge, 2] = tz
            if k < points - 1:
                triangles[t, 0], triangles[t, 1], triangles[t, 2] = v, v + 1, v + 2
                triangles[t + 1, 0], triangles[t + 1, 1], triangles[t + 1, 2] = v + 1, v + 3, v + 2
                t += 2
