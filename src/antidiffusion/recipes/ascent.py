"""Projected gradient ascent on one or several pictures, its four seams apart.

*Start* says where a perturbation begins, *direction* what a sign step follows, *projection* where the perturbation may
be, and *draw* at which noise and time an objective looks; `Mean` averages over draws.

References:
    Towards Deep Learning Models Resistant to Adversarial Attacks, Madry et al., 2018, arXiv 1706.06083
    Boosting Adversarial Attacks with Momentum, Dong et al., 2018, arXiv 1710.06081
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate, randn
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas

LARGEST_BATCH = 512 * 512  # pixels: a larger one costs memory and saves no time


class Objective(Protocol):
    """What ascent raises: maps pictures `x: (B, 3, h, w)` in [0, 1] to one loss a picture, `(B,)`."""

    def __call__(self, x: Tensor, generator: Generator, /) -> Tensor: ...


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


Start = Callable[[Canvas, Linf, Generator], None]
"""Sets a canvas's perturbation before the first step, in place."""


def current(canvas: Canvas, budget: Linf, generator: Generator) -> None:
    """Start where the canvas is: a new one is at the picture itself."""


def uniform(canvas: Canvas, budget: Linf, generator: Generator) -> None:
    """Start at uniform noise in the budget: the random start of projected ascent."""
    noise = torch.rand(canvas.delta.shape, generator=generator, device=generator.device)
    canvas.delta.copy_((2 * noise - 1) * budget.radius)
    project(canvas, budget)


class Direction(Protocol):
    """What the sign step of a group of canvases follows, `(B, 3, h, w)`, from its number and its gradient."""

    def __call__(self, group: int, slope: Tensor) -> Tensor: ...


def steepest(group: int, slope: Tensor) -> Tensor:
    """Follow the gradient alone."""
    return slope


@dataclass
class Momentum:
    """Follow the gradients before as well: each counts by its direction, whatever its size.

    Arguments:
        decay: Weight of the sum so far at the next step; 0 forgets it.
    """

    decay: float
    sums: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, group: int, slope: Tensor) -> Tensor:
        """Add a gradient of the group with that number and return the sum."""
        scaled = slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
        self.sums[group] = scaled + self.decay * self.sums[group] if group in self.sums else scaled
        return self.sums[group]


def project(canvas: Canvas, budget: Linf) -> None:
    """Bring a perturbation back into the ball around the untouched picture, the range of pixels, and the mask."""
    budget.project_(canvas.delta, canvas.darkest, canvas.brightest)
    if canvas.mask is not None:
        canvas.delta.mul_(canvas.mask)


def move(canvas: Canvas, direction: Tensor, step_size: float, budget: Linf) -> None:
    """Take one sign step of `step_size`, in 1/255 units, in a direction at the view, `(1, 3, h, w)`, and project."""
    canvas.delta.add_(canvas.full_gradient(direction).sign_(), alpha=step_size)
    project(canvas, budget)


Draw = Callable[[Surrogate, Tensor, Generator], tuple[Tensor, Tensor]]
"""Draws noise `(B, C, h, w)` and times `(B,)` for latents `(B, C, h, w)`."""


def training(surrogate: Surrogate, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw as the model's training does."""
    return surrogate.draw(z, generator)


@dataclass(frozen=True)
class Among:
    """Draw the time of each picture from its own.

    Arguments:
        times: For each of the B pictures the times `(S,)` that may be drawn, on the CPU.
    """

    times: Sequence[Tensor]

    def __call__(self, surrogate: Surrogate, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        n, device = randn(z.shape, generator, z), generator.device
        drawn = [one[int(torch.randint(len(one), (), generator=generator, device=device))] for one in self.times]
        return n, torch.stack(drawn).to(z.device)


@dataclass
class Mean:
    """The mean of an objective, of pictures or of latents, over `draws` of its randomness, with the memory of one.

    Arguments:
        objective: What to average.
        draws: Number of calls.
    """

    objective: Objective
    draws: int

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        if not x.requires_grad:
            return torch.stack([self.objective(x, generator) for _ in range(self.draws)]).mean(0)
        value, slope = torch.zeros(len(x), device=x.device), torch.zeros_like(x)
        leaf = x.detach().requires_grad_()
        for _ in range(self.draws):
            loss = self.objective(leaf, generator)
            value += loss.detach() / self.draws
            slope += torch.autograd.grad(loss.sum(), leaf)[0] / self.draws
        return with_slope(value, x, slope)


def with_slope(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """Return `value: (B,)` as a function of `x: (B, ...)` whose gradient is `slope`, of the shape of x."""
    return value + (slope * (x - x.detach())).flatten(1).sum(1)


def gradient(objective: Objective, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the objective's gradient at pictures `x: (B, 3, h, w)` and its values `(B,)`.

    The losses are summed, not averaged, so that one picture's step does not depend on how many share its batch.
    """
    x = x.detach().requires_grad_()
    losses = objective(x, generator)
    (result,) = torch.autograd.grad(losses.sum(), x)
    return result, losses.detach()


def decayed(step_size: float, done: int, total: int) -> float:
    """Return the step size after some of all steps: it falls linearly, to a hundredth at the end."""
    return step_size * (1 - 0.99 * done / total)


def ascend(
    objectives: Sequence[Objective],
    groups: Sequence[Sequence[Canvas]],
    budget: Linf,
    *,
    sizes: Sequence[float],
    generator: Generator,
    direction: Direction = steepest,
) -> Iterator[float]:
    """Take sign steps on every canvas, in place; yields the mean objective before each.

    Arguments:
        objectives: One for each group.
        groups: Canvases in groups of one view size, from `batches`.
        budget: Where the perturbations stay.
        sizes: Of the steps, in 1/255 units; one step each.
        generator: Source of the objectives' noise.
        direction: What a step follows; one with a memory goes on from call to call.
    """
    for size in sizes:
        values = []
        for number, (objective, group) in enumerate(zip(objectives, groups, strict=True)):
            slope, losses = gradient(objective, views(group), generator)
            for canvas, part in zip(group, direction(number, slope).split(1), strict=True):
                move(canvas, part, size, budget)
            values += losses.tolist()
        yield sum(values) / len(values)
