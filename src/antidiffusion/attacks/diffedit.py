"""DiffEdit: find where two texts disagree about a picture, and redraw only there.

References:
    DiffEdit: Diffusion-based Semantic Image Editing with Mask Guidance, Couairon et al., 2022, arXiv 2210.11427
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, check_share, check_steps, embed_each, usual
from antidiffusion.models.base import Embedding, Posterior, Surrogate, randn
from antidiffusion.models.sampling import check_size, denoise, invert, way_down
from antidiffusion.models.schedule import noised
from antidiffusion.progress import Progress, part, silent


@dataclass(frozen=True)
class DiffEdit:
    """Edit what `prompts.target` says and `prompts.source`, which may stay empty, does not; `base.Attack`'s call.

    The picture is inverted with the source text. The seed draws the mask's noise, then the posterior's.

    Arguments:
        strength: Share of the steps that are inverted and redrawn, in (0, 1]: the paper's encoding ratio.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        steps: Of the whole way, None for what is usual for the model; `strength` of them are run in each direction.
        mask_strength: Share of the noising at which the texts are compared, in (0, 1].
        mask_threshold: Redraw where the difference is more than this multiple of the picture's mean. diffusers
            halves the range up to three times the mean.
        maps: Draws of noise that the difference is averaged over.
    """

    strength: float = 0.8
    guidance: float | None = None
    steps: int | None = None
    mask_strength: float = 0.5
    mask_threshold: float = 1.5
    maps: int = 10

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_share("strength", self.strength)
        check_share("mask_strength", self.mask_strength)
        if not self.mask_threshold > 0:
            raise ValueError(f"expected a positive mask_threshold, got {self.mask_threshold}; try 1.5")
        if self.maps < 1:
            raise ValueError(f"expected at least 1 map, got {self.maps}; try 10")

    @torch.no_grad()
    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        check_size(x.shape[-2], x.shape[-1], surrogate)
        steps, guidance = usual(self.steps, self.guidance, surrogate)
        source, target = (embed_each(texts, len(x), surrogate) for texts in (prompts.source, prompts.target))
        generator = Generator().manual_seed(seed)
        height, width = x.shape[-2:]
        compared, times = (
            way_down(surrogate, height, width, steps, share) for share in (self.mask_strength, self.strength)
        )
        run = len(times) - 1
        total = self.maps + 2 * run

        posterior = surrogate.posterior(x)
        contrast = difference(
            posterior,
            compared[0],
            source,
            target,
            surrogate,
            generator,
            maps=self.maps,
            progress=part(progress, 0, total),
        )
        mask = (contrast > self.mask_threshold * contrast.mean((1, 2, 3), keepdim=True)).float()
        z = posterior.sample(generator)
        trajectory = invert(z, times, source, surrogate, progress=part(progress, self.maps, total))
        z = denoise(
            trajectory[0],
            times,
            target,
            surrogate,
            guidance=guidance,
            after=lambda done, z: mask * z + (1 - mask) * trajectory[done],
            progress=part(progress, self.maps + run, total),
        )
        return surrogate.decode(z)


@torch.no_grad()
def difference(
    posterior: Posterior,
    t: Tensor,
    source: Embedding,
    target: Embedding,
    surrogate: Surrogate,
    generator: Generator,
    *,
    maps: int = 10,
    progress: Progress = silent,
) -> Tensor:
    """Measure how much the denoiser's answers to two texts differ at every place; guidance would only scale it.

    Arguments:
        posterior: Of the pictures, `(B, C, h, w)`.
        t: Time at which the denoiser is asked, `()`.
        source, target: What to compare, each batch 1 or B.
        surrogate: The model.
        generator: Draws the latents, then the noise.
        maps: Draws for each picture.
        progress: Called after each draw.

    Returns:
        Mean absolute difference over channels and draws, `(B, 1, h, w)`.
    """
    count = len(posterior.mean)
    many = Posterior(*(tensor.repeat_interleave(maps, 0) for tensor in (posterior.mean, posterior.std)))
    z = many.sample(generator)
    steps = t.expand(count)
    z = noised(surrogate.schedule, z, randn(z.shape, generator, z), t).unflatten(0, (count, maps))
    total = torch.zeros_like(z[:, 0, :1])
    for done in range(maps):
        answers = [surrogate.predict(z[:, done], steps, text) for text in (source, target)]
        total += (answers[1] - answers[0]).abs().mean(1, keepdim=True)
        progress("comparing", done + 1, maps)
    return total / maps
