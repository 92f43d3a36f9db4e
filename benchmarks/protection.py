"""Protection on the embedded model: recipes and presets side by side, at the same true budget, with the random control.

    python benchmarks/protection.py [--pictures 8] [--budget 8] [--out benchmarks/results/protection.json]

Every recipe protects the same held-out portraits, in one run. Per recipe, on the rounded pixels:
the denoising loss of the untouched model at fresh noise with held-out prompts, over the clean picture's and over the
random-sign control's; the cross-attention mass moved; the similarity of its edits (SDEdit, MasaCtrl) to the clean
picture's; seconds. Ratios are means over pictures of the picture's own ratio, with the standard error.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from antidiffusion import Picture, Surrogate, protect
from antidiffusion.attacks.base import Attack, Prompts
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.protection import versions
from antidiffusion.recipes import PRESETS, RECIPES, AntiDiffusion, Recipe
from antidiffusion.surrogate import randn

HERE = Path(__file__).parent
EDIT_PROMPT = "a portrait of a person, wearing sunglasses and a red shirt, on a green background"
SOURCE_PROMPT = "a portrait of a person"
EDITS: dict[str, Attack] = {
    "sdedit 0.4": SDEdit(strength=0.4, guidance=3.0),
    "sdedit 0.6": SDEdit(strength=0.6, guidance=3.0),
    "masactrl": MasaCtrl(guidance=5.0),
}
DRAWS = 32  # (noise, step) pairs of the held-out loss, stratified over the steps


def recipes(budget: float) -> dict[str, Recipe]:
    """The recipes of the table, all at one budget."""
    ours = {f"anti-diffusion, SDL {sdl}": AntiDiffusion(sdl=sdl) for sdl in ("zero", "semantic", "divergence")}
    all_ = {
        "random-sign": RECIPES["random-sign"],
        "official": RECIPES["official"],
        "anti-diffusion, no SDL": AntiDiffusion(sdl_weight=0),
        **ours,
        "anti-diffusion, no tuning": AntiDiffusion(tuning_steps=0),
        "anti-diffusion, no prompt tuning": AntiDiffusion(prompt_steps=0),
        **{f"preset {name}": preset for name, preset in PRESETS.items()},
        **{name: recipe for name, recipe in RECIPES.items() if name != "anti-diffusion"},
    }
    return {name: replace(recipe, budget=budget) for name, recipe in all_.items()}  # type: ignore[type-var]


@torch.no_grad()
def held_out_loss(surrogate: Surrogate, x: Tensor, prompts: list[str]) -> float:
    """Mean denoising loss of picture `x: (1, 3, h, w)` at fixed noise and stratified steps, over held-out prompts."""
    z = surrogate.posterior(x).mean.expand(DRAWS, -1, -1, -1)
    steps = len(surrogate.schedule.signal)
    t = ((torch.arange(DRAWS) + 0.5) * steps / DRAWS).long()
    n = randn(z.shape, Generator().manual_seed(987_654_321), z)
    return statistics.mean(
        surrogate.denoising_loss(z, n, t, surrogate.embed([prompt])).mean().item() for prompt in prompts
    )


def write(args: argparse.Namespace, surrogate: Surrogate, rows: dict[str, list[dict[str, float]]]) -> None:
    """Write what is known so far, so that a stopped run keeps its pictures."""
    table = {
        name: {
            key: {
                "mean": statistics.mean(row[key] for row in group),
                "sem": statistics.stdev(row[key] for row in group) / len(group) ** 0.5 if len(group) > 1 else None,
            }
            for key in group[0]
        }
        for name, group in rows.items()
    }
    result = {
        "model_sha256": surrogate.sha256,
        "budget": args.budget,
        "pictures": len(rows["random-sign"]),
        "seed": args.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "settings": {name: asdict(recipe) for name, recipe in recipes(args.budget).items()},  # type: ignore[call-overload]
        "recipes": table,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--budget", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "protection.json")
    args = parser.parse_args()

    captions = json.loads((HERE / "portraits" / "captions.json").read_text())
    surrogate = Surrogate.from_pretrained("mini")
    rows: dict[str, list[dict[str, float]]] = {}
    for file, caption in list(captions.items())[: args.pictures]:
        original = Picture.read(HERE / "portraits" / file)
        prompts = ["a photo of a person", "a photo of sks person", caption]
        clean_loss = held_out_loss(surrogate, original.tensor(), prompts)

        def edits(picture: Picture) -> dict[str, Tensor]:
            request = Prompts(EDIT_PROMPT, SOURCE_PROMPT)
            return {kind: attack(picture.tensor(), request, surrogate, args.seed) for kind, attack in EDITS.items()}

        clean_edits = edits(original)
        random_loss = 0.0
        for name, recipe in recipes(args.budget).items():
            if args.only and name not in [*args.only, "random-sign"]:
                continue
            begun = time.perf_counter()
            (protected,) = protect([original], recipe, surrogate=surrogate, seed=args.seed)
            seconds = time.perf_counter() - begun
            loss = held_out_loss(surrogate, protected.picture.tensor(), prompts)
            random_loss = loss if name == "random-sign" else random_loss
            row = {
                "linf": int(np.abs(protected.picture.pixels.astype(int) - original.pixels).max()),
                "psnr": psnr(protected.picture.tensor(), original.tensor()).item(),
                "loss_over_clean": loss / clean_loss,
                "loss_over_random": loss / random_loss,
                "attention_mass_moved": protected.card["effect"]["attention_mass_moved"],
                "seconds": seconds,
            }
            for kind, edited in edits(protected.picture).items():
                row[f"edit_ssim {kind}"] = ssim(edited, clean_edits[kind]).item()
            rows.setdefault(name, []).append(row)
            print(f"{file} {name:34s}" + " ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
        write(args, surrogate, rows)


if __name__ == "__main__":
    main()
