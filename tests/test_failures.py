import errno
import math
from pathlib import Path

import pytest
import torch

from antidiffusion.failures import FAILURES, NotFiniteError, expect_finite, is_out_of_memory, printable, sentence
from antidiffusion.recipes.base import Trace


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none(value: float) -> None:
    for values in (value, torch.tensor([0.0, value]), torch.tensor(value, dtype=torch.bfloat16)):
        with pytest.raises(NotFiniteError, match=r"expected finite numbers in the loss, got NaN .*; try --dtype"):
            expect_finite(values, "the loss")
    expect_finite(1e38, "the loss")
    expect_finite(torch.ones(3), "the loss")
    assert issubclass(NotFiniteError, FAILURES)  # so that it ends one picture


def test_a_run_ends_at_the_first_loss_that_is_none() -> None:
    trace = Trace(3, lambda *step: None)
    with pytest.raises(NotFiniteError, match="the loss of the perturbation"):
        trace.run("perturbation", iter([1.0, math.nan, 2.0]))
    assert trace.losses == {"perturbation": [1.0]}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_is_not_enough(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert sentence(error).startswith("expected enough memory, got none left; try --low-memory")


def test_memory_of_this_machine() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("sizes differ"), OSError(28, "full")])
def test_other_failures_are_not_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_sentences() -> None:
    assert sentence(ValueError("expected a, got b; do c")) == "expected a, got b; do c"
    assert sentence(RuntimeError()) == "RuntimeError"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert sentence(full, Path("out/a.png")).startswith("out/a.png: expected a place to write to, got 'No space left")
    full.filename = "x"
    assert sentence(full).startswith("x: ")


def test_names_are_printed_and_not_obeyed() -> None:
    plain = "Zoë köpek (1) \N{HAMSTER FACE} 写真 \N{MAN}\u200d\N{WOMAN}.png"
    assert printable(plain) == plain
    assert printable("a\nb\x1b[31m\u202eq\udcff\u2028\x7f") == r"a\nb\x1b[31m\u202eq\udcff\u2028\x7f"
