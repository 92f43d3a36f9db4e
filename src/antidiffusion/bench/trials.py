"""One trial: a protection of a picture or a person's photos, or one attack on them, measured."""

import glob
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.pictures import fitted, fitted_mask, squared
from antidiffusion.attacks.purify import PURIFIERS
from antidiffusion.bench.plan import HALF, Folder, Plan, Trial
from antidiffusion.bench.rows import CLEAN, FAILED_ATTACK, PICTURES, UNPURIFIED, Row
from antidiffusion.card import effect, peak_memory, versions
from antidiffusion.data.defense_edit import Item, asked
from antidiffusion.data.people import Person
from antidiffusion.metrics.arcface import ArcFace
from antidiffusion.metrics.attributes import Attributes
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.metrics.identity import DlibFaces, Faces, distance, fdfr, ism, likeness
from antidiffusion.metrics.perceptual import LPIPS
from antidiffusion.metrics.semantic import ClipScore
from antidiffusion.metrics.table import OTHER_PROMPT
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import sample
from antidiffusion.pictures.picture import READABLE, WRITERS, Picture, linf
from antidiffusion.pictures.tensors import to_picture
from antidiffusion.protection import protect

UNCHANGED = 0.98  # SSIM to the source above which an edit has done nothing
ZERO, EXCEEDED, LOSSY = "zero gradient", "budget exceeded", "lossy file"

