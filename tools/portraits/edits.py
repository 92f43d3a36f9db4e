"""Defense-Edit-Synth: portraits of held-out people, each with an edit in words, its true result and what it touches."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from portraits.attributes import identity_attributes, scene_attributes
from portraits.caption import caption
from portraits.colours import BACKGROUND, FABRIC, HAIR
from portraits.files import write_json, write_whole
from portraits.identity import AGE_RANGES, Identity, sample_identity
from portraits.sampling import HELD_OUT_SEED, held_out_generator
from portraits.scene import EXPRESSION_WEIGHTS, Scene, sample_actions, sample_scene

FIRST = 1000  # held-out identities below are for personalisation
TRIES = 300  # captions to choose from
TOUCHED = 10  # 8-bit steps: more than the grain of both pictures
GROWN, SHRUNK = 13, 9  # odd windows in pixels: a mask closes holes of ten and keeps a margin of two
LOSSLESS: dict[str, dict[str, object]] = {
    ".webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
    ".png": {"format": "PNG", "optimize": True},
}

Look = tuple[Identity, Scene]


class Edit(NamedTuple):
    """A category, the word of the new value, and the person and scene after the edit."""

    category: str
    value: str
    after: Look


def another(rng: Generator, options: list[str], present: str) -> str:
    """Draw an option other than the present one."""
    others = [option for option in options if option != present]
    return others[rng.integers(len(others))]


def change_hair(rng: Generator, person: Identity, scene: Scene) -> Edit | None:
    """Dye the hair, if there is any to see."""
    if person.hair_style in ("bald", "buzz") or scene.hat:
        return None
    colour = another(rng, list(HAIR), person.hair_colour)
    return Edit("hair", colour, (replace(person, hair_colour=colour), scene))


def change_background(rng: Generator, person: Identity, scene: Scene) -> Edit:
    """Hang up another backdrop."""
    colour = another(rng, list(BACKGROUND), scene.background)
    return Edit("background", colour, (person, replace(scene, background=colour)))


def change_clothing(rng: Generator, person: Identity, scene: Scene) -> Edit:
    """Wear another colour."""
    colour = another(rng, list(FABRIC), scene.cloth_colour)
    return Edit("clothing", colour, (person, replace(scene, cloth_colour=colour)))


def change_glasses(rng: Generator, person: Identity, scene: Scene) -> Edit | None:
    """Put glasses on."""
    if scene.glasses or scene.expression in ("eyes closed", "winking"):
        return None
    worn = ("glasses", "sunglasses")[rng.integers(2)]
    return Edit("glasses", worn, (person, replace(scene, glasses=worn)))


def change_expression(rng: Generator, person: Identity, scene: Scene) -> Edit:
    """Make another face."""
    face = another(rng, [name for name in EXPRESSION_WEIGHTS if name != "neutral"], scene.expression)
    return Edit("expression", face, (person, replace(scene, expression=face, actions=sample_actions(rng, face))))


def change_age(rng: Generator, person: Identity, scene: Scene) -> Edit:
    """Grow old, or young again; the hair stays."""
    age = "old" if person.age == "young" else "young"
    phenotype = person.phenotype | {"age": float(rng.uniform(*AGE_RANGES[age]))}
    return Edit("age", age, (replace(person, age=age, phenotype=phenotype), scene))


CHANGES: tuple[Callable[[Generator, Identity, Scene], Edit | None], ...] = (
    change_expression,
    change_hair,
    change_glasses,
    change_clothing,
    change_background,
    change_age,
)


def captions(before: Look, after: Look, value: str) -> tuple[str, str] | None:
    """Find the caption pair with the fewest different words whose second one names the new value."""

    def distance(pair: tuple[str, str]) -> int:
        blocks = difflib.SequenceMatcher(None, *(text.split() for text in pair)).get_opcodes()
        return sum(i2 - i1 + j2 - j1 for tag, i1, i2, j1, j2 in blocks if tag != "equal")

    named = value if value != "eyes closed" else "closed eyes"
    pairs = [(caption(*before, seed), caption(*after, seed)) for seed in range(TRIES)]
    pairs = [pair for pair in pairs if named in pair[1] and pair[0] != pair[1]]
    return min(pairs, key=distance) if pairs else None


def touched(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mask `(H, W)`, 255 where pictures `(H, W, 3)` differ, without specks and with a margin."""
    differs = np.abs(before.astype(int) - after).max(-1) > TOUCHED
    mask = Image.fromarray(np.where(differs, 255, 0).astype(np.uint8))
    for step in (ImageFilter.MedianFilter(3), ImageFilter.MaxFilter(GROWN), ImageFilter.MinFilter(SHRUNK)):
        mask = mask.filter(step)
    return np.asarray(mask)


def render_edits(assets: Path, out: Path, count: int, report: Callable[[int], object]) -> None:
    """Render edits 0 ... count - 1 into out: NNN.webp, NNN-edited.webp, NNN-mask.png; manifest.json comes last.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        out: Folder of the set.
        count: Number of edits; each has a person of its own, categories take turns.
        report: Called with the number of edits that are done.
    """
    from portraits.dataset import renderer  # needs numba, which choosing edits does not

    items: list[dict[str, object]] = []
    index = FIRST
    while len(items) < count:
        rng = held_out_generator(index)
        person = sample_identity(rng)
        scene = sample_scene(rng, person)
        edit = CHANGES[len(items) % len(CHANGES)](rng, person, scene)
        texts = captions((person, scene), edit.after, edit.value) if edit else None
        index += 1
        if edit is None or texts is None:
            continue
        before, after = renderer(assets)(person, scene), renderer(assets)(*edit.after)
        mask = touched(before, after)
        name = f"{len(items):03d}"
        pictures = {f"{name}.webp": before, f"{name}-edited.webp": after, f"{name}-mask.png": mask}
        for file, pixels in pictures.items():
            save = partial(Image.fromarray(pixels).save, **LOSSLESS[Path(file).suffix])
            write_whole(out / file, save)
        items.append(
            {
                "name": name,
                "identity_seed": HELD_OUT_SEED + index - 1,
                "category": edit.category,
                "value": edit.value,
                "source_prompt": texts[0],
                "target_prompt": texts[1],
                "attributes": identity_attributes(person) | scene_attributes(scene),
                "sha256": {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in pictures},
            }
        )
        report(len(items))
    write_json(out / "manifest.json", {"name": "Defense-Edit-Synth", "licence": "CC0-1.0", "items": items}, indent=1)
