"""Writing files whole: a crash leaves the old file or the new one, never half of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
    partial.replace(path)


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write JSON."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy."""
    write_whole(path, lambda file: np.save(file, array))


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as .npz."""
    write_whole(path, lambda file: np.savez(file, **arrays))