Metrics = dict[str, float | None]


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

    def __call__(self, task: Task) -> Row:
        """Run a trial and return its row; its pictures are whole files before."""
        trial, begun = task.trial, time.perf_counter()
        surrogate = self._surrogate(trial.attacker)
        sha256 = surrogate.sha256
        run = {"protection": self._protect, "edit": self._edit, "tuning": self._tune}[trial.kind]
        metrics, flags, pictures, seconds = run(trial, surrogate)
        item = self.plan.item(trial)
        names = [f"{PICTURES}/{self.plan.key(trial)}-{number}.png" for number in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.write(self.folder / name, overwrite=True)
        return Row(
            key=self.plan.key(trial),
            **asdict(trial),
            category=item.category if isinstance(item, Item) else "",
            surrogate=self.plan.surrogate,
            budget=None if trial.recipe == CLEAN else self.plan.budget,
            metrics=metrics,
            flags=sorted({*task.flags, *flags}),
            pictures=names,
            seconds=round(time.perf_counter() - begun if seconds is None else seconds, 2),
            peak_memory_mb=round(peak_memory(surrogate.device) / 1e6),
            settings=self.plan.settings(trial) | {"precision": surrogate.precision},
            model_sha256=sha256,
            versions=versions(),
            backends=self.backends,
        )

    def _protect(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        recipe, files = self.plan.recipes[trial.recipe], self._published(trial)
        originals = [Picture.read(file) for file in files]
        if isinstance(recipe, Folder):
            return self._elsewhere(recipe, files, originals, trial, surrogate)
        protected = protect(originals, recipe, surrogate=surrogate, seed=trial.seed, together=len(files) > 1)
        pictures = [result.picture for result in protected]
        metrics, flags = self._fidelity(pictures, originals)
        metrics["loss_ratio"] = fmean(result.card["effect"]["denoising_loss_ratio"] for result in protected)
        return Outcome(metrics, flags, pictures, protected[0].card["cost"]["seconds"])

    def _elsewhere(
        self, recipe: Folder, files: Sequence[Path], originals: Sequence[Picture], trial: Trial, surrogate: Surrogate
    ) -> Outcome:
        """Take the pictures of another program."""
        parent = recipe.folder if len(files) == 1 else recipe.folder / trial.item
        found = [_only_file(parent, Path(trial.item).name if len(files) == 1 else file.stem) for file in files]
        pictures = [Picture.read(file) for file in found]
        for file, ours, theirs in zip(found, originals, pictures, strict=True):
            if ours.pixels.shape != theirs.pixels.shape:
                raise ValueError(f"expected {file} of the original's size and channels, got {theirs.pixels.shape}")
        metrics, flags = self._fidelity(pictures, originals)
        pairs = [(fitted(a, surrogate), fitted(b, surrogate)) for a, b in zip(originals, pictures, strict=True)]
        ratios = [effect(surrogate, *pair, trial.seed)["denoising_loss_ratio"] for pair in pairs]
        lossy = [LOSSY for file in found if file.suffix.lower() not in WRITERS]
        return Outcome(metrics | {"loss_ratio": fmean(ratios)}, [*flags, *lossy], pictures)

    def _fidelity(self, pictures: Sequence[Picture], originals: Sequence[Picture]) -> tuple[Metrics, list[str]]:
        moved = [linf(a, b) for a, b in zip(pictures, originals, strict=True)]
        pairs = [(a.tensor(), b.tensor()) for a, b in zip(pictures, originals, strict=True)]
        metrics: Metrics = {"linf": max(moved), "ssim": fmean(ssim(*pair).item() for pair in pairs)}
        metrics["psnr"] = fmean(psnr(*pair).item() for pair in pairs) if min(moved) else None
        if "lpips" in self.plan.metrics:
            metrics["lpips"] = fmean(self._lpips(*pair).item() for pair in pairs)
        flags = [ZERO] if not min(moved) else []
        return metrics, flags + ([EXCEEDED] if max(moved) > self.plan.budget else [])

    def _edit(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        item, edits = self.plan.item(trial), self.plan.edits
        assert isinstance(item, Item) and edits
        source = Picture.read(item.picture)
        x = self._washed(fitted(self._pictures(trial)[0], surrogate), trial, surrogate)
        mask = fitted_mask(Picture.read(item.mask), source, surrogate) if item.mask else None
        prompts = Prompts(item.target_prompt, item.source_prompt, mask)
        edited = to_picture(edits.attacks[trial.attack](x, prompts, surrogate, trial.seed))
        y, original = edited.tensor(), fitted(source, surrogate).cpu()
        metrics: Metrics = {"success": self._success(item, y, original)} | self._faces_of(y, original)
        if "clip" in self.plan.metrics:
            metrics["clip_score"] = self._clip(y, [item.target_prompt]).item()
        if trial.recipe != CLEAN:
            (clean,) = self._written(replace(trial, recipe=CLEAN), 1)
            metrics |= self._similarity(y, clean.tensor())
            return Outcome(metrics, [], [edited])
        failed = metrics["success"] == 0 or ssim(y, original).item() > UNCHANGED
        return Outcome(metrics, [FAILED_ATTACK] if failed else [], [edited])

    def _similarity(self, edited: Tensor, clean: Tensor) -> Metrics:
        """Compare an edit with that of the clean picture; equal pictures have no finite PSNR."""
        same = torch.equal(edited, clean)
        metrics: Metrics = {"ssim_to_clean": ssim(edited, clean).item()}
        metrics["psnr_to_clean"] = None if same else psnr(edited, clean).item()
        if "lpips" in self.plan.metrics:
            metrics["lpips_to_clean"] = self._lpips(edited, clean).item()
        return metrics

    def _tune(self, trial: Trial, surrogate: Surrogate) -> Outcome:
        person, tunings = self.plan.item(trial), self.plan.tunings
        assert isinstance(person, Person) and tunings
        photos = self._pictures(trial)
        if trial.setting == HALF:
            half = len(photos) // 2
            photos = [*photos[: len(photos) - half], *map(Picture.read, person.others[:half])]
        x = torch.cat([squared(photo, surrogate) for photo in photos])
        attack = tunings.attacks[trial.attack]
        texts = [tunings.prompt] * tunings.drawn + [tunings.other_prompt] * tunings.drawn
        with attack.tuned(self._washed(x, trial, surrogate), tunings.prompt, surrogate, trial.seed) as tuned:
            drawn = tuned.sample(texts, trial.seed).cpu()
        reference = self.faces.embed(
            torch.cat([squared(Picture.read(file), surrogate) for file in person.reference]).cpu()
        )
        metrics = self._likeness(drawn[: tunings.drawn], reference, "")
        metrics |= self._likeness(drawn[tunings.drawn :], reference, OTHER_PROMPT)
        flags = []
        if trial.recipe == CLEAN:
            options: Any = {"size": x.shape[-2:], "steps": attack.sampling_steps, "guidance": attack.guidance}
            untuned = sample(texts[: tunings.drawn], surrogate, Generator().manual_seed(trial.seed), **options).cpu()
            metrics["distance_untuned"] = distance(self.faces.embed(untuned), reference)
            tuned_to, before = metrics["distance"], metrics["distance_untuned"]
            flags = [FAILED_ATTACK] if tuned_to is None or (before is not None and tuned_to >= before) else []
        return Outcome(metrics, flags, [to_picture(picture[None]) for picture in drawn])

    @property
    def backends(self) -> dict[str, str]:
        """What measures what, by the names of its files."""
        given = {key: Path(name).name for key, name in self.plan.metrics.items()}
        faces = f"ArcFace {given.pop('arcface')}" if "arcface" in given else "dlib"
        return {"faces": faces, "attributes": "mini's classifier"} | given

    @cached_property
    def faces(self) -> Faces:
        weights = self.plan.metrics.get("arcface")
        return ArcFace(Path(weights)) if weights else DlibFaces()

    @cached_property
    def _lpips(self) -> LPIPS:
        return LPIPS(Path(self.plan.metrics["lpips"]))

    @cached_property
    def _clip(self) -> ClipScore:
        return ClipScore(self.plan.metrics["clip"])

    @cached_property
    def _attributes(self) -> Attributes:
        return Attributes.load()

    def _likeness(self, x: Tensor, reference: Sequence[Tensor | None], suffix: str) -> Metrics:
        found = self.faces.embed(x)
        values = {"fdfr": fdfr(found), "ism": ism(found, reference), "distance": distance(found, reference)}
        values["likeness"] = likeness(found, reference, cosine=isinstance(self.faces, ArcFace))
        return {f"{name}{suffix}": value for name, value in values.items()}

    def _faces_of(self, edited: Tensor, source: Tensor) -> Metrics:
        (there,), (before,) = self.faces.embed(edited), self.faces.embed(source)
        near = None if there is None or before is None else (there - before).norm().item()
        return {"face_lost": None if before is None else float(there is None), "face_distance": near}

    def _success(self, item: Item, edited: Tensor, source: Tensor) -> float | None:
        """Return whether the classifier sees what was asked for; None if it cannot judge, or saw that in the source."""
        wanted = asked(item)
        if wanted is None:
            return None
        before, after = (self._attributes.classify(x)[0][wanted[0]] == wanted[1] for x in (source, edited))
        return None if before else float(after)

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


def _only_file(folder: Path, stem: str) -> Path:
    found = sorted(file for file in folder.glob(f"{glob.escape(stem)}.*") if file.suffix.lower() in READABLE)
    if len(found) != 1:
        raise ValueError(f"expected one picture {stem}.* in {folder}, got {len(found)}; name it as the data set does")
    return found[0]
