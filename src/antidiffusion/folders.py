"""Which pictures a folder holds, which of them are left out and why, and which file each goes to."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from antidiffusion.card import card_path
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.picture import READABLE, WRITERS

SIGNATURES = (  # where in a file's first bytes, what stands there, and the format
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"GIF8", "GIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypcrx ", "raw"),
    (0, b"FUJIFILM", "raw"),
    (0, b"IIRO", "raw"),
    (0, b"IIU\0", "raw"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"qoif", "QOI"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
)
BY_CONTENT = frozenset({"PNG", "JPEG", "WebP", "TIFF", "GIF", "AVIF", "HEIC"})
"""Formats that are taken whatever a file is called."""
BY_SUFFIX = {
    **dict.fromkeys((".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"), "raw"),
    **dict.fromkeys((".psd", ".psb"), "Photoshop"),
    ".jxl": "JPEG XL",
}
"""Pictures by their names alone: a raw photo is a TIFF by its first bytes, but not one that can be read as one."""
LONGEST_NAME = 255  # bytes; what nearly every file system allows


@dataclass(frozen=True)
class Left:
    """A file or folder that a walk did not take, and why: `reason` counts, `remedy` helps."""

    path: Path
    reason: str
    remedy: str


@dataclass(frozen=True)
class Job:
    """One picture to read and the file to write."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """The jobs of a run, and the pictures that it leaves out."""

    jobs: list[Job]
    left: list[Left]


def walk(folder: Path) -> Iterator[Path | Left]:
    """Yield the pictures under a folder, in order of their names, and what may be one and is not taken.

    A name decides, and where it says nothing the first bytes: a picture without a suffix is one. Links to pictures are
    followed, links to folders are not. Reports, notes, films and whatever else is no picture are passed over.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Left(folder, "unreadable folder", f"{error.strerror}; change its permissions")
        return
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("."):
                yield from (Left(path, "hidden", "name it itself") for _ in [0] if _holds_pictures(path))
            else:
                yield from walk(path)
        elif entry.is_symlink() and not path.is_file():
            if path.is_dir():
                yield Left(path, "link to a folder", "name the folder itself")
            elif path.suffix.lower() in READABLE:
                yield Left(path, "link to nothing", "remove it or repair it")
        elif path.is_file():
            yield from _sorted_out(path)


def _sorted_out(path: Path) -> Iterator[Path | Left]:
    """Yield a file if it is a picture that can be read, or why one is left out; nothing for what is none."""
    suffix = path.suffix.lower()
    kind = "" if suffix in READABLE else BY_SUFFIX.get(suffix)
    if kind is None:
        try:
            kind = sniffed(path)
        except OSError as error:
            yield Left(path, "unreadable file", f"{error.strerror}; change its permissions")
            return
        if kind is None:
            return
    if path.name.startswith("."):
        yield Left(path, "hidden", "name it itself")
    elif not kind or kind in BY_CONTENT:
        yield path
    else:
        yield Left(path, f"{kind} format", "convert it to PNG or JPEG")


def sniffed(path: Path) -> str | None:
    """Return the picture format that a file's first bytes say, or None if they say none.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(16)
    return next((name for at, magic, name in SIGNATURES if head[at : at + len(magic)] == magic), None)


def _holds_pictures(folder: Path) -> bool:
    """Tell whether a hidden folder's own files have a picture among them by name; `.git` is not worth a word."""
    try:
        return any(Path(entry.name).suffix.lower() in READABLE for entry in os.scandir(folder))
    except OSError:
        return False


def pictures_in(path: Path) -> tuple[list[Path], list[Left]]:
    """Return a file itself, or the pictures under a folder and what of it is left out.

    Raises:
        ValueError: If the folder has none.
    """
    if not path.is_dir():
        return [path], []
    found = list(walk(path))
    pictures = [entry for entry in found if isinstance(entry, Path)]
    left = [entry for entry in found if isinstance(entry, Left)]
    if not pictures:
        others = f" but {counted(left)}" if left else ""
        raise ValueError(
            f"expected pictures ({', '.join(sorted(READABLE))}), got none in {path}{others}; check the folder"
        )
    return pictures, left


def counted(left: Sequence[Left]) -> str:
    """Say how many were left out for which reason, as `2 HEIC format, 1 hidden`."""
    reasons = [entry.reason for entry in left]
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))


