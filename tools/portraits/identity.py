"""An identity: what stays the same in every picture of one person."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from portraits.colours import EYE_SHADOW, LIPSTICK, RED_LIPSTICK, Colour, linear
from portraits.sampling import pick
from portraits.shapes import FACE_SHAPES

AGES = {"young": 0.5, "middle-aged": 0.28, "old": 0.22}
AGE_RANGES = {"young": (0.667, 0.72), "middle-aged": (0.76, 0.86), "old": (0.92, 1.0)}  # anny: 2/3 young, 1 old
TONES = ((0.13, "pale"), (0.32, "light"), (0.55, "tan"), (0.78, "brown"), (np.inf, "dark"))  # melanin below
MELANIN = (0.85, 0.34, 0.14)  # mean level of anny's african, asian and caucasian shapes
BEARDS = {"none": 0.5, "stubble": 0.14, "beard": 0.2, "longbeard": 0.07, "moustache": 0.09}
STRANDS = {
    "long straight": "long",
    "long wavy": "longwavy",
    "long curly": "longcurly",
    "bob": "bob",
    "short": "short",
    "swept-back": "sweptback",
    "curly": "curly",
    "afro": "afro",
    "bun": "bun",
    "ponytail": "ponytail",
    "buzz": "buzz",
}
BROWS = {"blond": "brown", "white": "grey"}  # brows that differ from the hair, or they would vanish on the skin


@dataclass(frozen=True)
class Identity:
    """One person. Amounts are in [0, 1] and positions in anny's decimetres unless said otherwise."""

    sex: str  # "woman" or "man"
    age: str  # a key of AGES
    phenotype: dict[str, float]  # anny's eleven parameters; gender 0 is male, 1 female
    shape: dict[str, float]  # local change label -> weight in [-1, 1]
    melanin: float
    tone: str
    skin_tint: tuple[float, float, float]
    hair_colour: str
    hair_style: str  # a key of STRANDS, or "bald"
    fringe: bool
    hair_strands: str  # template in hair.npz, "" when bald
    hair_mirrored: bool
    hair_width: float  # multiplies the strands' width
    hair_brightness: float
    beard: str  # a key of BEARDS
    beard_strands: str  # template in hair.npz, if the beard has strands
    eye_colour: str
    eye_brightness: float
    blush: float
    freckles: float
    under_eye: float
    make_up: float
    lid_colour: tuple[float, float, float]  # linear light
    lip_paint: float
    lip_colour: Colour
    brow_colour: str
    brow_height: float
    brow_arch: float  # times the usual arch
    brow_thickness: float
    brow_opacity: float
    texture_seed: float  # shifts the skin's noise
    wears_glasses: bool

    @property
    def lipstick(self) -> str:
        """The words for the lip colour if it is one that a viewer would name, else ""."""
        return "red lipstick" if self.lip_colour == RED_LIPSTICK and self.lip_paint > 0.6 else ""


def sample_shape(rng: Generator) -> dict[str, float]:
    """Draw the weights of the local face shapes; the right side follows the left one up to a slight asymmetry."""
    shape = {}
    for name, deviation in FACE_SHAPES.items():
        value = float(np.clip(rng.normal(0, deviation), -0.95, 0.95))
        shape[name] = value
        if name.startswith("l-"):
            shape["r-" + name[2:]] = float(np.clip(value + rng.normal(0, 0.04), -1, 1))
    return shape


def hair_colour_weights(dark: bool, age: str) -> dict[str, float]:
    """Return the weights of the hair colours of a dark or light skin at an age."""
    weights = {"black": 0.3, "brown": 0.35, "blond": 0.2, "red": 0.15}
    if dark:
        weights = {"black": 0.75, "brown": 0.22, "blond": 0.03}
    if age == "middle-aged":
        weights["grey"] = 0.12
    if age == "old":
        weights = {**{name: weight * 0.25 for name, weight in weights.items()}, "grey": 0.5, "white": 0.35}
    return weights


def hair_style_weights(female: bool, melanin: float, age: str) -> dict[str, float]:
    """Return the weights of the hair styles."""
    if female:
        return {
            "long straight": 0.2,
            "long wavy": 0.17,
            "long curly": 0.12,
            "bob": 0.14,
            "short": 0.06,
            "curly": 0.05,
            "afro": 0.04 + 0.14 * (melanin > 0.6),
            "bun": 0.13,
            "ponytail": 0.12,
            "buzz": 0.01,
        }
    return {
        "short": 0.36,
        "buzz": 0.16,
        "swept-back": 0.14,
        "curly": 0.1,
        "afro": 0.03 + 0.1 * (melanin > 0.6),
        "bald": 0.12 + 0.08 * (age == "old"),
        "long straight": 0.04,
        "long wavy": 0.04,
        "bun": 0.02,
    }


