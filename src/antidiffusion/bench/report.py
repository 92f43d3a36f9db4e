"""A benchmark run's rows as tables that can be trusted: one HTML page, Markdown, and CSV."""

import csv
import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from antidiffusion.bench import comparisons, figures, tables
from antidiffusion.bench.estimates import FEWEST, named_apart
from antidiffusion.bench.rows import Row, read_rows
from antidiffusion.bench.tables import Table
from antidiffusion.metrics.table import PRIMARY, RANKED, place
from antidiffusion.pictures.files import atomic

__all__ = ["expect_suffix", "read_rows", "render", "to_csv", "to_html", "to_markdown", "write"]

TITLE = "Anti-Diffusion benchmark"
LEAD = (
    "A protection raises an attacker's cost; it is no guarantee. Figures are means over items (pictures or people), "
    f"each averaged over its seeds first, with 95 % bootstrap intervals where a data set has at least {FEWEST} items, "
    "which are drawn anew within it. n counts items; it is given in a cell where some lack a "
    "figure. ↑ and ↓ say what is better for the protector."
)
SECTIONS = {
    "Protection": (
        tables.protection,
        "Measured on the written files; linf in 1/255; delta_e is S-CIELAB's difference at 40 pixels a degree, mean "
        "and percentiles, of which 2.3 is just noticed. peak_memory_mb is the process's so far and ranks nothing.",
    ),
    "Lengths": (comparisons.lengths, "Recipes that ran shorter than their papers or released code have them."),
    "Attacks": (
        tables.attacks,
        "All rows without purifier, also those whose attack fails on the clean picture. "
        "Clean is the attack's baseline, untuned what the model draws without tuning, random-sign the control; bold is "
        "the best protection. ssim_autoencoder is what encoding and decoding alone make of the protected picture, "
        "beside the clean one's: the part of the difference that no edit made. An edit obeys that does what was asked, "
        "to the same person, and leaves the rest alone.",
    ),
    "Ranking": (
        tables.ranking,
        f"Whether the result differs, by {' and '.join(PRIMARY.values())}; and whether edits still do what was asked, "
        f"by {RANKED['edit'][1]}. Without purifier, where the attacker has the protector's model. The mean rank's "
        "interval comes from the same resamples of items for all recipes.",
    ),
    "Equal visibility": (
        comparisons.equal_visibility,
        "One L-infinity budget is not one visibility: recipes that were run at several budgets, where all are as "
        "visible as the control.",
    ),
    "As papers print it": (comparisons.as_papers, "Tuning to people by an attacker with the protector's model."),
    "Purifiers": (
        tables.purifiers,
        "What the attacker washes pictures with first. Rows of attacks that fail on the clean picture are left out.",
    ),
    "Transfer": (
        tables.transfer,
        "Attackers with the protector's model and with others. "
        "Rows of attacks that fail on the clean picture are left out.",
    ),
}


def to_html(rows: Sequence[Row], folder: Path) -> str:
    """Render one page that needs no other file.

    Arguments:
        rows: From `read_rows`.
        folder: Where the pictures' paths begin: the rows' folder.
    """
    rows = named_apart(rows)
    environment = Environment(
        loader=PackageLoader("antidiffusion", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=TITLE,
        lead=LEAD,
        head=tables.head(rows),
        sections=_sections(rows),
        plots=figures.plots(rows),
        grids=figures.grids(rows, folder),
        size=figures,
    )


def to_markdown(rows: Sequence[Row]) -> str:
    """Render the tables but not the plots and pictures."""
    rows = named_apart(rows)
    parts = [f"# {TITLE}", LEAD, *map(_markdown, tables.head(rows))]
    for name, (found, note) in _sections(rows).items():
        parts += [f"## {name}", note, *map(_markdown, found)]
    return "\n\n".join(parts) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Render one flat line a row, a column for each metric."""
    metrics = sorted({metric for row in rows for metric in row.metrics}, key=place)
    names = ("key", "kind", "dataset", "item", "category", "recipe", "surrogate", "attack", "purifier", "setting")
    plain = (*names, "attacker", "seed", "budget", "seconds", "peak_memory_mb", "model_sha256")
    lists, objects = ("flags", "pictures"), ("settings", "versions", "backends")
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*plain, *metrics, *lists, *objects])
    for row in rows:
        fixed = [getattr(row, name) for name in plain]
        texts = ["; ".join(getattr(row, name)) for name in lists]
        texts += [json.dumps(getattr(row, name), sort_keys=True, ensure_ascii=False) for name in objects]
        writer.writerow([*fixed, *(row.metrics.get(metric) for metric in metrics), *texts])
    return buffer.getvalue()


def expect_suffix(path: Path) -> None:
    """Raise ValueError if a file name does not say in which format to write it."""
    if path.suffix.lower() not in RENDERERS:
        raise ValueError(f"expected an output of {', '.join(RENDERERS)}, got {path.name}; name it report.html")


RENDERERS: dict[str, Callable[[Sequence[Row], Path], str]] = {
    ".html": to_html,
    ".csv": lambda rows, folder: to_csv(rows),
    ".md": lambda rows, folder: to_markdown(rows),
}


def render(rows: Sequence[Row], folder: Path, output: Path) -> str:
    """Render the format that the output's suffix names; `rows` and `folder` as in `to_html`."""
    expect_suffix(output)
    return RENDERERS[output.suffix.lower()](rows, folder)


def write(text: str, path: Path) -> None:
    """Write a file that is there whole or not at all."""
    with atomic(path, overwrite=True) as (part,):
        part.write_text(text, encoding="utf-8", newline="")


def _sections(rows: Sequence[Row]) -> dict[str, tuple[list[Table], str]]:
    return {name: (found, note) for name, (build, note) in SECTIONS.items() if (found := build(rows))}


def _markdown(table: Table) -> str:
    lines = [table.columns, ("---",) * len(table.columns)]
    for line in table.lines:
        lines.append(tuple(f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text) for cell in line))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"### {_escaped(table.title)}", text, table.note) if part)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
