"""The renderer: an identity and a scene in, a picture out. Depth buffer and deferred shading on one CPU core."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from portraits import colours
from portraits.background import backdrop
from portraits.body import body_attributes, dressed, fit_head, rotation
from portraits.groom import (
    Tuft,
    TuftRibbons,
    beard_anchors,
    beard_tuft,
    hair_tuft,
    head_follow,
    tuft_ribbons,
)
from portraits.hair import load_hair
from portraits.identity import Identity
from portraits.look import hair_look, light, look, triple
from portraits.model import LASHES, Floats, HeadModel, load_model, shape_head
from portraits.noise import RGB
from portraits.raster import Fragments, empty_fragments, rasterise, vertex_normals
from portraits.scene import Scene
from portraits.shade import HEM, OCCLUSION, Ribbons, Shadow, Surface, shade
from portraits.worn import Part, beanie, glasses

SIDE = 128  # pixels of the embedded model's pictures
SUPERSAMPLING = 2  # each way
CAMERA_DISTANCE = 13.0  # decimetres from the pivot of the head at which the scene's span is measured
SHADOW_SIDE = 160  # pixels
SHADOW_SPAN = 5.2  # decimetres
GRAIN = 1.2  # standard deviation in 8-bit steps


class Pose(NamedTuple):
    """The turns of head and body round a pivot in the neck."""

    pivot: Floats  # (3,)
    head: Floats  # (3, 3)
    body: Floats  # (3, 3)

    def __call__(self, points: Floats, follow: Floats) -> Floats:
        """Move points (..., 3), which follow the head by (..., 1) and the body by the rest, round the pivot to 0."""
        centred = points - self.pivot
        return ((centred @ self.body.T) * (1 - follow) + (centred @ self.head.T) * follow).astype(np.float32)


class Camera(NamedTuple):
    """A pinhole that looks along -z."""

    position: NDArray[np.float64]  # (3,)
    focal: float  # pixels times decimetres
    side: int

    def project(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Return column, row and depth, in pixels and decimetres, of points (N, 3)."""
        x, y, z = self.position
        scale = self.focal / (z - points[:, 2])
        column = (points[:, 0] - x) * scale + self.side / 2
        row = self.side / 2 - (points[:, 1] - y) * scale
        return column.astype(np.float32), row.astype(np.float32), points[:, 2]


def pose_of(model: HeadModel, rest: Floats, scene: Scene) -> Pose:
    """Return the scene's pose of a person with vertices (V, 3) at rest."""
    pivot = (model.joint(rest, "neck") + np.array([0, 0.25, 0.1])).astype(np.float32)
    head = rotation(scene.yaw, scene.pitch, scene.roll).astype(np.float32)
    return Pose(pivot, head, rotation(scene.body_yaw).astype(np.float32))


def camera_of(model: HeadModel, posed: Floats, scene: Scene, side: int) -> Camera:
    """Aim the scene's camera at the middle of a posed head (V, 3), a little below it."""
    middle = 0.5 * (posed[model.head, 1].max() + posed[model.chin, 1].min())
    x = posed[model.head].mean(0)[0] * 0.6 + scene.camera_x
    position = np.array([x, middle - 0.22 + scene.camera_y, CAMERA_DISTANCE + 0.6])
    return Camera(position, side * CAMERA_DISTANCE / scene.span, side)


def assemble(model: HeadModel, vertices: Floats, parts: list[Part], pose: Pose, cloth: str) -> tuple[Surface, Floats]:
    """Join body and parts in one posed mesh; also return its clip values."""
    attributes, clip = body_attributes(model, cloth)
    count = len(vertices)
    all_attributes, clips, triangles = [attributes], [clip], [model.triangles]
    for part in parts:
        rows = np.zeros((len(part.vertices), attributes.shape[1]), np.float32)
        rows[:, OCCLUSION] = 1
        rows[:, HEM] = part.hem
        all_attributes.append(rows)
        clips.append(part.clip)
        triangles.append((part.triangles + count).astype(np.int32))
        count += len(part.vertices)
    follow = np.concatenate([model.head_weight, *(np.ones(len(part.vertices), np.float32) for part in parts)])
    posed = pose(np.concatenate([vertices, *(part.vertices for part in parts)]), follow[:, None])
    joined = np.concatenate(triangles)
    surface = Surface(
        triangles=joined,
        materials=np.concatenate([model.materials, *(part.materials for part in parts)]),
        positions=posed,
        normals=vertex_normals(posed, joined),
        reference=np.concatenate([model.vertices, *(part.reference for part in parts)]),
        attributes=np.concatenate(all_attributes),
    )
    return surface, np.concatenate(clips)


def join_ribbons(tufts: list[TuftRibbons]) -> tuple[Ribbons, Floats, NDArray]:
    """Join tufts; also return their vertices' lift (W,) and the triangles that cast shadows."""
    if not tufts:  # the kernel wants arrays even if no fragment points into them
        nothing = np.zeros((0, 3), np.float32)
        no_triangles = np.zeros((0, 3), np.int32)
        tufts = [TuftRibbons(nothing, nothing, no_triangles, nothing[:, 0], nothing[:, 0], no_triangles)]
    starts = np.cumsum([0] + [len(tuft.positions) for tuft in tufts[:-1]]).astype(np.int32)
    ribbons = Ribbons(
        triangles=np.concatenate([tuft.triangles + start for tuft, start in zip(tufts, starts, strict=True)]),
        positions=np.concatenate([tuft.positions for tuft in tufts]),
        tangents=np.concatenate([tuft.tangents for tuft in tufts]),
        random=np.concatenate([tuft.random for tuft in tufts]),
    )
    casting = np.concatenate([tuft.casting + start for tuft, start in zip(tufts, starts, strict=True)])
    return ribbons, np.concatenate([tuft.lift for tuft in tufts]), casting


