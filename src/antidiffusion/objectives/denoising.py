"""The denoising loss and the predicted noise: what the objectives of most baselines are made of.

References:
    Denoising Diffusion Probabilistic Models, Ho et al., 2020, arXiv 2006.11239
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import parts
from antidiffusion.objectives import Objective


@dataclass
class Denoising:
    """L_ldm at one draw of the noise and the step: the semantic loss of AdvDM, Anti-DreamBooth and Mist.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding of the prompt.
    """

    surrogate: Surrogate
    embedding: Embedding

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        return self.surrogate.denoising_loss(z, *self.surrogate.draw(z, generator), self.embedding)


@dataclass
class Mean:
    """The mean of an objective over `draws` of its randomness, with the memory of one.

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
        for _ in range(self.draws):
            loss = self.objective(x, generator)
            value += loss.detach() / self.draws
            slope += torch.autograd.grad(loss.sum(), x)[0] / self.draws
        return with_slope(value, x, slope)


def with_slope(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """Return `value: (B,)` as a function of `x: (B, ...)` whose gradient is `slope`, of the shape of x."""
    return value + (slope * (x - x.detach())).flatten(1).sum(1)


def predicted_noise(surrogate: Surrogate, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
    """Return the noise `(B, C, h, w)` that the denoiser finds in noisy latents, whatever it was trained to predict.

    Arguments:
        surrogate: The model.
        z_t: Noisy latents `(B, C, h, w)`.
        t: Times `(B,)`.
        embedding: Text embedding, batch 1 or B.
    """
    return parts(surrogate.schedule, z_t, surrogate.predict(z_t, t, embedding), t)[1]
