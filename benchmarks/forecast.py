"""How far `protect --dry-run` is from what a run then takes; each in a process of its own, since peaks never fall.

    python benchmarks/forecast.py [NAME ...]    # all: fifteen minutes on an idle machine; results/forecast.json

On the embedded model, and on Stable Diffusion 2.1's shape with half of its channels and random weights in bfloat16.
Seconds are those of the whole call, the report card's measurements included, less imports and loading.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = (
    "mini, default",
    "mini, quick",
    "mini, full tuning, low memory",
    "mini, official",
    "2.1's shape, quick",
    "2.1's shape, short, low memory",
)


def run(name: str, dry: bool) -> dict[str, float]:
    """Forecast or protect, in this process, as the command does."""
    import engine
    import torch

    from antidiffusion import Picture
    from antidiffusion.card import peak_memory
    from antidiffusion.forecast import forecast
    from antidiffusion.process import give_back_freed_memory, keep_freed_memory
    from antidiffusion.protection import protect
    from antidiffusion.recipes import PRESETS, RECIPES

    model, kind, *rest = name.split(", ")
    recipe: Any = PRESETS["anti-diffusion"].get(kind) or RECIPES.get(kind) or RECIPES["anti-diffusion"]
    if kind == "full tuning":
        recipe = replace(recipe, tuning="full")
    if kind == "short":
        recipe = replace(recipe, rounds=1, steps=10)
    lean = "low memory" in rest
    give_back_freed_memory() if lean else keep_freed_memory()  # as the command does
    surrogate, pixels = engine.prepared(*(("mini", 1, "float32") if model == "mini" else ("2.1", 2, "bfloat16")))
    if dry:
        said = forecast([Picture(pixels)], recipe, surrogate, low_memory=lean)
        return {"seconds": round(said.seconds, 1), "peak_memory_mb": round(said.peak_memory / 1e6)}
    begun = time.perf_counter()
    protect([Picture(pixels)], recipe, surrogate=surrogate, low_memory=lean)
    seconds = time.perf_counter() - begun
    return {"seconds": round(seconds, 1), "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 1e6)}


def fresh(name: str, dry: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--here", name, *(["--dry"] if dry else [])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=RUNS, help=f"of: {'; '.join(RUNS)}")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.here, options.dry)))
        return
    from antidiffusion.card import versions

    path = HERE / "results" / "forecast.json"
    rows: dict[str, Any] = json.loads(path.read_text())["said, then measured"] if path.exists() else {}
    for name in options.names:
        said, taken = fresh(name, True), fresh(name, False)
        rows[name] = {key: [said[key], taken[key]] for key in said}
        rows[name] |= {f"{key} off by": round(said[key] / taken[key] - 1, 3) for key in said}
        print(name, rows[name], flush=True)
        path.write_text(json.dumps({"said, then measured": rows, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
