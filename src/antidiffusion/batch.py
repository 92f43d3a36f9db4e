"""Protecting many pictures: each is done, was done before, is one of our own or fails, and none stops another."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from antidiffusion.card import card_path, is_marked, read_card, relative
from antidiffusion.failures import FAILURES, sentence
from antidiffusion.folders import Job, expect_nameable, make_writable, real
from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.files import expect_new, tidy
from antidiffusion.pictures.jpeg import SUFFIXES as JPEG
from antidiffusion.pictures.jpeg import expect_jpeg
from antidiffusion.pictures.picture import Picture, check_writable, linf
from antidiffusion.progress import Progress, silent
from antidiffusion.protection import Protected, protect
from antidiffusion.recipes import Recipe

Kind = Literal["done", "finished", "own", "failed"]


@dataclass(frozen=True)
class Settings:
    """What is done to every picture of a run; a process of its own can be sent it.

    Arguments:
        recipe, seed, together, side, luma, low_memory: As in `antidiffusion.protection.protect`.
        mask: A picture's file, as large as the others.
        resize: Longest side in pixels that a picture is scaled down to before it is protected; None for as it is.
        quality: Of JPEG outputs.
        keep_location: Keep coordinates and names of places in the metadata.
        overwrite: Replace existing outputs.
        again: Protect pictures that this package made too, from their originals where these are.
    """

    recipe: Recipe
    seed: int = 0
    together: bool = False
    side: int | None = None
    mask: Path | None = None
    luma: bool = False
    low_memory: bool = False
    resize: int | None = None
    quality: int | None = None
    keep_location: bool = False
    overwrite: bool = False
    again: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Arguments:
        kind: "done" now, "finished" by an earlier run with the same options, "own" for a picture that this package
            made, or "failed".
        card: Of the output that is there, if it is.
        error: The sentence that says why there is none.
    """

    job: Job
    kind: Kind
    card: dict[str, Any] | None = None
    error: str | None = None


class OwnPictureError(PictureError):
    """A picture that this package has protected already."""


