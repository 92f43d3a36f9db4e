"""The head model in memory: the template's arrays, the parts of it, and the shape of one person."""

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from portraits.identity import Identity

BODY, EYE, TEETH, TONGUE, LASHES, CLOTH, HAT, FRAME, LENS = range(9)  # materials

# anny's phenotypes and the values at which each of their variations is pure, in the order of the columns of
# `HeadModel.variations` (anny/models/phenotype.py, Apache-2.0, whose interpolation `phenotype_weights` repeats).
RACES = ("african", "asian", "caucasian")
ANCHORS = {
    "gender": np.linspace(0, 1, 2),
    "age": np.linspace(-1 / 3, 1, 5),
    "muscle": np.linspace(0, 1, 3),
    "weight": np.linspace(0, 1, 3),
    "height": np.linspace(0, 1, 2),
    "proportions": np.linspace(0, 1, 2),
    "cupsize": np.linspace(0, 1, 3),
    "firmness": np.linspace(0, 1, 3),
}

# Polylines over depth z on the template, which strands grow within and the skin's tint follows: the height y of the
# hairline and of the beard's upper and lower edge.
HAIRLINE_Z = np.array([-0.6, 0.0, 0.28, 0.34, 0.62, 0.68, 0.78, 0.92, 1.12, 1.36, 1.7])
HAIRLINE_Y = np.array([6.5, 6.55, 6.75, 7.36, 7.36, 7.08, 7.25, 7.62, 7.93, 8.06, 8.08])
BEARD_TOP_Z = np.array([0.5, 0.75, 0.95, 1.15, 1.4, 1.6])
BEARD_TOP_Y = np.array([7.1, 7.0, 6.6, 6.45, 6.43, 6.45])
BEARD_BOTTOM_Z = np.array([0.5, 0.8, 1.1, 1.4])
BEARD_BOTTOM_Y = np.array([6.45, 6.2, 6.0, 6.0])

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HeadModel:
    """Head and shoulders in MakeHuman's axes (x to the person's left, y up, z to the front) and decimetres."""

    vertices: Floats  # (V, 3), the template
    triangles: NDArray[np.int32]  # (T, 3)
    materials: NDArray[np.int32]  # (T,)
    shapes: Floats  # (S, V, 3) offsets: P phenotypes, facial actions, local changes
    labels: NDArray[np.str_]  # (S,); a local change's opposite follows it
    variations: NDArray[np.bool_]  # (P, 26), the variations whose weights a phenotype shape multiplies
    occlusion: Floats  # (V,), 1 in the open
    lips: Floats  # (V,), masks in [0, 1], as are the next three
    eyelids: Floats
    ears: Floats
    inside_mouth: Floats
    head_weight: Floats  # (V,), 1 where the vertex follows the head's pose, 0 where the body's
    arm_weights: Floats  # (V, 4): left and right arm, left and right shoulder
    joint_names: NDArray[np.str_]  # (J,)
    joints: Ints  # (J,), the first vertex of the joint's cube of eight

    @cached_property
    def label_index(self) -> dict[str, int]:
        """Index of each label."""
        return {str(label): i for i, label in enumerate(self.labels)}

    @cached_property
    def vertex_material(self) -> NDArray[np.int32]:
        """Material of each vertex (V,)."""
        material = np.zeros(len(self.vertices), np.int32)
        material[self.triangles.ravel()] = np.repeat(self.materials, 3)
        return material

    @cached_property
    def body(self) -> NDArray[np.bool_]:
        """Which vertices are skin (V,)."""
        body = np.zeros(len(self.vertices), bool)
        body[np.unique(self.triangles[self.materials == BODY])] = True
        return body

    @cached_property
    def cloth(self) -> Ints:
        """Vertices of the clothing."""
        return np.where(self.vertex_material == CLOTH)[0]

    @cached_property
    def eyes(self) -> tuple[Ints, Ints]:
        """Vertices of the left and the right eye."""
        eye, x = self.vertex_material == EYE, self.vertices[:, 0]
        return np.where(eye & (x > 0))[0], np.where(eye & (x < 0))[0]

    @cached_property
    def head(self) -> Ints:
        """Vertices of the skull and face, without the cavities of mouth and eyes."""
        x, y, z = self.vertices.T
        cavity = (np.abs(x) < 0.5) & (z > 0.4) & (z < 1.25) & (y < 8)
        return np.where(self.body & (y > 6.9) & ~cavity)[0]

    @cached_property
    def chin(self) -> Ints:
        """Vertices at the front of the chin."""
        _, y, z = self.vertices.T
        return np.where(self.body & (y < 6.3) & (y > 6.08) & (z > 1.2))[0]

    @cached_property
    def hat_triangles(self) -> Ints:
        """Triangles of the skin that a hat's shell copies (T',)."""
        x, y, z = self.vertices[self.triangles].mean(1).T
        eye_socket = (np.abs(x) < 0.55) & (z < 1.2) & (z > 0.5) & (y < 7.52)
        ear = (np.abs(x) > 0.7) & (y < 7.5)
        return np.where((self.materials == BODY) & (y > 7.45) & ~ear & ~eye_socket)[0]

    def joint(self, vertices: Floats, name: str) -> Floats:
        """Return a joint's position (3,) in a shaped mesh (V, 3)."""
        first = self.joints[list(self.joint_names).index(name)]
        return vertices[first : first + 8].mean(0)


@cache
def load_model(folder: Path) -> HeadModel:
    """Load model.npz from the folder of assets, once."""
    path = folder / "model.npz"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, found nothing; run `python -m portraits assets {folder}`")
    with np.load(path) as arrays:
        return HeadModel(**{name: arrays[name] for name in arrays.files})


def variation_weights(phenotype: dict[str, float]) -> NDArray[np.float64]:
    """Interpolate each phenotype between its two nearest variations; the races share a weight of 1: (26,)."""
    races = np.array([phenotype[name] for name in RACES])
    columns = [races / races.sum()]
    for name, anchors in ANCHORS.items():
        value = min(max(phenotype[name], anchors[0]), anchors[-1])
        upper = min(max(int(np.searchsorted(anchors, value)), 1), len(anchors) - 1)
        share = (value - anchors[upper - 1]) / (anchors[upper] - anchors[upper - 1])
        weights = np.zeros(len(anchors))
        weights[upper - 1 : upper + 1] = 1.0 - share, share
        columns.append(weights)
    return np.concatenate(columns)


def shape_head(model: HeadModel, identity: Identity) -> Floats:
    """Return a person's vertices (V, 3) at rest."""
    weights = np.zeros(len(model.labels))
    product = np.where(model.variations, variation_weights(identity.phenotype), 1.0).prod(1)
    weights[: len(product)] = product
    for name, value in identity.shape.items():
        index = model.label_index["local_change:" + name]
        weights[index if value >= 0 else index + 1] = abs(value)
    used = np.where(np.abs(weights) > 1e-6)[0]
    offsets = np.tensordot(weights[used].astype(np.float32), model.shapes[used], 1)
    return (model.vertices + offsets).astype(np.float32)
