"""Draw with a surrogate, and find the noise that a picture comes from: deterministic steps down and up the schedule.

References:
    Denoising Diffusion Implicit Models, Song et al., 2021, arXiv 2010.02502
    Diffusion Models Beat GANs on Image Synthesis, Dhariwal and Nichol, 2021, arXiv 2105.05233 (inversion, appendix F)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.schedule import step
from antidiffusion.progress import Progress, silent

DRAWING = "drawing"


@torch.no_grad()
def sample(
    prompts: Sequence[str],
    surrogate: Surrogate,
    generator: Generator,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Draw one picture for each prompt.

    Arguments:
        prompts: B texts.
        surrogate: The model that draws.
        generator: Source of the initial noise.
        steps: Of the sampler; None for 25, or fewer where fewer are usual for the model.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        size: Height and width in pixels, multiples of `surrogate.multiple`; the model's own if None.
        progress: Called after each step.

    Returns:
        Pictures `(B, 3, H, W)` float32 in [0, 1].

    Raises:
        ValueError: If the model cannot draw that size.
    """
    height, width = size or (surrogate.size, surrogate.size)
    check_size(height, width, surrogate)
    shape = (len(prompts), surrogate.channels, height // surrogate.factor, width // surrogate.factor)
    z = randn(shape, generator, torch.empty(0, device=surrogate.device))
    times = way_down(surrogate, height, width, min(25, surrogate.steps) if steps is None else steps)
    scale = surrogate.guidance if guidance is None else guidance
    embedding = surrogate.embed(prompts)
    return surrogate.decode(denoise(z, times, embedding, surrogate, guidance=scale, progress=progress))


def way_down(surrogate: Surrogate, height: int, width: int, steps: int, strength: float = 1.0) -> Tensor:
    """Return where a sampler stands that undoes a share of the noising, `(S + 1,)`, descending, on the model's device.

    Arguments:
        surrogate: The model.
        height, width: Of the pictures, in pixels.
        steps: Of the whole way.
        strength: Share of it that is gone, in (0, 1].

    Raises:
        ValueError: If that is no step.
    """
    schedule = surrogate.schedule
    first = schedule.first(steps, strength)
    if first >= steps:
        raise ValueError(f"expected a strength in (0, 1] that runs a step, got {strength} of {steps} steps; try 0.5")
    return schedule.times(steps, surrogate.positions(height, width))[first:].to(surrogate.device)


def check_size(height: int, width: int, surrogate: Surrogate) -> None:
    """Raise ValueError unless both sides in pixels are whole multiples of the surrogate's."""
    if min(height, width) < 1 or height % surrogate.multiple or width % surrogate.multiple:
        raise ValueError(
            f"expected sides that are multiples of {surrogate.multiple}, got {width} x {height}; resize or crop first"
        )


After = Callable[[int, Tensor], Tensor]
"""Called after every step with the steps done and the latents; returns the latents to go on with."""


def unchanged(done: int, z: Tensor) -> Tensor:
    """Go on with the same latents."""
    return z


@torch.no_grad()
def denoise(
    z: Tensor,
    times: Tensor,
    embedding: Embedding,
    surrogate: Surrogate,
    *,
    guidance: float | Tensor,
    after: After = unchanged,
    progress: Progress = silent,
) -> Tensor:
    """Go from noisy latents down the given times.

    Arguments:
        z: Latents `(B, C, h, w)` float32 at `times[0]`.
        times: Of `surrogate.schedule`, descending, `(S + 1,)`: a part of what its `times` returns.
        embedding: Of the prompts, batch 1 or B.
        surrogate: The model.
        guidance: Scale of classifier-free guidance, for all or for each, `(B,)`; 1 turns it off.
        after: Changes the latents after each step.
        progress: Called after each step.

    Returns:
        Latents `(B, C, h, w)` float32 at `times[-1]`.
    """
    predict = surrogate.guided(embedding, guidance, len(z))
    for done, (t, s) in enumerate(pairwise(times), 1):
        z = after(done, step(surrogate.schedule, z, predict(z, t), t, s))
        progress(DRAWING, done, len(times) - 1)
    return z


@torch.no_grad()
def invert(
    z: Tensor,
    times: Tensor,
    embedding: Embedding,
    surrogate: Surrogate,
    *,
    guidance: float | Tensor = 1.0,
    progress: Progress = silent,
) -> Tensor:
    """Go from clean latents up the given times, as diffusers' DDIMInverseScheduler does; `denoise` comes back.

    Every step asks at the noisier of its two times.

    Arguments:
        z: Latents `(B, C, h, w)` float32.
        times: What `denoise` is given, `(S + 1,)`, descending, down to the clean end.
        embedding: Of what the pictures show, batch 1 or B.
        surrogate: The model.
        guidance: Scale of classifier-free guidance; anything but 1 makes the way back inexact.
        progress: Called after each step.

    Returns:
        Latents `(S + 1, B, C, h, w)` float32 in the order of `denoise`: number i is at `times[i]`, the last is z.
    """
    predict = surrogate.guided(embedding, guidance, len(z))
    trajectory = [z]
    for done, (t, s) in enumerate(pairwise(times.flip(0)), 1):
        trajectory.append(step(surrogate.schedule, trajectory[-1], predict(trajectory[-1], s), t, s))
        progress("inverting", done, len(times) - 1)
    return torch.stack(trajectory[::-1])
