"""Made-up rows of a benchmark run."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from antidiffusion.bench.rows import Row

NUMBERS = count()
FAILED = ["clean attack failed"]


def row(recipe: str, item: str = "000", **fields: Any) -> Row:
    """Build a row: an edit by masactrl with the protector's own model, unless said otherwise."""
    kind = fields.get("kind", "edit")
    values: dict[str, Any] = {
        "key": f"{next(NUMBERS):016x}",
        "kind": kind,
        "dataset": "synth",
        "item": item,
        "category": "hair",
        "recipe": recipe,
        "surrogate": "mini",
        "attack": "" if kind == "protection" else "masactrl",
        "purifier": "none",
        "setting": "",
        "attacker": "mini",
        "seed": 0,
        "budget": None if recipe == "clean" else 8.0,
        "metrics": {},
        "flags": [],
        "pictures": [],
        "seconds": 2.0,
        "peak_memory_mb": 800,
        "settings": {},
        "model_sha256": "0123456789abcdef",
        "versions": {"antidiffusion": "0.1.0"},
        "backends": {"faces": "dlib"},
    }
    return Row(**values | fields)


def edit(recipe: str, item: str, ssim: float, **fields: Any) -> Row:
    return row(recipe, item, metrics={"ssim_to_clean": ssim}, **fields)


def tuned(recipe: str, item: str, distance: float | None, **fields: Any) -> Row:
    metrics = {"distance": distance, "likeness": None if distance is None else 1 - distance}
    values = {"kind": "tuning", "dataset": "people", "attack": "lora", "metrics": metrics}
    values["settings"] = {"attack": {"sampling_steps": 5, "guidance": 3.0}}
    return row(recipe, item, **values | fields)


def floor(item: str, distance: float, **fields: Any) -> Row:
    """What the untuned model draws, with the settings of `tuned`."""
    values = {"kind": "floor", "attack": "", "setting": "5 steps, 3 guidance"}
    return tuned("clean", item, distance, **values | fields)


def run() -> list[Row]:
    """Three recipes, two items, an edit and a tuning, one purifier, another attacker, one failed attack."""
    rows = []
    for item in ("000", "001", "002"):
        for number, recipe in enumerate(("random-sign", "advdm", "mist")):
            for dataset in ("synth", "people"):
                figures = {"linf": 8, "psnr": 30.0 + number, "loss_ratio": 1.0 + number}
                rows.append(row(recipe, item, kind="protection", dataset=dataset, metrics=figures))
            for washed in ("none", "jpeg-75", "blur"):
                rows.append(edit(recipe, item, (0.9 if washed == "none" else 0.95) - 0.1 * number, purifier=washed))
            rows.append(edit(recipe, item, 0.95 - 0.1 * number, attacker="other", model_sha256="f" * 16))
            rows.append(tuned(recipe, item, 0.3 + 0.1 * number, setting="all protected"))
        rows.append(row("clean", item, metrics={"success": 1}))
        rows.append(tuned("clean", item, 0.2, setting="all protected"))
    return [*rows, edit("advdm", "003", 0.1, flags=FAILED), edit("mist", "003", 0.9, flags=FAILED)]


def write_rows(rows: Iterable[Row], path: Path | str) -> Path:
    Path(path).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return Path(path)
