"""DDIM inversion: the noise that a picture comes from, and edits that draw from it beside the picture itself.

References:
    Denoising Diffusion Implicit Models, Song et al., 2021, arXiv 2010.02502
    Diffusion Models Beat GANs on Image Synthesis, Dhariwal and Nichol, 2021, arXiv 2105.05233 (inversion, appendix F)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from inspect import signature

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, embed_each
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.models.sampling import check_size, concatenate, denoise, guided
from antidiffusion.progress import Progress, part, silent

Phase = tuple[int, AbstractContextManager[None]]
"""Steps done when it ends, and what holds until then."""


@torch.no_grad()
def invert(
    z: Tensor,
    timesteps: Tensor,
    embedding: Embedding,
    surrogate: Surrogate,
    *,
    guidance: float | Tensor = 1.0,
    progress: Progress = silent,
) -> Tensor:
    """Go from clean latents up the given steps, as diffusers' DDIMInverseScheduler does; `denoise` comes back.

    Arguments:
        z: Latents `(B, C, h, w)` float32.
        timesteps: What `denoise` is given: steps of `surrogate.scheduler`, descending, `(S,)` int64, down to the last.
        embedding: Of what the pictures show, batch 1 or B.
        surrogate: The model.
        guidance: Scale of classifier-free guidance; anything but 1 makes the way back inexact.
        progress: Called after each step.

    Returns:
        Latents `(S + 1, B, C, h, w)` float32 in the order of `denoise`: number i is at `timesteps[i]`, the last is z.
    """
    from diffusers import DDIMInverseScheduler

    # Not from_config, which warns of settings that other schedulers have, nor set_timesteps, which refuses "linspace".
    known = signature(DDIMInverseScheduler.__init__).parameters.keys()
    scheduler = DDIMInverseScheduler(**{k: v for k, v in surrogate.scheduler.config.items() if k in known})
    scheduler.num_inference_steps = surrogate.scheduler.num_inference_steps
    predict = guided(embedding, surrogate, guidance, len(z))
    trajectory = [z]
    for done, t in enumerate(timesteps.flip(0), 1):
        trajectory.append(scheduler.step(predict(trajectory[-1], t), t, trajectory[-1]).prev_sample)
        progress("inverting", done, len(timesteps))
    return torch.stack(trajectory[::-1])


@torch.no_grad()
def edit_beside_source(
    x: Tensor,
    prompts: Prompts,
    surrogate: Surrogate,
    seed: int,
    *,
    steps: int,
    guidance: float,
    phases: Sequence[Phase],
    progress: Progress,
) -> Tensor:
    """Invert pictures, then denoise source and target side by side while the source controls the target's attention.

    The UNet's batch is B sources, B targets and, with guidance, the targets without a prompt. Only targets are guided.

    Arguments:
        x, prompts, surrogate, seed, progress: See `base.Attack`; the seed draws the posterior's noise.
        steps: DDIM steps in each direction.
        guidance: Scale of classifier-free guidance for the targets; 1 turns it off.
        phases: Parts of the denoising in order, the last of which ends at `steps`.

    Returns:
        The edited pictures, as x.
    """
    check_size(x.shape[-2], x.shape[-1], surrogate)
    count = len(x)
    source, target = (embed_each(texts, count, surrogate) for texts in (prompts.source, prompts.target))
    surrogate.scheduler.set_timesteps(steps, device=surrogate.device)
    timesteps = surrogate.scheduler.timesteps
    z = surrogate.encode(x, Generator().manual_seed(seed))
    z = invert(z, timesteps, source, surrogate, progress=part(progress, 0, 2 * steps))[0]
    z = torch.cat([z, z])
    both = concatenate((source, count), (target, count))
    scale = torch.tensor([1.0, guidance]).repeat_interleave(count)
    start = 0
    for end, context in phases:
        ahead = part(progress, steps + start, 2 * steps)
        with context:
            z = denoise(z, timesteps[start:end], both, surrogate, guidance=scale, progress=ahead)
        start = end
    return surrogate.decode(z[count:])


def check_settings(steps: int, shares: dict[str, float]) -> None:
    """Raise ValueError unless there is a step and all shares are in [0, 1]."""
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}; try 50")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {share}; it is a share, not a number")
