"""The denoising loss with the gradient of score distillation: no backward pass through the UNet.

References:
    DreamFusion: Text-to-3D using 2D Diffusion, Poole et al., 2023, arXiv 2209.14988
    Toward Effective Protection Against Diffusion-Based Mimicry Through Score Distillation, Xue et al., 2024,
    arXiv 2311.12832
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised
from antidiffusion.objectives.denoising import predicted_noise, with_slope


@dataclass
class Distillation:
    """sign * the squared error of the predicted noise, whose gradient at the latent is taken as sign * (e_theta - n).

    The true gradient is that through the UNet's Jacobian, which score distillation replaces by the identity.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        sign: 1 raises the loss, -1 lowers it: the picture then turns blurry for the model.
    """

    surrogate: Surrogate
    embedding: Embedding
    sign: float

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        with torch.no_grad():
            z_t = noised(self.surrogate.schedule, z, n, t)
            error = self.sign * (predicted_noise(self.surrogate, z_t, t, self.embedding) - n)
        return with_slope(self.sign * error.square().mean((1, 2, 3)), z, error)
