import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import antidiffusion.forecast
from antidiffusion.forecast import forecast
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture
from antidiffusion.recipes import PERTURBATION, PROMPT, TUNING, AntiDiffusion, OfficialAntiDiffusion, Recipe

SECONDS = {PROMPT: 1.0, TUNING: 3.0, PERTURBATION: 2.0}
SLOW_FIRST, AROUND = 50.0, 7.0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Replace protection by a clock that follows the recipe's stages, and record what is asked for."""
    now, asked = 100.0, []

    def stages(recipe: Any) -> Iterator[str]:
        prompt = [PROMPT] * recipe.prompt_steps
        yield from [*prompt, *[PERTURBATION] * recipe.steps]
        for left in reversed(range(recipe.rounds)):
            yield from [*[TUNING] * recipe.tuning_steps, *[PERTURBATION] * recipe.steps, *(prompt if left else [])]

    def protect(pictures: Any, recipe: Any, *, progress: Any, **options: Any) -> None:
        nonlocal now
        asked.append((len(pictures), recipe))
        seen = set()
        for stage in stages(recipe):
            now += SECONDS[stage] + (SLOW_FIRST if stage not in seen else 0)
            seen.add(stage)
            progress(stage, 0, 0)
        now += AROUND

    monkeypatch.setattr(antidiffusion.forecast, "protect", protect)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    return asked


def pictures(*sides: int) -> list[Picture]:
    return [Picture(np.zeros((side, side, 3), np.uint8)) for side in sides]


@pytest.mark.parametrize(
    "recipe",
    [
        AntiDiffusion(),
        OfficialAntiDiffusion(rounds=2),
        AntiDiffusion(rounds=0),
        AntiDiffusion(prompt_steps=0),
        AntiDiffusion(tuning_steps=0),
    ],
    ids=["default", "official", "no rounds", "no prompt tuning", "no tuning"],
)
def test_the_time_is_the_stages_counts_at_their_pace(recipe: Any, runs: list[tuple[int, Any]], tiny: Surrogate) -> None:
    found = forecast(pictures(64, 80), recipe, tiny)
    steps = {
        PROMPT: recipe.prompt_steps * max(1, recipe.rounds),
        TUNING: recipe.tuning_steps * recipe.rounds,
        PERTURBATION: recipe.steps * (1 + recipe.rounds),
    }
    assert found.seconds == pytest.approx(2 * (sum(SECONDS[stage] * count for stage, count in steps.items()) + AROUND))
    assert found.peak_memory > 1e8
    ((count, short),) = runs
    assert count == 1
    assert short.rounds <= 1 and short.prompt_steps <= 3 and short.tuning_steps <= 3


def test_pictures_together_are_one_run(runs: list[tuple[int, Recipe]], tiny: Surrogate) -> None:
    alone, both = (forecast(pictures(64, 64), AntiDiffusion(), tiny, together=value) for value in (False, True))
    assert alone.seconds == pytest.approx(2 * both.seconds)
    assert [count for count, _ in runs] == [1, 2]


def test_every_stage_of_a_real_run_is_timed(tiny: Surrogate) -> None:
    recipe = AntiDiffusion(steps=2, rounds=1, prompt_steps=2, tuning_steps=1)
    assert 0 < forecast(pictures(64), recipe, tiny).seconds < 600
