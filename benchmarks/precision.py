"""Does half precision protect as well, and are attacks the same in it? Edits and DreamBooth on `mini`.

    python benchmarks/precision.py OUT    # OUT keeps the pictures; the rows go to results/precision/PRECISION.jsonl

Weights in bfloat16 cannot be tuned in full, so each recipe runs in float32 and in the half precision that `--dtype
auto` takes for it on a large model. Protections in float32 are also attacked in mixed precision.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from antidiffusion import Surrogate
from antidiffusion.bench import ROWS, Plan, run
from antidiffusion.report.rows import CLEAN, CONTROL, Row, read_rows
from antidiffusion.report.tables import overall

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "precision"
ATTACKER, MIXED = "mini", "mixed"
TUNED, OTHERS = ("official", "anti-diffusion"), ("anti-diffusion, LoRA", "anti-diffusion, quick")
RECIPES = {ATTACKER: (CONTROL, *TUNED, *OTHERS), "bfloat16": (CONTROL, *OTHERS), MIXED: (CONTROL, *TUNED)}
"""By the surrogate's precision; the attacker's model in float32 is the float32 surrogate."""


def load(precision: str) -> Surrogate:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return Surrogate.from_pretrained("mini", dtype=dtype, autocast=torch.bfloat16 if precision == MIXED else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    plan = Plan.read(HERE / "precision.toml")
    RESULTS.mkdir(exist_ok=True)
    for precision, names in RECIPES.items():
        attackers = (ATTACKER, MIXED) if precision == ATTACKER else (ATTACKER,)
        recipes = {name: plan.recipes[name] for name in names}
        changed = replace(plan, surrogate=precision, attackers=attackers, recipes=recipes)
        for done in run(changed, args.out / precision, load):
            if done.error:
                raise SystemExit(f"{done.trial}: {done.error}")
        shutil.copy(args.out / precision / ROWS, RESULTS / f"{precision}.jsonl")
    print(tables())


def tables() -> str:
    """Return the table of benchmarks/README.md."""
    rows = {precision: read_rows(RESULTS / f"{precision}.jsonl") for precision in RECIPES}
    clean = [row for row in rows[ATTACKER] if row.recipe == CLEAN and row.kind == "tuning"]
    pairs = [(precision, ATTACKER) for precision in RECIPES] + [(ATTACKER, MIXED)]
    lines = ["| recipe | protected in | attacked in | edits, SSIM | DreamBooth, likeness |", "| --- " * 5 + "|"]
    for surrogate, attacker in pairs:
        own = [replace(row, surrogate=attacker) for row in rows[surrogate] if row.attacker == attacker]
        means = {kind: overall(own, kind) for kind in ("edit", "tuning")}
        for recipe in RECIPES[surrogate]:
            figures = " | ".join(f"{means[kind][recipe]:.3f}" for kind in means)
            lines.append(f"| {recipe} | {named(surrogate)} | {named(attacker)} | {figures} |")
        bare = fmean(likeness(row) for row in clean if row.attacker == attacker)
        lines.append(f"| unprotected | | {named(attacker)} | 1 | {bare:.3f} |")
    return "\n".join(lines) + "\n"


def named(precision: str) -> str:
    return "float32" if precision == ATTACKER else precision


def likeness(row: Row) -> float:
    value = row.metrics["likeness"]
    assert value is not None
    return value


if __name__ == "__main__":
    main()
