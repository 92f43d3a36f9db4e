"""Anti-Diffusion, our recipe: the paper's procedure inside a fixed ball, with terms that act."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import noised, target
from antidiffusion.models.tuning import tunable
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.alternation import Alternation
from antidiffusion.recipes.ascent import Momentum, Objective, ascend, batches, decayed, uniform, views
from antidiffusion.recipes.base import TUNING, Trace
from antidiffusion.recipes.objectives import clean_latent
from antidiffusion.recipes.semantic import variant

BALANCE_EVERY = 5
"""Ascent steps between two measurements of the gradients' norms."""


@dataclass
class DenoisingSemantic:
    """L + weight * ratio * SDL, one value a picture.

    L = noise_weight * |answer - target|^2 + clean_weight * |answer - answer for the clean picture|^2, mean squares. The
    first is the paper's: the target is what the model is trained to predict, and L is then L_ldm. The second is taken
    at the same noise and time; an edit of the clean picture follows that answer, and what the model does not know of
    the noise anyway is in both answers and cancels.

    mean(M^2) over tens of tokens is so small beside L_ldm that, taken as it is, the sum's gradient has the signs of
    L_ldm's alone. `ratio` brings SDL's gradient at the latent to the norm of L's. One (noise, time) pair tells it
    within a factor of seven only, so it is the geometric mean of all measurements so far; one is taken at the first
    call and at every `BALANCE_EVERY`-th after, and costs one more backward pass through the denoiser.

    Arguments:
        surrogate: The model whose error is raised.
        embedding: Text embedding f, usually a tuned one.
        weight: lambda; 0 leaves SDL and the recording of attention out.
        sdl: Name of a variant in `antidiffusion.recipes.semantic.SDL`.
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
        self.disturbance = variant(self.sdl, self.surrogate)
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
        disturbance = self.disturbance(attention, clean)
        if z.requires_grad:
            if self.calls % BALANCE_EVERY == 0:
                self.log_ratios.append(_log_norm_ratio(loss, disturbance, z))
            self.calls += 1
        return loss + self.weight * self.ratio * disturbance

    def _answer(self, z: Tensor, n: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ask the denoiser; return its answer and, if SDL reads it, its attention."""
        z_t = noised(self.surrogate.schedule, z, n, t)
        if not self.weight:
            return self.surrogate.predict(z_t, t, self.embedding), None
        with record_attention(self.surrogate, self.surrogate.map_layers()) as maps:
            answer = self.surrogate.predict(z_t, t, self.embedding)
        return answer, mean_map(maps)

    @cached_property
    def clean_latent(self) -> Tensor:
        """Latent of the clean pictures, encoded once."""
        return clean_latent(self.surrogate, self.clean)  # type: ignore[arg-type]

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


@dataclass(frozen=True)
class AntiDiffusion(Alternation):
    """Our recipe: the paper's procedure inside a fixed ball, with terms that act.

    The run starts at a random perturbation; the sign steps have momentum, and their size falls. The distance from the
    clean picture's answer disturbs edits most, the one from the truth tuning: docs/method.md has the figures.

    Arguments:
        sdl_weight: lambda; see above.
        step_size: Of the first sign step, in 1/255 units; a quarter of the budget if None.
        momentum: Weight of the earlier gradients in a step's direction, see `antidiffusion.recipes.ascent.Momentum`.
        noise_weight, clean_weight: Of the distance from what the model is trained to predict, the paper's, and from the
            answer for the clean picture, see `DenoisingSemantic`.
        tuning: "full", "lora" or "auto", see `antidiffusion.models.tuning.tunable`.
        sdl: Variant of the semantic disturbance loss, see `antidiffusion.recipes.semantic`.
    """

    steps: int = 30
    rounds: int = 3
    prompt_steps: int = 15
    sdl_weight: float = 0.0
    step_size: float | None = None
    momentum: float = 0.9
    noise_weight: float = 0.1
    clean_weight: float = 1.0
    tuning: str = "auto"
    sdl: str = "divergence"

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        objectives = [self.objective(surrogate, embedding, views(group)) for group in groups]
        budget, momentum = Linf(self.budget), Momentum(self.momentum)
        total = self.steps * (1 + self.rounds)
        sizes = iter([decayed(self.step_size or self.budget / 4, done, total) for done in range(total)])
        for canvas in canvases:
            uniform(canvas, budget, generator)

        def perturb() -> Iterator[float]:
            options: Any = {"sizes": list(islice(sizes, self.steps)), "generator": generator, "direction": momentum}
            return ascend(objectives, groups, budget, **options)

        tuned: AbstractContextManager[tuple[list[Tensor], float]] = nullcontext(([], 0.0))
        if self.counts[TUNING]:
            tuned = tunable(surrogate, self.tuning)
        with tuned as (weights, learning_rate):
            options: Any = {"embedding": embedding, "weights": weights, "learning_rate": learning_rate}
            return self.alternate(groups, surrogate, generator, progress, perturb=perturb, **options)

    def objective(self, surrogate: Surrogate, embedding: Embedding, clean: Tensor) -> Objective:
        """Return what the ascent raises for clean views `(B, 3, h, w)`: the one place where its terms meet."""
        distances = {"noise_weight": self.noise_weight, "clean_weight": self.clean_weight}
        return DenoisingSemantic(surrogate, embedding, self.sdl_weight, self.sdl, clean, **distances)
