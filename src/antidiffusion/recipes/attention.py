"""Attention: what the picture reads of the text in the first layers, and nothing else."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.attention import recording, watched
from antidiffusion.models.base import Embedding, Places, Surrogate
from antidiffusion.models.schedule import noised
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Mean, Momentum
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import clean_latent
from antidiffusion.recipes.semantic import variant


class _EnoughError(Exception):
    """The last map that is wanted is there."""


def first_maps(surrogate: Surrogate, layers: Sequence[str], z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
    """Return what the picture reads of the text in some layers, and compute nothing after the last of them.

    Arguments:
        surrogate: The model.
        layers: Names, as `cross_layers` gives them.
        z_t: Noisy latents `(B, C, h, w)`.
        t: Times `(B,)`.
        embedding: Of the prompt, batch 1 or B.

    Returns:
        `(B, N, L)` float32: the positions of all heads and layers, and L tokens.
    """
    maps: list[Tensor] = []
    record = recording(maps)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
        mixed = record(query, key, value, scale, places)
        if len(maps) == len(layers):
            raise _EnoughError
        return mixed

    with watched(surrogate, layers, attend), suppress(_EnoughError):
        surrogate.predict(z_t, t, embedding)
    return torch.cat([layer.flatten(1, 2) for layer in maps], 1)


@dataclass
class EarlyAttention:
    """A variant of SDL on the first layers' maps, averaged over draws of the noise and the time.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        term: Name of a variant in `antidiffusion.recipes.semantic.SDL`.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that `divergence` compares with.
        layers: Layers that are read, from the first.
        draws: Of noise and time for one value.
    """

    surrogate: Surrogate
    embedding: Embedding
    term: str
    clean: Tensor
    layers: int = 1
    draws: int = 1

    def __post_init__(self) -> None:
        self.variant = variant(self.term, self.surrogate)
        self.names = self.surrogate.cross_layers()[: self.layers]

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return Mean(self._at, self.draws)(self.surrogate.encode(x, generator), generator)

    def _at(self, z: Tensor, generator: Generator) -> Tensor:
        """Return the term for latents `z: (B, C, h, w)` at one draw."""
        n, t = self.surrogate.draw(z, generator)
        clean = None
        if self.term == "divergence":
            with torch.no_grad():
                clean = self._maps(self.clean_latent, n, t)
        return self.variant(self._maps(z, n, t), clean)

    def _maps(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        z_t = noised(self.surrogate.schedule, z, n, t)
        return first_maps(self.surrogate, self.names, z_t, t, self.embedding)

    @cached_property
    def clean_latent(self) -> Tensor:
        """Latent of the clean pictures, encoded once."""
        return clean_latent(self.surrogate, self.clean)


@dataclass(frozen=True)
class Attention:
    """Disturb where the picture looks in the text, in the first layers; the rest of the model is never computed.

    VETO raises the entropy of the attention between picture and reference picture in the first double block of FLUX.2,
    and stops there; DeContext lowers its mass in FLUX.1-Kontext. On these models the flow-matching loss itself does
    little, say both. Surrogates that draw from text have no reference picture: here the tokens are the text's, read
    through the softmax that text and picture share, or through a UNet's cross-attention. Steps, momentum, draws and
    prompt are VETO's. Whether it protects against models in use is not known: it was run on small ones with random
    weights only.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; VETO's is 4.
        steps: Sign steps.
        step_size: In 1/255 units.
        momentum: Weight of the earlier gradients in a step's direction.
        term: "entropy", "mass" (not for UNets), "divergence" from the clean picture's attention, or another variant in
            `antidiffusion.recipes.semantic.SDL`.
        layers: Layers that are read, from the first.
        draws: Of noise and time over which a gradient is averaged.
        prompt: What the model is told.

    References:
        VETO, 2026, arXiv 2607.27292
        DeContext, 2025, arXiv 2512.16625
    """

    budget: float = 8
    steps: int = 100
    step_size: float = 2
    momentum: float = 0.9
    term: str = "entropy"
    layers: int = 1
    draws: int = 10
    prompt: str = ""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])

        def objective(clean: Tensor) -> EarlyAttention:
            return EarlyAttention(surrogate, embedding, self.term, clean, self.layers, self.draws)

        return climb(self, objective, canvases, generator, progress, direction=Momentum(self.momentum))
