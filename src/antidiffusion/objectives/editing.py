"""Back through a whole edit: PhotoGuard's diffusion attack.

References:
    Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., 2022,
    arXiv 2108.01073
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.sampling import way_down
from antidiffusion.models.schedule import noised, step


@dataclass
class EditTarget:
    """Minus the distance of an edited picture, in [-1, 1], from a target, differentiated through every denoising step.

    Arguments:
        surrogate: The attacker's model.
        embedding: Text embedding of the edit's prompt.
        target: Pictures `(1 or B, 3, h, w)` in [0, 1] that the edit should end at.
        strength: Share of the noising that the edit undoes, in (0, 1].
        denoising_steps: Steps of the edit.
        eta: Share of DDPM's noise in the DDIM steps; 0 is deterministic.
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
        schedule = self.surrogate.schedule
        steps = round(self.denoising_steps / self.strength)
        times = way_down(self.surrogate, x.shape[-2], x.shape[-1], steps)[-self.denoising_steps - 1 :]
        z = self.surrogate.encode(x, generator)
        z = noised(schedule, z, randn(z.shape, generator, z), times[0])
        for t, s in pairwise(times):
            output = self.surrogate.predict(z, t.expand(len(z)), self.embedding)
            z = step(schedule, z, output, t, s, eta=self.eta, fresh=randn(z.shape, generator, z))
        return self.surrogate.decode_with_gradient(z)
