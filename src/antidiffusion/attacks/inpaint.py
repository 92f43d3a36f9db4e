"""Masked inpainting with an ordinary model: the picture, noised, is put back outside the mask after every step.

References:
    Blended Diffusion for Text-driven Editing of Natural Images, Avrahami et al., 2022, arXiv 2111.14818
    High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al., 2022, arXiv 2112.10752
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, check_share, check_steps, embed_each, usual
from antidiffusion.models.base import Surrogate, randn
from antidiffusion.models.sampling import check_size, denoise, way_down
from antidiffusion.models.schedule import noised
from antidiffusion.pictures.tensors import check_range
from antidiffusion.progress import Progress, silent


@dataclass(frozen=True)
class Inpaint:
    """Redraw where `prompts.mask` is at least 0.5, as diffusers' inpainting pipelines do with a UNet of four channels.

    The call is `base.Attack`'s. The seed draws the posterior's noise, then the added noise.

    Arguments:
        strength: Share of the noising that is undone, in (0, 1]; 1 forgets what was under the mask.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        steps: Of the whole way, None for what is usual for the model; `strength` of them are run.
        paste: Put the picture's own pixels back outside the mask; without, they have passed the autoencoder.
    """

    strength: float = 1.0
    guidance: float | None = None
    steps: int | None = None
    paste: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_share("strength", self.strength)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        check_size(x.shape[-2], x.shape[-1], surrogate)
        steps, guidance = usual(self.steps, self.guidance, surrogate)
        region = binary_mask(prompts.mask, x)
        mask = F.interpolate(region, scale_factor=1 / surrogate.factor)
        embedding = embed_each(prompts.target, len(x), surrogate)
        generator = Generator().manual_seed(seed)
        times = way_down(surrogate, x.shape[-2], x.shape[-1], steps, self.strength)
        clean = surrogate.encode(x, generator)
        noise = randn(clean.shape, generator, clean)

        def kept(done: int) -> Tensor:
            return clean if done == len(times) - 1 else noised(surrogate.schedule, clean, noise, times[done])

        z = denoise(
            noise if self.strength == 1 else kept(0),
            times,
            embedding,
            surrogate,
            guidance=guidance,
            after=lambda done, z: (1 - mask) * kept(done) + mask * z,
            progress=progress,
        )
        edited = surrogate.decode(z)
        return region * edited + (1 - region) * x if self.paste else edited


def binary_mask(mask: Tensor | None, x: Tensor) -> Tensor:
    """Return 1 where the mask is at least 0.5 and 0 elsewhere, `(1, 1, H, W)` or `(B, 1, H, W)` as x.

    Raises:
        ValueError: If there is no mask, or it does not fit x.
    """
    shapes = [(count, 1, *x.shape[-2:]) for count in (1, len(x))]
    if mask is None:
        raise ValueError(f"expected a mask to redraw in, got none; set Prompts.mask, {shapes[0]}, 1 to redraw")
    if mask.shape not in shapes:
        raise ValueError(f"expected a mask of {shapes[0]} or {shapes[1]}, got {tuple(mask.shape)}; resize it as x")
    check_range(mask, "a mask")
    return (mask >= 0.5).to(x)
