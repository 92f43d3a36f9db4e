"""Protection against compute: the rows of `antidiffusion bench benchmarks/compute.toml` beside the work of flops.json.

python benchmarks/compute.py    # prints the table of benchmarks/README.md, writes docs/compute.png; needs .[plots]
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from antidiffusion.bench.rows import CONTROL, read_rows
from antidiffusion.bench.tables import overall

HERE = Path(__file__).parent
PLOT = HERE.parent / "docs" / "compute.png"
WORK = {
    "12 steps": "anti-diffusion, quick, 12 steps",
    "anti-diffusion, quick": "anti-diffusion, quick",
    "50 steps": "anti-diffusion, quick, 50 steps",
    "anti-diffusion": "anti-diffusion",
    "anti-diffusion, strong": "anti-diffusion, strong",
    "official": "official, our code",
}
AXES = {"edit": "SSIM to the clean picture's edit", "tuning": "DreamBooth: likeness"}


def main() -> None:
    rows = read_rows(HERE / "results" / "compute" / "rows.jsonl")
    counted = json.loads((HERE / "results" / "flops.json").read_text())["rows"]
    means = {kind: overall(rows, kind) for kind in AXES}
    work = {recipe: counted[name]["tflop"] for recipe, name in WORK.items()}
    print("| recipe | TFLOP | of official | edits, SSIM | DreamBooth, likeness |\n| --- | --- | --- | --- | --- |")
    for recipe, tflop in [*work.items(), (CONTROL, 0.0)]:
        values = " | ".join(f"{means[kind][recipe]:.3f}" for kind in AXES)
        print(f"| {recipe} | {tflop:.0f} | {tflop / work['official']:.2f} | {values} |")
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (kind, label) in zip(figure.subplots(1, 2), AXES.items(), strict=True):
        ours = [recipe for recipe in work if recipe != "official"]
        axes.plot([work[recipe] for recipe in ours], [means[kind][recipe] for recipe in ours], "o-")
        axes.plot(work["official"], means[kind]["official"], "s")
        axes.axhline(means[kind][CONTROL], linestyle=":", color="grey")
        axes.annotate(CONTROL, (60, means[kind][CONTROL]), (0, -12), textcoords="offset points", color="grey")
        for recipe in work:
            name = recipe.removeprefix("anti-diffusion, ")
            axes.annotate(name, (work[recipe], means[kind][recipe]), (5, 5), textcoords="offset points")
        axes.set(xlabel="TFLOP a picture at Stable Diffusion 2.1-base's shape", ylabel=label)
        axes.set(xscale="log", xlim=(50, 3000))
    figure.savefig(PLOT, dpi=100)


if __name__ == "__main__":
    main()
