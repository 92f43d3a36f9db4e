"""The deferred shading kernel: fragments in, linear light out."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from portraits.materials import Look, cloth_finish, eye_finish, hat_finish, lens_finish, skin_finish
from portraits.model import BODY, CLOTH, EYE, FRAME, HAT, LASHES, TEETH, TONGUE
from portraits.noise import RGB, jit, normalised
from portraits.raster import Fragments

# Columns of `Surface.attributes`.
OCCLUSION, LIPS, EYELIDS, EARS, INSIDE_MOUTH, HEM = range(6)

# By material, in the order of `portraits.model`: the exponent of the highlight, and how far the light wraps round an
# edge in red, green and blue. Skin wraps most in red, as light scatters under it; lashes not at all.
EXPONENT = np.array([16.0, 90.0, 40.0, 18.0, 18.0, 8.0, 8.0, 40.0, 60.0])
SCATTERING, STIFF, SOFT = (0.3, 0.15, 0.1), (0.1, 0.1, 0.1), (0.15, 0.15, 0.15)
NONE = (0.0, 0.0, 0.0)
WRAP = np.array([SCATTERING, STIFF, SCATTERING, SCATTERING, NONE, SOFT, SOFT, SCATTERING, SCATTERING])
HAIR_EXPONENT = 30.0
SURFACE_BIAS, STRAND_BIAS = 0.06, 0.09  # decimetres that the shadow map may err
SPREAD = 1.5  # pixels of the shadow map between the nine samples of a soft edge


class Surface(NamedTuple):
    """The meshes of a picture: vertices V, triangles T."""

    triangles: NDArray[np.int32]  # (T, 3)
    materials: NDArray[np.int32]  # (T,)
    positions: NDArray[np.float32]  # (V, 3)
    normals: NDArray[np.float32]  # (V, 3)
    reference: NDArray[np.float32]  # (V, 3), the vertices' places on the template
    attributes: NDArray[np.float32]  # (V, 6)


class Ribbons(NamedTuple):
    """The strands of a picture as ribbons; the fragments number their triangles from T on."""

    triangles: NDArray[np.int32]  # (R, 3)
    positions: NDArray[np.float32]  # (W, 3)
    tangents: NDArray[np.float32]  # (W, 3)
    random: NDArray[np.float32]  # (W,), one value in [0, 1] a strand


class Hair(NamedTuple):
    """What hair looks like. It is lit as a volume round the head's centre."""

    colour: RGB
    shine: float
    centre: RGB


class Shadow(NamedTuple):
    """The scene seen from the light."""

    matrix: NDArray[np.float64]  # (3, 4), world -> column, row, depth
    depth: NDArray[np.float32]  # (S, S)


class Light(NamedTuple):
    """A key light, light from everywhere, and a fill from the other side."""

    direction: RGB  # unit vector towards the key light
    colour: RGB  # of the key light
    key: float
    ambient: float
    fill: float


@jit
def blend(values: NDArray, column: int, a: int, b: int, c: int, w1: float, w2: float) -> float:
    """Interpolate a column of per-vertex values between the corners of a triangle."""
    return (1 - w1 - w2) * values[a, column] + w1 * values[b, column] + w2 * values[c, column]


@jit
def visibility(x: float, y: float, z: float, strand: bool, m: NDArray, depth: NDArray) -> float:
    """Return the share of nine samples of the key light that reach a point; strands let some through.

    Arguments:
        x, y, z: The point.
        strand: Whether it lies on one.
        m, depth: The shadow's matrix and depth.
    """
    side = depth.shape[0]
    column = x * m[0, 0] + y * m[0, 1] + z * m[0, 2] + m[0, 3]
    row = x * m[1, 0] + y * m[1, 1] + z * m[1, 2] + m[1, 3]
    bias = STRAND_BIAS if strand else SURFACE_BIAS
    reach = x * m[2, 0] + y * m[2, 1] + z * m[2, 2] + bias
    lit = 0.0
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            i, j = int(row + dy * SPREAD), int(column + dx * SPREAD)
            if i < 0 or j < 0 or i >= side or j >= side or depth[i, j] < reach:
                lit += 1
            elif strand:
                lit += max(0.0, 1 - (depth[i, j] - reach) * 3.0) * 0.6
    return lit / 9


