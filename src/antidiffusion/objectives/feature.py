"""The denoising loss at chosen steps plus the shift of the UNet's features: SimAC's objective.

References:
    SimAC: A Simple Anti-Customization Method for Protecting Face Privacy against Text-to-Image Synthesis of Diffusion
    Models, Wang et al., 2024, arXiv 2312.07865
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn


@contextmanager
def record_features(surrogate: Surrogate) -> Iterator[list[Tensor]]:
    """Record the denoiser's features, see `Surrogate.features`, inside the block.

    Returns:
        List that fills with one `(B, C, h, w)` map per residual layer and forward pass.
    """
    features: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, arguments, output: features.append(output))
        for layer in surrogate.features()
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class DenoisingFeature:
    """L_ldm + weight * mean squared distance of the features from the clean picture's at the same noise and step.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that the features move away from.
        steps: For each of the B pictures the times `(S,)` that may be drawn, on the CPU.
        weight: lambda; 0 leaves the features out.
    """

    surrogate: Surrogate
    embedding: Embedding
    clean: Tensor
    steps: Sequence[Tensor]
    weight: float = 1.0

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n = randn(z.shape, generator, z)
        t = torch.stack([allowed[_index(len(allowed), generator)] for allowed in self.steps]).to(z.device)
        if not self.weight:
            return self.surrogate.denoising_loss(z, n, t, self.embedding)
        with torch.no_grad(), record_features(self.surrogate) as before:
            self.surrogate.denoising_loss(self.clean_latent, n, t, self.embedding)
        with record_features(self.surrogate) as after:
            loss = self.surrogate.denoising_loss(z, n, t, self.embedding)
        shifts = [(a.float() - b.float()).square().mean((1, 2, 3)) for a, b in zip(after, before, strict=True)]
        return loss + self.weight * torch.stack(shifts).mean(0)

    @cached_property
    def clean_latent(self) -> Tensor:
        """Latent of the clean pictures, encoded once."""
        with torch.no_grad():
            return self.surrogate.posterior(self.clean).mean


def _index(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))
