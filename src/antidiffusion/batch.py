"""Which picture goes to which file, and protecting them one after the other so that one failure stops no other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidiffusion.picture import READABLE, Picture, PictureError
from antidiffusion.protect import Protected, protect
from antidiffusion.recipes import Progress, Recipe
from antidiffusion.surrogate import Surrogate

LOSSLESS = (".png", ".webp", ".tif", ".tiff", ".bmp")


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

    A folder's tree is mirrored. One picture may go to a file name; without an output it goes beside the original as
    `name-protected.png`, and a folder to `folder-protected`.

    Arguments:
        inputs: Files and folders.
        output: A folder, a file name with a lossless suffix for one picture, or None.

    Raises:
        ValueError: If the output is inside an input folder, two pictures would share a file, or there is none.
    """
    jobs: list[Job] = []
    single = len(inputs) == 1 and not inputs[0].is_dir()
    for source in inputs:
        folder = output or source.with_name(f"{source.resolve().name}-protected")
        if source.is_dir():
            if folder.resolve().is_relative_to(source.resolve()):
                raise ValueError(
                    f"expected an output folder outside the input {source}, got {folder}; "
                    "else the next run would protect its own results"
                )
            found = sorted(p for p in source.rglob("*") if p.suffix.lower() in READABLE and p.is_file())
            jobs += [Job(p, folder / p.relative_to(source).with_suffix(".png")) for p in found]
        elif single and output and output.suffix:
            if output.suffix.lower() not in LOSSLESS:
                raise ValueError(
                    f"expected an output of {', '.join(LOSSLESS)}, got {output.name}; "
                    "lossy formats move pixels by more than the budget (JPEG at quality 95: 17/255)"
                )
            jobs.append(Job(source, output))
        elif output:
            jobs.append(Job(source, output / f"{source.stem}.png"))
        else:
            jobs.append(Job(source, source.with_name(f"{source.stem}-protected.png")))
    if not jobs:
        raise ValueError(
            f"expected pictures ({', '.join(sorted(READABLE))}), got none in {', '.join(map(str, inputs))}"
        )
    taken: dict[Path, Path] = {}
    for job in jobs:
        other = taken.setdefault(job.target.resolve(), job.source)
        if other != job.source:
            raise ValueError(
                f"expected one output name a picture, got {job.target} for both {other} and {job.source}; "
                "rename one or protect them into different folders"
            )
    return jobs


def run(
    jobs: Sequence[Job],
    recipe: Recipe,
    surrogate: Surrogate,
    *,
    seed: int = 0,
    together: bool = False,
    side: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Job], Progress],
) -> Iterator[Outcome]:
    """Protect and save every job's picture; yields each outcome as soon as it is known.

    Arguments:
        jobs: From `plan`.
        recipe, surrogate, seed, together, side: As in `antidiffusion.protect.protect`.
        overwrite: Replace existing outputs.
        progress: Gives the progress hook of a job.
    """
    readable: list[tuple[Job, Picture]] = []
    for job in jobs:
        try:
            if job.target.exists() and not overwrite:
                raise PictureError(f"{job.target}: expected a new file, got an existing one; use --overwrite")
            if together:
                readable.append((job, Picture.read(job.source)))
                continue
            (protected,) = protect(
                [job.source], recipe, surrogate=surrogate, seed=seed, side=side, progress=progress(job)
            )
            yield _save(job, protected, overwrite)
        except (PictureError, MemoryError) as error:
            yield Outcome(job, error=_sentence(job, error))
    if readable:
        pictures = [picture for _, picture in readable]
        shared = progress(readable[0][0])
        results = protect(pictures, recipe, surrogate=surrogate, seed=seed, together=True, side=side, progress=shared)
        for (job, _), protected in zip(readable, results, strict=True):
            yield _save(job, protected, overwrite)


def _save(job: Job, protected: Protected, overwrite: bool) -> Outcome:
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        return Outcome(job, card=protected.save(job.target, overwrite=overwrite))
    except (OSError, PictureError, RuntimeError) as error:
        return Outcome(job, error=_sentence(job, error))


def _sentence(job: Job, error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"{job.source}: expected enough memory, got none left; try --low-memory, --dtype bfloat16 or --side"
    text = str(error)
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"
