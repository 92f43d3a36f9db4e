"""One trial: a protection of a picture or a person's photos, or one attack on them, measured."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, usual
from antidiffusion.attacks.pictures import fitted, fitted_mask, squared
from antidiffusion.attacks.purify import PURIFIERS, vae_round_trip
from antidiffusion.bench.instruments import Instruments, Metrics
from antidiffusion.bench.plan import HALF, Folder, Plan, Trial, outside
from antidiffusion.bench.rows import CLEAN, FAILED_ATTACK, PICTURES, UNPURIFIED, Row
from antidiffusion.card import effect, peak_memory, versions
from antidiffusion.data.defense_edit import Item
from antidiffusion.data.people import Person
from antidiffusion.metrics.fidelity import ssim
from antidiffusion.metrics.identity import Embeddings
from antidiffusion.metrics.table import OTHER_PROMPT
from antidiffusion.models.base import Posterior, Surrogate
from antidiffusion.models.sampling import sample
from antidiffusion.pictures.picture import WRITERS, Picture
from antidiffusion.pictures.tensors import to_picture
from antidiffusion.protection import protect

UNCHANGED = 0.98  # SSIM to the source above which an edit has done nothing
ZERO, EXCEEDED, LOSSY = "zero gradient", "budget exceeded", "lossy file"


@dataclass(frozen=True)
class Task:
    """A trial with what is known of those before it.

    Arguments:
        trial: What to do.
        flags: Those of the same attack on the clean picture.
    """

    trial: Trial
    flags: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What a trial gave: metrics, flags, pictures, and its seconds where others than the trial's own count."""

    metrics: Metrics
    flags: list[str]
    pictures: Sequence[Picture]
    seconds: float | None = None


def protection(trial: Trial, plan: Plan) -> Trial:
    """Return the trial that made the pictures which a trial attacks."""
    trial = replace(trial, kind="protection", attack="", setting="", purifier=UNPURIFIED)
    return replace(trial, attacker=plan.surrogate)


