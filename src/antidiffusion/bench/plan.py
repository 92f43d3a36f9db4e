"""What a benchmark runs: recipes, attacks, purifiers, data sets and seeds of a TOML file, and the trials they make."""

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from antidiffusion.attacks import EDITS, TUNINGS
from antidiffusion.attacks.base import Attack
from antidiffusion.attacks.purify import PURIFIERS
from antidiffusion.attacks.tuned import Tuning
from antidiffusion.bench.rows import CLEAN, CONTROL, UNPURIFIED
from antidiffusion.data import defense_edit, people
from antidiffusion.data.defense_edit import Item
from antidiffusion.data.people import Person
from antidiffusion.metrics.table import OPTIONAL
from antidiffusion.pictures.budget import Linf
from antidiffusion.recipes import RECIPES, Recipe

T = TypeVar("T")

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
        """Yield every trial: protections first, then attacks on clean pictures, then all others."""
        repeated = [(group, seed) for group in self._groups() for seed in self.seeds]
        for (_, dataset, item, _), seed in repeated:
            for recipe in self.recipes:
                yield Trial("protection", dataset, item, recipe, "", "", UNPURIFIED, self.surrogate, seed)
        for recipes in ([CLEAN], list(self.recipes)):
            for (kind, dataset, item, attacks), seed in repeated:
                for attack, setting in attacks:
                    washed = self.purifiers if attack in self.purified else ()
                    for purifier in (UNPURIFIED, *washed):
                        for attacker in self.attackers:
                            for recipe in recipes:
                                yield Trial(kind, dataset, item, recipe, attack, setting, purifier, attacker, seed)

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
            settings["recipe"] = _described(self.recipes[trial.recipe])
        if trial.kind == "edit" and self.edits:
            settings["attack"] = _described(self.edits.attacks[trial.attack])
        if trial.kind == "tuning" and self.tunings:
            settings["attack"] = _described(self.tunings.attacks[trial.attack])
            settings |= {name: getattr(self.tunings, name) for name in ("prompt", "other_prompt", "drawn")}
        return settings

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


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _described(method: Any) -> dict[str, Any]:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(method).items()}
    return {"class": type(method).__name__} | values


def _plan(content: dict[str, Any], base: Path) -> Plan:
    lists = {"budget", "surrogate", "attackers", "seeds", "purifiers", "purified"}
    _only(content, lists | {"recipes", "edits", "tunings", "metrics"}, "the plan")
    budget, surrogate = _typed(float, content, "budget", 8), _typed(str, content, "surrogate", "mini")
    Linf(budget)
    recipes = {CONTROL: {}} | _table(content, "recipes")
    if CLEAN in recipes:
        raise ValueError(f"expected recipes, got {CLEAN!r}; the clean pictures are always run: leave it out")
    edits = _edits(_table(content, "edits"), base) if "edits" in content else None
    tunings = _tunings(_table(content, "tunings"), base) if "tunings" in content else None
    if not edits and not tunings:
        raise ValueError("expected a section [edits] or [tunings], got neither; see the plans that ship")
    if edits and tunings and edits.dataset == tunings.dataset:
        raise ValueError(f"expected two data sets, got {edits.dataset} for both; name another folder")
    attacks = [*(edits.attacks if edits else ()), *(tunings.attacks if tunings else ())]
    return Plan(
        budget,
        surrogate,
        _listed(str, content, "attackers", [surrogate]),
        _listed(int, content, "seeds", [0]),
        {name: _recipe(name, options, budget, base) for name, options in recipes.items()},
        edits,
        tunings,
        _names(_listed(str, content, "purifiers", []), PURIFIERS, "purifiers"),
        _names(_listed(str, content, "purified", attacks), attacks, "attacks"),
        _metrics(_table(content, "metrics"), base),
    )


def _recipe(name: str, options: dict[str, Any], budget: float, base: Path) -> Recipe | Folder:
    options = dict(options)
    if "folder" in options:
        _only(options, {"folder"}, f"recipe {name!r}")
        return Folder(base / _typed(str, options, "folder", ""))
    (known,) = _names([options.pop("recipe", name)], RECIPES, "recipes")
    return _changed(RECIPES[known], {"budget": budget} | options, name)


