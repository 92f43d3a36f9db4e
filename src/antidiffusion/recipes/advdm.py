"""AdvDM."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import Denoising


@dataclass(frozen=True)
class AdvDM:
    """Raise the denoising loss of the untouched model: one draw of noise and step for each sign step.

    The paper conditions on a prompt for paintings; the prompt for photos is that of its authors' later code. It starts
    at the picture: the paper is silent on random starts.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's.
        steps: Sign steps.
        step_size: In 1/255 units.
        prompt: What the picture shows.

    References:
        Adversarial Example Does Good: Preventing Painting Imitation from Diffusion Models via Adversarial Examples,
        Liang et al., 2023, arXiv 2302.04578
    """

    budget: float = 8
    steps: int = 40
    step_size: float = 2
    prompt: str = "a photo"

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])
        return climb(self, lambda clean: Denoising(surrogate, embedding), canvases, generator, progress)
