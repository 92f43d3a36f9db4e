"""Edits that draw from the noise that a picture comes from, beside the picture itself."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, check_steps, embed_each
from antidiffusion.models.base import Surrogate, concatenate
from antidiffusion.models.sampling import check_size, denoise, invert, way_down
from antidiffusion.progress import Progress, part

Phase = tuple[int, AbstractContextManager[None]]
"""Steps done when it ends, and what holds until then."""


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

    The batch is B sources, B targets and, with guidance, the targets without a prompt. Only targets are guided.

    Arguments:
        x, prompts, surrogate, seed, progress: See `base.Attack`; the seed draws the posterior's noise.
        steps: In each direction.
        guidance: Scale of guidance for the targets; 1 turns it off.
        phases: Parts of the denoising in order, the last of which ends at `steps`.

    Returns:
        The edited pictures, as x.
    """
    check_size(x.shape[-2], x.shape[-1], surrogate)
    count = len(x)
    source, target = (embed_each(texts, count, surrogate) for texts in (prompts.source, prompts.target))
    times = way_down(surrogate, x.shape[-2], x.shape[-1], steps)
    z = surrogate.encode(x, Generator().manual_seed(seed))
    z = invert(z, times, source, surrogate, progress=part(progress, 0, 2 * steps))[0]
    z = torch.cat([z, z])
    both = concatenate((source, count), (target, count))
    scale = torch.tensor([1.0, guidance]).repeat_interleave(count)
    start = 0
    for end, context in phases:
        ahead = part(progress, steps + start, 2 * steps)
        with context:
            z = denoise(z, times[start : end + 1], both, surrogate, guidance=scale, progress=ahead)
        start = end
    return surrogate.decode(z[count:])


def check_settings(steps: int | None, shares: dict[str, float]) -> None:
    """Raise ValueError unless there is a step and all shares are in [0, 1]."""
    check_steps(steps)
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {share}; it is a share, not a number")
