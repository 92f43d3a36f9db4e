"""The command line as tests call it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

import antidiffusion
from antidiffusion.cli import app

QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(antidiffusion.__file__).parents[1])}
PROGRAM = [sys.executable, "-c", "from antidiffusion.cli import main; main()"]


@dataclass
class Run:
    code: int
    out: str
    err: str


def cli(*arguments: str | Path) -> Run:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Run(result.exit_code, result.stdout, result.stderr)


def draw(path: Path | str, seed: int = 0, height: int = 64, width: int = 70) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return Path(path)
