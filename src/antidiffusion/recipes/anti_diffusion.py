"""Anti-Diffusion: prompt tuning, surrogate tuning and ascent in turn."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.memory import low_memory
from antidiffusion.models.tuning import Loss, denoising, fit, tunable
from antidiffusion.objectives.semantic import DenoisingSemantic
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Momentum, ascend, batches, decayed, scatter, views
from antidiffusion.recipes.base import PERTURBATION, PROMPT, TUNING, Trace, posteriors


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

    @property
    def counts(self) -> dict[str, int]:
        """Steps of each stage in a whole run; the last prompt tuning, whose result nobody would use, is left out."""
        prompts = self.prompt_steps * max(1, self.rounds)
        return {PROMPT: prompts, TUNING: self.tuning_steps * self.rounds, PERTURBATION: self.steps * (1 + self.rounds)}

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
        trace = Trace(sum(self.counts.values()), progress)

        def loss() -> Loss:
            samplers = [posterior.sample for posterior in posteriors(groups, surrogate)]
            return denoising(surrogate, samplers, embedding)

        def tune_prompt() -> None:
            if not self.prompt_steps:
                return
            options: Any = {"steps": self.prompt_steps, "learning_rate": self.prompt_learning_rate}
            trace.run(PROMPT, fit([embedding.tokens], (prompt_loss or loss)(), generator=generator, **options))

        tune_prompt()
        trace.run(PERTURBATION, perturb())
        for left in reversed(range(self.rounds)):
            if self.tuning_steps:
                options: Any = {"steps": self.tuning_steps, "learning_rate": learning_rate}
                trace.run(TUNING, fit(weights, loss(), generator=generator, **options))
            trace.run(PERTURBATION, perturb())
            if left:
                tune_prompt()
        return trace


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
            answer for the clean picture, see `antidiffusion.objectives.semantic.DenoisingSemantic`.
        tuning: "full", "lora" or "auto", see `antidiffusion.models.tuning.tunable`.
        sdl: Variant of the semantic disturbance loss, see `antidiffusion.objectives.semantic`.
        low_memory: Recompute activations instead of keeping them, and park what is not needed on disk: more time.
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
    low_memory: bool = False

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        distances = {"noise_weight": self.noise_weight, "clean_weight": self.clean_weight}
        objectives = [
            DenoisingSemantic(surrogate, embedding, self.sdl_weight, self.sdl, views(group), **distances)
            for group in groups
        ]
        budget, momentum = Linf(self.budget), Momentum(self.momentum)
        total = self.steps * (1 + self.rounds)
        sizes = iter([decayed(self.step_size or self.budget / 4, done, total) for done in range(total)])
        scatter(canvases, budget, generator)

        def perturb() -> Iterable[float]:
            options: Any = {"steps": 1, "generator": generator, "momentum": momentum}
            for step_size in islice(sizes, self.steps):
                yield from ascend(objectives, groups, budget, step_size=step_size, **options)

        lean = low_memory(surrogate) if self.low_memory else nullcontext()
        tuned: AbstractContextManager[tuple[list[Tensor], float]] = nullcontext(([], 0.0))
        if self.counts[TUNING]:
            tuned = tunable(surrogate, self.tuning)
        with lean, tuned as (weights, learning_rate):
            options: Any = {"embedding": embedding, "weights": weights, "learning_rate": learning_rate}
            return self._alternate(groups, surrogate, generator, progress, perturb=perturb, **options)
