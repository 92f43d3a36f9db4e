"""Measure peak memory and seconds per step of every stage at Stable Diffusion's shapes: memory.json.

Weights are random and built directly in the asked dtype. The text encoder has its real size, since a run loads it: it
is used once and stays in memory. Each configuration runs in a fresh process with one step of every stage. The stages
run in the order of the recipe and a process's peak never falls, so a stage's figure is the peak up to its end.

    python benchmarks/memory.py --model xl --dtype bfloat16 --tuning lora [--low-memory] [--width-divisor 4]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "memory.json"
GIB = 2**30
STAGES = ("prompt tuning", "perturbation", "surrogate tuning", "second perturbation")


def peak() -> float:
    """Return the process's peak resident memory in GiB."""
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB, 2)


def resident() -> float:
    """Return the memory resident now in GiB, where the system tells."""
    path = Path("/proc/self/statm")
    return round(int(path.read_text().split()[1]) * resource.getpagesize() / GIB, 2) if path.exists() else 0.0


def measure(model: str, dtype: str, tuning: str, low_memory: bool, divisor: int, threads: int) -> dict[str, Any]:
    """Run one step of every stage of AntiDiffusion in this process and return the row."""
    import numpy as np
    import shapes
    import torch

    from antidiffusion.models.memory import low_memory as lean
    from antidiffusion.pictures.canvas import Canvas
    from antidiffusion.process import give_back_freed_memory, keep_freed_memory
    from antidiffusion.recipes import AntiDiffusion

    give_back_freed_memory() if low_memory else keep_freed_memory()  # as the command does
    torch.set_num_threads(threads)
    imports = peak()
    started = time.perf_counter()
    surrogate = shapes.build(model, "cpu", dtype, divisor)
    side = surrogate.size
    weights = sum(p.numel() * p.element_size() for module in surrogate.modules for p in module.parameters())
    built = {"seconds": round(time.perf_counter() - started, 1), "peak_gib": peak(), "resident_gib": resident()}
    stages: dict[str, Any] = {"imports": {"peak_gib": imports}, "weights": built}
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    recipe = AntiDiffusion(rounds=1, steps=1, prompt_steps=1, tuning_steps=1, tuning=tuning)
    started = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal started
        name = STAGES[done - 1]
        seconds = round(time.perf_counter() - started, 1)
        stages[name] = {"seconds": seconds, "peak_gib": peak(), "resident_gib": resident()}
        print(f"{name:20} {stages[name]}", file=sys.stderr, flush=True)
        started = time.perf_counter()

    canvas = Canvas(pixels, (side, side))
    with lean(surrogate) if low_memory else nullcontext():
        recipe([canvas], surrogate, torch.Generator().manual_seed(0), progress)
    return {
        "model": model,
        "dtype": dtype,
        "tuning": tuning,
        "low_memory": low_memory,
        "width_divisor": divisor,
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": peak(),
        "stages": stages,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "finite": bool(torch.isfinite(canvas.delta).all() and canvas.delta.abs().max() > 0),
    }


def save(row: dict[str, Any]) -> None:
    """Put the row into the results, in place of an earlier one of the same configuration."""
    keys = ("model", "dtype", "tuning", "low_memory", "width_divisor")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in keys)] + [row]
    rows.sort(key=lambda old: [str(old[key]) for key in keys])
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["1.5", "2.1", "xl"], default="2.1", help="version of Stable Diffusion")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "mixed"], default="bfloat16")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument(
        "--width-divisor", type=int, choices=[1, 2, 4, 8], default=1, help="fewer channels, for a quick try"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="one is faster on a busy machine")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        row = measure(
            options.model,
            options.dtype,
            options.tuning,
            options.low_memory,
            options.width_divisor,
            options.threads,
        )
        print(json.dumps(row))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--here"]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    save(row)
    print(f"peak {row['peak_gib']} GiB, weights {row['weights_gib']} GiB")


if __name__ == "__main__":
    main()
