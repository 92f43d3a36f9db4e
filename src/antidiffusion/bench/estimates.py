"""Figures over the items of a run: groups of rows, means with intervals, ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from antidiffusion.bench.rows import CLEAN, CONTROL, FAILED_ATTACK, UNPURIFIED, UNTUNED, Row, Unit
from antidiffusion.metrics.statistics import Floats, percentiles, resample
from antidiffusion.metrics.table import PRIMARY

SEED = 0
FEWEST = 8
"""Items of a data set below which no interval is printed: it would be too narrow to mean what it says."""

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """The mean over `count` items and its 95 % interval, None where too few items leave it unknown."""

    mean: float
    interval: tuple[float, float] | None
    count: int


def sound(rows: Iterable[Row]) -> list[Row]:
    """Leave out the rows whose attack fails on the clean picture already: they prove nothing."""
    return [row for row in rows if FAILED_ATTACK not in row.flags]


def unpurified(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.purifier == UNPURIFIED]


def named_apart(rows: Sequence[Row]) -> list[Row]:
    """Put model and budget into the recipes' names where the rows hold several, so that nothing averages over them."""
    made = [row for row in rows if row.recipe != CLEAN]
    surrogates = len({row.surrogate for row in made}) > 1
    budgets = len({row.budget for row in made}) > 1

    def named(row: Row) -> Row:
        parts = [row.surrogate] * surrogates + [f"{row.budget or 0:g}/255"] * budgets
        return replace(row, recipe=f"{row.recipe} ({', '.join(parts)})") if parts and row.recipe != CLEAN else row

    return [named(row) for row in rows]


def is_control(recipe: str) -> bool:
    """Whether a recipe, as from `named_apart`, is the control."""
    return recipe == CONTROL or recipe.startswith(f"{CONTROL} (")


def by_recipe(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by recipe: the baselines first, then the control, then by name."""
    return grouped(
        rows, lambda row: row.recipe, lambda name: (name != CLEAN, name != UNTUNED, not is_control(name), name)
    )


def by_attack(rows: Iterable[Row], attackers: bool = True) -> dict[str, list[Row]]:
    """Group the rows of attacks by attack and setting, and by attacker if there are several and `attackers` is true."""
    rows = [row for row in rows if row.kind in PRIMARY]
    several = attackers and len({row.attacker for row in rows}) > 1

    def title(row: Row) -> str:
        parts = [row.attack or "no name", row.setting, f"by {row.attacker}" if several else ""]
        return ", ".join(part for part in parts if part)

    return grouped(rows, title)


def grouped(rows: Iterable[T], key: Callable[[T], str], order: Callable[[str], Any] = str) -> dict[str, list[T]]:
    """Group by a name, in the order of the names."""
    found: dict[str, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return {name: found[name] for name in sorted(found, key=order)}


def per_item(rows: Iterable[Row], metric: str) -> dict[Unit, float]:
    """Average a figure over the rows of each item that have it."""
    found: dict[Unit, list[float]] = {}
    for row in rows:
        if (value := row.figures.get(metric)) is not None:
            found.setdefault(row.unit, []).append(value)
    return {unit: fmean(found[unit]) for unit in sorted(found)}


def estimate(values: Mapping[Unit, float]) -> Estimate | None:
    """Return the mean over items, which are drawn anew within each data set for the interval; None without items."""
    if not values:
        return None
    drawn, interval = draws(tuple(dataset for dataset, _ in values)), None
    if drawn is not None:
        interval = percentiles(np.array(list(values.values()))[drawn].mean(1))
    return Estimate(fmean(values.values()), interval, len(values))


def share(values: Mapping[Unit, float], low: Mapping[Unit, float], high: Mapping[Unit, float]) -> Estimate | None:
    """Return where the mean lies on the way from that of `low`, 0, to that of `high`, 1, over the items of all three.

    Returns:
        The ratio of means, whose interval draws the items of all three together; None without items, or where `high` is
        not above `low`.
    """
    units = [unit for unit in values if unit in low and unit in high]
    if not units:
        return None
    table = np.array([[found[unit] for found in (values, low, high)] for unit in units])
    if table[:, 2].mean() <= table[:, 1].mean():
        return None

    def ratio(means: Floats) -> Floats:
        value, bottom, top = np.moveaxis(means, -1, 0)
        return (value - bottom) / np.where(top > bottom, top - bottom, np.nan)

    drawn, interval = draws(tuple(dataset for dataset, _ in units)), None
    if drawn is not None:
        resampled = ratio(table[drawn].mean(1))
        interval = percentiles(resampled[np.isfinite(resampled)])
    return Estimate(float(ratio(table.mean(0))), interval, len(units))


def ranks(counts: Floats, scores: Floats) -> Floats:
    """Rank recipes by the mean over items that are drawn so many times.

    Arguments:
        counts: How often each item is drawn, `(R, units)`.
        scores: Of each recipe for each item, less for the better, NaN where there is none, `(units, recipes)`.

    Returns:
        Ranks `(R, recipes)` from 1, ties averaged; NaN where no drawn item has a score.
    """
    present = counts @ np.isfinite(scores)
    means = counts @ np.nan_to_num(scores) / np.where(present > 0, present, np.nan)
    means = means.round(9)  # sums of equal figures may differ in the last bits
    here, there = means[:, :, None], means[:, None, :]
    found = 1 + (there < here).sum(2) + ((there == here).sum(2) - 1) / 2
    return np.where(np.isnan(means), np.nan, found)


def mean_rank(attacks: Sequence[Floats]) -> Floats:
    """Average ranks `(R, recipes)` over the attacks that have them."""
    stacked = np.stack(attacks)
    present = np.isfinite(stacked).sum(0)
    return np.nansum(stacked, 0) / np.where(present > 0, present, np.nan)


def draws(strata: tuple[str, ...]) -> npt.NDArray[np.intp] | None:
    """Return resamples `(R, N)` of items, whose order within a data set stays; None if one has fewer than `FEWEST`."""
    return _draws(strata) if min(map(strata.count, set(strata))) >= FEWEST else None


@lru_cache(maxsize=64)
def _draws(strata: tuple[str, ...]) -> npt.NDArray[np.intp]:
    return resample(strata, seed=SEED)
