"""One page that shows what a run did: each picture before and after, the difference, and the card's figures."""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from antidiffusion.card import relative
from antidiffusion.failures import printable
from antidiffusion.pictures.files import atomic
from antidiffusion.pictures.picture import Bytes, Picture, PictureError

MAGNIFY = 8
SIDE = 360
"""Longest side of a picture on the page: enough to see a pattern, too little to be worth stealing."""
AT_MOST = 200
"""Pictures on a page, which a browser has to hold."""


@dataclass(frozen=True)
class Shown:
    """A picture's row: its name, three data URIs (the first and the last are None without an original), its card."""

    name: str
    before: str | None
    after: str
    difference: str | None
    card: dict[str, Any]


def write_preview(page: Path, pairs: Iterable[tuple[Path, Path, dict[str, Any]]], total: int) -> None:
    """Write the page, one picture after the other in memory; an older page is replaced.

    Arguments:
        page: HTML file to write.
        pairs: Of each picture the original's path, the protected one's and the card.
        total: How many pairs there are; the first AT_MOST are shown.

    Raises:
        PictureError: If the page cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("antidiffusion", "templates"), autoescape=True, undefined=StrictUndefined
    )
    rows = (shown(*pair, page.parent) for pair in islice(pairs, AT_MOST))
    settings = {"magnify": MAGNIFY, "total": total, "at_most": AT_MOST}
    with atomic(page, overwrite=True) as (part,), part.open("w", encoding="utf-8") as file:
        file.writelines(environment.get_template("preview.html").generate(rows=rows, **settings))


def shown(source: Path, target: Path, card: dict[str, Any], folder: Path) -> Shown:
    """Read both pictures and draw them small.

    Arguments:
        source, target, card: As in `write_preview`.
        folder: Of the page.
    """
    made = Picture.read(target)
    name = printable(relative(target, folder))
    try:
        clean = Picture.read(source).resized(max(made.pixels.shape))
    except PictureError:  # gone since
        return Shown(name, None, drawn(made.pixels), None, card)
    if clean.pixels.shape != made.pixels.shape:
        return Shown(name, None, drawn(made.pixels), None, card)
    difference = np.clip(128 + MAGNIFY * (made.pixels.astype(np.int16) - clean.pixels), 0, 255).astype(np.uint8)
    return Shown(name, drawn(clean.pixels), drawn(made.pixels), drawn(cut(difference)), card)


def cut(pixels: Bytes) -> Bytes:
    """Cut the middle out at full size, SIDE a side at most: a scaled difference would average to nothing."""
    top, left = (max(0, (length - SIDE) // 2) for length in pixels.shape[:2])
    return pixels[top : top + SIDE, left : left + SIDE]


def drawn(pixels: Bytes) -> str:
    """Return pixels `(H, W, C)` uint8 as the data URI of a picture of at most SIDE a side."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def page_for(targets: Iterator[Path]) -> Path:
    """Return where the page of a run goes: beside its one picture, or into the folder that holds all of them."""
    first = next(targets)
    folder, several = first.parent, False
    for target in targets:
        several = True
        while not target.is_relative_to(folder):
            folder = folder.parent
    return folder / "preview.html" if several else first.with_name(f"{first.name}.html")
