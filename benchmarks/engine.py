"""What the engine costs beside a plain implementation of the released procedure, how cost grows, and where it goes.

    python benchmarks/engine.py compare [mini] [2.1]    # ours and tests/reference_official.py, same machine and weights
    python benchmarks/engine.py growth                  # pictures, sides, steps, start-up; needs .[plots]
    python benchmarks/engine.py profile [mini] [2.1]    # torch.profiler's operators of the default recipe

Every run is a process of its own, since a process's peak never falls. Results go to results/engine.json; run it on an
idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT, PLOT = HERE / "results" / "engine.json", HERE.parent / "docs" / "growth.png"
PORTRAIT = HERE / "portraits" / "02-01.png"
MODELS = ("mini", "2.1")
"""What `compare` runs on: the whole schedule on the embedded model, and Stable Diffusion 2.1's shape with half of its
channels and random weights at a tenth of the schedule, stage by stage, also in the precision of `--dtype auto`."""
DIVISOR, REFERENCE = 2, "released, plain"
TENTHS: dict[str, dict[str, int]] = {
    "official": {"rounds": 1, "steps": 3, "prompt_steps": 15, "tuning_steps": 10},
    "anti-diffusion": {"rounds": 1, "steps": 6, "prompt_steps": 5, "tuning_steps": 6},
    "quick": {"steps": 3, "prompt_steps": 2},
}
TUNED_IN_FULL = (REFERENCE, "official")
PICTURES, SIDES, STEPS = (1, 4, 16, 64), (128, 256, 512), (10, 20, 40, 80)
PIXELS = (256, 512, 1024, 2048)
REPEATS = 3
MATHS = ("conv", "mm", "attention", "linear")  # of operators' names: convolution, matrix product, fused attention
STARTUP = {
    "library": "from antidiffusion import Surrogate; Surrogate.from_pretrained('mini')",
    "command": "from antidiffusion.cli.shared import *; load_surrogate('mini', None, 'cpu', DType.auto)",
}


def peak() -> float:
    import torch

    from antidiffusion.card import peak_memory

    return peak_memory(torch.device("cpu")) / 1e6


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Run once; return the seconds, and the process's peak beyond what it was before, in MB."""
    before, begun = peak(), time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    return {"seconds": round(seconds, 2), "peak_mb": round(peak()), "working_mb": round(peak() - before)}


def prepared(model: str, divisor: int, precision: str) -> tuple[Any, Any]:
    """Return the surrogate and the portrait's pixels at its size."""
    import shapes

    from antidiffusion import Picture, Surrogate

    mini = model == "mini"
    surrogate = Surrogate.from_pretrained(model) if mini else shapes.build(model, "cpu", precision, divisor)
    times = surrogate.size // 128
    return surrogate, Picture.read(PORTRAIT).pixels.repeat(times, 0).repeat(times, 1)


def precisions(model: str, *, full_tuning: bool) -> list[str]:
    """Return float32, and after it what `--dtype auto` takes for a large model if that is another one here."""
    import torch

    from antidiffusion.models.precision import dtypes_of

    weights, computing = dtypes_of("auto", torch.device("cpu"), small=model == "mini", full_tuning=full_tuning)
    return list(dict.fromkeys(["float32", "mixed" if computing else str(weights).removeprefix("torch.")]))


def compared(model: str, name: str, precision: str) -> dict[str, float]:
    """Protect one picture, in this process."""
    sys.path.append(str(HERE.parent / "tests"))
    import reference_official
    import torch

    from antidiffusion.pictures.canvas import Canvas
    from antidiffusion.process import keep_freed_memory
    from antidiffusion.recipes import PRESETS, RECIPES

    if name != REFERENCE:
        keep_freed_memory()  # as the command does
    surrogate, pixels = prepared(model, DIVISOR, precision)
    schedule = {} if model == "mini" else TENTHS["official" if name == REFERENCE else name]
    if name == REFERENCE:
        for module in surrogate.modules:
            module.to(memory_format=torch.contiguous_format)  # as a plain implementation has them
        parts = (surrogate.vae, surrogate.denoiser, surrogate.text_encoders[0], surrogate.tokenizers[0])
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            scheduler = surrogate.pipeline().scheduler
            return timed(lambda: reference_official.protect_official(*parts, scheduler, image, **schedule))
    chosen: Any = PRESETS["anti-diffusion"].get(name) or RECIPES[name]
    recipe = replace(chosen, **schedule)
    canvas = Canvas(pixels, pixels.shape[:2])
    return timed(lambda: recipe([canvas], surrogate, torch.Generator().manual_seed(0), lambda *_: None))


