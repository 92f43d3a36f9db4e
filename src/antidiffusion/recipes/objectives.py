"""Objectives that several recipes share: the denoising loss and the distance from another picture's latent.

References:
    Denoising Diffusion Probabilistic Models, Ho et al., 2020, arXiv 2006.11239
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised, parts
from antidiffusion.recipes.ascent import Draw, training


@dataclass
class Denoising:
    """L_ldm at one draw of the noise and the time: the semantic loss of AdvDM, Anti-DreamBooth and Mist.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding of the prompt.
        draw: Where it looks.
    """

    surrogate: Surrogate
    embedding: Embedding
    draw: Draw = training

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        return self.surrogate.denoising_loss(z, *self.draw(self.surrogate, z, generator), self.embedding)


@dataclass
class LatentTarget:
    """Minus the distance of the posterior's mean from the target picture's.

    Arguments:
        surrogate: The model whose encoder is misled.
        target: Pictures `(1 or B, 3, h, w)` in [0, 1] that the latents should be taken for.
    """

    surrogate: Surrogate
    target: Tensor

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return -(self.surrogate.posterior(x).mean - self.goal).flatten(1).norm(dim=1)

    @cached_property
    def goal(self) -> Tensor:
        """Latent of the target, encoded once."""
        return clean_latent(self.surrogate, self.target)


@torch.no_grad()
def clean_latent(surrogate: Surrogate, x: Tensor) -> Tensor:
    """Return the posterior's mean `(B, C, h, w)` of pictures that do not move."""
    return surrogate.posterior(x).mean


def predicted_noise(surrogate: Surrogate, z: Tensor, n: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
    """Return the noise `(B, C, h, w)` that the model finds in noised latents, whatever it was trained to predict.

    Arguments:
        surrogate: The model.
        z, n: Latents and noise `(B, C, h, w)`.
        t: Times `(B,)`.
        embedding: Text embedding, batch 1 or B.
    """
    z_t = noised(surrogate.schedule, z, n, t)
    return parts(surrogate.schedule, z_t, surrogate.predict(z_t, t, embedding), t)[1]
