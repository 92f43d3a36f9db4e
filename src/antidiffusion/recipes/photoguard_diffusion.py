"""PhotoGuard's diffusion attack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.objectives.denoising import Mean
from antidiffusion.objectives.editing import EditTarget
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.photoguard import GREY


@dataclass(frozen=True)
class PhotoGuardDiffusion:
    """Make a whole edit end at a grey picture, differentiating through all of its denoising steps.

    The released code attacks an inpainting model, which none of our surrogates is: here the edit is SDEdit, at the
    strength that the released code names. Its prompt is empty, so that guidance has no effect and is left out.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16.
        steps: Sign steps. The paper takes 200; 100 keep a run on a CPU at half a minute.
        step_size: In 1/255 units. The paper's is 2.
        draws: Edits over which a gradient is averaged; the released code takes 10, at ten times the time.
        denoising_steps: Of an edit; the released code's.
        strength: Share of the noising that the edit undoes.
        prompt: Of the edit.

    References:
        Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    """

    budget: float = 8
    steps: int = 100
    step_size: float = 2
    draws: int = 1
    denoising_steps: int = 4
    strength: float = 0.7
    prompt: str = ""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])

        def objective(clean: torch.Tensor) -> Mean:
            target = torch.full_like(clean[:1], GREY)
            return Mean(EditTarget(surrogate, embedding, target, self.strength, self.denoising_steps), self.draws)

        return climb(self, objective, canvases, generator, progress)
