"""The noise predicted at an edit's first step, and random masks: DiffusionGuard's objective.

References:
    DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing, Choi et al., 2025,
    arXiv 2410.05694
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.sampling import way_down
from antidiffusion.models.schedule import noised
from antidiffusion.objectives import Objective
from antidiffusion.objectives.denoising import predicted_noise

GREY = 0.5  # zero in the model's range [-1, 1]
ITERATIONS = 15  # of the contour, at most: the released code's
SMOOTHNESS = 0.1  # of the mask's radius: the released code's


@dataclass
class FirstStepNoise:
    """Norm of the noise that the UNet predicts at the first denoising step of an edit.

    Arguments:
        surrogate: The attacker's model.
        embedding: Text embedding of the edit's prompt.
        inference_steps: Steps of the edit: the first of them is at about `1 - 1 / inference_steps` of the noising.
    """

    surrogate: Surrogate
    embedding: Embedding
    inference_steps: int = 4

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        z = self.surrogate.encode(x, generator)
        t = way_down(self.surrogate, x.shape[-2], x.shape[-1], self.inference_steps)[:1].expand(len(z))
        z_t = noised(self.surrogate.schedule, z, randn(z.shape, generator, z), t)
        return predicted_noise(self.surrogate, z_t, t, self.embedding).flatten(1).norm(dim=1)


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