def _edits(section: dict[str, Any], base: Path) -> Edits:
    _only(section, {"dataset", "first", "items", "attacks"}, "[edits]")
    name, root = _dataset(_typed(str, section, "dataset", "defense-edit-synth"), base)
    items = _some(defense_edit.read(root), section, "items")
    given = _table(section, "attacks") or {name: {} for name in EDITS}
    _names(given, EDITS, "edits")
    attacks = {key: _changed(EDITS[key], options, key) for key, options in given.items()}
    if "inpaint" in attacks and not all(item.mask for item in items):
        raise ValueError("expected a mask of every item for inpaint, got a data set without; leave inpaint out")
    return Edits(name, items, attacks)


def _tunings(section: dict[str, Any], base: Path) -> Tunings:
    texts = {"prompt", "other_prompt", "drawn"}
    _only(section, {"dataset", "first", "people", "attacks", "settings"} | texts, "[tunings]")
    name, root = _dataset(_typed(str, section, "dataset", "people-synth"), base)
    chosen = _some(people.read(root), section, "people")
    given = _table(section, "attacks") or {name: {} for name in TUNINGS}
    _names(given, TUNINGS, "tunings")
    attacks = {key: _changed(TUNINGS[key], options, key) for key, options in given.items()}
    settings = _names(_listed(str, section, "settings", [ALL]), (ALL, HALF), "settings")
    plain = Tunings(name, chosen, attacks, settings)
    return _changed(plain, {key: section[key] for key in texts & section.keys()}, "[tunings]")


def _metrics(section: dict[str, Any], base: Path) -> dict[str, str]:
    _only(section, set(OPTIONAL), "[metrics]")
    names = {key: _typed(str, section, key, "") for key in section}
    return {key: str(base / name) if (base / name).exists() else name for key, name in names.items()}


def _dataset(name: str, base: Path) -> tuple[str, Path]:
    """Return the name that rows carry and the folder of a data set that ships or of a path."""
    return (name, DATASETS[name]()) if name in DATASETS else (Path(name).name, base / name)


def _some(everything: Sequence[T], section: dict[str, Any], key: str) -> tuple[T, ...]:
    first, count = _typed(int, section, "first", 0), _typed(int, section, key, len(everything))
    chosen = everything[first : first + count] if first >= 0 and count > 0 else []
    if not chosen:
        got = f"a set of {len(everything)}, first = {first} and {key} = {count}"
        raise ValueError(f"expected to choose some {key}, got {got}; lower `first` or raise `{key}`")
    return tuple(chosen)


def _changed(method: T, options: dict[str, Any], name: str) -> T:
    _only(options, set(vars(method)), name)
    for each in fields(method):  # type: ignore[arg-type]
        if each.name in options and get_origin(each.type) is not tuple:
            _typed(each.type, options, each.name, None)
    change: Callable[..., T] = replace
    return change(method, **options)


def _typed(kind: Any, content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return a value after making sure that it is of a plain type or a union of such; whole numbers are floats too."""
    value = content.get(key, default)
    kinds = get_args(kind) or (kind,)
    if type(value) not in (*kinds, int if float in kinds else kind):
        raise ValueError(f"expected {key} as {getattr(kind, '__name__', kind)}, got {value!r}; change it")
    return value


def _listed(kind: Any, content: Mapping[str, Any], key: str, default: Sequence[Any]) -> tuple[Any, ...]:
    values = content.get(key, default)
    if not isinstance(values, list | tuple):
        raise ValueError(f"expected a list of {key}, got {values!r}; put it in brackets")
    return tuple(_typed(kind, {key: value}, key, value) for value in values)


def _table(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"expected a table {key}, got {value!r}; write [{key}]")
    return value


def _names(
    given: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any] | Sequence[str], noun: str
) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise ValueError(f"expected {noun} of {', '.join(known)}, got {name!r}; check the spelling")
    return tuple(given)


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"expected {', '.join(sorted(known))} in {where}, got {', '.join(unknown)}; leave it out")
