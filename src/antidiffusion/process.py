"""Settings of the whole process. A library should leave lasting ones to its caller; the command line makes them."""

import ctypes
import gc
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

# glibc's malloc.h: an option of mallopt and its value.
KEEP = {
    "M_MMAP_MAX": (-4, 0),  # no block is mapped for itself, and given back when freed
    "M_TRIM_THRESHOLD": (-1, -1),  # the heap never shrinks
    "M_TOP_PAD": (-2, 2**26),  # it grows by 64 MB at least
}
GIVE_BACK = {"M_MMAP_THRESHOLD": (-3, 2**17)}  # larger blocks are mapped; unset, it grows with what is freed


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of giving it back to the system, until it ends.

    A step allocates and frees hundreds of tensors of many megabytes. glibc maps each anew, and the system fills its
    pages with zeros as they are touched, which takes longer than adding two tensors (benchmarks/README.md has figures).

    Returns:
        Whether the allocator took it; False where it is not glibc's.
    """
    return _mallopt(KEEP)


def give_back_freed_memory() -> bool:
    """Let this process give freed memory back to the system at once, until it ends: the opposite, for low memory.

    glibc by itself gives back some and keeps some in pieces that fit nothing: an eighth of the peak of Stable Diffusion
    2.1, almost a third of XL's (benchmarks/README.md).

    Returns:
        Whether the allocator took it; False where it is not glibc's.
    """
    return _mallopt(GIVE_BACK)


def _mallopt(options: dict[str, tuple[int, int]]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in options.values())


@contextmanager
def uncollected() -> Iterator[None]:
    """Import and load inside the block without garbage collection.

    Libraries make half a million objects that live to the end, and the collector would go through them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stop_as_by_ctrl_c() -> None:
    """Let what ends a job or closes a terminal raise KeyboardInterrupt, as Ctrl-C does, so that work is tidied up.

    A signal that is ignored, as by nohup, stays ignored.
    """
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def end_with_parent() -> None:
    """End this process when its parent is killed: an executor's processes would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("expected a process that another one started, got the first; call it in a worker")
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
