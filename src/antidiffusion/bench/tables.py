"""What a run's rows say: each table a pure function of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import numpy.typing as npt

from antidiffusion.bench.estimates import (
    Estimate,
    by_attack,
    by_recipe,
    draws,
    estimate,
    grouped,
    is_control,
    mean_rank,
    per_item,
    ranks,
    share,
    sound,
    unpurified,
)
from antidiffusion.bench.rows import CLEAN, CONTROL, UNPURIFIED, UNTUNED, Row, Unit, drawing
from antidiffusion.metrics.statistics import Floats, percentiles
from antidiffusion.metrics.table import ARROWS, PRIMARY, RANKED, heading, known, place

NOTHING = "—"
ROWS_NAMED = 12


@dataclass(frozen=True)
class Cell:
    """A text, whether it is the best of its column, and its colour from 0 (worst for the protector) to 1."""

    text: str
    best: bool = False
    tone: float | None = None


@dataclass(frozen=True)
class Table:
    """Lines of cells under columns, the first of which names the line."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    note: str = ""


def head(rows: Sequence[Row]) -> list[Table]:
    """Say what was run, and which rows are to be read with care."""
    items: dict[str, set[str]] = {}
    for row in rows:
        items.setdefault(row.dataset, set()).add(row.item)
    models = {(row.surrogate if row.kind == "protection" else row.attacker, row.model) for row in rows}
    facts = {
        "rows": ", ".join(f"{len(group)} of {kind}" for kind, group in grouped(rows, lambda row: row.kind).items()),
        "data sets": ", ".join(f"{name}: {_count(len(found), 'item')}" for name, found in sorted(items.items())),
        "seeds": _listed(row.seed for row in rows),
        "models": _listed(f"{name} {model}" for name, model in models),
        "budgets": _listed(f"{row.budget:g}/255" for row in rows if row.budget is not None),
        "versions": _listed(f"{name} {version}" for row in rows for name, version in row.versions.items()),
        "measured with": _listed(f"{name}: {backend}" for row in rows for name, backend in row.backends.items()),
        "settings that differ": _listed(_inconsistent(rows)),
    }
    lines = tuple((Cell(name), Cell(fact)) for name, fact in facts.items() if fact)
    flagged = grouped(((flag, row) for row in rows for flag in sorted(set(row.flags))), lambda pair: pair[0])
    care = tuple(
        (Cell(flag), Cell(str(len(pairs))), Cell(_concerned([row for _, row in pairs])))
        for flag, pairs in flagged.items()
    )
    tables = [Table("What was run", ("", "of this run"), lines)]
    return [*tables, Table("Flags", ("flag", "rows", "which"), care)] if care else tables


def protection(rows: Sequence[Row]) -> list[Table]:
    """Say what each recipe does to a picture, and what it costs."""
    group = [row for row in rows if row.kind == "protection"]
    return [_metrics_table("What is published", group, ["seconds", "peak_memory_mb"])] if group else []


def attacks(rows: Sequence[Row]) -> list[Table]:
    """Say what each attack makes of each recipe's pictures, without purifier, and how that differs from the control.

    Tuning stands beside what the untuned model draws, where that was measured.
    """
    tables = []
    for title, group in by_attack(unpurified(rows)).items():
        primary, floor = PRIMARY[group[0].kind], _floor(rows, group)
        table = _metrics_table(title, [*floor, *group])
        lines = [(*line, Cell(_difference(group, line[0].text, primary))) for line in table.lines]
        columns = [*table.columns, f"{primary}, difference to {CONTROL}"]
        if floor:
            columns.append(f"{primary}, share of the way from {UNTUNED} to {CLEAN}{ARROWS[known(primary).better]}")
            lines = [(*line, Cell(_way(group, floor, line[0].text, primary))) for line in lines]
        tables.append(replace(table, columns=tuple(columns), lines=tuple(lines)))
    return tables


def _floor(rows: Sequence[Row], group: Sequence[Row]) -> list[Row]:
    """Return the rows of what the untuned models of a group's attackers draw with its settings."""
    untuned = [row for row in rows if row.kind == "floor"]
    if not untuned:
        return []
    drawn = {(row.attacker, drawing(row.settings)) for row in group if row.kind == "tuning"}
    return [replace(row, recipe=UNTUNED) for row in untuned if (row.attacker, row.setting) in drawn]


