"""Protections: each a frozen dataclass with its paper's defaults that perturbs canvases in place."""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from antidiffusion.budget import Linf
from antidiffusion.objectives.semantic import DenoisingSemantic, Official
from antidiffusion.optimize import ascend, batches, views
from antidiffusion.resolution import Canvas
from antidiffusion.surrogate import Embedding, Posterior, Surrogate
from antidiffusion.tune import Loss, constant, denoising, fit, tunable

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage's name, the steps done and the steps of the whole run."""

PROMPT, TUNING, PERTURBATION = "prompt tuning", "surrogate tuning", "perturbation"


@dataclass
class Trace:
    """The losses of a run, by stage, and the hook that shows its progress.

    Arguments:
        total: Steps of the whole run.
        progress: Called after each of them.
    """

    total: int
    progress: Progress
    losses: dict[str, list[float]] = field(default_factory=dict)

    def run(self, stage: str, values: Iterable[float]) -> None:
        """Exhaust an iterator of losses and record them under the stage's name."""
        for value in values:
            self.losses.setdefault(stage, []).append(value)
            self.progress(stage, sum(map(len, self.losses.values())), self.total)


class Recipe(Protocol):
    """A protection: perturbs `canvases` in place inside its budget and returns its losses."""

    @property
    def budget(self) -> float:
        """L-infinity budget in 1/255 units."""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace: ...


@torch.no_grad()
def posteriors(groups: Sequence[Sequence[Canvas]], surrogate: Surrogate) -> list[Posterior]:
    """Encode every group's current views, once for a whole phase."""
    return [surrogate.posterior(views(group)) for group in groups]


@dataclass(frozen=True)
class RandomSign:
    """Every channel of every pixel moved by the whole budget, up or down at random: the control of every table."""

    budget: float = 8

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        trace = Trace(1, progress)
        budget = Linf(self.budget)
        for canvas in canvases:
            signs = torch.randint(2, canvas.delta.shape, generator=generator, device=generator.device) * 2 - 1
            canvas.delta.copy_(signs * self.budget)
            budget.project_(canvas.delta, canvas.clean)
        trace.run(PERTURBATION, [0.0])
        return trace


@dataclass(frozen=True)
class Alternation:
    """Prompt tuning and ascent, then rounds of [surrogate tuning, ascent, prompt tuning].

    Several canvases share one text embedding and one surrogate: give it the pictures of one person together.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture.
        steps: Ascent steps of each phase; there are 1 + `rounds` phases.
        rounds: Rounds after the first ascent.
        prompt_steps, prompt_learning_rate: AdamW on the text embedding, which starts from the empty prompt's.
        tuning_steps: AdamW steps on the UNet in a round.
        sdl_weight: lambda, the weight of the semantic disturbance loss; 0 leaves it out.

    References:
        Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
    """

    budget: float = 8
    steps: int = 10
    rounds: int = 5
    prompt_steps: int = 30
    prompt_learning_rate: float = 1e-3
    tuning_steps: int = 20
    sdl_weight: float = 1.0

    def _alternate(
        self,
        groups: Sequence[Sequence[Canvas]],
        surrogate: Surrogate,
        generator: Generator,
        progress: Progress,
        *,
        embedding: Embedding,
        weights: Sequence[Tensor],
        learning_rate: float,
        perturb: Callable[[], Iterable[float]],
        prompt_loss: Callable[[], Loss] | None = None,
    ) -> Trace:
        prompts = max(1, self.rounds)  # the last embedding would not be used
        total = self.steps * (1 + self.rounds) + self.prompt_steps * prompts + self.tuning_steps * self.rounds
        trace = Trace(total, progress)

        def loss() -> Loss:
            samplers = [posterior.sample for posterior in posteriors(groups, surrogate)]
            return denoising(surrogate, samplers, embedding)

        def tune_prompt() -> None:
            options: Any = {"steps": self.prompt_steps, "learning_rate": self.prompt_learning_rate}
            trace.run(PROMPT, fit([embedding.tokens], (prompt_loss or loss)(), generator=generator, **options))

        tune_prompt()
        trace.run(PERTURBATION, perturb())
        for left in reversed(range(self.rounds)):
            options: Any = {"steps": self.tuning_steps, "learning_rate": learning_rate}
            trace.run(TUNING, fit(weights, loss(), generator=generator, **options))
            trace.run(PERTURBATION, perturb())
            if left:
                tune_prompt()
        return trace


