"""Small plans and data sets for tests of the benchmark."""

from pathlib import Path

import numpy as np
from command_line import draw
from PIL import Image

from antidiffusion.data import people

PLAN = """
surrogate = "{model}"
purifiers = ["bit-depth"]
[recipes]
advdm = {{ steps = 1 }}
[edits]
dataset = "pictures"
attacks.sdedit = {{ steps = 2 }}
"""


def write_plan(folder: Path, model: object, text: str = PLAN, items: int = 2) -> Path:
    """Write a plan and the data set beside it that it names."""
    for number in range(items):
        item = folder / "pictures" / f"item {number}"
        item.mkdir(parents=True, exist_ok=True)
        draw(item / "example.png", number)
        (item / "prompt.txt").write_text(f"a person with hat {number}")
    path = folder / "plan.toml"
    path.write_text(text.format(model=model))
    return path


def write_person(folder: Path) -> None:
    """Write a synthetic person's photos at half size, so that the tests' small model sees faces."""
    source = people.synthetic() / "p00"
    for photo in source.rglob("*.webp"):
        target = folder / "people" / "p00" / photo.relative_to(source).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(photo).convert("RGB"))).save(target)