@dataclass(frozen=True)
class Worker:
    """Does jobs with one model: in this process, in one of several, or on another machine.

    Arguments:
        settings: What is done.
        surrogate: The model.
    """

    settings: Settings
    surrogate: Surrogate | LatentSpaces

    def __call__(self, jobs: Sequence[Job], progress: Progress = silent) -> Iterator[Outcome]:
        """Protect and save pictures that belong together, or one; yields each outcome as soon as it is known."""
        identities = self._identities(jobs)
        ready: list[tuple[Job, Picture]] = []
        for job, found in self.prepared(jobs, identities):
            if isinstance(found, Outcome):
                yield found
                continue
            try:
                make_writable(job.target.parent)
            except OSError as error:
                yield failed(job, error)
            else:
                ready.append((job, found))
        if not ready:
            return
        try:
            names = ("seed", "together", "side", "mask", "luma", "low_memory")
            options: Any = {name: getattr(self.settings, name) for name in names}
            pictures = [picture for _, picture in ready]
            results = protect(pictures, self.settings.recipe, surrogate=self.surrogate, progress=progress, **options)
        except FAILURES as error:
            yield from [failed(job, error) for job, _ in ready]
            return
        for (job, _), protected in zip(ready, results, strict=True):
            yield self._save(job, protected, identities.get(job))

    def prepared(
        self, jobs: Sequence[Job], identities: Mapping[Job, str] | None = None
    ) -> Iterator[tuple[Job, Picture | Outcome]]:
        """Yield each job with its picture, or with its outcome where there is nothing to do; writes nothing.

        Arguments:
            jobs: What belongs together.
            identities: From `_identities`, where they are known already.
        """
        identities = identities or self._identities(jobs)
        for job in jobs:
            card = None if self.settings.overwrite else read_card(job.target)
            if card and job in identities and card.get("options") == identities[job]:
                yield job, Outcome(job, "finished", card)
                continue
            try:
                yield job, self.open(job)
            except OwnPictureError as error:
                yield job, Outcome(job, "own", error=str(error))
            except FAILURES as error:
                yield job, failed(job, error)

    def open(self, job: Job) -> Picture:
        """Read a picture as it will be protected, and make sure that the result can be saved.

        Raises:
            OwnPictureError: If this package made it and `again` is not set.
            PictureError: If it cannot be read, or the result not be written.
            OSError: If the disk has no room.
        """
        expect_nameable(job.target)
        self._expect_new(job.target)
        picture = Picture.read(self._original(job.source), keep_location=self.settings.keep_location)
        if is_marked(picture) and not self.settings.again:
            raise OwnPictureError(own_sentence(job.source))
        if self.settings.resize is not None:
            picture = picture.resized(self.settings.resize)
        if job.target.suffix.lower() in JPEG:
            expect_jpeg(picture, job.target)
        else:
            check_writable(picture, job.target, overwrite=self.settings.overwrite)
        expect_room(job.target.parent, picture.pixels.nbytes)
        return picture

    def _expect_new(self, target: Path) -> None:
        try:
            expect_new(target, card_path(target), overwrite=self.settings.overwrite)
        except PictureError as error:
            if (card := read_card(target)) is None or "options" not in card:
                raise
            got = "one of another picture or of other options"
            raise PictureError(
                f"{target}: expected a new file, got {got}; use --overwrite or another output"
            ) from error

    def _original(self, source: Path) -> Path:
        """Return what to protect: the file itself, or the original of one that this package made."""
        card = read_card(source)
        if card is None:
            return source
        if not self.settings.again:
            raise OwnPictureError(own_sentence(source))
        original = source.parent / str(card.get("source", ""))
        if not original.is_file():
            return source
        try:
            clean, made = Picture.read(original), Picture.read(source)
            longest = max(made.pixels.shape)
            return original if linf(clean.resized(longest), made) <= card["budget"]["measured"] else source
        except (PictureError, ValueError, KeyError, TypeError):
            return source

    def _identities(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """Return by job a hash of all that decides the bytes of its output; files that cannot be read have none."""
        contents: dict[Job, str] = {}
        for job in jobs:
            with suppress(OSError):  # its sentence comes when it is opened
                contents[job] = _content(job.source)
        decisive = replace(self.settings, mask=None, low_memory=False, overwrite=False, again=False)
        model = [self.surrogate.sha256, self.surrogate.precision]
        options: dict[str, Any] = {
            "recipe": type(decisive.recipe).__name__,
            "settings": asdict(decisive),
            "model": model,
        }
        options["mask"] = _content(self.settings.mask) if self.settings.mask else None
        group = sorted(contents.values()) if self.settings.together else []
        return {
            job: _digest(options | {"format": job.target.suffix.lower(), "picture": content, "group": group})
            for job, content in contents.items()
        }

    def _save(self, job: Job, protected: Protected, identity: str | None) -> Outcome:
        if any(note.startswith("resized from ") for note in protected.original.notes):
            budget = protected.card["budget"] | {"measured_against": "the resized original"}
            protected = replace(protected, card=protected.card | {"budget": budget})
        beside = {"source": relative(real(job.source), real(job.target).parent), "options": identity}
        named = replace(protected, card=beside | protected.card)
        try:
            card = named.save(job.target, overwrite=self.settings.overwrite, quality=self.settings.quality)
        except FAILURES as error:
            return failed(job, error)
        return Outcome(job, "done", card)


def run(
    jobs: Sequence[Job],
    settings: Settings,
    surrogate: Surrogate | LatentSpaces,
    *,
    progress: Callable[[Job], Progress] = lambda job: silent,
) -> Iterator[Outcome]:
    """Protect and save every job's picture in this process; yields each outcome as soon as it is known.

    Arguments:
        jobs: From `antidiffusion.folders.plan`.
        settings: What is done.
        surrogate: The model.
        progress: Gives the progress hook of a job.
    """
    worker = Worker(settings, surrogate)
    clear(jobs)
    for group in groups(jobs, settings):
        yield from worker(group, progress(group[0]))


def groups(jobs: Sequence[Job], settings: Settings) -> Iterator[Sequence[Job]]:
    """Yield what one call of a worker does: a picture, or all of them together."""
    if settings.together and jobs:
        yield jobs
    elif not settings.together:
        yield from ([job] for job in jobs)


def clear(jobs: Sequence[Job]) -> None:
    """Finish or remove what killed runs left half done in the folders of the outputs."""
    for folder in dict.fromkeys(job.target.parent for job in jobs):
        if folder.is_dir():
            tidy(folder)


def failed(job: Job, error: BaseException) -> Outcome:
    """Return the outcome of a job that raised one of `FAILURES`."""
    text = sentence(error, job.target)
    if str(job.source) not in text and str(job.target) not in text:
        text = f"{job.source}: {text}"
    return Outcome(job, "failed", error=text)


def own_sentence(source: Path) -> str:
    """Say that a picture was protected before."""
    return f"{source}: expected an untouched picture, got one that antidiffusion made; --again protects it once more"


def expect_room(folder: Path, needed: int) -> None:
    """Raise OSError if the disk has not the room for so many bytes: noise leaves a lossless format little to save."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        got = f"room for {free / 1e6:.1f} MB, and the picture may take {needed / 1e6:.1f} MB"
        raise OSError(errno.ENOSPC, got, str(folder))


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
