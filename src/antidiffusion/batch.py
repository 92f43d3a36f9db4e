"""Which picture goes to which file, and protecting them one after the other so that one failure stops no other."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import READABLE, WRITERS, Picture, PictureError
from antidiffusion.progress import Progress
from antidiffusion.protection import Protected, card_path, protect
from antidiffusion.recipes import Recipe

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)
OUT_OF_MEMORY = re.compile("(out of|allocate|enough) memory")  # PyTorch says so in a RuntimeError


@dataclass(frozen=True)
class Job:
    """One picture to read and the file to write."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its report card, or the sentence that says why there is none."""

    job: Job
    card: dict[str, Any] | None = None
    error: str | None = None


def plan(inputs: Sequence[Path], output: Path | None) -> list[Job]:
    """Pair pictures with output files.

    A folder's tree is mirrored, without what is hidden (macOS puts a `._a.jpg` beside every `a.jpg`). One picture may
    go to a file name; without an output it goes beside the original as `name-protected.png`, and a folder to
    `folder-protected`. A picture named twice is done once.

    Arguments:
        inputs: Files and folders.
        output: A folder, a file name with a lossless suffix for one picture, or None.

    Raises:
        ValueError: If an output is an input or inside an input folder, two pictures would share a file, or there is
            none.
    """
    jobs: list[Job] = []
    folders = [source for source in inputs if source.is_dir()]
    single = len(inputs) == 1 and not folders
    # What exists decides; else a suffix tells a file from a folder.
    to_file = bool(output and not output.is_dir() and (output.suffix if single else output.suffix.lower() in READABLE))
    if output and not single and (to_file or output.is_file()):
        raise ValueError(f"expected an output folder for several pictures, got {output}; name one without a suffix")
    for source in inputs:
        if source in folders:
            named = source if source.name not in ("", "..") else _real(source)
            folder = output or named.with_name(f"{named.name}-protected")
            jobs += [Job(p, folder / p.relative_to(source).with_suffix(".png")) for p in pictures_in(source)]
        elif output and to_file:
            jobs.append(Job(source, lossless(output)))
        elif output:
            jobs.append(Job(source, output / f"{source.stem}.png"))
        else:
            jobs.append(Job(source, source.with_name(f"{source.stem}-protected.png")))
    return _distinct(jobs, folders)


def pictures_in(path: Path) -> list[Path]:
    """Return a file itself, or the pictures under a folder, but none with a dot before its or a folder's name.

    Raises:
        ValueError: If the folder has none.
    """
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix.lower() in READABLE and file.is_file())
    pictures = sorted(file for file in found if not any(n.startswith(".") for n in file.relative_to(path).parts))
    if not pictures:
        raise ValueError(f"expected pictures ({', '.join(sorted(READABLE))}), got none in {path}; check the folder")
    return pictures


def lossless(path: Path) -> Path:
    """Return the path, or raise ValueError if its suffix is not one that keeps every pixel."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(
            f"expected an output of {', '.join(WRITERS)}, got {path.name}; use .png, "
            "for lossy formats move pixels by more than the budget (JPEG at quality 95: 17/255)"
        )
    return path


def expect_new(path: Path, *, overwrite: bool) -> None:
    """Raise PictureError if a file to be written exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise PictureError(f"{path}: expected a new file, got an existing one; use --overwrite or another name")


def make_writable(folder: Path) -> None:
    """Make a folder, or raise OSError: better now than after hours of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def run(
    jobs: Sequence[Job],
    recipe: Recipe,
    surrogate: Surrogate,
    *,
    seed: int = 0,
    together: bool = False,
    side: int | None = None,
    mask: Picture | None = None,
    luma: bool = False,
    low_memory: bool = False,
    overwrite: bool = False,
    progress: Callable[[Job], Progress],
) -> Iterator[Outcome]:
    """Protect and save every job's picture; yields each outcome as soon as it is known.

    Arguments:
        jobs: From `plan`.
        recipe, surrogate, seed, together, side, mask, luma, low_memory: As in `antidiffusion.protection.protect`.
        overwrite: Replace existing outputs.
        progress: Gives the progress hook of a job.
    """
    for group in [jobs] if together else [[job] for job in jobs]:
        ready: list[tuple[Job, Picture]] = []
        for job in group:
            try:
                ready.append((job, _open(job, overwrite)))
            except FAILURES as error:
                yield Outcome(job, error=_sentence(job, error))
        if not ready:
            continue
        pictures, hook = [picture for _, picture in ready], progress(ready[0][0])
        options: Any = {"seed": seed, "together": together, "side": side, "progress": hook}
        options |= {"mask": mask, "luma": luma, "low_memory": low_memory}
        try:
            results = protect(pictures, recipe, surrogate=surrogate, **options)
        except FAILURES as error:
            yield from [Outcome(job, error=_sentence(job, error)) for job, _ in ready]
            continue
        for (job, _), protected in zip(ready, results, strict=True):
            yield _save(job, protected, overwrite)


def _open(job: Job, overwrite: bool) -> Picture:
    """Read a picture and make sure that its result can be saved."""
    for path in (job.target, card_path(job.target)):
        expect_new(path, overwrite=overwrite)
    picture = Picture.read(job.source)
    make_writable(job.target.parent)
    return picture


def _save(job: Job, protected: Protected, overwrite: bool) -> Outcome:
    try:
        return Outcome(job, card=protected.save(job.target, overwrite=overwrite))
    except FAILURES as error:
        return Outcome(job, error=_sentence(job, error))


def _sentence(job: Job, error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{job.target}: expected a place to write to, got {error.strerror!r}; choose another output"
    text = str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        text = "expected enough memory, got none left; try --low-memory, --dtype bfloat16 or a smaller --side"
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"


def _real(path: Path) -> Path:
    """Resolve every link; unlike `Path.resolve` it leaves a loop of links for the reader to refuse."""
    return Path(os.path.realpath(path))


def _distinct(jobs: Sequence[Job], folders: Sequence[Path]) -> list[Job]:
    """Return the jobs without repetitions, after making sure that no output meets an input or another output."""
    sources = {_real(job.source) for job in jobs}
    taken: dict[Path, Job] = {}
    for job in jobs:
        target = _real(job.target)
        if target in sources:
            raise ValueError(f"expected outputs that are no inputs, got {job.target}; choose another name or folder")
        for folder in folders:
            if target.is_relative_to(_real(folder)):
                raise ValueError(
                    f"expected an output outside the input folder {folder}, got {job.target}; "
                    "choose another folder, else the next run would protect its own results"
                )
        other = taken.setdefault(target, job)
        if _real(other.source) != _real(job.source):
            raise ValueError(
                f"expected one output name a picture, got {job.target} for both {other.source} and {job.source}; "
                "rename one or protect them into different folders"
            )
    return list(taken.values())
