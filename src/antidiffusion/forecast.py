"""What a run will take, from a few steps of every stage on the machine itself."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from antidiffusion.card import peak_memory
from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.pictures.picture import Picture
from antidiffusion.protection import protect
from antidiffusion.recipes import PERTURBATION, PROMPT, TUNING, AntiDiffusion, Latents, OfficialAntiDiffusion
from antidiffusion.recipes.anti_diffusion import BALANCE_EVERY

WARM = {PROMPT: 1, TUNING: 1, PERTURBATION: BALANCE_EVERY}
"""Steps of each stage that are not timed: first ones are slow."""
TIMED = {PROMPT: 2, TUNING: 2, PERTURBATION: BALANCE_EVERY}


@dataclass(frozen=True)
class Forecast:
    """Expected wall time in seconds, loading apart, peak memory of the process in bytes, and of how many pictures."""

    seconds: float
    peak_memory: int
    pictures: int


def forecast(
    pictures: Iterable[Picture],
    recipe: AntiDiffusion | OfficialAntiDiffusion | Latents,
    surrogate: Surrogate | LatentSpaces,
    *,
    together: bool = False,
    side: int | None = None,
    low_memory: bool = False,
) -> Forecast:
    """Protect one picture, or all if `together`, with few steps, and reckon the whole run from their times.

    Arguments:
        pictures: What will be protected; the largest stands for all, and no other is kept unless `together`.
        recipe: With which; every stage that it runs is tried.
        surrogate, together, side, low_memory: As in `protect`.
    """
    tried: list[Picture] = []
    count = 0
    for picture in pictures:
        count += 1
        if together or not tried:
            tried.append(picture)
        elif picture.pixels.size > tried[0].pixels.size:
            tried = [picture]
    if not tried:
        return Forecast(0, peak_memory(surrogate.device), 0)
    rounds = getattr(recipe, "rounds", 0)
    few = {"rounds": 1, "prompt_steps": WARM[PROMPT] + TIMED[PROMPT], "tuning_steps": WARM[TUNING] + TIMED[TUNING]}
    cut: Any = {name: min(most, getattr(recipe, name)) for name, most in few.items() if hasattr(recipe, name)}
    steps = WARM[PERTURBATION] if rounds else WARM[PERTURBATION] + TIMED[PERTURBATION]
    short = replace(recipe, steps=min(steps, recipe.steps), **cut)
    seconds: dict[str, list[float]] = {}
    begun = last = time.perf_counter()

    def clock(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.setdefault(stage, []).append(now - last)
        last = now

    how: Any = {"together": together, "side": side, "low_memory": low_memory}
    protect(tried, short, surrogate=surrogate, progress=clock, **how)
    around = time.perf_counter() - begun - sum(map(sum, seconds.values()))
    timed = {stage: times[WARM[stage] :] or times for stage, times in seconds.items()}
    whole = sum(recipe.counts[stage] * sum(times) / len(times) for stage, times in timed.items())
    return Forecast((whole + around) * (1 if together else count), peak_memory(surrogate.device), count)
