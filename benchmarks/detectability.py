"""Can a small detector tell protected pictures? Its AUROC on pictures that it never saw, a lower limit.

    python benchmarks/detectability.py [--pictures 96] [--model mini] [--recipe quick]...

Portraits of Defense-Edit-Synth, each once: half of them train the detector, the other half judge it. The same for the
control of random signs, and for pictures that nothing was done to,
where chance must come out. Results go to results/detectability.json.
"""

import argparse
import json
from pathlib import Path

import torch

from antidiffusion import Picture, Surrogate, protect
from antidiffusion.card import versions
from antidiffusion.data.defense_edit import read, synthetic
from antidiffusion.metrics.detectability import detectability
from antidiffusion.metrics.fidelity import psnr
from antidiffusion.recipes import PRESETS, RECIPES

RESULT = Path(__file__).parent / "results" / "detectability.json"
SEEDS = (0, 1, 2)  # of the detector
CONTROL = "random-sign"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--recipe", action="append", help="may be repeated; default: quick")
    args = parser.parse_args()
    surrogate = Surrogate.from_pretrained(args.model)
    originals = [Picture.read(item.picture) for item in read(synthetic())[: args.pictures]]
    clean = torch.cat([picture.tensor() for picture in originals])
    result = {"pictures": len(clean), "model_sha256": surrogate.sha256, "versions": versions(), "auroc": {}}
    same = [detectability(clean, clean, seed=seed) for seed in SEEDS]
    result["auroc"]["nothing"] = {"by detector": same, "psnr": None}
    for name in [CONTROL, *(args.recipe or ["quick"])]:
        recipe = {**RECIPES, **PRESETS}[name]
        protected = protect(originals, recipe, surrogate=surrogate)
        perturbed = torch.cat([done.picture.tensor() for done in protected])
        found = [detectability(clean, perturbed, seed=seed) for seed in SEEDS]
        result["auroc"][name] = {"by detector": found, "psnr": psnr(clean, perturbed).mean().item()}
        print(name, result["auroc"][name], flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