def sample_identity(rng: Generator) -> Identity:
    """Draw one person. The order of the draws is part of the data set: change it and every picture changes."""
    female = rng.random() < 0.5
    gender = rng.uniform(0.82, 1.0) if female else rng.uniform(0, 0.15)
    age = pick(rng, AGES)
    years = {name: rng.uniform(*limits) for name, limits in AGE_RANGES.items()}[age]  # draws for every age
    ancestry = rng.dirichlet([0.35, 0.35, 0.35])
    phenotype = {
        "gender": gender,
        "age": years,
        "muscle": float(np.clip(rng.normal(0.5, 0.15), 0.1, 0.9)),
        "weight": float(np.clip(rng.normal(0.5, 0.22), 0.05, 1.0)),
        "height": 0.5,
        "proportions": float(rng.uniform(0.3, 0.8)),
        "cupsize": 0.4,
        "firmness": 0.6,
        "african": float(ancestry[0]),
        "asian": float(ancestry[1]),
        "caucasian": float(ancestry[2]),
    }
    shape = sample_shape(rng)

    melanin = float(np.clip(ancestry @ np.array(MELANIN) + rng.normal(0, 0.09), 0, 1))
    skin_tint = (1.0, float(rng.uniform(0.96, 1.04)), float(rng.uniform(0.92, 1.06)))

    hair_colour = pick(rng, hair_colour_weights(melanin > 0.5, age))
    hair_style = pick(rng, hair_style_weights(female, melanin, age))
    hair_variant = rng.integers(2)
    fringe = female and hair_style in ("long straight", "bob") and bool(rng.random() < 0.45)
    hair_mirrored = bool(rng.random() < 0.5)
    hair_width = float(rng.uniform(0.9, 1.25))
    hair_brightness = float(rng.uniform(0.75, 1.3))
    beard = "none" if female else pick(rng, BEARDS)
    beard_variant = rng.integers(2)

    light_eyes = {"brown": 0.45, "blue": 0.25, "green": 0.17, "grey": 0.13}
    eye_colour = pick(rng, light_eyes if melanin < 0.45 else {"brown": 0.85, "green": 0.1, "grey": 0.05})
    eye_brightness = float(rng.uniform(0.8, 1.25))
    blush = float(rng.uniform(0.3, 1.0))
    freckled = melanin < 0.3 and rng.random() < 0.15
    freckles = float(rng.uniform(0.6, 1.0)) if freckled else 0.0
    under_eye = float(rng.uniform(0.1, 0.8))
    made_up = female and rng.random() < 0.5
    make_up = float(rng.uniform(0.3, 0.9)) if made_up else 0.0
    lid_colour = linear(EYE_SHADOW[rng.integers(len(EYE_SHADOW))])
    lip_paint = float(rng.uniform(0.5, 0.85)) if made_up else float(rng.uniform(0, 0.12))
    lip_colour = LIPSTICK[rng.integers(len(LIPSTICK))]
    return Identity(
        sex="woman" if female else "man",
        age=age,
        phenotype=phenotype,
        shape=shape,
        melanin=melanin,
        tone=next(name for limit, name in TONES if melanin < limit),
        skin_tint=skin_tint,
        hair_colour=hair_colour,
        hair_style=hair_style,
        fringe=fringe,
        hair_strands=f"{STRANDS[hair_style]}{'fringe' * fringe}{hair_variant}" if hair_style != "bald" else "",
        hair_mirrored=hair_mirrored,
        hair_width=hair_width,
        hair_brightness=hair_brightness,
        beard=beard,
        beard_strands=f"{beard}{beard_variant}" if beard in ("beard", "longbeard", "moustache") else "",
        eye_colour=eye_colour,
        eye_brightness=eye_brightness,
        blush=blush,
        freckles=freckles,
        under_eye=under_eye,
        make_up=make_up,
        lid_colour=(float(lid_colour[0]), float(lid_colour[1]), float(lid_colour[2])),
        lip_paint=lip_paint,
        lip_colour=lip_colour,
        brow_colour=BROWS.get(hair_colour, hair_colour),
        brow_height=float(rng.normal(0.0, 0.02)),
        brow_arch=float(rng.uniform(0.5, 1.4)) if female else float(rng.uniform(0.2, 1.0)),
        brow_thickness=float(rng.uniform(0.045, 0.07)) if female else float(rng.uniform(0.06, 0.1)),
        brow_opacity=float(rng.uniform(0.75, 1.0)) * (0.75 if hair_colour in ("blond", "white", "grey") else 1.0),
        texture_seed=float(rng.integers(1000)),
        wears_glasses=bool(rng.random() < 0.22),
    )
