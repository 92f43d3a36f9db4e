"""Synthetic people with three sets of photos each, in Anti-DreamBooth's layout, to measure protections of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from portraits.files import write_whole
from portraits.identity import sample_identity
from portraits.model import shape_head
from portraits.sampling import held_out_generator
from portraits.scene import sample_scene

FIRST = 500  # held-out identities below are for personalisation, those from 1000 on for edits
SETS = ("set_A", "set_B", "set_C")
PHOTOS = 4  # in each set
WEBP = {"format": "WEBP", "quality": 92, "method": 6}  # as photos are published: lossy


def render_people(assets: Path, out: Path, count: int, report: Callable[[int], object]) -> None:
    """Render people 0 ... count - 1 into out/pNN/set_X/N.webp.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        out: Folder of the set.
        count: Number of people.
        report: Called with the number of people that are done.
    """
    from portraits.dataset import renderer  # needs numba

    for index in range(count):
        rng = held_out_generator(FIRST + index)
        person = sample_identity(rng)
        rest = shape_head(renderer(assets).model, person)
        for name in SETS:
            for number in range(PHOTOS):
                photo = Image.fromarray(renderer(assets)(person, sample_scene(rng, person), rest))
                write_whole(out / f"p{index:02d}" / name / f"{number}.webp", partial(photo.save, **WEBP))
        report(index + 1)
