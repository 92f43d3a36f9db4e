"""The released code of Anti-Diffusion, to compare with."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator

from antidiffusion.models.base import Surrogate
from antidiffusion.models.schedule import VP
from antidiffusion.models.tuning import Loss, constant, denoising, tunable
from antidiffusion.objectives.semantic import Official
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.anti_diffusion import Alternation
from antidiffusion.recipes.ascent import ascend, batches
from antidiffusion.recipes.base import Trace, posteriors


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
        if not isinstance(surrogate.schedule, VP):
            raise ValueError(
                f"expected a model of Stable Diffusion 1, 2 or XL for official, got {surrogate.name}; name one"
            )
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        objectives = [Official(surrogate, embedding, self.sdl_weight)] * len(groups)
        noise_target = copy.copy(surrogate)
        noise_target.schedule = VP({**surrogate.schedule.scheduler, "prediction_type": "epsilon"})

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
