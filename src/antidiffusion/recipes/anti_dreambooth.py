"""Anti-DreamBooth: guidance by a fully trained surrogate (FSMG), and surrogate and perturbation in turn (ASPL).

References:
    Anti-DreamBooth: Protecting Users from Personalized Text-to-image Synthesis, Van Le et al., 2023, arXiv 2303.15433
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Posterior, Surrogate
from antidiffusion.models.memory import held
from antidiffusion.models.tuning import described, fit, restored, tunable
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Objective, ascend, batches
from antidiffusion.recipes.base import PERTURBATION, TUNING, Trace, posteriors
from antidiffusion.recipes.objectives import Denoising

STEP_SIZE = 5e-3 * 255 / 2  # 5e-3 of the range [-1, 1], in 1/255 units


@contextmanager
def learner(surrogate: Surrogate, method: str) -> Iterator[tuple[list[Tensor], float]]:
    """Make the surrogate tunable inside the block as the papers do: full tuning includes the text encoders.

    Arguments and returns as `antidiffusion.models.tuning.tunable`.
    """
    (denoiser, _), *encoders = surrogate.tunable(texts=True).values()
    first = next(denoiser.parameters())
    with tunable(surrogate, method) as (weights, learning_rate):
        if weights[0] is not first:  # adapters
            yield weights, learning_rate
            return
        modules = [encoder for encoder, _ in encoders]
        with held(modules):
            text = [weight for module in modules for weight in module.parameters()]
            with restored(text):
                yield [*weights, *text], learning_rate


@dataclass(frozen=True)
class Learner:
    """What FSMG, ASPL and SimAC share: DreamBooth on the surrogate, and ascent on its denoising loss.

    There is no prior preservation, which would draw 200 pictures of the class first, and gradients are not clipped,
    which makes no difference to AdamW at these rates. A step of tuning sees all pictures, not one in turn.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 6.4.
        steps: Sign steps of a phase.
        step_size: In 1/255 units.
        tuning_steps: AdamW steps of a phase.
        tuning: "full", "lora" or "auto", see `antidiffusion.models.tuning.tunable`; full includes the text encoders.
        prompt: What the surrogate is tuned to, with the identifier.
    """

    budget: float = 8
    steps: int = 100
    step_size: float = STEP_SIZE
    tuning_steps: int = 200
    tuning: str = "auto"
    prompt: str = "a photo of sks person"

    def _tune(
        self,
        weights: Sequence[Tensor],
        learning_rate: float,
        latents: Sequence[Posterior],
        surrogate: Surrogate,
        generator: Generator,
    ) -> Iterator[float]:
        loss = described(surrogate, [posterior.sample for posterior in latents], self.prompt)
        return fit(weights, loss, steps=self.tuning_steps, learning_rate=learning_rate, generator=generator)

    def _perturb(
        self, groups: Sequence[Sequence[Canvas]], objectives: Sequence[Objective], generator: Generator
    ) -> Iterator[float]:
        sizes = [self.step_size] * self.steps
        return ascend(objectives, groups, Linf(self.budget), sizes=sizes, generator=generator)


@dataclass(frozen=True)
class FSMG(Learner):
    """Tune the surrogate on the clean pictures, then raise its denoising loss.

    The paper tunes for 1000 steps on four other clean photos of the person. Given one set of pictures we tune on those
    themselves, and for 200 steps, which keeps a run on a CPU below a minute. More in `Learner`, with the arguments.
    """

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        trace = Trace(self.tuning_steps + self.steps, progress)
        with learner(surrogate, self.tuning) as (weights, rate):
            latents = posteriors(groups, surrogate)
            trace.run(TUNING, self._tune(weights, rate, latents, surrogate, generator))
            objective = Denoising(surrogate, surrogate.embed([self.prompt]))
            trace.run(PERTURBATION, self._perturb(groups, [objective] * len(groups), generator))
        return trace


@dataclass(frozen=True)
class ASPL(Learner):
    """In every round: tune a copy of the surrogate on the clean pictures, perturb against it, drop it, and tune the
    surrogate itself on the perturbed pictures.

    The paper's clean pictures are four other photos of the person; here they are the pictures themselves. More in
    `Learner`, with the other arguments.

    Arguments:
        rounds: Of the three phases. The released code takes 50; 25 keep a run on a CPU at half a minute, and make 150
            sign steps.
    """

    steps: int = 6
    tuning_steps: int = 3
    rounds: int = 25

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        trace = Trace(self.rounds * (self.steps + 2 * self.tuning_steps), progress)

        def objectives(embedding: Embedding) -> list[Objective]:
            return [Denoising(surrogate, embedding)] * len(groups)

        self._alternate(groups, surrogate, generator, trace, objectives)
        return trace

    def _alternate(
        self,
        groups: Sequence[Sequence[Canvas]],
        surrogate: Surrogate,
        generator: Generator,
        trace: Trace,
        objectives: Callable[[Embedding], Sequence[Objective]],
    ) -> None:
        """Run all rounds; `objectives` gives each group's, for the prompt as the tuned text encoders embed it."""
        before = posteriors(groups, surrogate)
        with learner(surrogate, self.tuning) as (weights, rate):
            for _ in range(self.rounds):
                with restored(weights):
                    trace.run(TUNING, self._tune(weights, rate, before, surrogate, generator))
                    embedding = surrogate.embed([self.prompt])
                    trace.run(PERTURBATION, self._perturb(groups, objectives(embedding), generator))
                trace.run(TUNING, self._tune(weights, rate, posteriors(groups, surrogate), surrogate, generator))
