"""Imports point one way: from the command line down to the weights (docs: the module's own docstrings)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUIET

import antidiffusion

ROOT = Path(antidiffusion.__file__).parent
# From the top down: a module imports only from layers below its own, or from its own.
LAYERS = [
    {"cli"},
    {"bench"},
    {"batch", "demo", "folders", "forecast", "preview", "workers"},
    {"protection"},
    {"card"},
    {"attacks", "recipes", "data"},
    {"metrics"},
    {"models"},
    {"pictures"},
    {"failures", "process", "progress"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    names = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[1] for name in names if name.startswith("antidiffusion.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert all(RANK[own] <= RANK[name] for name in imported(path)), (own, imported(path))


def test_attacks_do_not_know_protections() -> None:
    for path in (ROOT / "attacks").glob("*.py"):
        assert not imported(path) & {"protection", "recipes"}, path


@pytest.mark.parametrize("module", ["rows", "estimates", "tables", "figures", "report"])
def test_rows_are_read_without_what_writes_them(module: str) -> None:
    names = {f"antidiffusion.bench.{name}" for name in ("plan", "trials", "runner")} | {"torch"}
    code = f"import sys, antidiffusion.bench.{module}; sys.exit(bool({names!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=QUIET).returncode == 0
