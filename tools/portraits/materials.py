"""Colour, occlusion and gloss of every material at a point of the template, in numba.

Points are in the template's space, where x is the distance to the person's left in decimetres, 0 the middle; the face
looks along z, with the chin near y = 6.2, the mouth 6.7, the eyes 7.3, the brows 7.5. The patterns stay on the skin
however a face is shaped and posed. Colours are linear.

After an edit delete the folder __pycache__: numba's cache looks only at the file of the outermost kernel.
"""

import math
from typing import NamedTuple

from portraits.model import BEARD_BOTTOM_Y, BEARD_BOTTOM_Z, BEARD_TOP_Y, BEARD_TOP_Z, HAIRLINE_Y, HAIRLINE_Z
from portraits.noise import RGB, darken, jit, mix, noise, polyline, scaled, smooth_step

Finish = tuple[RGB, float, float]  # colour, occlusion in [0, 1], gloss

IRIS = 0.47  # radians seen from the eye's centre


class Skin(NamedTuple):
    """What the skin of a person looks like; amounts in [0, 1]."""

    colour: RGB
    lips: RGB
    brow: RGB
    hair: RGB
    lids: RGB
    shift: float  # of the noise
    gloss: float
    blush: float
    freckles: float
    under_eye: float
    make_up: float
    brow_height: float
    brow_arch: float
    brow_thickness: float
    brow_opacity: float
    beard: float  # tint under a beard
    lip_only: bool  # the beard is a moustache
    scalp: float  # tint under the hair


class Eyes(NamedTuple):
    """What the eyes look like and where they look."""

    iris: RGB
    left: RGB  # the centres of the eyeballs
    right: RGB
    gaze: RGB  # unit vector


class Cloth(NamedTuple):
    """What the clothing looks like."""

    colour: RGB
    stripe: RGB
    striped: bool


class Look(NamedTuple):
    """All that the materials need to know."""

    skin: Skin
    eyes: Eyes
    cloth: Cloth
    hat: RGB
    frame: RGB


@jit
def complexion(x: float, y: float, z: float, ears: float, skin: Skin) -> RGB:
    """Mottled skin with blushing cheeks, nose and ears, freckles and shadows under the eyes."""
    coarse = noise(x * 6 + skin.shift, y * 6, z * 6) - 0.5
    fine = noise(x * 26 + skin.shift, y * 26, z * 26) - 0.5
    colour = scaled(skin.colour, 1 + 0.10 * coarse + 0.07 * fine)
    side = abs(x)
    red = ears * 0.35
    if z > 1:
        red += math.exp(-(((side - 0.43) / 0.2) ** 2 + ((y - 6.93) / 0.2) ** 2)) * skin.blush
    if z > 1.4:
        red += math.exp(-((side / 0.16) ** 2 + ((y - 6.93) / 0.14) ** 2)) * 0.5 * skin.blush
    colour = darken(colour, min(1.0, red), -0.08, 0.26, 0.24)
    if skin.freckles > 0 and z > 1.0 and y < 7.5 and y > 6.6:
        spots = smooth_step(0.60, 0.70, noise(x * 34 + skin.shift, y * 34, z * 34))
        amount = spots * skin.freckles * math.exp(-(((y - 7.0) / 0.22) ** 2))
        colour = darken(colour, amount, 0.28, 0.42, 0.5)
    if z > 1.1:
        amount = math.exp(-(((side - 0.30) / 0.14) ** 2 + ((y - 7.13) / 0.06) ** 2)) * skin.under_eye
        colour = darken(colour, amount, 0.2, 0.28, 0.2)
    return colour


@jit
def brow_cover(x: float, y: float, z: float, skin: Skin) -> float:
    """How much brow covers a point: an arched, tapered stroke of hairs that starts 1.3 cm from the middle."""
    along = (abs(x) - 0.13) / 0.50
    if along <= -0.1 or along >= 1.1 or z <= 0.9:
        return 0.0
    arch = 0.055 * math.sin(max(0.0, min(1.0, along)) * 2.7 - 0.25)
    centre = 7.505 + skin.brow_height + skin.brow_arch * arch - 0.045 * max(0.0, along - 0.6) / 0.4
    half = skin.brow_thickness * (1 - 0.55 * max(0.0, along - 0.3))
    if abs(y - centre) > half + 0.01:  # further than the ragged edge goes
        return 0.0
    distance = abs(y - centre + 0.02 * (noise(x * 60, y * 18, 1.0 + skin.shift) - 0.5))
    cover = 1 - smooth_step(half * 0.55, half, distance)
    cover *= smooth_step(-0.06, 0.06, along) * (1 - smooth_step(0.88, 1.02, along)) * skin.brow_opacity
    return min(1.0, cover * (0.75 + 0.5 * noise(x * 70 + y * 30, y * 22, skin.shift)))


@jit
def beard_cover(x: float, y: float, z: float, lips: float, skin: Skin) -> float:
    """How much beard tints the skin of jaw, upper lip and the bridge between them."""
    if skin.beard <= 0 or z <= 0.5 or y >= 7.15 or y <= 5.95:
        return 0.0
    side = abs(x)
    cover = 0.0
    if z > 1.3:
        cover = (1 - smooth_step(0.28, 0.38, side)) * smooth_step(6.66, 6.72, y) * (1 - smooth_step(6.82, 6.9, y))
    if not skin.lip_only:
        top, bottom = polyline(z, BEARD_TOP_Z, BEARD_TOP_Y), polyline(z, BEARD_BOTTOM_Z, BEARD_BOTTOM_Y)
        cover = max(cover, smooth_step(-0.06, 0.06, top - y) * smooth_step(-0.08, 0.08, y - bottom))
        if z > 1.2:
            bridge = smooth_step(0.24, 0.28, side) * (1 - smooth_step(0.33, 0.38, side))
            cover = max(cover, bridge * smooth_step(6.35, 6.45, y) * (1 - smooth_step(6.72, 6.85, y)))
    if cover == 0.0:
        return 0.0
    return min(0.95, cover * (1 - lips) * skin.beard * (0.7 + 0.6 * noise(x * 45, y * 45, z * 45)))


