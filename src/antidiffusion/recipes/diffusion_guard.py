"""DiffusionGuard: the noise predicted at an edit's first step, under random masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.sampling import way_down
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Objective
from antidiffusion.recipes.base import Trace, climb
from antidiffusion.recipes.objectives import predicted_noise

GREY = 0.5  # zero in the model's range [-1, 1]
ITERATIONS = 15  # of the contour, at most: the released code's
SMOOTHNESS = 0.1  # of the mask's radius: the released code's


@dataclass
class FirstStepNoise:
    """Norm of the noise that the model predicts at the first denoising step of an edit.

    Arguments:
        surrogate: The attacker's model.
        embedding: Text embedding of the edit's prompt.
        inference_steps: Steps of the edit: the first of them is at about `1 - 1 / inference_steps` of the noising.

    Raises:
        ValueError: If that step sees noise alone.
    """

    surrogate: Surrogate
    embedding: Embedding
    inference_steps: int = 4

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        first = way_down(self.surrogate, x.shape[-2], x.shape[-1], self.inference_steps)[0]
        if self.surrogate.schedule(first)[0] == 0:
            raise ValueError(
                "expected a model whose first step sees something of the picture, got one that starts from noise "
                f"alone ({self.surrogate.name}); take another recipe"
            )
        z = self.surrogate.encode(x, generator)
        n = randn(z.shape, generator, z)
        noise = predicted_noise(self.surrogate, z, n, first.expand(len(z)), self.embedding)
        return noise.flatten(1).norm(dim=1)


@dataclass
class RandomlyMasked:
    """An objective of the picture inside a mask that is another at every call; grey outside.

    Arguments:
        objective: What to maximise.
        mask: `(1, 1, h, w)` float32, 1 where an attacker would keep the picture, 0 where he would redraw it.
    """

    objective: Objective
    mask: Tensor

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return self.objective(GREY + (x - GREY) * shrink(self.mask, generator), generator)


def shrink(mask: Tensor, generator: Generator) -> Tensor:
    """Move a mask's contour inwards by a random distance that varies smoothly along it.

    The released code shifts the points of OpenCV's contour and puts back those that left the mask; here the blurred
    mask is cut, again and again, at a random level between 1/2 and 3/4, which needs no contour.

    Arguments:
        mask: `(1, 1, h, w)` float32 of zeros and ones.
        generator: Source of the distances.

    Returns:
        A mask inside the given one, not empty unless it is.
    """
    side = 2 * max(1, round(SMOOTHNESS * math.sqrt(mask.sum().item() / math.pi))) + 1
    count = int(torch.randint(1, ITERATIONS + 1, (), generator=generator, device=generator.device))
    height, width = mask.shape[-2:]
    for _ in range(count):
        coarse = torch.rand((1, 1, 2 + height // side, 2 + width // side), generator=generator, device=generator.device)
        level = 0.5 + 0.25 * F.interpolate(coarse.to(mask), size=(height, width), mode="bilinear", align_corners=True)
        inside = F.avg_pool2d(mask, side, stride=1, padding=side // 2, count_include_pad=False) >= level
        smaller = mask * inside
        if not smaller.any():
            break
        mask = smaller
    return mask


@dataclass(frozen=True)
class DiffusionGuard:
    """Raise the norm of the noise predicted at the first step of an edit, under random masks where a mask is given.

    The paper attacks an inpainting model, whose first step sees pure noise beside the latent of the masked picture. Our
    surrogates have no such input: here the first step sees the noised latent of the picture, as in SDEdit. The mask is
    the canvases', white on what an attacker would keep, usually the face; without one there are no random masks.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture; the paper's is 16/255 of
            the range [-1, 1], which is the same.
        steps: Sign steps. The released code takes 800; 400 fill the ball and keep a run on a CPU below a minute.
        step_size: In 1/255 units; the released code's 1/255 of the range [-1, 1].
        inference_steps: Of the edit, which decide where its first step is; the released code's.
        prompt: Of the edit.

    References:
        DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing, Choi et al., 2025,
        arXiv 2410.05694
    """

    budget: float = 8
    steps: int = 400
    step_size: float = 0.5
    inference_steps: int = 4
    prompt: str = ""

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: Generator, progress: Progress
    ) -> Trace:
        norm = FirstStepNoise(surrogate, surrogate.embed([self.prompt]), self.inference_steps)
        mask = canvases[0].mask  # one for all

        def objective(clean: Tensor) -> Objective:
            if mask is None:
                return norm
            return RandomlyMasked(norm, F.interpolate(mask, size=clean.shape[-2:], mode="nearest-exact"))

        return climb(self, objective, canvases, generator, progress)
