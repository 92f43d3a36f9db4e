import gc
import platform
import subprocess
import sys

import pytest

from antidiffusion.process import keep_freed_memory, uncollected

FAULTS = """
import resource, torch
from antidiffusion.process import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(8)][-1])
"""


def faults_of_256_megabytes(call: str) -> int:
    """Return the page faults of filling four tensors of 64 MB for the eighth time, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults():
    assert faults_of_256_megabytes("keep_freed_memory()") < 20_000 < 60_000 < faults_of_256_megabytes("")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


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