def grown(pictures: int, pixels: int, side: int, steps: int) -> dict[str, float]:
    """Run the default recipe's ascent on several pictures of one size together, in this process."""
    from antidiffusion import Picture, Surrogate, protect
    from antidiffusion.process import keep_freed_memory
    from antidiffusion.recipes import AntiDiffusion

    keep_freed_memory()
    surrogate = Surrogate.from_pretrained("mini")
    whole = Picture.read(PORTRAIT).pixels.repeat(pixels // 128, 0).repeat(pixels // 128, 1)
    recipe = AntiDiffusion(rounds=0, steps=steps, prompt_steps=steps // 2, tuning_steps=0)
    options: Any = {"surrogate": surrogate, "together": True, "side": side}
    return timed(lambda: protect([Picture(whole)] * pictures, recipe, **options))


def profiled(model: str, precision: str) -> dict[str, Any]:
    """Return the shares of the operators' own time in the default recipe, less what is under 1 %.

    A third of the schedule on the embedded model; at Stable Diffusion's shape, all its channels, one step of each stage
    but two of ascent.
    """
    import torch

    from antidiffusion.pictures.canvas import Canvas
    from antidiffusion.process import keep_freed_memory
    from antidiffusion.recipes import AntiDiffusion

    keep_freed_memory()
    surrogate, pixels = prepared(model, 1, precision)
    once = {"rounds": 1, "steps": 1, "prompt_steps": 1, "tuning_steps": 1}
    recipe = replace(AntiDiffusion(), **({"rounds": 1, "steps": 20} if model == "mini" else once))

    def run() -> None:
        canvas = Canvas(pixels, pixels.shape[:2])
        recipe([canvas], surrogate, torch.Generator().manual_seed(0), lambda *_: None)

    run()
    with torch.profiler.profile() as profile:
        run()
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    ranked = sorted(own.items(), key=lambda pair: -pair[1])
    maths = sum(value for key, value in own.items() if any(word in key for word in MATHS))
    return {
        "convolution, matrix products and attention": round(maths / total, 3),
        "operators": {key: round(value / total, 3) for key, value in ranked if value > total / 100},
    }


def fresh(*arguments: Any) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--here", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(models: Sequence[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for model in models:
        names = (REFERENCE, *TENTHS)
        cases = [(name, kind) for name in names for kind in precisions(model, full_tuning=name in TUNED_IN_FULL)]
        for name, precision in cases:
            repeats = REPEATS if model == "mini" else 1  # short runs differ by a third from one to the next
            runs = [fresh("compare", model, name, precision) for _ in range(repeats)]
            row = sorted(runs, key=lambda run: run["seconds"])[repeats // 2]
            first = rows.setdefault(model, {}).setdefault(f"{REFERENCE}, float32", row)
            ratios = {f"{key} / reference": round(row[key] / first[key], 3) for key in row}
            rows[model][f"{name}, {precision}"] = row | ratios
            print(model, name, precision, row | ratios, flush=True)
    return rows


def growth() -> dict[str, Any]:
    base = {"pictures": 1, "pixels": 128, "side": 128, "steps": 10}
    swept = {"pictures": PICTURES, "pixels": PIXELS, "side": SIDES, "steps": STEPS}
    rows: dict[str, Any] = {}
    for key, values in swept.items():
        rows[key] = {}
        for value in values:
            rows[key][value] = fresh("growth", *(base | {key: value}).values())
            print(key, value, rows[key][value], flush=True)
    plot(rows)
    return rows | {"start-up seconds": {name: started(code) for name, code in STARTUP.items()}}


def started(code: str) -> float:
    """Return the median seconds from the start of a process to a loaded model."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.monotonic()  # which all processes of a machine read alike
        command = [sys.executable, "-c", f"{code}; import time; print(time.monotonic())"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        seconds.append(float(run.stdout) - begun)
    return round(statistics.median(seconds), 2)


def plot(rows: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    labels = {
        "pictures": ("pictures together", "s a picture"),
        "pixels": ("side of the picture, px", "s"),
        "side": ("side that the model sees, px", "s"),
        "steps": ("steps", "s"),
    }
    for axes, (key, (x, y)) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        values = list(rows[key])
        share = [rows[key][value]["seconds"] / (value if key == "pictures" else 1) for value in values]
        axes.plot(values, share, "o-")
        axes.set(xlabel=x, ylabel=y, xscale="log", xticks=values, xticklabels=values)
        axes.set_ylim(bottom=0)
        axes.minorticks_off()
    figure.savefig(PLOT, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compare", "growth", "profile"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        if options.command == "compare":
            print(json.dumps(compared(*options.arguments)))
        else:
            print(json.dumps(grown(*map(int, options.arguments))))
        return
    import torch

    from antidiffusion.card import versions

    models = options.arguments or MODELS
    run = {
        "compare": lambda: compare(models),
        "growth": growth,
        "profile": lambda: {
            f"{model}, {kind}": profiled(model, kind)
            for model in models
            for kind in precisions(model, full_tuning=False)
        },
    }[options.command]
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    machine = {"threads": torch.get_num_threads(), "versions": versions()}
    results[options.command] = results.get(options.command, {}) | run() | machine
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
