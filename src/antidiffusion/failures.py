"""What can go wrong in a run that is nobody's mistake, and the sentences for it."""

from __future__ import annotations

import errno
import math
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this before it knows that it needs torch
    from torch import Tensor

FAILURES = (ValueError, OSError, MemoryError, RuntimeError)
"""What ends the work on one picture or trial, and no other."""

MEMORY = re.compile("(out of|allocate|enough) memory|unable to allocate|ALLOC_FAILED", re.IGNORECASE)
JOINERS = "\u200c\u200d"  # they hold emoji together


class NotFiniteError(RuntimeError):
    """A number that is none, in one sentence: the stage it came up in, and the remedy."""


def expect_finite(values: Tensor | float, stage: str) -> None:
    """Raise NotFiniteError if a number or an entry of a tensor is NaN or infinite.

    Arguments:
        values: What was computed.
        stage: What computed it, for the sentence.
    """
    finite = math.isfinite(values) if isinstance(values, int | float) else bool(values.isfinite().all())
    if not finite:
        raise NotFiniteError(
            f"expected finite numbers in {stage}, got NaN or infinity; try --dtype float32 or bfloat16, "
            "and if that does not help another copy of the model"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device or the machine had no memory left; PyTorch raises a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(MEMORY.search(str(error))))


def sentence(error: BaseException, path: object = None) -> str:
    """Say an error of `FAILURES` as expected, got, remedy.

    Arguments:
        error: What was raised.
        path: What could not be written; else the file that an error of the system names.
    """
    if is_out_of_memory(error):
        return (
            "expected enough memory, got none left; try --low-memory, --dtype bfloat16, a smaller --side, "
            "fewer --jobs or pictures at a time, where the command has them"
        )
    if isinstance(error, OSError):
        where = path or error.filename or "disk"
        return f"{where}: expected a place to write to, got {error.strerror or str(error)!r}; choose another output"
    return str(error) or type(error).__name__


def printable(text: str) -> str:
    """Escape what a file's name may hold and a terminal would obey: line ends, escapes, turned writing directions."""
    return "".join(
        c if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escaped(c)
        for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
