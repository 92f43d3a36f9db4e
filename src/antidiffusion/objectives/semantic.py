"""The denoising loss with the semantic disturbance loss (SDL): what Anti-Diffusion maximises.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from antidiffusion.attention import coarsest_layers, mean_map, record_attention
from antidiffusion.surrogate import Embedding, Surrogate


def zero(attention: Tensor, clean: Tensor | None) -> Tensor:
    """The paper's loss, -mean(M^2): pull every probability towards zero, which spreads the mass evenly."""
    return -attention.square().mean((1, 2))


def semantic(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the mass off every token but the begin-of-text one, the sink that describes nothing."""
    return attention[..., 0].mean(1)


def divergence(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the map away from the clean picture's at the same noise and step: total variation distance."""
    if clean is None:
        raise ValueError("expected the clean picture's attention, got None; give the objective the clean pictures")
    return (attention - clean).abs().sum(2).mean(1) / 2


SDL: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "zero": zero,
    "semantic": semantic,
    "divergence": divergence,
}


@dataclass
class DenoisingSemantic:
    """L_ldm + weight * ratio * SDL, one value a picture.

    mean(M^2) over tens of tokens is so small beside L_ldm that, taken as it is, the sum's gradient has the signs of
    L_ldm's alone. `ratio` brings SDL's gradient at the latent to the norm of L_ldm's. It is measured at the first call
    and kept, which costs one more backward pass a round; make a new objective when the surrogate changes.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding f, usually a tuned one.
        weight: lambda; 0 leaves SDL and the recording of attention out.
        sdl: Name of a variant in `SDL`.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that `divergence` compares with.
    """

    surrogate: Surrogate
    embedding: Embedding
    weight: float = 1.0
    sdl: str = "semantic"
    clean: Tensor | None = None
    ratio: Tensor | None = field(default=None, init=False)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        if not self.weight:
            return self.surrogate.denoising_loss(z, n, t, self.embedding)
        layers = coarsest_layers(self.surrogate.unet)
        clean = None
        if self.sdl == "divergence" and self.clean is not None:
            with torch.no_grad(), record_attention(self.surrogate.unet, layers) as maps:
                self.surrogate.denoising_loss(self.surrogate.posterior(self.clean).mean, n, t, self.embedding)
            clean = mean_map(maps)
        with record_attention(self.surrogate.unet, layers) as maps:
            loss = self.surrogate.denoising_loss(z, n, t, self.embedding)
        disturbance = SDL[self.sdl](mean_map(maps), clean)
        if self.ratio is None and z.requires_grad:
            self.ratio = _norm_ratio(loss, disturbance, z)
        return loss + self.weight * (1.0 if self.ratio is None else self.ratio) * disturbance


def _norm_ratio(loss: Tensor, other: Tensor, z: Tensor) -> Tensor:
    norms = []
    for term in (loss, other):
        (gradient,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        norms.append(gradient.flatten(1).norm(dim=1))
    return norms[0] / norms[1].clamp(min=1e-12)


@dataclass
class Official:
    """The released code's loss: L_ldm against the noise itself, and MSE to zero of 100 x the map clamped to [0, 1].

    It reads the maps with 16 x 16 query positions only and the second half of the heads, so tokens with more than 1 %
    of the attention get no gradient from it.
    """

    surrogate: Surrogate
    embedding: Embedding
    weight: float = 1.0
    positions: int = 16 * 16

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        unet = self.surrogate.unet
        layers = [name for name in unet.attn_processors if ".attn2." in name and not name.startswith("mid_block")]
        with record_attention(unet, layers if self.weight else [], self.positions) as maps:
            output = self.surrogate.predict(self.surrogate.schedule.add_noise(z, n, t), t, self.embedding)
        loss = (output - n).square().mean((1, 2, 3))
        if not maps:  # no layer has 16 x 16 positions at this size: the released code's term is then empty
            return loss
        attention = mean_map([layer[:, layer.shape[1] // 2 :] for layer in maps])
        return loss - self.weight * (100 * attention).clamp(0, 1).square().mean((1, 2))
