"""SDEdit: noise a picture part of the way and denoise it towards a prompt (image-to-image).

References:
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., 2022,
    arXiv 2108.01073
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, check_share, check_steps, embed_each, usual
from antidiffusion.models.base import Surrogate, randn
from antidiffusion.models.sampling import check_size, denoise, way_down
from antidiffusion.models.schedule import noised
from antidiffusion.progress import Progress, silent


@dataclass(frozen=True)
class SDEdit:
    """Edit with diffusers' image-to-image procedure; the call is `base.Attack`'s.

    The seed draws the posterior's noise, then the added noise, as diffusers' pipeline does.

    Arguments:
        strength: Share of the noising that is undone, in (0, 1]: 0 keeps the picture, 1 forgets it.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        steps: Of the whole way, None for what is usual for the model; `strength` of them are run.
    """

    strength: float = 0.5
    guidance: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_share("strength", self.strength)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        check_size(x.shape[-2], x.shape[-1], surrogate)
        steps, guidance = usual(self.steps, self.guidance, surrogate)
        embedding = embed_each(prompts.target, len(x), surrogate)
        generator = Generator().manual_seed(seed)
        times = way_down(surrogate, x.shape[-2], x.shape[-1], steps, self.strength)
        z = surrogate.encode(x, generator)
        z = noised(surrogate.schedule, z, randn(z.shape, generator, z), times[0])
        z = denoise(z, times, embedding, surrogate, guidance=guidance, progress=progress)
        return surrogate.decode(z)