def cast_shadows(
    surface: Surface, clip: Floats, ribbons: Ribbons, casting: NDArray[np.int32], direction: RGB, centre: Floats
) -> Shadow:
    """Draw the scene as the key light sees it from a direction, a unit vector, aimed below the head's centre (3,).

    Lashes cast no shadow, as they are thinner than the shadow map's pixels.
    """
    across = np.cross(np.array([0, 1, 0.0]), direction)
    across /= np.linalg.norm(across)
    upward = np.cross(direction, across)
    scale = SHADOW_SIDE / SHADOW_SPAN
    target = np.array([centre[0], centre[1] - 0.55, centre[2]])
    matrix = np.zeros((3, 4))
    matrix[0, :3], matrix[0, 3] = across * scale, SHADOW_SIDE / 2 - across @ target * scale
    matrix[1, :3], matrix[1, 3] = upward * scale, SHADOW_SIDE / 2 - upward @ target * scale
    matrix[2, :3] = direction
    fragments = empty_fragments(SHADOW_SIDE)

    def draw(points: Floats, triangles: NDArray[np.int32], clip: Floats) -> None:
        seen = [points @ row[:3].astype(np.float32) + np.float32(row[3]) for row in matrix]
        rasterise(seen[0], seen[1], seen[2], triangles, clip, fragments, 0)

    draw(surface.positions, surface.triangles[surface.materials != LASHES], clip)
    draw(ribbons.positions, casting, np.ones(len(ribbons.positions), np.float32))
    return Shadow(matrix, fragments.depth)


def develop(light: NDArray[np.float64], exposure: float, seed: int) -> NDArray[np.uint8]:
    """Turn linear light (H, W, 3) into a picture: average the samples, soften highlights, add grain."""
    height, width, _ = light.shape
    grid = (height // SUPERSAMPLING, SUPERSAMPLING, width // SUPERSAMPLING, SUPERSAMPLING, 3)
    exposed = light.reshape(grid).mean((1, 3)) * exposure
    softened = exposed / (1 + np.maximum(0, exposed - 0.6) * 0.35)
    values = colours.srgb(softened)
    values = values + default_rng(seed).normal(size=values.shape) * GRAIN
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


class Renderer:
    """Renders pictures from a folder of assets.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        side: Pixels of a picture.
    """

    def __init__(self, assets: Path, side: int = SIDE) -> None:
        self.model = load_model(assets)
        self.hair = load_hair(assets)
        self.side = side
        self.anchors = {
            name: beard_anchors(self.model, strands[:, 0])
            for name, (strands, _) in self.hair.items()
            if name[:-1] in ("beard", "longbeard", "moustache")
        }

    def tufts(self, identity: Identity, scene: Scene, vertices: Floats, fit: NDArray[np.float64]) -> list[Tuft]:
        """Return a person's hair and beard, with the head's affine map (4, 3)."""
        tufts = []
        if identity.hair_strands:
            tufts.append(hair_tuft(*self.hair[identity.hair_strands], identity, bool(scene.hat), fit))
        if identity.beard_strands:
            name = identity.beard_strands
            tufts.append(beard_tuft(*self.hair[name], self.anchors[name], self.model, vertices, fit))
        return tufts

    def __call__(self, identity: Identity, scene: Scene, rest: Floats | None = None) -> NDArray[np.uint8]:
        """Render a picture.

        Arguments:
            identity: Who is in it.
            scene: The picture.
            rest: The person's vertices (V, 3) from `shape_head`, to shape them once for many pictures.

        Returns:
            The picture (side, side, 3) in sRGB.
        """
        model = self.model
        rest = shape_head(model, identity) if rest is None else rest
        vertices = dressed(model, rest, scene)
        fit = fit_head(model, rest)
        parts = [beanie(model, rest, fit)] if scene.hat else []
        if scene.glasses:
            parts.append(glasses(model, vertices, scene.glasses_style, scene.glasses == "sunglasses"))
        pose = pose_of(model, rest, scene)
        surface, clip = assemble(model, vertices, parts, pose, scene.cloth)

        side = self.side * SUPERSAMPLING
        camera = camera_of(model, surface.positions, scene, side)
        height = rest[model.head, 1].mean() - model.vertices[model.head, 1].mean()
        tufts = self.tufts(identity, scene, vertices, fit)
        posed = [pose(tuft.strands, head_follow(tuft, height)) for tuft in tufts]
        pieces = [tuft_ribbons(*piece, camera.position) for piece in zip(tufts, posed, strict=True)]
        centre = surface.positions[model.head].mean(0)
        ribbons, lift, casting = join_ribbons(pieces)

        lights = light(scene)
        shadow = cast_shadows(surface, clip, ribbons, casting, lights.direction, centre)
        fragments = self.draw(camera, surface, clip, ribbons, lift)
        image = backdrop(scene, side)
        style = look(model, identity, scene, pose.head)
        hair = hair_look(identity, centre)
        shade(image, fragments, surface, ribbons, shadow, lights, triple(camera.position), style, hair)
        return develop(image, scene.exposure, scene.seed)

    @staticmethod
    def draw(camera: Camera, surface: Surface, clip: Floats, ribbons: Ribbons, lift: Floats) -> Fragments:
        """Draw meshes and ribbons as the camera sees them."""
        fragments = empty_fragments(camera.side)
        rasterise(*camera.project(surface.positions), surface.triangles, clip, fragments, 0)
        column, row, depth = camera.project(ribbons.positions)
        ones = np.ones(len(lift), np.float32)
        rasterise(column, row, depth + lift, ribbons.triangles, ones, fragments, len(surface.triangles))
        return fragments
