import gc
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import QUIET, cli

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


BAR = """
from antidiffusion.cli.shared import progress_bar
with progress_bar() as bar:
    task = bar.add_task("[/bold]", total=500)
    for done in range(500):
        bar.update(task, description="[/bold] name", completed=done)
    print("result", flush=True)
"""


def test_a_log_is_not_filled_with_bars() -> None:
    environment = QUIET | {"FORCE_COLOR": "1"}  # as on many CI machines
    run = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, env=environment, check=True)
    assert (run.stdout, run.stderr) == ("result\n", "")


def test_results_go_to_standard_output_while_the_bar_is_on_a_terminal() -> None:
    terminal, device = pty.openpty()
    environment = QUIET | {"TERM": "xterm"}
    run = subprocess.run(
        [sys.executable, "-c", BAR], stdout=subprocess.PIPE, stderr=device, env=environment, check=True
    )
    os.close(device)
    shown = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    except OSError:  # Linux's end of a terminal
        pass
    finally:
        os.close(terminal)
    assert run.stdout == b"result\n"
    assert b"[/bold] name" in shown
