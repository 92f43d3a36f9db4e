"""PhotoGuard's encoder attack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import uniform
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import LatentTarget

GREY = 0.5


@dataclass(frozen=True)
class PhotoGuard:
    """Pull the latent to that of a grey picture, so that the model edits a grey picture.

    Random start, decaying step size and the target are those of the released demo, which takes a photo of a grey screen
    for the target, here it is exactly grey, and steps of 1.3 in a ball of 15.3.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16.
        steps: Sign steps.
        step_size: Of the first step, in 1/255 units.

    References:
        Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    """

    budget: float = 8
    steps: int = 200
    step_size: float = 2

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        def objective(clean: torch.Tensor) -> LatentTarget:
            return LatentTarget(surrogate, torch.full_like(clean[:1], GREY))

        return climb(self, objective, canvases, generator, progress, start=uniform, decay=True)
