"""The loss of the UNet's answer with the semantic disturbance loss (SDL): what Anti-Diffusion maximises.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Generator, Tensor

from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised, target


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


@dataclass
class DenoisingSemantic:
    """L + weight * ratio * SDL, one value a picture.

    L = noise_weight * |answer - target|^2 + clean_weight * |answer - answer for the clean picture|^2, mean squares. The
    first is the paper's: the target is what the model is trained to predict, and L is then L_ldm. The second is taken
    at the same noise and step; an edit of the clean picture follows that answer, and what the model does not know of
    the noise anyway is in both answers and cancels.

    mean(M^2) over tens of tokens is so small beside L_ldm that, taken as it is, the sum's gradient has the signs of
    L_ldm's alone. `ratio` brings SDL's gradient at the latent to the norm of L's. One (noise, step) pair tells it
    within a factor of seven only, so it is the geometric mean of all measurements so far; one is taken at the first
    call and at every `BALANCE_EVERY`-th after, and costs one more backward pass through the UNet.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding f, usually a tuned one.
        weight: lambda; 0 leaves SDL and the recording of attention out.
        sdl: Name of a variant in `SDL`.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that `divergence` and `clean_weight` compare with.
        noise_weight, clean_weight: Of the two distances.

    Raises:
        ValueError: If there is no such variant, no positive weight, or no clean pictures where they are compared with.
    """

    surrogate: Surrogate
    embedding: Embedding
    weight: float = 1.0
    sdl: str = "semantic"
    clean: Tensor | None = None
    noise_weight: float = 1.0
    clean_weight: float = 0.0
    calls: int = field(default=0, init=False)
    log_ratios: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.sdl not in SDL:
            raise ValueError(f"expected sdl of {', '.join(SDL)}, got {self.sdl!r}; check the spelling")
        weights = self.noise_weight, self.clean_weight
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"expected noise_weight and clean_weight of at least 0, not both 0, got {weights}")
        if self.clean_weight and self.clean is None:
            raise ValueError("expected the clean pictures for clean_weight, got None; give them")

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = self.surrogate.draw(z, generator)
        targets, clean = [(self.noise_weight, target(self.surrogate.schedule, z, n, t))], None
        if self.clean is not None and (self.clean_weight or (self.weight and self.sdl == "divergence")):
            with torch.no_grad():
                before, clean = self._answer(self.clean_latent, n, t)
            targets.append((self.clean_weight, before))
        answer, attention = self._answer(z, n, t)
        distances = [weight * (answer - other).square().mean((1, 2, 3)) for weight, other in targets]
        loss = torch.stack(distances).sum(0)
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
        z_t = noised(self.surrogate.schedule, z, n, t)
        if not self.weight:
            return self.surrogate.predict(z_t, t, self.embedding), None
        with record_attention(self.surrogate, self.surrogate.map_layers()) as maps:
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
        layers = [name for name in self.surrogate.cross_layers() if not name.startswith("mid_block")]
        with record_attention(self.surrogate, layers if self.weight else [], self.positions) as maps:
            loss = self.surrogate.denoising_loss(z, n, t, self.embedding)
        if not maps:  # no layer has 16 x 16 positions at this size: the released code's term is then empty
            return loss
        attention = mean_map([layer[:, layer.shape[1] // 2 :] for layer in maps])
        return loss - self.weight * (100 * attention).clamp(0, 1).square().mean((1, 2))
