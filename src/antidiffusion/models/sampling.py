"""Draw with a surrogate: deterministic DDIM with classifier-free guidance.

References:
    Denoising Diffusion Implicit Models, Song et al., 2021, arXiv 2010.02502
    Classifier-Free Diffusion Guidance, Ho and Salimans, 2022, arXiv 2207.12598
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.progress import Progress, silent

DRAWING = "drawing"


@torch.no_grad()
def sample(
    prompts: Sequence[str],
    surrogate: Surrogate,
    generator: Generator,
    *,
    steps: int = 25,
    guidance: float = 7.5,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Draw one picture for each prompt.

    Arguments:
        prompts: B texts.
        surrogate: The model that draws.
        generator: Source of the initial noise.
        steps: DDIM steps.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        size: Height and width in pixels, multiples of `surrogate.multiple`; the model's own if None.
        progress: Called after each step.

    Returns:
        Pictures `(B, 3, H, W)` float32 in [0, 1].

    Raises:
        ValueError: If the model cannot draw that size.
    """
    height, width = size or (surrogate.size, surrogate.size)
    check_size(height, width, surrogate)
    shape = (len(prompts), surrogate.vae.config.latent_channels, height // surrogate.factor, width // surrogate.factor)
    z = randn(shape, generator, torch.empty(0, device=surrogate.device))
    surrogate.scheduler.set_timesteps(steps, device=surrogate.device)
    timesteps = surrogate.scheduler.timesteps
    embedding = surrogate.embed(prompts)
    return surrogate.decode(denoise(z, timesteps, embedding, surrogate, guidance=guidance, progress=progress))


def check_size(height: int, width: int, surrogate: Surrogate) -> None:
    """Raise ValueError unless both sides in pixels are whole multiples of the surrogate's."""
    if min(height, width) < 1 or height % surrogate.multiple or width % surrogate.multiple:
        raise ValueError(
            f"expected sides that are multiples of {surrogate.multiple}, got {width} x {height}; resize or crop first"
        )


def unconditional(surrogate: Surrogate) -> Embedding:
    """Return what guidance leads away from, batch 1: the empty prompt, or zeros for SDXL, as in diffusers."""
    empty = surrogate.embed([""])
    if empty.pooled is None:
        return empty
    return Embedding(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))


def concatenate(*parts: tuple[Embedding, int]) -> Embedding:
    """Join embeddings, each of batch 1 or of the number beside it, to one batch."""
    tokens = torch.cat([embedding.tokens.expand(count, -1, -1) for embedding, count in parts])
    pooled = [embedding.pooled.expand(count, -1) for embedding, count in parts if embedding.pooled is not None]
    return Embedding(tokens, torch.cat(pooled) if pooled else None)


def guided(
    embedding: Embedding, surrogate: Surrogate, guidance: float | Tensor, count: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Prepare the UNet with classifier-free guidance; one call answers with and without the prompts.

    Arguments:
        embedding: Of the prompts, batch 1 or B.
        surrogate: The model.
        guidance: Scale for all or for each, `(B,)`. Entries of scale 1 are not guided; the answers without a prompt of
            the others stand in the UNet's batch after all B.
        count: B.

    Returns:
        Function of latents `(B, C, h, w)` and their step, `()` int64, that returns the UNet's answer `(B, C, h, w)`.
    """
    scale = torch.as_tensor(guidance, dtype=torch.float32, device=surrogate.device).expand(count)
    chosen = (scale != 1).nonzero().flatten()
    scale, total = scale[chosen, None, None, None], count + len(chosen)
    if len(chosen):
        embedding = concatenate((embedding, count), (unconditional(surrogate), len(chosen)))

    def predict(z: Tensor, t: Tensor) -> Tensor:
        answers = surrogate.predict(torch.cat([z, z[chosen]]), t.expand(total), embedding)
        output, unguided = answers[:count], answers[count:]
        return output.index_copy(0, chosen, unguided + scale * (output[chosen] - unguided))

    return predict


After = Callable[[int, Tensor], Tensor]
"""Called after every step with the steps done and the latents; returns the latents to go on with."""


def unchanged(done: int, z: Tensor) -> Tensor:
    """Go on with the same latents."""
    return z


@torch.no_grad()
def denoise(
    z: Tensor,
    timesteps: Tensor,
    embedding: Embedding,
    surrogate: Surrogate,
    *,
    guidance: float | Tensor,
    after: After = unchanged,
    progress: Progress = silent,
) -> Tensor:
    """Go from noisy latents down the given steps.

    Arguments:
        z: Latents `(B, C, h, w)` float32 at `timesteps[0]`.
        timesteps: Steps of `surrogate.scheduler`, descending, `(S,)` int64, after its `set_timesteps`.
        embedding: Of the prompts, batch 1 or B.
        surrogate: The model.
        guidance: Scale of classifier-free guidance, for all or for each, `(B,)`; 1 turns it off.
        after: Changes the latents after each step.
        progress: Called after each step.

    Returns:
        Clean latents `(B, C, h, w)` float32.
    """
    predict = guided(embedding, surrogate, guidance, len(z))
    for done, t in enumerate(timesteps, 1):
        z = after(done, surrogate.scheduler.step(predict(z, t), t, z).prev_sample)
        progress(DRAWING, done, len(timesteps))
    return z
