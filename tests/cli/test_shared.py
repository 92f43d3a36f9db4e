import gc
from pathlib import Path
from typing import Any

import pytest
from command_line import cli

import antidiffusion.models.loading
from antidiffusion.models.base import Surrogate

DRAWING = ["--steps", "1", "-o", "out.png"]


@pytest.fixture
def loadings(monkeypatch: pytest.MonkeyPatch, tiny: Surrogate) -> list[dict[str, Any]]:
    """What models are loaded with; each is a tiny one."""
    options: list[dict[str, Any]] = []
    for loader in ("load", "load_protector"):
        monkeypatch.setattr(antidiffusion.models.loading, loader, lambda model, **given: options.append(given) or tiny)
    return options


@pytest.mark.parametrize(
    ("command", "dtype", "full_tuning"),
    [
        (["protect", "photos/a.png", "--steps", "1", "--rounds", "0"], "auto", False),
        (["protect", "photos/a.png", "--recipe", "official", "--dry-run"], "auto", True),
        (["protect", "photos/a.png", "--tuning", "full", "--dry-run"], "auto", True),
        (["sample", "a", *DRAWING], "auto", False),
        (["attack", "dreambooth", "photos", "--prompt", "a", *DRAWING], "auto", True),
        (["attack", "custom-diffusion", "photos", "--prompt", "a", *DRAWING], "auto", True),
        (["attack", "lora", "photos", "--prompt", "a", *DRAWING], "auto", False),
        (["sample", "a", *DRAWING, "--dtype", "mixed"], "mixed", False),
        (["sample", "a", *DRAWING, "--dtype", "float16"], "float16", False),
    ],
)
def test_what_the_loader_is_told(
    here: Path, loadings: list[dict[str, Any]], command: list[str], dtype: str, full_tuning: bool
) -> None:
    run = cli(*command, "--model", "large", "--device", "cpu")
    assert run.code == 0, run.err
    told = [(given["device"], given["dtype"], given["full_tuning"]) for given in loadings]
    assert told == [("cpu", dtype, full_tuning)]


def test_what_is_loaded_is_never_collected(
    here: Path, loadings: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(loadings)))
    assert cli("sample", "a", *DRAWING).code == 0
    assert frozen == [1]  # after the model is there
