"""Score distillation: the denoising loss without a backward pass through the denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import with_slope
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import predicted_noise


@dataclass
class Distillation:
    """sign * the squared error of the predicted noise, whose gradient at the latent is taken as sign * (e_theta - n).

    The true gradient is that through the denoiser's Jacobian, which score distillation replaces by the identity.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        sign: 1 raises the loss, -1 lowers it: the picture then turns blurry for the model.

    References:
        DreamFusion: Text-to-3D using 2D Diffusion, Poole et al., 2023, arXiv 2209.14988
    """

    surrogate: Surrogate
    embedding: Embedding
    sign: float

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        with torch.no_grad():
            error = self.sign * (predicted_noise(self.surrogate, z, n, t, self.embedding) - n)
        return with_slope(self.sign * error.square().mean((1, 2, 3)), z, error)


@dataclass(frozen=True)
class SDSPlus:
    """Raise the denoising loss along score distillation's gradient: AdvDM without a backward pass through the
    denoiser.

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
