"""Stable Diffusion 3.5 and FLUX.1 through the command line: protected, tuned and edited."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command_line import cli
from conftest import write_joint
from PIL import Image
from safetensors.torch import load_file

KINDS = pytest.mark.parametrize("kind", ["sd35", "flux-dev"])


def read(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@KINDS
def test_protecting(here: Path, kind: str) -> None:
    folder = write_joint(kind, here)
    command = ["protect", "photos/a.png", "--model", folder, "--steps", "2", "--rounds", "1", "--tuning-steps", "1"]
    run = cli(*command, "-o", "out")
    assert run.code == 0, run.err
    card = json.loads(Path("out/a.png.json").read_text())
    moved = np.abs(read("out/a.png") - read("photos/a.png")).max()
    assert card["budget"]["measured"] == moved and 1 <= moved <= 8
    effect = card["effect"]
    assert all(math.isfinite(effect[key]) for key in ("denoising_loss_before", "denoising_loss_after"))
    assert 0 < effect["attention_mass_moved"] < 1
    lean = cli(*command, "--tuning", "lora", "--low-memory", "-o", "lean")
    assert lean.code == 0, lean.err
    other = json.loads(Path("lean/a.png.json").read_text())
    assert other["model"]["sha256"] == card["model"]["sha256"] and other["budget"]["measured"] <= 8


@KINDS
def test_attacking(here: Path, kind: str) -> None:
    folder = write_joint(kind, here)
    tuning = ["attack", "lora", "photos/a.png", "--prompt", "a photo of sks person", "--model", folder, "--steps", "2"]
    run = cli(*tuning, "-o", "tuned.png", "--save", "adapter", "--rank", "2")
    assert run.code == 0, run.err
    weights = load_file("adapter/pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in weights)
    assert any(value.any() for key, value in weights.items() if ".lora_B." in key)
    assert cli(*tuning, "-o", "lean.png", "--rank", "2", "--low-memory").code == 0
    assert np.abs(read("lean.png") - read("tuned.png")).max() <= 1
    for method in ("sdedit", "masactrl"):
        edit = ["edit", method, "photos/a.png", "--prompt", "a red hat", "--model", folder, "--steps", "3"]
        run = cli(*edit, "-o", f"{method}.png")
        assert run.code == 0, run.err
        assert read(f"{method}.png").shape == (64, 64, 3) and read(f"{method}.png").std() > 1
