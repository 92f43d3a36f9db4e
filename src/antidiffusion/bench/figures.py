"""A run's plots, as numbers for an SVG, and its pictures side by side, as data URIs."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image

from antidiffusion.bench.estimates import by_attack, by_recipe, estimate, per_item, unpurified
from antidiffusion.bench.rows import Row, Unit
from antidiffusion.bench.tables import overall
from antidiffusion.metrics.table import AXES, PRIMARY, known

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 380, 60, 340, 16  # SVG units
LABEL = 15  # height of a label
MAX_SIDE = 160
MAX_ITEMS = 4
MAX_BYTES = 2_000_000  # of all pictures as data URIs
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow says of damaged files


@dataclass(frozen=True)
class Point:
    """A recipe in a plot; its label stands at `label_y`, left of the point if `left`."""

    name: str
    x: float
    y: float
    label_y: float
    left: bool


@dataclass(frozen=True)
class Plot:
    """Protection, up for the better, against a figure of what is published."""

    title: str
    metric: str
    axis: str
    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Grid:
    """Of one item a line of pictures for each recipe; data URIs, "" where there is none."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def plots(rows: Sequence[Row]) -> list[Plot]:
    """Draw each kind of attack: the primary metric's mean over attacks against each of `AXES`."""
    found = []
    for kind in PRIMARY:
        datasets = {row.dataset for row in rows if row.kind == kind}
        published = by_recipe(row for row in rows if row.kind == "protection" and row.dataset in datasets)
        heights = overall(rows, kind)
        for figure in AXES:
            x = {recipe: value for recipe, own in published.items() if (value := estimate(per_item(own, figure)))}
            if places := {recipe: (x[recipe].mean, y) for recipe, y in heights.items() if recipe in x}:
                found.append(_plot(kind, figure, places))
    return found


def _plot(kind: str, figure: str, places: dict[str, tuple[float, float]]) -> Plot:
    metric = PRIMARY[kind]
    xs, ys = zip(*places.values(), strict=True)
    top, bottom = (max(ys), min(ys)) if known(metric).better > 0 else (min(ys), max(ys))
    left, right = min(xs), max(xs)

    def place(value: float, start: float, end: float, low: float, high: float) -> float:
        share = (value - start) / (end - start) if end != start else 0.5
        return round(low + share * (high - low), 1)

    def horizontal(x: float) -> float:
        return place(x, left, right, LEFT + 30, WIDTH - 30)

    def vertical(y: float) -> float:
        return place(y, top, bottom, TOP + 20, BOTTOM - 20)

    points: list[Point] = []
    for name, (x, y) in sorted(places.items(), key=lambda entry: (vertical(entry[1][1]), entry[0])):
        below = points[-1].label_y + LABEL if points else 0.0
        above = BOTTOM - LABEL * (len(places) - len(points))  # leaves room for those that follow
        at = horizontal(x)
        points.append(Point(name, at, vertical(y), min(max(vertical(y), below), above), at > (LEFT + WIDTH) / 2))
    x_ticks = tuple((horizontal(x), f"{x:.1f}") for x in sorted({left, (left + right) / 2, right}))
    y_ticks = tuple((vertical(y), f"{y:.3f}") for y in sorted({top, (top + bottom) / 2, bottom}))
    return Plot(kind, metric, AXES[figure], tuple(points), x_ticks, y_ticks)


def grids(rows: Sequence[Row], folder: Path) -> list[Grid]:
    """Show a few items of every data set: what is published, and what each attack makes of it.

    Files are embedded as they are if they are small PNG files, else as thumbnails; as WebP if the page got too large.

    Arguments:
        rows: Of the run.
        folder: Where the pictures' paths begin. Those that are gone, damaged or elsewhere are left out.
    """
    kept = [row for row in unpurified(rows) if row.own and row.pictures]
    units = sorted({row.unit for row in kept if row.kind != "protection"})
    turns = [(turn, unit) for _, own in groupby(units, lambda unit: unit[0]) for turn, unit in enumerate(own)]
    shown = [unit for _, unit in sorted(turns)[:MAX_ITEMS]]
    for lossy in (False, True):
        found = [grid for unit in shown if (grid := _grid(kept, unit, folder, lossy)).lines]
        if _bytes(found) <= MAX_BYTES:
            break
    while _bytes(found) > MAX_BYTES:
        found.pop()
    return found


def _grid(rows: Sequence[Row], unit: Unit, folder: Path, lossy: bool) -> Grid:
    own = sorted((row for row in rows if row.unit == unit), key=lambda row: row.seed)
    columns = {"published": [row for row in own if row.kind == "protection"]} | by_attack(own)
    lines = []
    for recipe in by_recipe(own):
        line = tuple(
            _first([row for row in group if row.recipe == recipe], folder, lossy) for group in columns.values()
        )
        if any(line):
            lines.append((recipe, line))
    return Grid("/".join(unit), tuple(columns), tuple(lines))


def _first(rows: Sequence[Row], folder: Path, lossy: bool) -> str:
    """Return the first seed's first picture."""
    return _embed(folder, rows[0].pictures[0], lossy) if rows else ""


def _embed(folder: Path, name: str, lossy: bool) -> str:
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return ""
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as picture:
            picture.load()
            kind = "webp" if lossy else "png"
            if lossy or picture.format != "PNG" or max(picture.size) > MAX_SIDE:
                picture.thumbnail((MAX_SIDE, MAX_SIDE))
                buffer = BytesIO()
                picture.convert("RGB").save(buffer, kind, quality=80)
                content = buffer.getvalue()
    except UNREADABLE:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _bytes(found: Sequence[Grid]) -> int:
    return sum(len(picture) for grid in found for _, line in grid.lines for picture in line)