def plan(inputs: Sequence[Path], output: Path | None, *, suffix: str | None = None) -> Plan:
    """Pair pictures with output files.

    A folder's tree is mirrored, without what is hidden (macOS puts a `._a.jpg` beside every `a.jpg`). One picture may
    go to a file name; without an output it goes beside the original as `name-protected.png`, and a folder to
    `folder-protected`. A picture named twice is done once.

    Arguments:
        inputs: Files and folders.
        output: A folder, a file name for one picture, or None.
        suffix: Of the outputs, which decides their format; None for that of a file's name, or else .png.

    Raises:
        ValueError: If an output is an input or inside an input folder, two pictures would share a file, there is none,
            or an output's name has another suffix.
    """
    jobs: list[Job] = []
    left: list[Left] = []
    folders = [source for source in inputs if source.is_dir()]
    single = len(inputs) == 1 and not folders
    # What exists decides; else a suffix tells a file from a folder.
    to_file = bool(output and not output.is_dir() and (output.suffix if single else output.suffix.lower() in READABLE))
    if output and not single and (to_file or output.is_file()):
        raise ValueError(f"expected an output folder for several pictures, got {output}; name one without a suffix")
    ending = suffix or ".png"
    for source in inputs:
        if source in folders:
            named = source if source.name not in ("", "..") else real(source)
            folder = output or named.with_name(f"{named.name}-protected")
            pictures, others = pictures_in(source)
            left += others
            jobs += [Job(p, folder / p.relative_to(source).with_suffix(ending)) for p in pictures]
        elif output and to_file:
            jobs.append(Job(source, expect_suffix(output, suffix)))
        elif output:
            jobs.append(Job(source, output / f"{source.stem}{ending}"))
        else:
            jobs.append(Job(source, source.with_name(f"{source.stem}-protected{ending}")))
    return Plan(_distinct(jobs, folders), left)


def expect_suffix(path: Path, suffix: str | None = None) -> Path:
    """Return the path, or raise ValueError unless its suffix is the one asked for, or one that keeps every pixel."""
    got = path.suffix.lower()
    same = {".jpeg": ".jpg", ".tif": ".tiff"}
    if suffix is not None and same.get(got, got) != suffix:
        raise ValueError(
            f"expected an output of {suffix}, got {path.name}; give it that suffix or leave out --format and --jpeg"
        )
    if suffix is None and got not in WRITERS:
        raise ValueError(
            f"expected an output of {', '.join(WRITERS)}, got {path.name}; use .png, for lossy formats move pixels by "
            "more than the budget (protect --jpeg QUALITY measures by how much)"
        )
    return path


def make_writable(folder: Path) -> None:
    """Make a folder, or raise OSError: better now than after hours of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def expect_nameable(target: Path) -> None:
    """Raise PictureError if the name of an output, or of the card beside it, is too long for a file system."""
    beside, own = (len(os.fsencode(path.name)) for path in (card_path(target), target))
    limit = LONGEST_NAME
    if hasattr(os, "pathconf") and target.parent.is_dir():  # an encrypted home folder allows fewer
        limit = os.pathconf(target.parent, "PC_NAME_MAX")
    if beside > limit:
        raise PictureError(
            f"{target}: expected a name of at most {limit - (beside - own)} bytes, which leaves room for the card's, "
            f"got {own}; rename the picture or choose another output"
        )


def real(path: Path) -> Path:
    """Resolve every link; unlike `Path.resolve` it leaves a loop of links for the reader to refuse."""
    return Path(os.path.realpath(path))


def _distinct(jobs: Sequence[Job], folders: Sequence[Path]) -> list[Job]:
    """Return the jobs without repetitions, after making sure that no output meets an input or another output."""
    roots = [(folder, real(folder)) for folder in folders]
    sources = {real(job.source) for job in jobs}
    taken: dict[Path, Job] = {}
    for job in jobs:
        target = real(job.target)
        if target in sources:
            raise ValueError(f"expected outputs that are no inputs, got {job.target}; choose another name or folder")
        for folder, root in roots:
            if target.is_relative_to(root):
                raise ValueError(
                    f"expected an output outside the input folder {folder}, got {job.target}; "
                    "choose another folder, else the next run would protect its own results"
                )
        other = taken.setdefault(target, job)
        if real(other.source) != real(job.source):
            raise ValueError(
                f"expected one output name a picture, got {job.target} for both {other.source} and {job.source}; "
                "rename one or protect them into different folders"
            )
    return list(taken.values())
