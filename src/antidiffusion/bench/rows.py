"""The rows of a benchmark run, read without believing them."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_origin

ROWS, PICTURES = "rows.jsonl", "pictures"
"""In the folder of a run."""

KINDS = ("protection", "floor", "edit", "tuning")
CLEAN, UNTUNED, CONTROL, UNPURIFIED = "clean", "untuned", "random-sign", "none"
FAILED_ATTACK = "clean attack failed"
DRAWING = ("sampling_steps", "guidance")
"""The settings of a tuning attack that decide what the untuned model draws."""

Unit = tuple[str, str]
"""Data set and name of a picture or person; what different rows say of one unit is not independent."""


@dataclass(frozen=True)
class Row:
    """One measurement of a run.

    Arguments:
        key: Its name; no other row has it.
        kind: What was measured: "protection", "edit", "tuning", or "floor", what the untuned model draws.
        dataset, item: Of which picture or person.
        category: Of the edit.
        recipe: The protection, or "clean".
        surrogate: Model that the run's protections are made with.
        attack, setting, purifier: What the attacker did; "" and "" for kind protection, "none" without purifier.
        attacker: Model that the attacker used.
        seed: Of all randomness.
        budget: Of the protection in 1/255; None for clean.
        metrics: Figures by name; None where there is nothing to measure.
        flags: What is to be known before believing the figures.
        pictures: Paths from the rows' folder; the files may be gone.
        seconds, peak_memory_mb: What it cost; the memory is the peak of the process up to then, trials before included.
        settings, model_sha256, versions, backends: How it was made and measured.
    """

    key: str
    kind: str
    dataset: str
    item: str
    category: str
    recipe: str
    surrogate: str
    attack: str
    purifier: str
    setting: str
    attacker: str
    seed: int
    budget: int | float | None
    metrics: dict[str, float | None]
    flags: list[str]
    pictures: list[str]
    seconds: int | float | None
    peak_memory_mb: int | float | None
    settings: dict[str, Any]
    model_sha256: str
    versions: dict[str, Any]
    backends: dict[str, Any]

    @property
    def unit(self) -> Unit:
        return self.dataset, self.item

    @property
    def model(self) -> str:
        """What computed: the hash of its weights, shortened, and the precision; rows that do not tell are float32."""
        return f"{self.model_sha256[:12]} in {self.settings.get('precision', 'float32')}"

    @property
    def own(self) -> bool:
        """Whether the attacker has the protector's model."""
        return self.attacker == self.surrogate

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics and the cost."""
        return self.metrics | {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}


def drawing(settings: Mapping[str, Any]) -> str:
    """Name how a tuning attack draws, from its row's settings: the setting of the floor that it is compared with."""
    steps, guidance = (settings["attack"].get(name) for name in DRAWING)
    usual = "usual" if guidance is None else f"{guidance:g}"
    return f"{'usual' if steps is None else steps} steps, {usual} guidance"


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a run, in an order that does not depend on theirs.

    A last line without its end, which a killed run leaves, is left out with a warning.

    Arguments:
        path: The file, one JSON object a line.

    Raises:
        ValueError: If there is no row, a line is none, or two lines have one key.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: expected the rows of a run, got {error.strerror!r}; name its rows.jsonl") from error
    if rest:
        warnings.warn(f"{path}: the last line has no end, as a killed run leaves it: left out", stacklevel=2)
    if not lines:
        raise ValueError(f"{path}: expected rows, got none; let the run measure something first")
    rows: dict[str, Row] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line, f"{path}, line {number}")
        if row.key in rows:
            got = f"key {row.key!r} of line {numbers[row.key]} again"
            raise ValueError(f"{path}, line {number}: expected a key of its own, got {got}; delete one of the lines")
        rows[row.key], numbers[row.key] = row, number
    return sorted(rows.values(), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    who = (KINDS.index(row.kind), row.dataset, row.item, row.recipe, row.surrogate, row.budget or 0)
    return (*who, row.attack, row.setting, row.attacker, row.purifier, row.seed, row.key)


def _row(line: bytes, where: str) -> Row:
    def refuse(expected: str, got: object) -> NoReturn:
        raise ValueError(f"{where}: expected {expected}, got {got}; mend or delete the line")

    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        refuse("a JSON object", repr(line[:40].decode(errors="replace")))
    if not isinstance(data, dict):
        refuse("a JSON object", type(data).__name__)
    for field in fields(Row):
        if field.name not in data:
            refuse(f"the field {field.name!r}", "none")
        kind: Any = field.type if isinstance(field.type, UnionType) else get_origin(field.type) or field.type
        if not isinstance(data[field.name], kind):
            refuse(f"{field.name!r} as {getattr(kind, '__name__', kind)}", repr(data[field.name]))
    if data["kind"] not in KINDS:
        refuse(f"a kind of {', '.join(KINDS)}", repr(data["kind"]))
    for name in ("flags", "pictures"):
        if not all(isinstance(entry, str) for entry in data[name]):
            refuse(f"texts in {name!r}", data[name])
    figures = data["metrics"] | {name: data[name] for name in ("budget", "seconds", "peak_memory_mb")}
    for name, value in figures.items():
        if not (value is None or (isinstance(value, int | float) and math.isfinite(value))):
            refuse(f"a finite number or null as {name!r}", repr(value))
    return Row(**{field.name: data[field.name] for field in fields(Row)})
