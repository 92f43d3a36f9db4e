"""PhotoGuard's diffusion attack."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.sampling import way_down
from antidiffusion.models.schedule import noised, step
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Mean
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.photoguard import GREY


@dataclass
class EditTarget:
    """Minus the distance of an edited picture, in [-1, 1], from a target, differentiated through every denoising step.

    Arguments:
        surrogate: The attacker's model.
        embedding: Text embedding of the edit's prompt.
        target: Pictures `(1 or B, 3, h, w)` in [0, 1] that the edit should end at.
        strength: Share of the noising that the edit undoes, in (0, 1].
        denoising_steps: Steps of the edit.
        eta: Share of DDPM's noise in the steps; 0 is deterministic.

    References:
        SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., 2022,
        arXiv 2108.01073
    """

    surrogate: Surrogate
    embedding: Embedding
    target: Tensor
    strength: float = 0.7
    denoising_steps: int = 4
    eta: float = 1.0

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        edit = self.edit(x, generator)
        return -2 * (edit - self.target).flatten(1).norm(dim=1)

    def edit(self, x: Tensor, generator: Generator) -> Tensor:
        """Return the edited pictures `(B, 3, h, w)`, not clamped to [0, 1]: a clamp would stop the gradient."""
        surrogate, schedule = self.surrogate, self.surrogate.schedule
        steps = round(self.denoising_steps / self.strength)
        times = way_down(surrogate, x.shape[-2], x.shape[-1], steps)[-self.denoising_steps - 1 :]
        z = surrogate.encode(x, generator)
        z = noised(schedule, z, randn(z.shape, generator, z), times[0])
        for t, s in pairwise(times):
            answer = surrogate.predict(z, t.expand(len(z)), self.embedding)
            z = step(schedule, z, answer, t, s, eta=self.eta, fresh=randn(z.shape, generator, z))
        return surrogate.decode_with_gradient(z)


@dataclass(frozen=True)
class PhotoGuardDiffusion:
    """Make a whole edit end at a grey picture, differentiating through all of its denoising steps.

    The released code attacks an inpainting model, which none of our surrogates is: here the edit is SDEdit, at the
    strength that the released code names. Its prompt is empty, so that guidance has no effect and is left out.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16.
        steps: Sign steps. The paper takes 200; 100 keep a run on a CPU at half a minute.
        step_size: In 1/255 units. The paper's is 2.
        draws: Edits over which a gradient is averaged; the released code takes 10, at ten times the time.
        denoising_steps: Of an edit; the released code's.
        strength: Share of the noising that the edit undoes.
        prompt: Of the edit.

    References:
        Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    """

    budget: float = 8
    steps: int = 100
    step_size: float = 2
    draws: int = 1
    denoising_steps: int = 4
    strength: float = 0.7
    prompt: str = ""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        embedding = surrogate.embed([self.prompt])

        def objective(clean: Tensor) -> Mean:
            target = torch.full_like(clean[:1], GREY)
            return Mean(EditTarget(surrogate, embedding, target, self.strength, self.denoising_steps), self.draws)

        return climb(self, objective, canvases, generator, progress)
