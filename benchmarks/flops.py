"""Count the floating-point operations per picture of our default recipe and of the released code: flops.json.

Every stage's single step runs on the meta device through the code that protects pictures, at Stable Diffusion
2.1-base's shape and 512 pixels, and is multiplied by the recipe's number of steps; ours also at the shapes of 1.5 and,
with 1024 pixels, of XL. FlopCounterMode counts two operations per multiply-add, of convolutions and matrix products
only. On the meta device fused attention decomposes to two matrix products forward and four backward, the count of naive
attention; this is checked below. A real fused kernel computes the scores once more in the backward pass, which no count
here contains.

    python benchmarks/flops.py
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from antidiffusion.models.base import Surrogate
from antidiffusion.models.tuning import denoising, tunable
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes import (
    PERTURBATION,
    PRESETS,
    PROMPT,
    RECIPES,
    TUNING,
    AntiDiffusion,
    OfficialAntiDiffusion,
    Recipe,
    posteriors,
)
from antidiffusion.recipes.anti_diffusion import BALANCE_EVERY
from antidiffusion.recipes.ascent import gradient
from antidiffusion.recipes.official import Official

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import reference_official as released

ENCODING, BALANCED = "encoding", "perturbation that balances"


def tera(work: Callable[[], Any]) -> float:
    """Return the TFLOP of calling `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def check_attention() -> None:
    """Fail if fused attention is counted otherwise than naive attention."""

    def fused() -> None:
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    def naive() -> None:
        ((q @ q.transpose(-1, -2)).softmax(-1) @ q).sum().backward()

    q = torch.empty(1, 5, 4096, 64, device="meta", requires_grad=True)
    expected = 3 * 2 * 2 * 5 * 4096**2 * 64 / 1e12
    if not tera(fused) == tera(naive) == expected:
        raise RuntimeError(f"expected {expected} TFLOP of attention, got {tera(fused)} fused and {tera(naive)} naive")


def our_works(
    surrogate: Surrogate, recipe: AntiDiffusion | OfficialAntiDiffusion
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every stage and its single step, by the recipe's own code; a step is to be called before the next one."""
    generator = torch.Generator().manual_seed(0)
    side = surrogate.size
    groups = [[Canvas(np.zeros((side, side, 3), np.uint8), (side, side), "meta")]]
    x = groups[0][0].view()
    embedding = surrogate.embed([""])
    official = isinstance(recipe, OfficialAntiDiffusion)
    objective: Any = (
        Official(surrogate, embedding, recipe.sdl_weight) if official else recipe.objective(surrogate, embedding, x)
    )
    loss = denoising(surrogate, [posterior.sample for posterior in posteriors(groups, surrogate)], embedding)

    def fit_step(parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_()
        loss(generator).backward()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    yield ENCODING, lambda: posteriors(groups, surrogate)
    yield PROMPT, lambda: fit_step([embedding.tokens])
    yield BALANCED, lambda: gradient(objective, x, generator)
    yield PERTURBATION, lambda: gradient(objective, x, generator)
    with tunable(surrogate, "full" if official else recipe.tuning) as (weights, _):
        yield TUNING, lambda: fit_step(weights)


def our_steps(surrogate: Surrogate, recipe: AntiDiffusion | OfficialAntiDiffusion) -> dict[str, float]:
    """Return the TFLOP of one step of every stage."""
    return {stage: tera(work) for stage, work in our_works(surrogate, recipe)}


def counts(recipe: Any) -> dict[str, int]:
    """Return the steps of every stage, checked against the total that the recipe itself announces."""
    result = dict(recipe.counts)
    announced = total_steps(recipe)
    if sum(result.values()) != announced:
        raise RuntimeError(f"expected {announced} steps, got {result}; bring counts() up to date with the recipe")
    balanced = math.ceil(result[PERTURBATION] / BALANCE_EVERY) if recipe.sdl_weight else 1  # the first encodes too
    result[PERTURBATION] -= balanced
    tunings = recipe.rounds if recipe.tuning_steps else 0
    return result | {BALANCED: balanced, ENCODING: max(1, recipe.rounds) + tunings}


def total_steps(recipe: Recipe) -> int:
    """Start the recipe on the embedded model and stop it when it has said how many steps it will take."""

    def stop(stage: str, done: int, total: int) -> None:
        announced.append(total)
        raise KeyboardInterrupt

    announced: list[int] = []
    canvas = Canvas(np.zeros((64, 64, 3), np.uint8), (64, 64))
    try:
        recipe([canvas], Surrogate.from_pretrained("mini"), torch.Generator().manual_seed(0), stop)
    except KeyboardInterrupt:
        return announced[0]
    raise RuntimeError("expected the recipe to report its progress, got no call")


def released_steps(surrogate: Surrogate) -> dict[str, float]:
    """Return the TFLOP of one step of every stage of the released procedure."""
    vae, unet, scheduler = surrogate.vae, surrogate.denoiser, surrogate.pipeline().scheduler
    for module in (vae, unet):
        module.requires_grad_(True)
    unet.set_attn_processor(AttnProcessor())
    image = torch.zeros(1, 3, surrogate.size, surrogate.size, device="meta")
    latents = torch.zeros(1, 4, surrogate.size // 8, surrogate.size // 8, device="meta")
    embedding = surrogate.embed([""]).tokens
    prompt = embedding.clone().requires_grad_()
    nothing = torch.optim.SGD([prompt], lr=0)
    with torch.no_grad():
        encoding = tera(lambda: released.encode(vae, image))
    return {
        ENCODING: encoding,
        PROMPT: tera(lambda: released.prompt_step(unet, scheduler, latents, prompt, nothing)),
        PERTURBATION: tera(lambda: released.image_gradient(vae, unet, scheduler, image, embedding)),
        TUNING: tera(lambda: released.tuning_step(vae, unet, scheduler, image, embedding, nothing)),
    }


def row(steps: dict[str, float], times: dict[str, int]) -> dict[str, Any]:
    """Return the JSON row: TFLOP per step, steps, and their products' sum."""
    total = sum(steps[stage] * number for stage, number in times.items())
    return {
        "tflop_per_step": {stage: round(value, 4) for stage, value in steps.items()},
        "steps": times,
        "tflop": round(total, 1),
    }


def main() -> None:
    check_attention()
    default, official, presets = RECIPES["anti-diffusion"], RECIPES["official"], PRESETS["anti-diffusion"]
    rows = {}
    for name, recipe in {
        "anti-diffusion": default,
        "anti-diffusion, full tuning": replace(default, tuning="full"),
        "anti-diffusion, semantic term": replace(default, sdl_weight=1.0),
        **{f"anti-diffusion, {name}": preset for name, preset in presets.items()},
        **{f"anti-diffusion, quick, {steps} steps": replace(presets["quick"], steps=steps) for steps in (12, 50)},
        "official, our code": official,
    }.items():
        rows[name] = row(our_steps(shapes.build(), recipe), counts(recipe))
    base = released_steps(shapes.build())
    rounds = official.rounds
    times = {
        PROMPT: official.prompt_steps * (1 + rounds),  # the last of them is not used
        PERTURBATION: official.steps * (1 + rounds),
        TUNING: official.tuning_steps * rounds,
        ENCODING: 1 + rounds,
    }
    rows["released code"] = row(base, times)
    needed = times | {PROMPT: official.prompt_steps * rounds, ENCODING: rounds}
    rows["released code, unused prompt tuning left out"] = row(base, needed)
    for values in rows.values():
        values["released_over_this"] = round(rows["released code"]["tflop"] / values["tflop"], 3)
    others = {
        f"{shapes.SHAPES[version].name}, {name}": row(our_steps(shapes.build(version), recipe), counts(recipe))
        for version in ("1.5", "xl")
        for name, recipe in (("anti-diffusion", default), ("quick", presets["quick"]))
    }
    path = Path(__file__).parent / "results" / "flops.json"
    path.write_text(
        json.dumps(
            {
                "model": "Stable Diffusion 2.1-base, 512 x 512, one picture",
                "convention": "2 operations per multiply-add; convolutions and matrix products only",
                "torch": torch.__version__,
                "rows": rows,
                "other models, 512 x 512 and 1024 x 1024": others,
            },
            indent=2,
        )
        + "\n"
    )
    for name, values in (rows | others).items():
        print(f"{values['tflop']:8.1f} TFLOP  {name}  {values['tflop_per_step']}")


if __name__ == "__main__":
    main()
