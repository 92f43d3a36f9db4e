"""Does half precision protect as well, and are attacks the same in it? Edits and DreamBooth on `mini`.

    python benchmarks/precision.py OUT    # OUT keeps the pictures; rows go to results/precision/PRECISION.jsonl

Weights in bfloat16 cannot be tuned in full, so each recipe runs in float32 and in the half precision that `--dtype
auto` takes for it on a large model. Protections in float32 are also attacked in mixed precision.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from antidiffusion import Surrogate
from antidiffusion.bench.plan import Plan
from antidiffusion.bench.rows import CONTROL, ROWS
from antidiffusion.bench.runner import run

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "precision"
ATTACKER, MIXED = "mini", "mixed"
TUNED, OTHERS = ("official", "anti-diffusion"), ("anti-diffusion, LoRA", "anti-diffusion, quick")
RECIPES = {ATTACKER: (CONTROL, *TUNED, *OTHERS), "bfloat16": (CONTROL, *OTHERS), MIXED: (CONTROL, *TUNED)}
"""By the surrogate's precision; the attacker's model in float32 is the float32 surrogate."""


def load(precision: str) -> Surrogate:
    return Surrogate.from_pretrained("mini", device="cpu", dtype="float32" if precision == ATTACKER else precision)


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


if __name__ == "__main__":
    main()
