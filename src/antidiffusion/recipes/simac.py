"""SimAC."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.objectives import Objective
from antidiffusion.objectives.feature import DenoisingFeature
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.anti_dreambooth import ASPL
from antidiffusion.recipes.ascent import batches, gradient, views
from antidiffusion.recipes.base import Trace

SELECTION = "time-step selection"
BINS = 1000  # steps of the noising that the search tells apart: the training steps of Stable Diffusion
ENOUGH = 0.1  # share of them at which the selection ends


def times(surrogate: Surrogate, steps: Tensor) -> Tensor:
    """Return the schedule's times `(S,)` at steps `(S,)` int64 of the `BINS`."""
    return surrogate.schedule.time((steps + 0.5) / BINS)


@dataclass(frozen=True)
class SimAC(ASPL):
    """ASPL at steps that a greedy search picks for each picture, with the shift of the UNet's features added.

    The search scores five random steps by the gradient's L1 norm, throws out the neighbourhood of the lowest, takes a
    sign step at the highest on a trial copy, and goes on until a tenth of all steps is left. The features move away
    from the clean picture's, as the paper says; the released code compares with the perturbed picture of the round's
    start, and detaches the term, so that it does nothing there. More in `ASPL` and `Learner`.

    Arguments:
        feature_weight: lambda, the weight of the features' mean squared shift.
        selection_steps: Rounds of the search, at most.
        candidates: Steps scored in a round of the search.
        neighbourhood: Steps thrown out on either side of the lowest.

    References:
        SimAC: A Simple Anti-Customization Method for Protecting Face Privacy against Text-to-Image Synthesis of
        Diffusion Models, Wang et al., 2024, arXiv 2312.07865
    """

    feature_weight: float = 1.0
    selection_steps: int = 50
    candidates: int = 5
    neighbourhood: int = 20

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        groups = batches(canvases)
        clean = [views(group) for group in groups]
        phases = self.rounds * (self.steps + 2 * self.tuning_steps)
        trace = Trace(self.selection_steps * len(canvases) + phases, progress)
        embedding = surrogate.embed([self.prompt])
        chosen: list[list[Tensor]] = []
        for group in groups:
            chosen.append([])
            for canvas in group:
                left = torch.ones(BINS, dtype=torch.bool)
                before = len(trace.losses.get(SELECTION, []))
                trace.run(SELECTION, self._search(left, canvas, surrogate, embedding, generator))
                trace.total -= self.selection_steps - (len(trace.losses.get(SELECTION, [])) - before)
                chosen[-1].append(times(surrogate, left.nonzero()[:, 0]))

        def objectives(embedding: Embedding) -> list[Objective]:
            return [
                DenoisingFeature(surrogate, embedding, x, steps, self.feature_weight)
                for x, steps in zip(clean, chosen, strict=True)
            ]

        self._alternate(groups, surrogate, generator, trace, objectives)
        return trace

    def _search(
        self, left: Tensor, canvas: Canvas, surrogate: Surrogate, embedding: Embedding, generator: Generator
    ) -> Iterator[float]:
        """Throw steps out of `left: (T,)` bool, in place, round by round; yields the loss at the highest of each."""
        trial, budget, total = copy.copy(canvas), Linf(self.budget), len(left)
        trial.delta = canvas.delta.clone()

        def at(step: int) -> tuple[Tensor, Tensor]:
            objective = DenoisingFeature(
                surrogate, embedding, trial.clean_view, [times(surrogate, torch.tensor([step]))], weight=0
            )
            return gradient(objective, trial.view(), generator)

        for _ in range(self.selection_steps):
            steps = left.nonzero()[:, 0]
            if len(steps) <= ENOUGH * total:
                return
            drawn = torch.randint(len(steps), (self.candidates,), generator=generator, device=generator.device)
            scores = {step: at(step)[0].abs().sum().item() for step in steps[drawn.cpu()].tolist()}
            lowest, highest = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
            middle = min(max(lowest, self.neighbourhood), total - self.neighbourhood)
            left[middle - self.neighbourhood : middle + self.neighbourhood] = False
            slope, loss = at(highest)
            trial.ascend(slope, self.step_size, budget)
            yield loss.item()