@jit
def scalp_cover(x: float, y: float, z: float, skin: Skin) -> float:
    """How much the hair's colour tints the scalp, so that no skin shines through between strands."""
    ear = abs(x) > 0.7 and y < 7.37 and z > 0.28 and z < 0.72
    if skin.scalp <= 0 or y <= 6.4 or ear:
        return 0.0
    height = y - polyline(z, HAIRLINE_Z, HAIRLINE_Y)
    if height < -0.075:  # further than the ragged edge goes
        return 0.0
    height += 0.05 * (noise(x * 20, y * 20, z * 20) - 0.5)
    return min(1.0, smooth_step(-0.05, 0.07, height) * skin.scalp * (0.9 + 0.2 * noise(x * 40, y * 40, z * 40)))


@jit
def skin_finish(
    x: float,
    y: float,
    z: float,
    occlusion: float,
    lips: float,
    eyelids: float,
    ears: float,
    inside_mouth: float,
    skin: Skin,
) -> Finish:
    """Skin with all that is painted on it; the masks are the mesh's."""
    colour = complexion(x, y, z, ears, skin)
    if z > 1.2 and y < 7.5 and y > 7.1:
        colour = mix(colour, skin.lids, 0.5 * eyelids * skin.make_up)
    colour = mix(colour, skin.brow, brow_cover(x, y, z, skin))
    colour = mix(colour, skin.brow, beard_cover(x, y, z, lips, skin))
    scalp = scalp_cover(x, y, z, skin)
    colour = (
        colour[0] * (1 - scalp) + skin.hair[0] * scalp * 0.8,
        colour[1] * (1 - scalp) + skin.hair[1] * scalp * 0.8,
        colour[2] * (1 - scalp) + skin.hair[2] * scalp * 0.8,
    )
    red = min(1.0, lips * 1.15)
    colour = mix(colour, skin.lips, red)
    # The mask misses the walls of the mouth, which occlusion finds.
    if inside_mouth > 0.5 or (z < 1.38 and z > 0.4 and abs(x) < 0.38 and y < 6.99 and y > 6.2 and occlusion < 0.28):
        colour = (0.10, 0.025, 0.022)
        occlusion = min(occlusion, 0.35)
    gloss = skin.gloss * (1 + 1.2 * red - 0.4 * ears)
    return colour, 0.25 + 0.75 * min(1.0, occlusion * 1.25), gloss


@jit
def eye_finish(x: float, y: float, z: float, occlusion: float, eyes: Eyes) -> Finish:
    """White, iris with fibres and a dark rim, pupil."""
    centre = eyes.left if x > 0 else eyes.right
    dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
    length = math.sqrt(dx * dx + dy * dy + dz * dz) + 1e-9
    dx, dy, dz = dx / length, dy / length, dz / length
    cosine = dx * eyes.gaze[0] + dy * eyes.gaze[1] + dz * eyes.gaze[2]
    radius = math.acos(max(-1.0, min(1.0, cosine))) / IRIS
    white = smooth_step(0.94, 1.06, radius)
    fibre = 0.75 + 0.5 * noise(math.atan2(dy - eyes.gaze[1], dx - eyes.gaze[0]) * 6, radius * 2, 3.0)
    rim = 1 - 0.65 * smooth_step(0.72, 1.0, radius)
    pupil = 1 - smooth_step(0.34, 0.42, radius)
    iris = fibre * rim * 1.25 * (1 - pupil)
    colour = (
        (eyes.iris[0] * iris + 0.004 * pupil) * (1 - white) + 0.84 * white,
        (eyes.iris[1] * iris + 0.004 * pupil) * (1 - white) + 0.80 * white,
        (eyes.iris[2] * iris + 0.004 * pupil) * (1 - white) + 0.78 * white,
    )
    return colour, 0.6 + 0.4 * min(1.0, occlusion * 1.8), 0.9


@jit
def cloth_finish(x: float, y: float, z: float, occlusion: float, hem: float, cloth: Cloth) -> Finish:
    """Woven cloth, plain or striped, with a darker hem; hem is the distance to it."""
    folds = noise(x * 5 + 3, y * 5, z * 5) - 0.5
    weave = noise(x * 38, y * 38, z * 38) - 0.5
    shade = 1 + 0.12 * folds + 0.12 * weave
    colour = scaled(cloth.colour, shade)
    if cloth.striped and math.sin(y * 19) > 0.1:
        colour = scaled(cloth.stripe, shade)
    if hem < 0.07:
        colour = (colour[0] * 0.72, colour[1] * 0.72, colour[2] * 0.72)
    return colour, 0.5 + 0.5 * occlusion, 0.02


@jit
def hat_finish(x: float, y: float, z: float, hem: float, hat: RGB) -> Finish:
    """Knitted ribs with a darker brim; hem is the height over the edge."""
    shade = 0.82 + 0.22 * math.sin(math.atan2(x, z - 0.55) * 44)
    shade *= 1 + 0.18 * (noise(x * 30, y * 30, z * 30) - 0.5)
    if hem < 0.24:
        shade *= 0.8
    return scaled(hat, shade), 0.95, 0.02


@jit
def lens_finish(y: float) -> Finish:
    """Sunglasses, darker at the top."""
    grey = 0.006 + 0.02 * (1 - smooth_step(6.9, 7.6, y))
    return (grey, grey, grey), 1.0, 0.9
