"""What a benchmark runs: recipes, attacks, purifiers, data sets and seeds of a TOML file, and the trials they make."""

import glob
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from antidiffusion.attacks import EDITS, TUNINGS
from antidiffusion.attacks.base import Attack
from antidiffusion.attacks.purify import PURIFIERS
from antidiffusion.attacks.tuned import Tuning
from antidiffusion.bench.rows import CLEAN, CONTROL, DRAWING, UNPURIFIED, drawing
from antidiffusion.bench.toml import changed, listed, names, only, table, typed
from antidiffusion.data import defense_edit, people
from antidiffusion.data.defense_edit import Item
from antidiffusion.data.people import Person
from antidiffusion.metrics.table import OPTIONAL
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.picture import READABLE
from antidiffusion.recipes import RECIPES, Recipe

T = TypeVar("T")

POSTERIORS = ("sample", "mean")
ALL, HALF = "all protected", "half clean"
DATASETS = {"defense-edit-synth": defense_edit.synthetic, "people-synth": people.synthetic}


@dataclass(frozen=True)
class Folder:
    """A protection made elsewhere: pictures named and sized as the data set's, without regard to the suffix.

    Arguments:
        folder: With `ITEM.png`, or `PERSON/PHOTO.png` for people.
    """

    folder: Path


@dataclass(frozen=True)
class Edits:
    """The attacks that change one picture, and the pictures."""

    dataset: str
    items: tuple[Item, ...]
    attacks: Mapping[str, Attack]


@dataclass(frozen=True)
class Tunings:
    """The attacks that tune to a person, the people, and what is drawn.

    Arguments:
        settings: `ALL`: tuned to the protected photos; `HALF`: half of them replaced by other, clean ones.
        prompt: The text that is tuned to and then drawn.
        other_prompt: Drawn too, with the same tuned model.
        drawn: Pictures of each prompt.
    """

    dataset: str
    people: tuple[Person, ...]
    attacks: Mapping[str, Tuning]
    settings: tuple[str, ...] = (ALL,)
    prompt: str = "a photo of sks person"
    other_prompt: str = "a dslr portrait of sks person"
    drawn: int = 4

    @property
    def texts(self) -> list[str]:
        """What is drawn, one text for each picture: the tuned prompt first."""
        return [self.prompt] * self.drawn + [self.other_prompt] * self.drawn


