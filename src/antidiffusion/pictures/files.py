"""Files that are there whole or not at all, several of them together."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from antidiffusion.pictures.errors import PictureError

PREFIX, SUFFIX = ".antidiffusion-", ".part"
LOCK, ORDER, COMMITTED = ".lock", ".order", ".committed"


@contextmanager
def atomic(*targets: Path, overwrite: bool = False) -> Iterator[tuple[Path, ...]]:
    """Give a path to write for each target; when the block ends all of them appear, and when it fails none.

    They are written under their own names in a hidden folder beside the targets. A mark in that folder is the moment of
    the commit: a process that is killed before leaves nothing that `tidy` would not remove, and one that is killed
    after leaves what `tidy` moves into place. The first target appears last, so that whoever sees it sees the others.

    Arguments:
        targets: Files of one folder, the picture first, then what belongs to it.
        overwrite: Replace existing files.

    Raises:
        PictureError: If a target exists, or the disk refuses in the block or at its end.
        ValueError: If the targets are not different names in one folder.
    """
    folder = targets[0].parent
    if any(target.parent != folder for target in targets) or len({target.name for target in targets}) < len(targets):
        raise ValueError(f"expected different names in one folder, got {', '.join(map(str, targets))}; separate them")
    expect_new(*targets, overwrite=overwrite)
    try:
        stage, lock = _stage(folder)
        try:
            yield tuple(stage / target.name for target in targets)
            for target in targets:
                _flush(stage / target.name)
            expect_new(*targets, overwrite=overwrite)  # the block may have taken hours
            (stage / ORDER).write_text(json.dumps([target.name for target in reversed(targets)]))
            _flush(stage / ORDER)
            (stage / ORDER).rename(stage / COMMITTED)
            _flush(stage)
        finally:  # after a KeyboardInterrupt too, wherever it came
            _settle(stage, lock)
    except OSError as error:
        got = error.strerror or str(error)
        raise PictureError(f"{targets[0]}: expected a writable place with room, got {got!r}; choose another") from error


def expect_new(*paths: Path, overwrite: bool) -> None:
    """Raise PictureError if a file to be written is a folder, exists and may not be replaced, or cannot exist."""
    for path in paths:
        try:
            is_there, is_folder = path.exists(), path.is_dir()
        except OSError as error:  # a name that is too long
            raise PictureError(
                f"{path}: expected a name that can be written, got {error.strerror!r}; choose another"
            ) from error
        if is_folder:
            raise PictureError(f"{path}: expected a file's name, got a directory's; choose another")
        if is_there and not overwrite:
            raise PictureError(f"{path}: expected a new file, got an existing one; use --overwrite or another name")


def tidy(folder: Path) -> int:
    """Finish what killed processes had committed in a folder and remove what they had not; return how many there were.

    What belongs to a living process or to another user stays.

    Raises:
        OSError: If the folder cannot be read, or a committed file cannot be moved.
    """
    dead = 0
    for stage in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        with suppress(PermissionError):  # another user's
            if (lock := _locked(stage)) is not None:
                _settle(stage, lock)
                dead += 1
    return dead


def _stage(folder: Path) -> tuple[Path, FileLock]:
    """Make a hidden folder that this process holds; the system lets go of the lock when the process ends."""
    while True:
        stage = folder / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        stage.mkdir()
        if (lock := _locked(stage)) is not None:
            return stage, lock


def _locked(stage: Path) -> FileLock | None:
    """Lock a hidden folder, or return None if another process has it or has just removed it."""
    lock = FileLock(stage / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):
        return None
    if (stage / LOCK).exists():
        return lock
    lock.release()  # of a file that was removed between being opened and being locked
    return None


def _settle(stage: Path, lock: FileLock) -> None:
    """Move what was committed into place, in its order, and remove the hidden folder."""
    moved = 0
    try:
        if (stage / COMMITTED).exists():
            for name in json.loads((stage / COMMITTED).read_text()):
                if (stage / name).exists():
                    (stage / name).replace(stage.parent / name)
                moved += 1
            _flush(stage.parent)
    except OSError:
        if moved:  # the rest waits for `tidy`
            lock.release()
            raise
        _remove(stage, lock)
        raise
    _remove(stage, lock)


def _remove(stage: Path, lock: FileLock) -> None:
    (stage / COMMITTED).unlink(missing_ok=True)  # first: half a removal must not look like a commit
    lock.release()  # Windows removes no open file
    shutil.rmtree(stage, ignore_errors=True)  # what another process tidies at this moment is gone already


def _flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not is_folder:  # some file systems cannot say it of a folder, and keep its entries anyway
            raise
    finally:
        os.close(descriptor)
