"""What all recipes share: the call, the record of a run, and the ascent that most of the baselines consist of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from antidiffusion.failures import expect_finite
from antidiffusion.models.base import Posterior, Surrogate
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import (
    Direction,
    Objective,
    Start,
    ascend,
    batches,
    current,
    decayed,
    steepest,
    views,
)

PROMPT, TUNING, PERTURBATION = "prompt tuning", "surrogate tuning", "perturbation"


@dataclass
class Trace:
    """The losses of a run, by stage, and the hook that shows its progress.

    Arguments:
        total: Steps of the whole run.
        progress: Called after each of them.
    """

    total: int
    progress: Progress
    losses: dict[str, list[float]] = field(default_factory=dict)

    def run(self, stage: str, values: Iterable[float]) -> None:
        """Exhaust an iterator of losses and record them under the stage's name.

        Raises:
            NotFiniteError: If a loss is no number.
        """
        for value in values:
            expect_finite(value, f"the loss of the {stage}")
            self.losses.setdefault(stage, []).append(value)
            self.progress(stage, sum(map(len, self.losses.values())), self.total)


class Recipe(Protocol):
    """A protection: perturbs `canvases` in place inside its budget and returns its losses."""

    @property
    def budget(self) -> float:
        """L-infinity budget in 1/255 units."""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace: ...


@torch.no_grad()
def posteriors(groups: Sequence[Sequence[Canvas]], surrogate: Surrogate) -> list[Posterior]:
    """Encode every group's current views, once for a whole phase."""
    return [surrogate.posterior(views(group)) for group in groups]


class Ascent(Protocol):
    """A recipe that is one phase of sign steps."""

    @property
    def budget(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_size(self) -> float: ...


def climb(
    recipe: Ascent,
    objective: Callable[[Tensor], Objective],
    canvases: Sequence[Canvas],
    generator: Generator,
    progress: Progress,
    *,
    start: Start = current,
    direction: Direction = steepest,
    decay: bool = False,
) -> Trace:
    """Perturb canvases in place: one phase of sign steps, the whole run of a recipe without tuning.

    Arguments:
        recipe: Says budget, steps and step size.
        objective: Builds what is maximised from the clean views `(B, 3, h, w)` of canvases with one view size.
        canvases: The pictures.
        generator: Source of all randomness.
        progress: Called after every step.
        start: Where the perturbations begin.
        direction: What a step follows.
        decay: Lower the step size linearly, to a hundredth of it at the end.
    """
    groups = batches(canvases)
    objectives = [objective(views(group)) for group in groups]
    budget, trace = Linf(recipe.budget), Trace(recipe.steps, progress)
    for canvas in canvases:
        start(canvas, budget, generator)
    sizes = [decayed(recipe.step_size, done if decay else 0, recipe.steps) for done in range(recipe.steps)]
    trace.run(PERTURBATION, ascend(objectives, groups, budget, sizes=sizes, generator=generator, direction=direction))
    return trace
