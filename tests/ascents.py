"""What tests of recipes and of their objectives share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.progress import silent
from antidiffusion.recipes import Recipe, Trace

PORTRAIT = np.array(Image.open(Path(__file__).parent / "data/portrait.png").convert("RGB"))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def slope(objective: Callable[[Tensor, Generator], Tensor], x: Tensor, seed: int = 0) -> Tensor:
    """Return the gradient of an objective's sum."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, seeded(seed)).sum(), leaf)[0]


def draws(surrogate: Surrogate, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return a sampled latent and noise, by diffusers' own calls."""
    posterior = surrogate.vae.encode(2 * x - 1).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    return surrogate.vae.config.scaling_factor * z, torch.randn(z.shape, generator=generator)


def ask(surrogate: Surrogate, z: Tensor, n: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
    """Return a UNet's answer at noised latents, by diffusers' own call."""
    z_t = noised(surrogate.schedule, z, n, t)
    return surrogate.denoiser(z_t, t, encoder_hidden_states=embedding.tokens.expand(len(z), -1, -1)).sample


def canvas(pixels: np.ndarray = PORTRAIT, side: int = 64, **options: object) -> Canvas:
    return Canvas(pixels, view_size(*pixels.shape[:2], side=side, multiple=32), **options)  # type: ignore[arg-type]


def run(
    recipe: Recipe,
    surrogate: Surrogate,
    *canvases: Canvas,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = silent,
) -> Trace:
    return recipe(canvases, surrogate, seeded(seed), progress)


def weights(surrogate: Surrogate) -> list[Tensor]:
    return [weight for module in surrogate.modules for weight in module.parameters()]