@jit
def strand_light(
    point: RGB, tangent: RGB, random: float, view: RGB, half: RGB, lit: float, hair: Hair, light: Light
) -> RGB:
    """Light a strand by the angles of its tangent (Kajiya and Kay, 1989), dimmed by where it lies round the head."""
    lx, ly, lz = light.direction
    along_light = tangent[0] * lx + tangent[1] * ly + tangent[2] * lz
    along_half = tangent[0] * half[0] + tangent[1] * half[1] + tangent[2] * half[2]
    diffuse = math.sqrt(max(0.0, 1 - along_light * along_light))
    nx, ny, nz = normalised(point[0] - hair.centre[0], (point[1] - hair.centre[1]) * 0.6, point[2] - hair.centre[2])
    towards = max(0.0, (nx * lx + ny * ly + nz * lz + 0.35) / 1.35)
    open_share = 0.55 + 0.45 * max(0.0, nx * view[0] + ny * view[1] + nz * view[2])
    highlight = max(0.0, 1 - along_half * along_half) ** HAIR_EXPONENT * hair.shine * (0.4 + random) * towards
    highlight *= light.key * lit
    base = light.ambient * 0.9 * open_share + light.fill * 0.25 + light.key * lit * diffuse * towards
    base *= 0.62 + 0.6 * random
    colour = hair.colour
    tint = 0.65 / (colour[0] + 0.05)
    return (
        colour[0] * base + highlight * (0.35 + tint * colour[0]),
        colour[1] * base + highlight * (0.35 + tint * colour[1]),
        colour[2] * base + highlight * (0.35 + tint * colour[2]),
    )


@jit
def surface_light(
    colour: RGB,
    occlusion: float,
    gloss: float,
    material: int,
    normal: RGB,
    facing: float,
    half: RGB,
    lit: float,
    light: Light,
) -> RGB:
    """Light a point of a surface: wrapped diffuse, Blinn's highlight, a rim at grazing angles.

    Arguments:
        colour, occlusion, gloss: The material's finish.
        material: Its number.
        normal, half: Unit vectors: the surface's normal, the middle between light and view.
        facing: Cosine between normal and view.
        lit: Share of the key light that arrives.
        light: The lights.
    """
    nx, ny, nz = normal
    lx, ly, lz = light.direction
    towards = nx * lx + ny * ly + nz * lz
    sky = light.ambient * (0.6 + 0.4 * ny) * occlusion
    fill = max(0.0, -nx * lx * 0.8 + nz * 0.55) * light.fill * occlusion
    towards_half = max(0.0, nx * half[0] + ny * half[1] + nz * half[2])
    highlight = towards_half ** EXPONENT[material] * gloss * lit * light.key * (0.3 + 0.7 * occlusion)
    highlight += (1 - max(0.0, facing)) ** 4 * gloss * 0.8 * (light.ambient + light.fill) * occlusion
    wr, wg, wb = WRAP[material, 0], WRAP[material, 1], WRAP[material, 2]
    lit_red = lit * 0.93 + 0.07 if material == BODY else lit  # red light bleeds into skin's shadows
    red = light.key * light.colour[0] * max(0.0, (towards + wr) / (1 + wr)) * lit_red
    green = light.key * light.colour[1] * max(0.0, (towards + wg) / (1 + wg)) * lit
    blue = light.key * light.colour[2] * max(0.0, (towards + wb) / (1 + wb)) * lit
    return (
        colour[0] * (sky + fill + red) + highlight,
        colour[1] * (sky + fill + green) + highlight,
        colour[2] * (sky + fill + blue) + highlight,
    )


@jit
def blend3(values: NDArray, a: int, b: int, c: int, w1: float, w2: float) -> RGB:
    """Interpolate three columns."""
    return blend(values, 0, a, b, c, w1, w2), blend(values, 1, a, b, c, w1, w2), blend(values, 2, a, b, c, w1, w2)


