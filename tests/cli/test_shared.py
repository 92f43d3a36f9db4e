import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import cli

from antidiffusion.cli.shared import fast_dtype
from antidiffusion.models.base import Surrogate

DRAWING = ["--steps", "1", "-o", "out.png"]


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that computes in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


@pytest.fixture
def loadings(monkeypatch: pytest.MonkeyPatch, tiny: Surrogate) -> list[dict[str, Any]]:
    """What models are loaded with; each is a tiny one."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(Surrogate, "from_pretrained", lambda model, **given: options.append(given) or tiny)
    return options


@pytest.mark.parametrize(
    ("device", "capabilities", "native", "weights", "tuned"),
    [
        ("cpu", {"avx512_bf16": True}, False, "bfloat16", "mixed"),
        ("cpu", {"amx_bf16": True}, False, "bfloat16", "mixed"),
        ("cpu", {"avx512_bf16": False, "avx2": True}, False, "float32", "float32"),
        ("mps", {"avx512_bf16": True}, False, "float32", "float32"),
        ("cuda:1", {}, True, "float16", "mixed"),
        ("cuda", {}, False, "float16", "float32"),
    ],
)
def test_half_precision_where_the_hardware_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capabilities: dict[str, bool],
    native: bool,
    weights: str,
    tuned: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert fast_dtype(device, full_tuning=False) == weights
    assert fast_dtype(device, full_tuning=True) == tuned


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype("cpu", full_tuning=False) == "float32"


@pytest.mark.parametrize(
    ("command", "weights", "computed"),
    [
        (["protect", "photos/a.png", "--steps", "1", "--rounds", "0"], torch.bfloat16, None),
        (["protect", "photos/a.png", "--recipe", "official", "--dry-run"], torch.float32, torch.bfloat16),
        (["protect", "photos/a.png", "--tuning", "full", "--dry-run"], torch.float32, torch.bfloat16),
        (["sample", "a", *DRAWING], torch.bfloat16, None),
        (["attack", "dreambooth", "photos", "--prompt", "a", *DRAWING], torch.float32, torch.bfloat16),
        (["attack", "custom-diffusion", "photos", "--prompt", "a", *DRAWING], torch.float32, torch.bfloat16),
        (["attack", "lora", "photos", "--prompt", "a", *DRAWING], torch.bfloat16, None),
        (["sample", "a", *DRAWING, "--dtype", "mixed"], torch.float32, torch.bfloat16),
        (["sample", "a", *DRAWING, "--dtype", "float16"], torch.float16, None),
    ],
)
def test_the_precision_of_a_large_model(
    here: Path,
    capable: None,
    loadings: list[dict[str, Any]],
    command: list[str],
    weights: torch.dtype,
    computed: torch.dtype | None,
) -> None:
    run = cli(*command, "--model", "large", "--device", "cpu")
    assert run.code == 0, run.err
    assert [(given["dtype"], given["autocast"]) for given in loadings] == [(weights, computed)]


def test_what_is_loaded_is_never_collected(
    here: Path, loadings: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(loadings)))
    assert cli("sample", "a", *DRAWING).code == 0
    assert frozen == [1]  # after the model is there


def test_mini_stays_in_float32(here: Path, capable: None, loadings: list[dict[str, Any]]) -> None:
    assert cli("sample", "a", *DRAWING).code == 0
    assert [(given["dtype"], given["autocast"]) for given in loadings] == [(torch.float32, None)]
