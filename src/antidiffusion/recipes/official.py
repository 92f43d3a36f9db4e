"""The released code of Anti-Diffusion, to compare with."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor

from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.schedule import VP
from antidiffusion.models.tuning import Loss, constant, denoising, tunable
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.alternation import Alternation
from antidiffusion.recipes.ascent import ascend, batches
from antidiffusion.recipes.base import Trace, posteriors


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
        schedule = surrogate.schedule
        if not isinstance(schedule, VP):
            raise ValueError(
                "expected Stable Diffusion 1, 2 or XL, whose maps of 16 x 16 positions the released code reads, got "
                f"{surrogate.name}; take anti-diffusion"
            )
        groups = batches(canvases)
        embedding = surrogate.embed([""])
        objectives = [Official(surrogate, embedding, self.sdl_weight)] * len(groups)
        noise_target = copy.copy(surrogate)
        noise_target.schedule = replace(schedule, scheduler={**schedule.scheduler, "prediction_type": "epsilon"})

        def prompt_loss() -> Loss:
            samplers = [constant(posterior.sample(generator)) for posterior in posteriors(groups, surrogate)]
            return denoising(noise_target, samplers, embedding)

        def perturb() -> Iterator[float]:
            centres = [canvas.delta.clone() for canvas in canvases]
            sizes = [self.step_size] * self.steps
            for value in ascend(objectives, groups, Linf(self.budget), sizes=sizes, generator=generator):
                for canvas, centre in zip(canvases, centres, strict=True):
                    canvas.delta.clamp_(centre - self.radius, centre + self.radius)
                yield value

        with tunable(surrogate, "full") as (weights, _):
            hooks: Any = {"perturb": perturb, "prompt_loss": prompt_loss}
            options: Any = {"embedding": embedding, "weights": weights, "learning_rate": self.learning_rate}
            return self.alternate(groups, surrogate, generator, progress, **options, **hooks)