@jit
def shade(
    image: NDArray[np.float64],
    fragments: Fragments,
    surface: Surface,
    ribbons: Ribbons,
    shadow: Shadow,
    light: Light,
    camera: RGB,
    look: Look,
    hair: Hair,
) -> None:
    """Write the light of every fragment into an image (H, W, 3) that holds the background.

    Arguments:
        image: Linear light, changed in place.
        fragments: What each pixel shows; triangles from len(surface.triangles) on are ribbons.
        surface, ribbons: The scene.
        shadow, light: How it is lit.
        camera: Its position.
        look, hair: What the materials are like.
    """
    # Arrays leave their tuples here, once: numba counts a reference each time, which doubled the time of a picture.
    _, numbers, second, third = fragments
    triangles, materials, positions, normals, reference, attributes = surface
    ribbon_triangles, ribbon_positions, tangents, randoms = ribbons
    matrix, depth = shadow
    height, width = numbers.shape
    first_ribbon = triangles.shape[0]
    lx, ly, lz = light.direction
    for row in range(height):
        for column in range(width):
            t = numbers[row, column]
            if t < 0:
                continue
            w1, w2 = second[row, column], third[row, column]
            strand = t >= first_ribbon
            if strand:
                t -= first_ribbon
                a, b, c = ribbon_triangles[t, 0], ribbon_triangles[t, 1], ribbon_triangles[t, 2]
                px, py, pz = blend3(ribbon_positions, a, b, c, w1, w2)
            else:
                a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                px, py, pz = blend3(positions, a, b, c, w1, w2)
            lit = visibility(px, py, pz, strand, matrix, depth)
            view = normalised(camera[0] - px, camera[1] - py, camera[2] - pz)
            half = normalised(lx + view[0], ly + view[1], lz + view[2])
            if strand:
                tangent = blend3(tangents, a, b, c, w1, w2)
                pixel = strand_light((px, py, pz), tangent, randoms[a], view, half, lit, hair, light)
                image[row, column, 0], image[row, column, 1], image[row, column, 2] = pixel
                continue

            material = materials[t]
            nx, ny, nz = blend3(normals, a, b, c, w1, w2)
            nx, ny, nz = normalised(nx, ny, nz)
            facing = nx * view[0] + ny * view[1] + nz * view[2]
            if facing < 0 and material != BODY:  # thin parts are seen from both sides
                nx, ny, nz, facing = -nx, -ny, -nz, -facing
            x, y, z = blend3(reference, a, b, c, w1, w2)
            occlusion = blend(attributes, OCCLUSION, a, b, c, w1, w2)
            if material == BODY:
                lips = blend(attributes, LIPS, a, b, c, w1, w2)
                eyelids = blend(attributes, EYELIDS, a, b, c, w1, w2)
                ears = blend(attributes, EARS, a, b, c, w1, w2)
                mouth = blend(attributes, INSIDE_MOUTH, a, b, c, w1, w2)
                colour, occlusion, gloss = skin_finish(x, y, z, occlusion, lips, eyelids, ears, mouth, look.skin)
            elif material == EYE:
                colour, occlusion, gloss = eye_finish(x, y, z, occlusion, look.eyes)
            elif material == TEETH:
                colour, occlusion, gloss = (0.86, 0.82, 0.72), 0.75, 0.25
            elif material == TONGUE:
                colour, occlusion, gloss = (0.42, 0.13, 0.12), 0.4, 0.2
            elif material == LASHES:
                colour, occlusion, gloss = (0.01, 0.008, 0.008), 0.6, 0.0
            elif material == CLOTH:
                hem = blend(attributes, HEM, a, b, c, w1, w2)
                colour, occlusion, gloss = cloth_finish(x, y, z, occlusion, hem, look.cloth)
            elif material == HAT:
                hem = blend(attributes, HEM, a, b, c, w1, w2)
                colour, occlusion, gloss = hat_finish(x, y, z, hem, look.hat)
            elif material == FRAME:
                colour, occlusion, gloss = look.frame, 0.9, 0.6
            else:
                colour, occlusion, gloss = lens_finish(y)
            pixel = surface_light(colour, occlusion, gloss, material, (nx, ny, nz), facing, half, lit, light)
            image[row, column, 0], image[row, column, 1], image[row, column, 2] = pixel
