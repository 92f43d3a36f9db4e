"""The numbers that the shading kernel needs, from an identity and a scene."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from portraits.colours import EYES, FABRIC, HAIR, Colour, linear, skin
from portraits.identity import Identity
from portraits.materials import Cloth, Eyes, Look, Skin
from portraits.model import HeadModel
from portraits.noise import RGB
from portraits.scene import Scene
from portraits.shade import Hair, Light

BEARD_TINT = {"none": 0.0, "stubble": 0.5, "beard": 0.9, "longbeard": 0.9, "moustache": 0.8}
GAZE_LIMIT = np.array([0.32, 0.2])  # tangents of how far an eye turns sideways and up


def triple(values: ArrayLike) -> RGB:
    """Turn three numbers into the tuple that numba passes without counting references."""
    r, g, b = np.asarray(values, float)
    return float(r), float(g), float(b)


def paint(colour: Colour) -> RGB:
    """Return an 8-bit colour in linear light."""
    return triple(linear(colour))


def hair_look(identity: Identity, centre: ArrayLike) -> Hair:
    """Return what a person's hair looks like on a head with its centre at (3,)."""
    shine = 0.05 if identity.hair_style in ("afro", "curly") else 0.10
    return Hair(hair_colour(identity), shine, triple(centre))


def hair_colour(identity: Identity) -> RGB:
    """Return the hair's linear colour."""
    return triple(linear(HAIR[identity.hair_colour]) * identity.hair_brightness)


def skin_look(identity: Identity) -> Skin:
    """Return what a person's skin looks like."""
    colour = skin(identity.melanin, identity.skin_tint)
    natural = colour * np.array([0.82, 0.52, 0.50]) + np.array([0.05, 0.0, 0.01])
    scalp = 1.0
    if identity.hair_style == "bald":
        scalp = 0.0 if identity.hair_colour == "white" else 0.06  # a trace of shaved hair
    return Skin(
        colour=triple(colour),
        lips=triple(natural * (1 - identity.lip_paint) + linear(identity.lip_colour) * identity.lip_paint),
        brow=triple(linear(HAIR[identity.brow_colour]) * 0.75),
        hair=hair_colour(identity),
        lids=identity.lid_colour,
        shift=identity.texture_seed,
        gloss=0.10 + 0.10 * identity.melanin,
        blush=identity.blush,
        freckles=identity.freckles,
        under_eye=identity.under_eye,
        make_up=identity.make_up,
        brow_height=identity.brow_height,
        brow_arch=identity.brow_arch,
        brow_thickness=identity.brow_thickness,
        brow_opacity=identity.brow_opacity,
        beard=BEARD_TINT[identity.beard],
        lip_only=identity.beard == "moustache",
        scalp=scalp,
    )


def eye_look(model: HeadModel, identity: Identity, scene: Scene, head_turn: NDArray) -> Eyes:
    """Return a person's eyes, which look about at the camera as far as they can turn in a head turned by (3, 3)."""
    gaze = head_turn.T @ np.array([scene.gaze_x, scene.gaze_y, 1.0])
    gaze = np.array([*np.clip(gaze[:2], -GAZE_LIMIT, GAZE_LIMIT), 1.0])
    left, right = ((model.vertices[eye].min(0) + model.vertices[eye].max(0)) / 2 for eye in model.eyes)
    return Eyes(
        iris=triple(linear(EYES[identity.eye_colour]) * identity.eye_brightness),
        left=triple(left),
        right=triple(right),
        gaze=triple(gaze / np.linalg.norm(gaze)),
    )


def look(model: HeadModel, identity: Identity, scene: Scene, head_turn: NDArray) -> Look:
    """Return what all materials of a picture look like."""
    cloth = Cloth(paint(FABRIC[scene.cloth_colour]), paint(FABRIC[scene.stripe_colour]), scene.striped)
    return Look(
        skin=skin_look(identity),
        eyes=eye_look(model, identity, scene, head_turn),
        cloth=cloth,
        hat=paint(FABRIC[scene.hat_colour]),
        frame=paint(scene.frame_colour),
    )


def light(scene: Scene) -> Light:
    """Return the scene's lights."""
    direction = np.array(scene.light_direction)
    return Light(
        direction=triple(direction / np.linalg.norm(direction)),
        colour=scene.light_colour,
        key=scene.key,
        ambient=scene.ambient,
        fill=scene.fill,
    )
