"""DiffusionGuard."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.objectives import Objective
from antidiffusion.objectives.first_step import FirstStepNoise, RandomlyMasked
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.pictures.picture import Picture
from antidiffusion.progress import Progress
from antidiffusion.recipes.base import Trace, climb


@dataclass(frozen=True)
class DiffusionGuard:
    """Raise the norm of the noise predicted at the first step of an edit, under random masks where a mask is given.

    The paper attacks an inpainting model, whose first step sees pure noise beside the latent of the masked picture. Our
    surrogates have no such input: here the first step sees the noised latent of the picture, as in SDEdit.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16/255 of
            the range [-1, 1], which is the same.
        steps: Sign steps. The released code takes 800; 400 fill the ball and keep a run on a CPU below a minute.
        step_size: In 1/255 units; the released code's 1/255 of the range [-1, 1].
        inference_steps: Of the edit, which decide where its first step is; the released code's.
        prompt: Of the edit.
        mask: File of a picture as large as the protected ones, white on what an attacker would keep, usually the face;
            the perturbation stays inside. None turns the masks off.

    References:
        DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing, Choi et al., 2025,
        arXiv 2410.05694
    """

    budget: float = 8
    steps: int = 400
    step_size: float = 0.5
    inference_steps: int = 4
    prompt: str = ""
    mask: str | None = None

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        norm = FirstStepNoise(surrogate, surrogate.embed([self.prompt]), self.inference_steps)
        mask = None if self.mask is None else read_mask(self.mask, canvases)

        def objective(clean: Tensor) -> Objective:
            if mask is None:
                return norm
            size = clean.shape[-2:]
            return RandomlyMasked(norm, F.interpolate(mask, size=size, mode="nearest-exact").to(clean.device))

        return climb(self, objective, canvases, generator, progress)


def read_mask(path: str | Path, canvases: Sequence[Canvas]) -> Tensor:
    """Read a mask `(1, 1, H, W)` of zeros and ones.

    Raises:
        PictureError: If the file cannot be read.
        ValueError: If a canvas has another size, or nothing is white.
    """
    pixels = torch.from_numpy(Picture.read(path).pixels.copy()).float()
    mask = (pixels.mean(-1) > 127.5).float()[None, None]
    for canvas in canvases:
        if canvas.clean.shape[-2:] != mask.shape[-2:]:
            (height, width), (got_height, got_width) = canvas.clean.shape[-2:], mask.shape[-2:]
            raise ValueError(
                f"expected a mask of {width} x {height} as the picture, got {got_width} x {got_height}; resize {path}"
            )
    if not mask.any():
        raise ValueError(f"expected a mask with white on what to keep, got none in {path}; paint the face white")
    return mask
