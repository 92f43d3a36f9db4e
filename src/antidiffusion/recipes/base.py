"""What all recipes share: the call, the record of a run, and the ascent that most of the baselines consist of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Posterior, Surrogate
from antidiffusion.objectives import Objective
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import ascend, batches, decayed, scatter, views

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
        """Exhaust an iterator of losses and record them under the stage's name."""
        for value in values:
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
    random_start: bool = False,
    decay: bool = False,
) -> Trace:
    """Perturb canvases in place: one phase of sign steps, the whole run of a recipe without tuning.

    Arguments:
        recipe: Says budget, steps and step size.
        objective: Builds what is maximised from the clean views `(B, 3, h, w)` of canvases with one view size.
        canvases: The pictures.
        generator: Source of all randomness.
        progress: Called after every step.
        random_start: Start uniformly in the budget instead of at the picture.
        decay: Lower the step size linearly, to a hundredth of it at the end.
    """
    groups = batches(canvases)
    objectives = [objective(views(group)) for group in groups]
    budget, trace = Linf(recipe.budget), Trace(recipe.steps, progress)
    if random_start:
        scatter(canvases, budget, generator)
    for done in range(recipe.steps):
        step_size = decayed(recipe.step_size, done, recipe.steps) if decay else recipe.step_size
        run = ascend(objectives, groups, budget, steps=1, step_size=step_size, generator=generator)
        trace.run(PERTURBATION, run)
    return trace