@dataclass(frozen=True)
class AntiDiffusion(Alternation):
    """Our recipe: the paper's procedure inside a fixed ball, with a semantic term that acts.

    Arguments:
        step_size: Of a sign step, in 1/255 units; if None, a sixteenth of the budget,
            or more in a run of fewer steps.
        tuning: "full", "lora" or "auto", see `antidiffusion.tune.tunable`.
        sdl: Variant of the semantic disturbance loss, see `antidiffusion.objectives.semantic`.
        low_memory: Recompute activations instead of keeping them, and park what is not needed on disk: more time.
    """

    step_size: float | None = None
    tuning: str = "auto"
    sdl: str = "divergence"
    low_memory: bool = False

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        objectives = [
            DenoisingSemantic(surrogate, embedding, self.sdl_weight, self.sdl, views(group)) for group in groups
        ]

        reach = min(16, self.steps * (1 + self.rounds))  # a short run takes steps that still fill the ball
        step_size = self.step_size or self.budget / reach

        def perturb() -> Iterable[float]:
            options: Any = {"steps": self.steps, "step_size": step_size, "generator": generator}
            return ascend(objectives, groups, Linf(self.budget), **options)

        with (
            surrogate.low_memory() if self.low_memory else nullcontext(),
            tunable(surrogate, self.tuning) as (weights, learning_rate),
        ):
            options: Any = {"embedding": embedding, "weights": weights, "learning_rate": learning_rate}
            return self._alternate(groups, surrogate, generator, progress, perturb=perturb, **options)


@dataclass(frozen=True)
class OfficialAntiDiffusion(Alternation):
    """The released code's procedure, quirks included, at its demo settings; to compare with, not to protect with.

    It recentres a ball of `radius` on the current picture in every round, so that the total may reach
    `(1 + rounds) * min(steps * step_size, radius)`, which `budget` then cuts. Its prompt tuning uses one posterior
    sample and takes the noise for the target whatever the model predicts, and its attention term gives no gradient to
    tokens that hold more than 1 % of the mass.

    Arguments:
        radius: Of the ball of one round, in 1/255 units: 1e-2 of the range [-1, 1].
        step_size: In 1/255 units: 2e-3 of the range [-1, 1].
        learning_rate: AdamW's on the UNet's weights.
    """

    step_size: float = 2e-3 * 255 / 2
    radius: float = 1e-2 * 255 / 2
    learning_rate: float = 5e-7

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        objectives = [Official(surrogate, embedding, self.sdl_weight)] * len(groups)
        noise_target = copy.copy(surrogate)
        noise_target.schedule = replace(surrogate.schedule, prediction="epsilon")

        def prompt_loss() -> Loss:
            samplers = [constant(posterior.sample(generator)) for posterior in posteriors(groups, surrogate)]
            return denoising(noise_target, samplers, embedding)

        def perturb() -> Iterable[float]:
            centres = [canvas.delta.clone() for canvas in canvases]
            options: Any = {"steps": self.steps, "step_size": self.step_size, "generator": generator}
            for value in ascend(objectives, groups, Linf(self.budget), **options):
                for canvas, centre in zip(canvases, centres, strict=True):
                    canvas.delta.clamp_(centre - self.radius, centre + self.radius)
                yield value

        with tunable(surrogate, "full") as (weights, _):
            hooks: Any = {"perturb": perturb, "prompt_loss": prompt_loss}
            options: Any = {"embedding": embedding, "weights": weights, "learning_rate": self.learning_rate}
            return self._alternate(groups, surrogate, generator, progress, **options, **hooks)


RECIPES: dict[str, Recipe] = {
    "anti-diffusion": AntiDiffusion(),
    "official": OfficialAntiDiffusion(),
    "random-sign": RandomSign(),
}

PRESETS: dict[str, AntiDiffusion] = {
    "quick": AntiDiffusion(rounds=1, prompt_steps=15, tuning_steps=10),
    "strong": AntiDiffusion(rounds=11),
}
