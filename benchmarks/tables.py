"""Print the committed results as the Markdown tables of benchmarks/README.md.

python benchmarks/tables.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def flops() -> str:
    rows = [
        [name, f"{row['tflop']:.1f}", f"{row['released_over_this']:.2f}"] for name, row in read("flops")["rows"].items()
    ]
    return table(["recipe, SD 2.1-base at 512 px", "TFLOP", "released code / this"], rows)


def memory() -> str:
    rows = []
    for row in read("memory"):
        stages = {name: stage.get("seconds") for name, stage in row["stages"].items() if "seconds" in stage}
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in stages.items() if name != "weights")
        lean = "yes" if row["low_memory"] else "no"
        peak = f"{row['peak_gib'] * 2**30 / 1e9:.1f} GB"
        rows.append([row["dtype"], row["tuning"], lean, str(row["width_divisor"]), peak, seconds])
    return table(["dtype", "tuning", "--low-memory", "width /", "peak", "one step of each stage"], rows)


def mini() -> str:
    rows = [
        [
            f"{radius}/255",
            *(f"{row[f'{kind}_shift']:.1%}" for kind in ("attack", "random")),
            *(f"{row[f'{kind}_edit_ssim']:.3f}" for kind in ("attack", "random")),
        ]
        for radius, row in read("mini")["sensitivity"].items()
    ]
    return table(
        ["budget", "latent shift, attack", "random", "edit SSIM (strength 0.4), attack", "random"],
        rows,
    )


if __name__ == "__main__":
    for name, make in {"flops": flops, "memory": memory, "mini": mini}.items():
        if (RESULTS / f"{name}.json").exists():
            print(f"### {name}\n\n{make()}")
