"""SDEdit: noise a picture part of the way and denoise it towards a prompt (image-to-image).

References:
    SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., 2022,
    arXiv 2108.01073
"""

import torch
from torch import Generator, Tensor

from antidiffusion.sampling import Report, check_size, denoise, silent
from antidiffusion.surrogate import Surrogate, randn


@torch.no_grad()
def sdedit(
    x: Tensor,
    prompt: str,
    surrogate: Surrogate,
    generator: Generator,
    *,
    strength: float = 0.5,
    guidance: float = 7.5,
    steps: int = 50,
    progress: Report = silent,
) -> Tensor:
    """Edit pictures towards a prompt.

    Arguments:
        x: Pictures `(B, 3, h, w)` float32 in [0, 1], sides multiples of `surrogate.multiple`.
        prompt: What the edited picture should show.
        surrogate: The model that edits.
        generator: Source of the posterior's noise, then of the added noise, drawn as in diffusers' image-to-image
            pipeline.
        strength: Share of the noising that is undone, in (0, 1]: 0 keeps the picture, 1 forgets it.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        steps: Steps of the full DDIM trajectory; `strength` of them are run.
        progress: Called after each step.

    Returns:
        Edited pictures, as `x`.

    Raises:
        ValueError: If `strength` leaves no step to run, or the model cannot edit that size.
    """
    check_size(x.shape[-2], x.shape[-1], surrogate)
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise ValueError(f"expected a strength in (0, 1] that runs a step, got {strength} of {steps} steps; try 0.5")
    surrogate.scheduler.set_timesteps(steps, device=surrogate.device)
    timesteps = surrogate.scheduler.timesteps[steps - int(steps * strength) :]
    z = surrogate.encode(x, generator)
    z = surrogate.schedule.add_noise(z, randn(z.shape, generator, z), timesteps[:1].expand(len(z)))
    z = denoise(z, timesteps, surrogate.embed([prompt]), surrogate, guidance=guidance, progress=progress)
    return surrogate.decode(z)
