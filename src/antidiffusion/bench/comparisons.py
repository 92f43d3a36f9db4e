"""Comparisons that need care: at equal visibility, with shortened baselines, and with what others report."""

import json
from collections.abc import Sequence

import numpy as np

from antidiffusion.bench.estimates import by_attack, by_recipe, estimate, grouped, is_control, per_item, unpurified
from antidiffusion.bench.rows import Row
from antidiffusion.bench.tables import NOTHING, Cell, Table, count_of, overall, text_of
from antidiffusion.metrics.table import PRIMARY, heading

PUBLISHED: dict[str, dict[str, float]] = {
    "PhotoGuardDiffusion": {"steps": 200, "draws": 10},
    "DiffusionGuard": {"steps": 800},
    "FSMG": {"tuning_steps": 1000},
    "ASPL": {"rounds": 50},
    "SimAC": {"rounds": 50},
}
"""Lengths in the papers or their released code, by class and setting, of the recipes that may be run shorter."""

YARDSTICK_SOURCE = (
    "DreamBooth on Stable Diffusion 2.1 unless said otherwise, bound 7/255, prompt 'a photo of sks person', as "
    "DLADiff reports (arXiv 2511.19910): other people, other settings, and FID on Inception's features, where KID here "
    "is on CLIP's. Orders may be compared, figures may not."
)
YARDSTICK = (
    ("CelebA-HQ", "none", 0.996, 0.580, 53),
    ("CelebA-HQ", "Mist", 0.980, 0.516, 95),
    ("CelebA-HQ", "Anti-DreamBooth", 0.851, 0.452, 144),
    ("CelebA-HQ", "Anti-Diffusion", 0.802, 0.425, 165),
    ("VGGFace2", "none", 0.928, 0.521, 63),
    ("VGGFace2", "Mist", 0.844, 0.268, 176),
    ("VGGFace2", "Anti-DreamBooth", 0.677, 0.300, 187),
    ("VGGFace2", "Anti-Diffusion", 0.824, 0.318, 165),
    ("LoRA", "none", 0.942, 0.433, 59),
    ("LoRA", "Anti-DreamBooth", 0.776, 0.280, 152),
    ("LoRA", "Anti-Diffusion", 0.825, 0.298, 147),
    ("made on 2.1, attacked with 1.5", "Anti-DreamBooth", 0.606, 0.323, 239),
    ("made on 2.1, attacked with 1.5", "Anti-Diffusion", 0.258, 0.139, 312),
)
"""Data, protection, detection rate, ISM with ArcFace, FID."""


def lengths(rows: Sequence[Row]) -> list[Table]:
    """Say which recipes ran shorter than published, and what the plan notes of a recipe."""
    lines = []
    for recipe, own in by_recipe(row for row in rows if row.kind == "protection").items():
        said = dict.fromkeys(text for row in own if (text := _shortened(row)))
        if said:
            lines.append((Cell(recipe), Cell("; ".join(said))))
    return [Table("Not as published", ("recipe", "what differs"), tuple(lines))] if lines else []


def _shortened(row: Row) -> str:
    settings = row.settings.get("recipe") or {}
    published = PUBLISHED.get(settings.get("class", ""), {})
    parts = [
        f"{name} {settings[name]:g} instead of {value:g}"
        for name, value in published.items()
        if name in settings and settings[name] < value
    ]
    return "; ".join([*parts, *filter(None, [row.settings.get("note")])])


def equal_visibility(rows: Sequence[Row]) -> list[Table]:
    """Compare recipes that were run at several budgets where all are as visible as the control.

    Between two budgets figures are interpolated linearly; beyond them nothing is said.
    """
    published = [row for row in rows if row.kind == "protection"]
    figure = next((name for name in ("lpips", "delta_e") if all(name in row.metrics for row in published)), None)
    control = [row for row in published if is_control(row.recipe)]
    if not published or figure is None or not control:
        return []
    by_name = by_recipe(published)
    seen = {name: found.mean for name, own in by_name.items() if (found := estimate(per_item(own, figure)))}
    wanted = estimate(per_item(control, figure))
    methods = grouped(by_name, lambda name: _method(by_name[name][0]))
    tables = []
    for kind, metric in PRIMARY.items():
        heights, lines = overall(rows, kind), []
        for names in methods.values():
            points = sorted((seen[name], heights[name]) for name in names if name in seen and name in heights)
            if len(points) < 2 or wanted is None:
                continue
            xs, ys = zip(*points, strict=True)
            inside = xs[0] <= wanted.mean <= xs[-1]
            value = f"{np.interp(wanted.mean, xs, ys):.3f}" if inside else NOTHING
            lines.append((Cell(", ".join(names)), Cell(f"{xs[0]:.3f} to {xs[-1]:.3f}"), Cell(value)))
        if lines and wanted:
            title = f"{kind} at equal {figure}, {wanted.mean:.3f} as the control's, {count_of(published)}"
            note = "Interpolated between budgets; a dash where the budgets do not reach so far."
            tables.append(Table(title, ("recipe at its budgets", figure, heading(metric)), tuple(lines), note))
    return tables


def _method(row: Row) -> str:
    """Return what a recipe is apart from its budget."""
    settings = row.settings.get("recipe") or {"name": row.recipe}
    return json.dumps([row.surrogate, {key: value for key, value in settings.items() if key != "budget"}])


def as_papers(rows: Sequence[Row]) -> list[Table]:
    """Print tuning as the papers do, and what others report beside it, where ArcFace measured."""
    measured = [row for row in unpurified(rows) if row.kind == "tuning" and row.own]
    measured = [row for row in measured if row.backends.get("faces", "").startswith("ArcFace")]
    if not measured:
        return []
    tables = []
    for title, group in by_attack(measured).items():
        lines = []
        for recipe, own in by_recipe(group).items():
            lost = {unit: 1 - value for unit, value in per_item(own, "fdfr").items()}
            figures = (estimate(lost), estimate(per_item(own, "ism")), estimate(per_item(own, "kid")))
            lines.append((Cell(recipe), *(Cell(text_of(found, 3)) for found in figures)))
        columns = ("recipe", "detection rate ↓", heading("ism"), heading("kid"))
        tables.append(Table(f"{title}, {count_of(group)}", columns, tuple(lines)))
    outside = tuple(
        tuple(map(Cell, (data, recipe, f"{rate:.3f}", f"{ism:.3f}", str(fid))))
        for data, recipe, rate, ism, fid in YARDSTICK
    )
    reported = ("data", "recipe", "detection rate ↓", "ism ↓", "FID ↑")
    return [*tables, Table("What others report", reported, outside, YARDSTICK_SOURCE)]
