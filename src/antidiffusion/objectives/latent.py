"""Attacks on the encoder: pull the latent to a target, alone (PhotoGuard) or with the denoising loss (Mist).

References:
    Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    Mist: Towards Improved Adversarial Examples for Diffusion Models, Liang and Wu, 2023, arXiv 2305.12683
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate


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
        with torch.no_grad():
            return self.surrogate.posterior(self.target).mean


@dataclass
class Fused:
    """L_ldm minus weight * the mean squared distance of a sampled latent from the target's.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        target: Pictures `(1 or B, 3, h, w)` in [0, 1].
        weight: Of the distance; 0 leaves the denoising loss.
    """

    surrogate: Surrogate
    embedding: Embedding
    target: Tensor
    weight: float

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        semantic = self.surrogate.denoising_loss(z, *self.surrogate.draw(z, generator), self.embedding)
        return semantic - self.weight * (z - self.goal).square().mean((1, 2, 3))

    @cached_property
    def goal(self) -> Tensor:
        """Latent of the target, encoded once."""
        with torch.no_grad():
            return self.surrogate.posterior(self.target).mean
