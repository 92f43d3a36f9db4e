"""The loss of the UNet's answer with the semantic disturbance loss (SDL): what Anti-Diffusion maximises.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.attention import coarsest_layers, mean_map, record_attention
from antidiffusion.surrogate import Embedding, Surrogate


def zero(attention: Tensor, clean: Tensor | None) -> Tensor:
    """The paper's loss, -mean(M^2), times the number of tokens: it pulls every probability towards zero and so spreads
    the mass evenly. The factor changes nothing once the gradients are balanced, and keeps float16 from underflowing.
    """
    return -attention.square().sum(2).mean(1)


def semantic(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the mass off every token but the begin-of-text one, the sink that describes nothing."""
    return attention[..., 0].mean(1)


def divergence(attention: Tensor, clean: Tensor | None) -> Tensor:
    """Move the map away from the clean picture's at the same noise and step: total variation distance.

    The default of `AntiDiffusion`: of the variants it moved the most attention at the same loss within the errors of
    three pictures. Against no term at all it moves 0.5 % of the mass instead of 0.3 % (benchmarks/README.md).
    """
    if clean is None:
        raise ValueError("expected the clean picture's attention, got None; give the objective the clean pictures")
    return (attention - clean).abs().sum(2).mean(1) / 2


SDL: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "zero": zero,
    "semantic": semantic,
    "divergence": divergence,
}


BALANCE_EVERY = 5
TARGETS = ("noise", "clean")


@dataclass
class DenoisingSemantic:
    """L + weight * ratio * SDL, one value a picture.

    L is the mean squared distance of the UNet's answer from a target. The paper's, "noise", is what the model is
    trained to predict: L is then L_ldm. "clean" is the answer for the clean picture at the same noise and step, which
    an edit of that picture follows: what the model does not know of the noise anyway is in both answers and cancels.

    mean(M^2) over tens of tokens is so small beside L_ldm that, taken as it is, the sum's gradient has the signs of
    L_ldm's alone. `ratio` brings SDL's gradient at the latent to the norm of L's. One (noise, step) pair tells it
    within a factor of seven only, so it is the geometric mean of all measurements so far; one is taken at the first
    call and at every `BALANCE_EVERY`-th after, and costs one more backward pass through the UNet.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding f, usually a tuned one.
        weight: lambda; 0 leaves SDL and the recording of attention out.
        sdl: Name of a variant in `SDL`.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that `divergence` and the target "clean" compare with.
        target: What the answer is driven away from, of `TARGETS`.

    Raises:
        ValueError: If there is no such variant or target, or the target "clean" without clean pictures.
    """

    surrogate: Surrogate
    embedding: Embedding
    weight: float = 1.0
    sdl: str = "semantic"
    clean: Tensor | None = None
    target: str = "noise"
    calls: int = field(default=0, init=False)
    log_ratios: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name, value, known in (("sdl", self.sdl, tuple(SDL)), ("target", self.target, TARGETS)):
            if value not in known:
                raise ValueError(f"expected {name} of {', '.join(known)}, got {value!r}; check the spelling")
        if self.target == "clean" and self.clean is None:
            raise ValueError("expected the clean pictures for the target 'clean', got None; give them")

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        target, clean = self.surrogate.schedule.target(z, n, t), None
        if self.clean is not None and (self.target == "clean" or (self.weight and self.sdl == "divergence")):
            with torch.no_grad():
                answer, clean = self._answer(self.clean_latent, n, t)
            target = answer if self.target == "clean" else target
        answer, attention = self._answer(z, n, t)
        loss = (answer - target).square().mean((1, 2, 3))
        if attention is None:
            return loss
        disturbance = SDL[self.sdl](attention, clean)
        if z.requires_grad:
            if self.calls % BALANCE_EVERY == 0:
                self.log_ratios.append(_log_norm_ratio(loss, disturbance, z))
            self.calls += 1
        return loss + self.weight * self.ratio * disturbance

    def _answer(self, z: Tensor, n: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ask the UNet; return its answer and, if SDL reads it, its attention."""
        z_t = self.surrogate.schedule.add_noise(z, n, t)
        if not self.weight:
            return self.surrogate.predict(z_t, t, self.embedding), None
        with record_attention(self.surrogate.unet, coarsest_layers(self.surrogate.unet)) as maps:
            answer = self.surrogate.predict(z_t, t, self.embedding)
        return answer, mean_map(maps)

    @cached_property
    def clean_latent(self) -> Tensor:
        """Latent of the clean pictures, encoded once."""
        with torch.no_grad():
            return self.surrogate.posterior(self.clean).mean  # type: ignore[arg-type]

    @property
    def ratio(self) -> Tensor:
        """L's gradient norm over SDL's, `(B,)`, or 1 before anything was differentiated."""
        return torch.stack(self.log_ratios).mean(0).exp() if self.log_ratios else torch.ones(())


def _log_norm_ratio(loss: Tensor, other: Tensor, z: Tensor) -> Tensor:
    norms = []
    for term in (loss, other):
        (gradient,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        norms.append(gradient.flatten(1).norm(dim=1).clamp(min=1e-12).log())
    return norms[0] - norms[1]


@dataclass
class Official:
    """The released code's loss: L_ldm, and MSE to zero of 100 x the map clamped to [0, 1].

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
            loss = self.surrogate.denoising_loss(z, n, t, self.embedding)
        if not maps:  # no layer has 16 x 16 positions at this size: the released code's term is then empty
            return loss
        attention = mean_map([layer[:, layer.shape[1] // 2 :] for layer in maps])
        return loss - self.weight * (100 * attention).clamp(0, 1).square().mean((1, 2))
