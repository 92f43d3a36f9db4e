"""Score distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.objectives.distillation import Distillation
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.base import Trace, climb


@dataclass(frozen=True)
class SDSPlus:
    """Raise the denoising loss along score distillation's gradient: AdvDM without a backward pass through the UNet.

    The released code encodes twice, once for the score and once for the gradient; here both share one latent.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16.
        steps: Sign steps.
        step_size: In 1/255 units.
        prompt: What the picture shows; the released code's for portraits.

    References:
        Toward Effective Protection Against Diffusion-Based Mimicry Through Score Distillation, Xue et al., 2024,
        arXiv 2311.12832
    """

    sign: ClassVar[float] = 1
    budget: float = 8
    steps: int = 100
    step_size: float = 1
    prompt: str = "a portrait photo"

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])
        return climb(self, lambda clean: Distillation(surrogate, embedding, self.sign), canvases, generator, progress)


@dataclass(frozen=True)
class SDSMinus(SDSPlus):
    """Lower the denoising loss along score distillation's gradient, the paper's proposal: edits turn blurry.

    Its losses are minus the denoising loss. Arguments and references as `SDSPlus`.
    """

    sign: ClassVar[float] = -1