@dataclass(frozen=True)
class Trial:
    """One row: one protection of one item (a picture or a person), or one attack on it."""

    kind: str
    dataset: str
    item: str
    recipe: str
    attack: str
    setting: str
    purifier: str
    attacker: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a benchmark runs, read from TOML by `Plan.read`.

    Arguments:
        budget: L-infinity budget of every recipe in 1/255 units.
        surrogate: Model that the protections are made with.
        attackers: Models that attack; others than the surrogate show how protections transfer.
        seeds: Each decides a whole repetition.
        recipes: The protections by the names they get in the rows.
        edits, tunings: The attacks, or None.
        purifiers: Names in `PURIFIERS` that pictures are washed with before an attack, beside none.
        purified: The attacks before which that happens.
        metrics: Models that the user has beside what ships, see `antidiffusion.metrics.table.OPTIONAL`.
        posterior: What attackers' encoders give: a "sample" of the posterior, as scripts do, or its "mean".
        notes: By recipe what a reader of the tables should know, for example how it differs from its paper's.
    """

    budget: float
    surrogate: str
    attackers: tuple[str, ...]
    seeds: tuple[int, ...]
    recipes: Mapping[str, Recipe | Folder]
    edits: Edits | None = None
    tunings: Tunings | None = None
    purifiers: tuple[str, ...] = ()
    purified: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    posterior: str = "sample"
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, dataset: Path | None = None) -> "Plan":
        """Read a plan; paths in it are relative to its folder.

        Arguments:
            path: A TOML file as `default.toml` beside this module.
            dataset: Replaces the data set of the edits: a folder of the paper's layout, or one with a manifest.

        Raises:
            ValueError: If the file, a name or a setting in it is wrong; the sentence names it.
            OSError: If the file cannot be read.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected TOML, got {error}; see the plans that ship") from error
        if dataset is not None:
            content.setdefault("edits", {"attacks": {}})["dataset"] = str(dataset.absolute())
        try:
            return _plan(content, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def trials(self) -> Iterator[Trial]:
        """Yield every trial: protections, what untuned models draw, attacks on clean pictures, then all others."""
        repeated = [(group, seed) for group in self._groups() for seed in self.seeds]
        for (_, dataset, item, _), seed in repeated:
            for recipe in self.recipes:
                yield Trial("protection", dataset, item, recipe, "", "", UNPURIFIED, self.surrogate, seed)
        if self.tunings:
            untuned = [
                (person, seed, by) for person in self.tunings.people for seed in self.seeds for by in self.attackers
            ]
            for person, seed, attacker in untuned:
                for setting in self._floors():
                    who = (self.tunings.dataset, person.name, CLEAN, "", setting)
                    yield Trial("floor", *who, UNPURIFIED, attacker, seed)
        for recipes in ([CLEAN], list(self.recipes)):
            for (kind, dataset, item, attacks), seed in repeated:
                for attack, setting in attacks:
                    washed = self.purifiers if attack in self.purified else ()
                    for purifier in (UNPURIFIED, *washed):
                        for attacker in self.attackers:
                            for recipe in recipes:
                                yield Trial(kind, dataset, item, recipe, attack, setting, purifier, attacker, seed)

    def floor(self, trial: Trial) -> Trial:
        """Return the trial that drew with the untuned model what a tuning attack draws, with the same settings."""
        setting = drawing(self.settings(trial))
        return replace(trial, kind="floor", recipe=CLEAN, attack="", setting=setting, purifier=UNPURIFIED)

    def _floors(self) -> dict[str, dict[str, Any]]:
        """Return the settings of drawing that the tuning attacks have, by their names."""
        attacks = self.tunings.attacks.values() if self.tunings else ()
        found = [{name: getattr(attack, name) for name in DRAWING} for attack in attacks]
        return {drawing({"attack": options}): options for options in found}

    def _groups(self) -> Iterator[tuple[str, str, str, list[tuple[str, str]]]]:
        """Yield kind, data set, name, and the attacks with their settings, of every picture and person."""
        if self.edits:
            for item in self.edits.items:
                yield "edit", self.edits.dataset, item.name, [(name, "") for name in self.edits.attacks]
        if self.tunings:
            pairs = [(name, setting) for name in self.tunings.attacks for setting in self.tunings.settings]
            for person in self.tunings.people:
                yield "tuning", self.tunings.dataset, person.name, pairs

    def item(self, trial: Trial) -> Item | Person:
        """Return what a trial is about."""
        if self.edits and trial.dataset == self.edits.dataset:
            return next(item for item in self.edits.items if item.name == trial.item)
        assert self.tunings
        return next(person for person in self.tunings.people if person.name == trial.item)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """Return everything beside its names that decides a trial's result, as JSON values."""
        settings: dict[str, Any] = {}
        if trial.recipe != CLEAN:
            recipe = self.recipes[trial.recipe]
            settings["recipe"] = _described(recipe)
            if isinstance(recipe, Folder):
                settings["outside"] = [_digest(file) for file in outside(recipe, self.item(trial), missing=True)]
        if trial.kind != "protection" and self.posterior != "sample":
            settings["posterior"] = self.posterior
        if trial.kind == "edit" and self.edits:
            settings["attack"] = _described(self.edits.attacks[trial.attack])
        if trial.kind in ("tuning", "floor") and self.tunings:
            floor = self._floors().get(trial.setting, {})
            settings["attack"] = _described(self.tunings.attacks[trial.attack]) if trial.attack else floor
            settings |= {name: getattr(self.tunings, name) for name in ("prompt", "other_prompt", "drawn")}
        return settings

    def budget_of(self, trial: Trial) -> float | None:
        """Return the budget of a trial's protection in 1/255 units; None for clean pictures."""
        if trial.recipe == CLEAN:
            return None
        recipe = self.recipes[trial.recipe]
        return self.budget if isinstance(recipe, Folder) else recipe.budget

    def note(self, trial: Trial) -> dict[str, str]:
        """Return what a protection's row says beside its settings, which changes no result."""
        said = trial.kind == "protection" and trial.recipe in self.notes
        return {"note": self.notes[trial.recipe]} if said else {}

    def key(self, trial: Trial) -> str:
        """Return what names a trial and its files: a hash of its names, its settings and its input files."""
        item = self.item(trial)
        files = (
            [item.picture, item.mask] if isinstance(item, Item) else [*item.reference, *item.published, *item.others]
        )
        texts = [item.source_prompt, item.target_prompt] if isinstance(item, Item) else []
        content = [asdict(trial), self.surrogate, self.budget, self.settings(trial), texts, self.metrics]
        content += [_digest(file) for file in files if file]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    state = file.stat()
    return _hashed(file, state.st_mtime_ns, state.st_size)


@cache
def _hashed(file: Path, changed: int, size: int) -> str:
    """Hash a file as it is now: keys ask for the same ones a thousand times."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def outside(recipe: Folder, about: Item | Person, *, missing: bool = False) -> list[Path]:
    """Return the files of another program's protection of a picture or a person.

    Raises:
        ValueError: If there is not one for each, unless they may be `missing` still.
    """
    if isinstance(about, Item):
        wanted = [(recipe.folder, Path(about.name).name)]
    else:
        wanted = [(recipe.folder / about.name, photo.stem) for photo in about.published]
    files = []
    for folder, stem in wanted:
        found = sorted(file for file in folder.glob(f"{glob.escape(stem)}.*") if file.suffix.lower() in READABLE)
        if len(found) != 1 and not missing:
            got = f"{len(found)}; name it as the data set does"
            raise ValueError(f"expected one picture {stem}.* in {folder}, got {got}")
        files += found
    return files


def _described(method: Any) -> dict[str, Any]:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(method).items()}
    return {"class": type(method).__name__} | values


def _plan(content: dict[str, Any], base: Path) -> Plan:
    lists = {"budget", "surrogate", "attackers", "seeds", "purifiers", "purified", "posterior"}
    only(content, lists | {"recipes", "edits", "tunings", "metrics"}, "the plan")
    budget, surrogate = typed(float, content, "budget", 8), typed(str, content, "surrogate", "mini")
    Linf(budget)
    recipes = {CONTROL: {}} | table(content, "recipes")
    if CLEAN in recipes:
        raise ValueError(f"expected recipes, got {CLEAN!r}; the clean pictures are always run: leave it out")
    edits = _edits(table(content, "edits"), base) if "edits" in content else None
    tunings = _tunings(table(content, "tunings"), base) if "tunings" in content else None
    if not edits and not tunings:
        raise ValueError("expected a section [edits] or [tunings], got neither; see the plans that ship")
    if edits and tunings and edits.dataset == tunings.dataset:
        raise ValueError(f"expected two data sets, got {edits.dataset} for both; name another folder")
    (posterior,) = names([typed(str, content, "posterior", "sample")], POSTERIORS, "posterior")
    notes = {name: typed(str, options, "note", "") for name, options in recipes.items() if "note" in options}
    attacks = [*(edits.attacks if edits else ()), *(tunings.attacks if tunings else ())]
    return Plan(
        budget,
        surrogate,
        listed(str, content, "attackers", [surrogate]),
        listed(int, content, "seeds", [0]),
        {name: _recipe(name, options, budget, base) for name, options in recipes.items()},
        edits,
        tunings,
        names(listed(str, content, "purifiers", []), PURIFIERS, "purifiers"),
        names(listed(str, content, "purified", attacks), attacks, "attacks"),
        _metrics(table(content, "metrics"), base),
        posterior,
        notes,
    )


def _recipe(name: str, options: dict[str, Any], budget: float, base: Path) -> Recipe | Folder:
    options = {key: value for key, value in options.items() if key != "note"}
    if "folder" in options:
        only(options, {"folder"}, f"recipe {name!r}")
        return Folder(base / typed(str, options, "folder", ""))
    (known,) = names([options.pop("recipe", name)], RECIPES, "recipes")
    return changed(RECIPES[known], {"budget": budget} | options, name)


def _edits(section: dict[str, Any], base: Path) -> Edits:
    only(section, {"dataset", "first", "items", "attacks"}, "[edits]")
    name, root = _dataset(typed(str, section, "dataset", "defense-edit-synth"), base)
    items = _some(defense_edit.read(root), section, "items")
    given = table(section, "attacks") or {name: {} for name in EDITS}
    names(given, EDITS, "edits")
    attacks = {key: changed(EDITS[key], options, key) for key, options in given.items()}
    if "inpaint" in attacks and not all(item.mask for item in items):
        raise ValueError("expected a mask of every item for inpaint, got a data set without; leave inpaint out")
    return Edits(name, items, attacks)


def _tunings(section: dict[str, Any], base: Path) -> Tunings:
    texts = {"prompt", "other_prompt", "drawn"}
    only(section, {"dataset", "first", "people", "attacks", "settings"} | texts, "[tunings]")
    name, root = _dataset(typed(str, section, "dataset", "people-synth"), base)
    chosen = _some(people.read(root), section, "people")
    given = table(section, "attacks") or {name: {} for name in TUNINGS}
    names(given, TUNINGS, "tunings")
    attacks = {key: changed(TUNINGS[key], options, key) for key, options in given.items()}
    settings = names(listed(str, section, "settings", [ALL]), (ALL, HALF), "settings")
    plain = Tunings(name, chosen, attacks, settings)
    return changed(plain, {key: section[key] for key in texts & section.keys()}, "[tunings]")


def _metrics(section: dict[str, Any], base: Path) -> dict[str, str]:
    only(section, set(OPTIONAL), "[metrics]")
    names = {key: typed(str, section, key, "") for key in section}
    return {key: str(base / name) if (base / name).exists() else name for key, name in names.items()}


def _dataset(name: str, base: Path) -> tuple[str, Path]:
    """Return the name that rows carry and the folder of a data set that ships or of a path."""
    return (name, DATASETS[name]()) if name in DATASETS else (Path(name).name, base / name)


def _some(everything: Sequence[T], section: dict[str, Any], key: str) -> tuple[T, ...]:
    first, count = typed(int, section, "first", 0), typed(int, section, key, len(everything))
    chosen = everything[first : first + count] if first >= 0 and count > 0 else []
    if not chosen:
        got = f"a set of {len(everything)}, first = {first} and {key} = {count}"
        raise ValueError(f"expected to choose some {key}, got {got}; lower `first` or raise `{key}`")
    return tuple(chosen)
