import gc
import platform
import signal
import subprocess
import sys

import pytest

from antidiffusion.process import give_back_freed_memory, keep_freed_memory, stop_as_by_ctrl_c, uncollected

FAULTS = """
import resource, torch
from antidiffusion.process import give_back_freed_memory, keep_freed_memory, stop_as_by_ctrl_c, uncollected
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(8)][-1])
"""


HOLES = """
import os, torch
from pathlib import Path
from antidiffusion.process import give_back_freed_memory, keep_freed_memory, stop_as_by_ctrl_c, uncollected
{call}
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
torch.ones(2**22)  # 16 MB, freed: glibc now takes blocks up to this size from its heap
before = resident()
tensors = [torch.ones(2**21) for _ in range(64)]
tensors = tensors[7::8]
print((resident() - before) >> 20)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def printed(code: str) -> int:
    """Run code in a process of its own and return the number that it prints."""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@glibc
def test_freed_memory_is_used_again_without_page_faults():
    """Faults of filling four tensors of 64 MB for the eighth time."""
    kept, left = (printed(FAULTS.format(call=call)) for call in ("keep_freed_memory()", ""))
    assert kept < 20_000 < 60_000 < left


@glibc
def test_freed_memory_between_live_tensors_is_given_back():
    """Megabytes that stay when seven of eight tensors of 8 MB are freed."""
    given, left = (printed(HOLES.format(call=call)) for call in ("give_back_freed_memory()", ""))
    assert given < 100 < 300 < left


@pytest.mark.parametrize("setting", [keep_freed_memory, give_back_freed_memory])
def test_another_c_library_is_left_alone(monkeypatch, setting):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not setting()


def test_nothing_is_collected_inside_the_block():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_goes_on_after_an_error():
    with pytest.raises(ValueError), uncollected():
        raise ValueError
    assert gc.isenabled()


def test_a_caller_without_collection_stays_so():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    """As under nohup; one that is not raises what Ctrl-C does."""
    number = getattr(signal, name)
    before = {other: signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(number, signal.SIG_IGN)
        stop_as_by_ctrl_c()
        signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        stop_as_by_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
