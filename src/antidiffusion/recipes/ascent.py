"""Projected gradient ascent on one or several pictures.

References:
    Towards Deep Learning Models Resistant to Adversarial Attacks, Madry et al., 2018, arXiv 1706.06083
    Boosting Adversarial Attacks with Momentum, Dong et al., 2018, arXiv 1710.06081
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Generator, Tensor

from antidiffusion.objectives import Objective
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas

LARGEST_BATCH = 512 * 512  # pixels: a larger one costs memory and saves no time


def batches(canvases: Sequence[Canvas]) -> list[list[Canvas]]:
    """Group canvases whose views have one size; a group runs as a batch of at most `LARGEST_BATCH`, or of one."""
    ordered = sorted(canvases, key=lambda canvas: canvas.size)
    groups = []
    for (height, width), group in groupby(ordered, key=lambda canvas: canvas.size):
        alike, count = list(group), max(1, LARGEST_BATCH // (height * width))
        groups += [alike[first : first + count] for first in range(0, len(alike), count)]
    return groups


def views(batch: Sequence[Canvas]) -> Tensor:
    """Stack what the model sees of canvases with one view size: `(B, 3, h, w)` float32 in [0, 1]."""
    return torch.cat([canvas.view() for canvas in batch])


def scatter(canvases: Sequence[Canvas], budget: Linf, generator: Generator) -> None:
    """Set every perturbation, in place, to uniform noise in the budget: the random start of projected ascent."""
    for canvas in canvases:
        noise = torch.rand(canvas.delta.shape, generator=generator, device=generator.device)
        canvas.delta.copy_((2 * noise - 1) * budget.radius)
        budget.project_(canvas.delta, canvas.clean)


def gradient(objective: Objective, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the objective's gradient at pictures `x: (B, 3, h, w)` and its values `(B,)`.

    The losses are summed, not averaged, so that one picture's step does not depend on how many share its batch.
    """
    x = x.detach().requires_grad_()
    losses = objective(x, generator)
    (result,) = torch.autograd.grad(losses.sum(), x)
    return result, losses.detach()


@dataclass
class Momentum:
    """What sign steps remember of the gradients before: each counts by its direction, whatever its size.

    Arguments:
        decay: Weight of the sum so far at the next step; 0 forgets it.
    """

    decay: float
    sums: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, group: int, slope: Tensor) -> Tensor:
        """Add a gradient `(B, 3, h, w)` of the group with that number and return the sum."""
        scaled = slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        self.sums[group] = scaled + self.decay * self.sums[group] if group in self.sums else scaled
        return self.sums[group]


def decayed(step_size: float, done: int, total: int) -> float:
    """Return the step size after some of all steps: it falls linearly, to a hundredth at the end."""
    return step_size * (1 - 0.99 * done / total)


def ascend(
    objectives: Sequence[Objective],
    groups: Sequence[Sequence[Canvas]],
    budget: Linf,
    *,
    steps: int,
    step_size: float,
    generator: Generator,
    momentum: Momentum | None = None,
) -> Iterator[float]:
    """Take `steps` sign steps on every canvas, in place; yields the mean objective after each.

    Arguments:
        objectives: One for each group.
        groups: Canvases in groups of one view size, from `batches`.
        budget: Where the perturbations stay.
        steps: Number of steps.
        step_size: In 1/255 units.
        generator: Source of the objectives' noise.
        momentum: Goes on from one call to the next; None for plain sign steps.
    """
    for _ in range(steps):
        values = []
        for number, (objective, group) in enumerate(zip(objectives, groups, strict=True)):
            slope, losses = gradient(objective, views(group), generator)
            if momentum:
                slope = momentum(number, slope)
            for canvas, part in zip(group, slope.split(1), strict=True):
                canvas.ascend(part, step_size, budget)
            values += losses.tolist()
        yield sum(values) / len(values)
