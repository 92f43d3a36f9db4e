"""The procedure of Anti-Diffusion: prompt tuning, surrogate tuning and ascent in turn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.tuning import Loss, denoising, fit
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
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
        tuning_steps: AdamW steps on the surrogate in a round.
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

    def alternate(
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
        """Run all stages.

        Arguments:
            groups: Canvases in groups of one view size.
            surrogate, generator, progress: As a recipe gets them.
            embedding: Tuned in place.
            weights, learning_rate: What tunes the surrogate.
            perturb: One phase of ascent: an iterator of losses.
            prompt_loss: What prompt tuning lowers, if it is not the denoising loss.
        """
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
