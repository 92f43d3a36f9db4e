"""The control of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import project
from antidiffusion.recipes.base import PERTURBATION, Trace


@dataclass(frozen=True)
class RandomSign:
    """Every channel of every pixel moved by the whole budget, up or down at random: the control of every table."""

    encoders_suffice: ClassVar[bool] = True

    budget: float = 8

    def __call__(
        self,
        canvases: Sequence[Canvas],
        surrogate: Surrogate | LatentSpaces,
        generator: Generator,
        progress: Progress,
    ) -> Trace:
        trace = Trace(1, progress)
        budget = Linf(self.budget)
        for canvas in canvases:
            signs = torch.randint(2, canvas.delta.shape, generator=generator, device=generator.device) * 2 - 1
            canvas.delta.copy_(signs * self.budget)
            project(canvas, budget)
        trace.run(PERTURBATION, [0.0])
        return trace