@dataclass
class Laboratory:
    """Runs trials of one plan; models are loaded once.

    Arguments:
        plan: What is run.
        folder: Where pictures go, under the keys of their trials.
        load: Gives a model by its name.
    """

    plan: Plan
    folder: Path
    load: Callable[[str], Surrogate]

    def __post_init__(self) -> None:
        self._surrogates: dict[str, Surrogate] = {}
        self._references: dict[str, tuple[Tensor, Embeddings]] = {}
        self.instruments = Instruments(self.plan.metrics)

    def __call__(self, task: Task) -> Row:
        """Run a trial and return its row; its pictures are whole files before."""
        trial, begun = task.trial, time.perf_counter()
        surrogate = self._surrogate(trial.attacker)
        sha256 = surrogate.sha256
        kinds = {"protection": self._protect, "floor": self._draw, "edit": self._edit, "tuning": self._tune}
        attacker = surrogate if trial.kind == "protection" else with_posterior(surrogate, self.plan.posterior)
        metrics, flags, pictures, seconds = kinds[trial.kind](trial, attacker)
        item = self.plan.item(trial)
        names = [f"{PICTURES}/{self.plan.key(trial)}-{number}.png" for number in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.write(self.folder / name, overwrite=True)
        return Row(
            key=self.plan.key(trial),
            **asdict(trial),
            category=item.category if isinstance(item, Item) else "",
            surrogate=self.plan.surrogate,
            budget=self.plan.budget_of(trial),
            metrics=metrics,
            flags=sorted({*task.flags, *flags}),
            pictures=names,
            seconds=round(time.perf_counter() - begun if seconds is None else seconds, 2),
            peak_memory_mb=round(peak_memory(surrogate.device) / 1e6),
            settings=self.plan.settings(trial) | {"precision": surrogate.precision} | self.plan.note(trial),
            model_sha256=sha256,
            versions=versions(),
            backends=self.instruments.names,
        )

    def _protect(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        recipe, files = self.plan.recipes[trial.recipe], self._published(trial)
        originals = [Picture.read(file) for file in files]
        if isinstance(recipe, Folder):
            return self._elsewhere(recipe, files, originals, trial, surrogate)
        protected = protect(originals, recipe, surrogate=surrogate, seed=trial.seed, together=len(files) > 1)
        pictures = [result.picture for result in protected]
        metrics, flags = self._published_as(pictures, originals, trial)
        metrics["loss_ratio"] = _mean([result.card["effect"].get("denoising_loss_ratio") for result in protected])
        return Outcome(metrics, flags, pictures, protected[0].card["cost"]["seconds"])

    def _elsewhere(
        self, recipe: Folder, files: Sequence[Path], originals: Sequence[Picture], trial: Trial, surrogate: Surrogate
    ) -> Outcome:
        """Take the pictures of another program."""
        found = outside(recipe, self.plan.item(trial))
        pictures = [Picture.read(file) for file in found]
        for file, ours, theirs in zip(found, originals, pictures, strict=True):
            if ours.pixels.shape != theirs.pixels.shape:
                raise ValueError(f"expected {file} of the original's size and channels, got {theirs.pixels.shape}")
        metrics, flags = self._published_as(pictures, originals, trial)
        pairs = [(fitted(a, surrogate), fitted(b, surrogate)) for a, b in zip(originals, pictures, strict=True)]
        ratios = [effect(surrogate, *pair, trial.seed)["denoising_loss_ratio"] for pair in pairs]
        lossy = [LOSSY for file in found if file.suffix.lower() not in WRITERS]
        return Outcome(metrics | {"loss_ratio": _mean(ratios)}, [*flags, *lossy], pictures)

    def _published_as(
        self, pictures: Sequence[Picture], originals: Sequence[Picture], trial: Trial
    ) -> tuple[Metrics, list[str]]:
        metrics, budget = self.instruments.published(pictures, originals), self.plan.budget_of(trial)
        flags = [ZERO] if any((a.pixels == b.pixels).all() for a, b in zip(pictures, originals, strict=True)) else []
        exceeded = budget is not None and (metrics["linf"] or 0) > budget
        return metrics, flags + ([EXCEEDED] if exceeded else [])

    def _edit(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        item, edits = self.plan.item(trial), self.plan.edits
        assert isinstance(item, Item) and edits
        source = Picture.read(item.picture)
        original = fitted(source, surrogate)
        found = fitted(self._pictures(trial)[0], surrogate)
        mask = fitted_mask(Picture.read(item.mask), source, surrogate) if item.mask else None
        prompts = Prompts(item.target_prompt, item.source_prompt, mask)
        attack = edits.attacks[trial.attack]
        edited = to_picture(attack(self._washed(found, trial, surrogate), prompts, surrogate, trial.seed))
        y, before = edited.tensor(), original.cpu()
        metrics = self.instruments.edit(item, y, before, None if mask is None else mask.cpu())
        if trial.recipe == CLEAN:
            failed = metrics["success"] == 0 or ssim(y, before).item() > UNCHANGED
            return Outcome(metrics, [FAILED_ATTACK] if failed else [], [edited])
        (clean,) = self._written(replace(trial, recipe=CLEAN), 1)
        metrics |= self.instruments.similarity(y, clean.tensor())
        if trial.purifier == UNPURIFIED:  # what the attacker's autoencoder alone makes of the two
            both = vae_round_trip(torch.cat([found, original]), surrogate, trial.seed).cpu()
            metrics["ssim_autoencoder"] = ssim(both[:1], both[1:]).item()
        return Outcome(metrics, [], [edited])

    def _tune(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        person, tunings = self.plan.item(trial), self.plan.tunings
        assert isinstance(person, Person) and tunings
        photos = self._pictures(trial)
        if trial.setting == HALF:
            half = len(photos) // 2
            photos = [*photos[: len(photos) - half], *map(Picture.read, person.others[:half])]
        x = torch.cat([squared(photo, surrogate) for photo in photos])
        attack = tunings.attacks[trial.attack]
        with attack.tuned(self._washed(x, trial, surrogate), tunings.prompt, surrogate, trial.seed) as tuned:
            drawn = tuned.sample(tunings.texts, trial.seed).cpu()
        metrics, flags = self._drawn(drawn, person, surrogate), []
        if trial.recipe == CLEAN:
            floor = [picture.tensor() for picture in self._written(self.plan.floor(trial), len(tunings.texts))]
            untuned = self._drawn(torch.cat(floor), person, surrogate)
            names = ("likeness", "margin") if metrics["margin"] is not None else ("likeness",)
            failed = any((metrics[name] or 0) <= (untuned[name] or 0) for name in names)
            flags = [FAILED_ATTACK] if failed else []
        return Outcome(metrics, flags, [to_picture(picture[None]) for picture in drawn])

    def _draw(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        """Draw with the untuned model what every tuning attack draws: the floor of its likeness."""
        person, tunings = self.plan.item(trial), self.plan.tunings
        assert isinstance(person, Person) and tunings
        options: dict[str, Any] = self.plan.settings(trial)["attack"]
        steps, guidance = usual(options["sampling_steps"], options["guidance"], surrogate)
        generator = Generator().manual_seed(trial.seed)
        drawn = sample(tunings.texts, surrogate, generator, steps=steps, guidance=guidance).cpu()
        metrics = self._drawn(drawn, person, surrogate)
        return Outcome(metrics, [], [to_picture(picture[None]) for picture in drawn])

    def _drawn(self, drawn: Tensor, person: Person, surrogate: Surrogate) -> Metrics:
        """Measure drawings, the half of the tuned prompt and that of the other."""
        assert self.plan.tunings
        photos, reference = self._reference(person, surrogate)
        strangers = [self._reference(other, surrogate)[1] for other in self.plan.tunings.people if other != person]
        halves = zip(drawn.chunk(2), ("", OTHER_PROMPT), strict=True)
        found = [self.instruments.drawn(half, photos, reference, strangers, suffix) for half, suffix in halves]
        return found[0] | found[1]

    def _reference(self, person: Person, surrogate: Surrogate) -> tuple[Tensor, Embeddings]:
        """Return the clean photos that tell a person, at the model's size, and their embeddings."""
        key = f"{person.name} at {surrogate.size}"
        if key not in self._references:
            x = torch.cat([squared(Picture.read(file), surrogate) for file in person.reference]).cpu()
            self._references[key] = x, self.instruments.faces.embed(x)
        return self._references[key]

    def _surrogate(self, name: str) -> Surrogate:
        if name not in self._surrogates:
            self._surrogates[name] = self.load(name)
        return self._surrogates[name]

    def _published(self, trial: Trial) -> Sequence[Path]:
        item = self.plan.item(trial)
        return [item.picture] if isinstance(item, Item) else item.published

    def _pictures(self, trial: Trial) -> list[Picture]:
        """Return what the attacker finds: the clean or the protected pictures."""
        files = self._published(trial)
        if trial.recipe == CLEAN:
            return [Picture.read(file) for file in files]
        return self._written(protection(trial, self.plan), len(files))

    def _written(self, trial: Trial, count: int) -> list[Picture]:
        """Read the pictures of an earlier trial."""
        return [Picture.read(self.folder / PICTURES / f"{self.plan.key(trial)}-{i}.png") for i in range(count)]

    def _washed(self, x: Tensor, trial: Trial, surrogate: Surrogate) -> Tensor:
        return x if trial.purifier == UNPURIFIED else PURIFIERS[trial.purifier](x, surrogate, trial.seed)


def with_posterior(surrogate: Surrogate, posterior: str) -> Surrogate:
    """Return a surrogate that encodes to "sample"s of the posterior or always to its "mean"; the weights are shared."""
    if posterior == "sample":
        return surrogate
    changed = copy.copy(surrogate)

    def mean(x: Tensor) -> Posterior:
        found = surrogate.posterior(x)
        return Posterior(found.mean, torch.zeros_like(found.std))

    changed.posterior = mean  # type: ignore[method-assign]
    return changed


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if one is unknown."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if len(numbers) == len(values) else None
