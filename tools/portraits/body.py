"""From a person at rest to a body with an expression, lowered arms and clothing, still facing the front."""

import numpy as np
from numpy.typing import NDArray

from portraits.model import Floats, HeadModel
from portraits.raster import vertex_normals
from portraits.scene import Scene
from portraits.shade import EARS, EYELIDS, HEM, INSIDE_MOUTH, LIPS, OCCLUSION
from portraits.worn import CLOTH_OFFSET, homogeneous, neckline

SHOULDER_SHARE = 0.45  # of the arm's rotation that the shoulder takes


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> NDArray[np.float64]:
    """Return the matrix (3, 3) that rolls about z, then pitches about x, then turns about y, in radians."""
    cy, sy = np.cos(yaw), np.sin(yaw)
    cx, sx = np.cos(pitch), np.sin(pitch)
    cz, sz = np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return turn @ nod @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])


def fit_head(model: HeadModel, rest: Floats) -> NDArray[np.float64]:
    """Return the affine map (4, 3) that takes the template's head to this one best, for hair and hats."""
    fit, _, _, _ = np.linalg.lstsq(homogeneous(model.vertices[model.head]), rest[model.head], rcond=None)
    return fit


def express(model: HeadModel, rest: Floats, actions: dict[str, float]) -> Floats:
    """Add facial actions to a person's vertices (V, 3)."""
    face = rest.copy()
    for name, weight in actions.items():
        face = face + np.float32(weight) * model.shapes[model.label_index["facial_action:" + name]]
    return face


def lower_arms(model: HeadModel, rest: Floats, vertices: Floats, angle: float) -> Floats:
    """Turn both arms down round their shoulder joints by an angle in radians."""
    for column, (side, sign) in enumerate((("left", 1), ("right", -1))):
        pivot = model.joint(rest, side + " shoulder")
        weight = model.arm_weights[:, column] + SHOULDER_SHARE * model.arm_weights[:, column + 2]
        weight = np.clip(weight[:, None], 0, 1)
        turn = rotation(0, 0, -sign * angle).astype(np.float32)
        vertices = vertices * (1 - weight) + ((vertices - pivot) @ turn.T + pivot) * weight
    return vertices


def dressed(model: HeadModel, rest: Floats, scene: Scene) -> Floats:
    """Return the vertices (V, 3) with the scene's expression, arms down and the clothing off the skin."""
    vertices = lower_arms(model, rest, express(model, rest, scene.actions), scene.arm_angle)
    offset = np.zeros(len(rest), np.float32)
    offset[model.cloth] = CLOTH_OFFSET[scene.cloth]
    return vertices + vertex_normals(vertices, model.triangles) * offset[:, None]


def body_attributes(model: HeadModel, cloth: str) -> tuple[Floats, Floats]:
    """Return the vertices' shading attributes (V, 6) and clip values (V,), which cut the clothing at its neckline."""
    attributes = np.zeros((len(model.vertices), 6), np.float32)
    attributes[:, OCCLUSION] = model.occlusion
    attributes[:, LIPS] = model.lips
    attributes[:, EYELIDS] = model.eyelids
    attributes[:, EARS] = model.ears
    attributes[:, INSIDE_MOUTH] = model.inside_mouth
    clip = np.ones(len(model.vertices), np.float32)
    clip[model.cloth] = attributes[model.cloth, HEM] = neckline(model.vertices[model.cloth], cloth)
    return attributes, clip
