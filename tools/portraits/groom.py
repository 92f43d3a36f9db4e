"""The strands of one picture: hair and beard templates on a person's head, then as ribbons before the camera."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from portraits.identity import Identity
from portraits.model import Floats, HeadModel, Ints
from portraits.raster import ribbons
from portraits.worn import hat_edge, homogeneous

RANDOM = np.random.default_rng(5).random(6000).astype(np.float32)  # one a strand; more than any style has


class Tuft(NamedTuple):
    """Strands on a head at rest that still faces the front."""

    strands: Floats  # (N, K, 3)
    widths: Floats  # (N, K)
    is_beard: bool


class TuftRibbons(NamedTuple):
    """A tuft as ribbons in the world: W = N * K * 2 vertices, R = N * (K - 1) * 2 triangles."""

    positions: Floats  # (W, 3)
    tangents: Floats  # (W, 3)
    triangles: NDArray[np.int32]  # (R, 3)
    random: Floats  # (W,)
    lift: Floats  # (W,), towards the viewer, so that hair does not sink into the chest it lies on
    casting: NDArray[np.int32]  # (R / 2, 3), the triangles that cast shadows: every second strand's


def beard_anchors(model: HeadModel, roots: Floats) -> Ints:
    """Return the vertices (N,) that a beard's roots (N, 3) on the template move with."""
    x, y, z = model.vertices.T
    cavity = (np.abs(x) < 0.4) & (z < 1.2) & (y > 6.2)
    outside = model.body & (z > 0.4) & (y < 7.3) & (y > 5.8) & (model.inside_mouth < 0.5) & ~cavity
    candidates = np.where(outside)[0]
    return candidates[cKDTree(model.vertices[candidates]).query(roots)[1]]


def fit_strands(strands: Floats, fit: NDArray[np.float64]) -> Floats:
    """Map strands (N, K, 3) from the template's head by an affine map (4, 3)."""
    points = strands.reshape(-1, 3) @ fit[:3].astype(np.float32) + fit[3].astype(np.float32)
    return points.reshape(strands.shape)


def hair_tuft(strands: Floats, widths: Floats, identity: Identity, hat: bool, fit: NDArray[np.float64]) -> Tuft:
    """Put a hair style (N, K, 3), (N, K) on a head by its affine map (4, 3)."""
    if identity.hair_mirrored:
        strands = strands * np.array([-1, 1, 1], np.float32)
    if identity.hair_style.startswith("long"):  # what falls behind the shoulders would pierce the clothing
        x, y, z = np.moveaxis(strands, -1, 0)
        widths = np.where((np.abs(x) > 0.92) & (y < 5.85) & (z < 0.75), np.float32(0), widths)
    if hat:
        shown = strands[..., 1] < hat_edge(strands, 7.56, 0.20) - 0.02
        kept = shown.any(1)
        strands, widths = strands[kept], np.where(shown[kept], widths[kept], 0)
    return Tuft(fit_strands(strands, fit), widths * identity.hair_width, False)


def beard_tuft(
    strands: Floats, widths: Floats, anchors: Ints, model: HeadModel, vertices: Floats, fit: NDArray[np.float64]
) -> Tuft:
    """Put a beard on a head; it follows the jaw and mouth of vertices (V, 3) by its anchors (N,)."""
    moved = vertices[anchors] - (homogeneous(model.vertices[anchors]) @ fit).astype(np.float32)
    return Tuft(fit_strands(strands, fit) + moved[:, None], widths, True)


def head_follow(tuft: Tuft, height: float) -> Floats:
    """Return how far points follow the head's pose (N, K, 1): beards wholly, hair less and less below the chin.

    Arguments:
        tuft: The strands.
        height: How much higher than the template's the head is, in decimetres.
    """
    if tuft.is_beard:
        return np.ones((*tuft.widths.shape, 1), np.float32)
    share = np.clip((tuft.strands[..., 1:2] - height - 5.5) / (6.9 - 5.5), 0, 1)
    return share * share * (3 - 2 * share)


def tuft_ribbons(tuft: Tuft, posed: Floats, camera: NDArray[np.float64]) -> TuftRibbons:
    """Make ribbons of a tuft whose strands stand posed (N, K, 3) before a camera at (3,)."""
    count, points = tuft.widths.shape
    positions = np.empty((count * points * 2, 3), np.float32)
    tangents = np.empty_like(positions)
    triangles = np.empty((count * (points - 1) * 2, 3), np.int32)
    ribbons(posed, tuft.widths.astype(np.float32), camera.astype(np.float32), positions, triangles, tangents)
    lift = np.float32(0.22) * (1 - np.clip((tuft.strands[..., 1] - 5.6) / 0.7, 0, 1)) * (not tuft.is_beard)
    return TuftRibbons(
        positions,
        tangents,
        triangles,
        np.repeat(RANDOM[:count], points * 2),
        np.repeat(lift.reshape(-1), 2),
        triangles.reshape(count, -1, 3)[::2].reshape(-1, 3),
    )
