"""Mist: the denoising loss and a pull towards a pattern."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import uniform
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import clean_latent

LATENT = 4 * 64 * 64  # values of the latent of 512 x 512 pixels, over which the released code sums


def pattern(height: int, width: int) -> Tensor:
    """Draw the target: black and white diagonal stripes whose direction changes from tile to tile, 8 x 8 tiles.

    Mist's own target is a picture of repeated black letters on white. What the two share is what the paper asks for:
    high contrast and repetition.

    Returns:
        `(1, 3, height, width)` float32 of zeros and ones.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tile = max(4, min(height, width) // 8)
    sign = 1 - 2 * ((y // tile + x // tile) % 2)
    stripes = ((x + sign * y) // (tile // 4)) % 2
    return stripes.float().expand(1, 3, -1, -1)


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
        return clean_latent(self.surrogate, self.target)


@dataclass(frozen=True)
class Mist:
    """Raise the denoising loss and pull the latent to a high-contrast pattern's: the fused mode.

    Random start, step size, prompt and weight are the released code's. It sums the squared distance of the latent and
    takes `rate` times the mean denoising loss; the distance here is a mean times the size of its latent, so that the
    balance is the same at every picture size.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16.
        steps: Sign steps.
        step_size: In 1/255 units.
        rate: Weight of the denoising loss, over the summed squared distance.
        prompt: What the picture shows.

    References:
        Mist: Towards Improved Adversarial Examples for Diffusion Models, Liang and Wu, 2023, arXiv 2305.12683
    """

    budget: float = 8
    steps: int = 100
    step_size: float = 1
    rate: float = 1e4
    prompt: str = "a photo"

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])

        def objective(clean: Tensor) -> Fused:
            target = pattern(*clean.shape[-2:]).to(clean)
            return Fused(surrogate, embedding, target, LATENT / self.rate)

        return climb(self, objective, canvases, generator, progress, start=uniform)