def _way(rows: Sequence[Row], floor: Sequence[Row], recipe: str, metric: str) -> str:
    """Return how far a recipe leaves the attack between what it draws untuned and unprotected, in per cent."""
    if recipe in (CLEAN, UNTUNED):
        return ""
    own, clean = ([row for row in rows if row.recipe == name] for name in (recipe, CLEAN))
    found = share(*(per_item(some, metric) for some in (own, floor, clean)))
    if found is None:
        return NOTHING
    ends = None if found.interval is None else (100 * found.interval[0], 100 * found.interval[1])
    return text_of(Estimate(100 * found.mean, ends, found.count), 0, len({row.unit for row in own})) + " %"


def ranking(rows: Sequence[Row]) -> list[Table]:
    """Rank the recipes in every attack by the protector's model, without purifier: by each figure of `RANKED` in turn.

    The interval of the mean rank comes from resamples of the items, the same for all recipes and attacks.
    """
    tables = []
    for turn in range(max(map(len, RANKED.values()))):
        metrics = {kind: names[turn] for kind, names in RANKED.items() if turn < len(names)}
        tables += _ranks(rows, metrics)
    return tables


def _ranks(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[Table]:
    """Rank by a figure for each kind of attack."""
    candidates = [row for row in unpurified(rows) if row.own and row.kind in metrics and row.recipe != CLEAN]
    kept = [row for row in sound(candidates) if row.figures.get(metrics[row.kind]) is not None]
    if not kept:
        return []
    recipes, groups, units = list(by_recipe(kept)), by_attack(kept), sorted({row.unit for row in kept})
    scores = [_scores(group, metrics[group[0].kind], recipes, units) for group in groups.values()]
    once = [ranks(np.ones((1, len(units))), score) for score in scores]
    mean = mean_rank(once)[0]
    resampled, drawn = draws(tuple(dataset for dataset, _ in units)), None
    if resampled is not None:
        counts = np.array([np.bincount(draw, minlength=len(units)) for draw in resampled], dtype=np.float64)
        drawn = mean_rank([ranks(counts, score) for score in scores])
    lines = []
    for k in sorted(range(len(recipes)), key=lambda k: (mean[k], recipes[k])):
        own = [float(rank[0, k]) for rank in once]
        interval = None if drawn is None else percentiles(drawn[np.isfinite(drawn[:, k]), k])
        took_part = sum(np.isfinite(own))
        text = text_of(Estimate(float(mean[k]), interval, 0), 2)
        text += f", {took_part} of {len(own)} attacks" if took_part < len(own) else ""
        cells = [_rank(rank, np.isfinite(score), k) for rank, score in zip(own, scores, strict=True)]
        lines.append((Cell(recipes[k]), Cell(text, mean[k] == np.nanmin(mean)), *cells))
    left_out = len(candidates) - len(sound(candidates))
    note = "1 is best for the protector."
    note += f" {_count(left_out, 'row')} left out because the attack fails on the clean picture already."
    by = " and ".join(name for kind, name in metrics.items() if any(row.kind == kind for row in kept))
    title = f"By {by}, {count_of(kept)}"
    columns = (f"{name}, n = {len({row.unit for row in group})}" for name, group in groups.items())
    return [Table(title, ("recipe", "mean rank", *columns), tuple(lines), note)]


def purifiers(rows: Sequence[Row]) -> list[Table]:
    """Say what washing the pictures first does to the primary metric, attack by attack."""
    tables = []
    for title, group in by_attack(sound(rows)).items():
        metric = PRIMARY[group[0].kind]
        names = sorted({row.purifier for row in group} - {UNPURIFIED})
        grid = {recipe: _by_purifier(own, metric) for recipe, own in by_recipe(group).items()}
        shade = _shading([value for line in grid.values() for value in line.values()], metric)
        lines = []
        for recipe, line in grid.items():
            washed = {name: line[name] for name in names if name in line}
            missing = f" ({len(washed)} of {len(names)})" if len(washed) < len(names) else ""
            worst = min(washed, key=lambda name: known(metric).better * washed[name], default="")
            summary = [
                shade(line.get(UNPURIFIED)),
                shade(fmean(washed.values()) if washed else None, missing),
                shade(washed.get(worst), f" ({worst})"),
            ]
            if line:
                lines.append((Cell(recipe), *summary, *(shade(washed.get(name)) for name in names)))
        columns = ("recipe", UNPURIFIED, "mean of purifiers", "worst of purifiers", *names)
        if names and lines:
            tables.append(Table(f"{title}: {heading(metric)}, {count_of(group)}", columns, tuple(lines)))
    return tables


def transfer(rows: Sequence[Row]) -> list[Table]:
    """Say how the primary metric holds against attackers with another model than the protector's, without purifier."""
    tables = []
    for title, group in by_attack(unpurified(sound(rows)), attackers=False).items():
        attackers, metric = sorted({row.attacker for row in group}), PRIMARY[group[0].kind]
        if len(attackers) < 2:
            continue
        lines, items = [], len({row.unit for row in group})
        for recipe, own in by_recipe(group).items():
            found = [_of([row for row in own if row.attacker == attacker], metric) for attacker in attackers]
            if any(found):
                lines.append((Cell(recipe), *(Cell(text_of(value, 3, items)) for value in found)))
        columns = ("recipe", *(f"by {attacker}" for attacker in attackers))
        tables.append(Table(f"{title}: {heading(metric)}, {count_of(group)}", columns, tuple(lines)))
    return tables


def overall(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Return the primary metric's mean over the attacks of a kind, as ranked, of the recipes that have them all."""
    kept = [row for row in unpurified(sound(rows)) if row.kind == kind and row.own]
    groups = [by_recipe(group) for group in by_attack(kept).values()]
    found = {recipe: [_of(group.get(recipe, []), PRIMARY[kind]) for group in groups] for recipe in by_recipe(kept)}
    return {name: fmean(each.mean for each in means if each) for name, means in found.items() if all(means)}


def _metrics_table(title: str, rows: Sequence[Row], more: Sequence[str] = ()) -> Table:
    present = {metric for row in rows for metric in row.metrics}
    metrics = [*sorted(present, key=place), *more]
    recipes = by_recipe(rows)
    items = len({row.unit for row in rows})
    columns = []
    for metric in metrics:
        found = {recipe: _of(own, metric) for recipe, own in recipes.items()}
        texts = {recipe: text_of(value, known(metric).digits, items) for recipe, value in found.items()}
        values = {recipe: value.mean for recipe, value in found.items() if value}
        if known(metric).largest:
            values = {recipe: max(per_item(own, metric).values()) for recipe, own in recipes.items() if found[recipe]}
            texts |= {recipe: f"{value:g}" for recipe, value in values.items()}
        best = _best({recipe: value for recipe, value in values.items() if recipe not in (CLEAN, UNTUNED)}, metric)
        columns.append([Cell(texts[recipe], recipe in best) for recipe in recipes])
    lines = tuple((Cell(recipe), *(column[i] for column in columns)) for i, recipe in enumerate(recipes))
    return Table(f"{title}, {count_of(rows)}", ("recipe", *map(heading, metrics)), lines)


def _difference(rows: Sequence[Row], recipe: str, metric: str) -> str:
    """Return the mean difference to the control over the items that both have, in words if it is for the worse."""
    if recipe in (CLEAN, UNTUNED) or is_control(recipe):
        return ""
    made = [row for row in rows if row.recipe == recipe]
    how = {(row.surrogate, row.budget) for row in made}
    own = per_item(made, metric)
    control = per_item((row for row in rows if is_control(row.recipe) and (row.surrogate, row.budget) in how), metric)
    found = estimate({unit: value - control[unit] for unit, value in own.items() if unit in control})
    text = text_of(found, 3, max(len(own), len(control)), sign="+")
    worse = found and found.interval and max(known(metric).better * end for end in found.interval) < 0
    return f"{text} worse than {CONTROL}" if worse else text


def _scores(rows: Sequence[Row], metric: str, recipes: Sequence[str], units: Sequence[Unit]) -> Floats:
    """Return a figure `(units, recipes)`, less for the better, NaN where there is none."""
    scores = np.full((len(units), len(recipes)), np.nan)
    for recipe, own in by_recipe(rows).items():
        for unit, value in per_item(own, metric).items():
            scores[units.index(unit), recipes.index(recipe)] = -known(metric).better * value
    return scores


def _by_purifier(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Return the mean under each purifier that has one."""
    found = {name: _of(washed, metric) for name, washed in grouped(rows, lambda row: row.purifier).items()}
    return {name: value.mean for name, value in found.items() if value}


def _rank(rank: float, present: npt.NDArray[np.bool_], recipe: int) -> Cell:
    """Write the rank of a recipe by an attack, with the number of its items if others have more; `(units, recipes)`."""
    if np.isnan(rank):
        return Cell(NOTHING)
    count = present[:, recipe].sum()
    return Cell(f"{rank:g}" + (f", n={count}" if count < present.any(1).sum() else ""), best=rank == 1)


def _shading(values: Sequence[float], metric: str) -> Callable[..., Cell]:
    """Return what makes a coloured cell of a value, on the scale of all values of its table."""
    low, high = (min(values), max(values)) if values else (0, 0)

    def cell(value: float | None, more: str = "") -> Cell:
        if value is None:
            return Cell(NOTHING)
        share = (value - low) / (high - low) if high > low else 0.5
        return Cell(f"{value:.3f}{more}", tone=round(share if known(metric).better > 0 else 1 - share, 3))

    return cell


def _of(rows: Iterable[Row], metric: str) -> Estimate | None:
    return estimate(per_item(rows, metric))


def text_of(found: Estimate | None, digits: int, items: int = 0, sign: str = "") -> str:
    """Write an estimate, with the number of its items if there should be more."""
    if found is None:
        return NOTHING
    form = f"{sign}.{digits}f"
    ends = "" if found.interval is None else " [{}, {}]".format(*(format(end, form) for end in found.interval))
    return f"{found.mean:{form}}{ends}" + (f", n={found.count}" if found.count < items else "")


def _best(values: Mapping[str, float], metric: str) -> set[str]:
    """Return the recipes whose value is best for the protector: none if nobody knows which is, or all are equal."""
    better = known(metric).better
    signed = {recipe: round(better * value, 9) for recipe, value in values.items()}
    top = max(signed.values(), default=0)
    return (
        {recipe for recipe, value in signed.items() if value == top}
        if better and min(signed.values(), default=top) < top
        else set()
    )


def count_of(rows: Sequence[Row]) -> str:
    """Say on how many items and seeds figures rest."""
    items, seeds = len({row.unit for row in rows}), len({row.seed for row in rows})
    return f"n = {items}, {_count(seeds, 'seed')}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in sorted(set(values), key=lambda value: (len(str(value)), str(value))))


def _concerned(rows: Sequence[Row]) -> str:
    def name(row: Row) -> str:
        by = "" if row.own else f"by {row.attacker}"
        attack = " ".join(part for part in (row.attack or row.kind, row.setting, by) if part)
        washed = "" if row.purifier == UNPURIFIED else f" after {row.purifier}"
        return f"{attack} of {row.recipe}{washed}, {row.dataset}/{row.item}, seed {row.seed} ({row.key})"

    more = f"; and {len(rows) - ROWS_NAMED} more, in the CSV" if len(rows) > ROWS_NAMED else ""
    return "; ".join(name(row) for row in rows[:ROWS_NAMED]) + more


def _inconsistent(rows: Sequence[Row]) -> Iterator[str]:
    """Name what ran with different settings, weights or precision under one name: its figures average over them."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for role, name in (("recipe", row.recipe), ("attack", row.attack)):
            if name and name != CLEAN:
                seen.setdefault(name, set()).add(json.dumps(row.settings.get(role), sort_keys=True))
        model = row.surrogate if row.kind == "protection" else row.attacker
        seen.setdefault(f"model {model}", set()).add(row.model)
    return (f"{name}: {len(found)}" for name, found in seen.items() if len(found) > 1)
