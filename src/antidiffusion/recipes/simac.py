"""SimAC: the denoising loss at chosen times, and the shift of the UNet's features."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.anti_dreambooth import ASPL
from antidiffusion.recipes.ascent import Among, Objective, batches, gradient, move, views
from antidiffusion.recipes.base import Trace
from antidiffusion.recipes.objectives import Denoising, clean_latent

SELECTION = "time-step selection"
TIMES = 1000  # the search's resolution: the paper's models have so many steps
ENOUGH = 0.1  # share of the times at which the selection ends


@contextmanager
def record_features(modules: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Record the outputs `(B, C, h, w)` of modules inside the block, in the list that is returned."""
    features: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, arguments, output: features.append(output)) for module in modules]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class DenoisingFeature:
    """L_ldm + weight * mean squared distance of the features from the clean picture's at the same noise and time.

    Arguments:
        surrogate: The model.
        embedding: Text embedding of the prompt.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that the features move away from.
        times: For each of the B pictures the times `(S,)` that may be drawn, on the CPU.
        weight: lambda; 0 leaves the features out.
    """

    surrogate: Surrogate
    embedding: Embedding
    clean: Tensor
    times: Sequence[Tensor]
    weight: float = 1.0

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        n, t = Among(self.times)(self.surrogate, z, generator)
        if not self.weight:
            return self.surrogate.denoising_loss(z, n, t, self.embedding)
        modules = self.surrogate.features()
        with torch.no_grad(), record_features(modules) as before:
            self.surrogate.denoising_loss(self.clean_latent, n, t, self.embedding)
        with record_features(modules) as after:
            loss = self.surrogate.denoising_loss(z, n, t, self.embedding)
        shifts = [(a.float() - b.float()).square().mean((1, 2, 3)) for a, b in zip(after, before, strict=True)]
        return loss + self.weight * torch.stack(shifts).mean(0)

    @cached_property
    def clean_latent(self) -> Tensor:
        """Latent of the clean pictures, encoded once."""
        return clean_latent(self.surrogate, self.clean)


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
        surrogate.features()  # a model without them is refused before any work
        groups = batches(canvases)
        clean = [views(group) for group in groups]
        phases = self.rounds * (self.steps + 2 * self.tuning_steps)
        trace = Trace(self.selection_steps * len(canvases) + phases, progress)
        embedding = surrogate.embed([self.prompt])
        chosen: list[list[Tensor]] = []
        for group in groups:
            chosen.append([])
            for canvas in group:
                left = torch.ones(TIMES, dtype=torch.bool)
                before = len(trace.losses.get(SELECTION, []))
                trace.run(SELECTION, self._search(left, canvas, surrogate, embedding, generator))
                trace.total -= self.selection_steps - (len(trace.losses.get(SELECTION, [])) - before)
                chosen[-1].append(_times(left, surrogate))

        def objectives(embedding: Embedding) -> list[Objective]:
            return [
                DenoisingFeature(surrogate, embedding, x, times, self.feature_weight)
                for x, times in zip(clean, chosen, strict=True)
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
            times = [_times(torch.arange(total) == step, surrogate)]
            objective = Denoising(surrogate, embedding, Among(times))
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
            move(trial, slope, self.step_size, budget)
            yield loss.item()


def _times(chosen: Tensor, surrogate: Surrogate) -> Tensor:
    """Return the model's times `(S,)` in the middle of those of `TIMES` equal parts of the noising that are chosen."""
    return surrogate.schedule.time((chosen.nonzero()[:, 0] + 0.5) / len(chosen))
