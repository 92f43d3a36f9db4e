"""Back through a whole edit: PhotoGuard's diffusion attack.

References:
    Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., 2022,
    arXiv 2108.01073
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn


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
        scheduler = self.surrogate.scheduler
        scheduler.set_timesteps(round(self.denoising_steps / self.strength), device=x.device)
        timesteps = scheduler.timesteps[-self.denoising_steps :]
        z = self.surrogate.encode(x, generator)
        z = self.surrogate.schedule.add_noise(z, randn(z.shape, generator, z), timesteps[:1].expand(len(z)))
        for t in timesteps:
            output = self.surrogate.predict(z, t.expand(len(z)), self.embedding)
            noise = randn(z.shape, generator, z)
            z = scheduler.step(output, t, z, eta=self.eta, variance_noise=noise).prev_sample
        return self.surrogate.decode_with_gradient(z)
