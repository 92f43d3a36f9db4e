"""What an attacker does to wash a perturbation out of pictures before misusing them: functions with one call.

Each takes, and `PURIFIERS` holds with all settings chosen:

Arguments:
    x: Pictures `(B, 3, H, W)` float in [0, 1]; those that pass a model have sides in multiples of `surrogate.multiple`.
    surrogate: The attacker's model, which the filters of pixels leave alone.
    seed: Decides every random draw.

Returns:
    Pictures of the same shape, dtype and range.

Raises:
    ValueError: If these are no pictures in [0, 1], the model cannot take their size, or a setting is out of range.
"""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import Embedding, Surrogate, randn
from antidiffusion.models.sampling import check_size
from antidiffusion.models.schedule import VP, Schedule, noised, parts, step
from antidiffusion.pictures.canvas import filter_matrix
from antidiffusion.pictures.tensors import check_pictures, to_bytes

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION |= {"prediction_type": "epsilon"}
TRAINED = 1000  # steps of the noising, which the papers count by


class Purifier(Protocol):
    """One of these functions with its settings chosen."""

    def __call__(self, x: Tensor, surrogate: Surrogate, seed: int) -> Tensor: ...


def jpeg(x: Tensor, surrogate: Surrogate, seed: int, *, quality: int) -> Tensor:
    """Write as JPEG of quality 1 to 100 with Pillow, whose default halves the chroma, and read back."""
    check_pictures(x)
    _within("a JPEG quality", quality, 1, 100)
    reread = []
    for picture in to_bytes(x):
        file = BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        reread.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(reread)).permute(0, 3, 1, 2).to(x) / 255


def rescale(x: Tensor, surrogate: Surrogate, seed: int, *, factor: float) -> Tensor:
    """Shrink by a factor in (0, 1] and enlarge again, both with the antialiased bilinear filter."""
    check_pictures(x)
    _within("a factor", factor, 0.01, 1)
    height, width = x.shape[-2:]
    return _resize(_resize(x, max(1, round(factor * height)), max(1, round(factor * width))), height, width)


def lanczos(x: Tensor, surrogate: Surrogate, seed: int, *, factor: float) -> Tensor:
    """Shrink by a factor in (0, 1] and enlarge again with Pillow's Lanczos filter on 8 bits: no filter of ours."""
    check_pictures(x)
    _within("a factor", factor, 0.01, 1)
    height, width = x.shape[-2:]
    smaller = (max(1, round(factor * width)), max(1, round(factor * height)))
    filtered = []
    for picture in map(Image.fromarray, to_bytes(x)):
        small = picture.resize(smaller, Image.Resampling.LANCZOS)
        filtered.append(np.asarray(small.resize((width, height), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(filtered)).permute(0, 3, 1, 2).to(x) / 255


def jpeg_lanczos(x: Tensor, surrogate: Surrogate, seed: int, *, quality: int, factor: float) -> Tensor:
    """Write as JPEG, then shrink and enlarge: what a picture goes through that is shared and found again."""
    return lanczos(jpeg(x, surrogate, seed, quality=quality), surrogate, seed, factor=factor)


def crop_resize(x: Tensor, surrogate: Surrogate, seed: int, *, share: float) -> Tensor:
    """Keep a share in (0, 1] of either side, in the middle, and enlarge it to the old size."""
    check_pictures(x)
    _within("a share", share, 0.01, 1)
    height, width = x.shape[-2:]
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return _resize(x[..., top : top + rows, left : left + columns], height, width)


def blur(x: Tensor, surrogate: Surrogate, seed: int, *, sigma: float) -> Tensor:
    """Blur with a Gaussian of `sigma` pixels; borders repeat their last pixel."""
    check_pictures(x)
    _within("a sigma in pixels", sigma, 0.1, 100)
    radius = int(4 * sigma + 0.5)  # what is beyond weighs less than 1e-4
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(x).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.mT, groups=3).clamp(0, 1)


def median(x: Tensor, surrogate: Surrogate, seed: int, *, size: int) -> Tensor:
    """Take the median of each channel in a square of odd size around each pixel; borders repeat their last pixel.

    References:
        Feature Squeezing, Xu et al., 2018, arXiv 1704.01155
    """
    check_pictures(x)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"expected an odd size of at least 1 px, got {size}; try 3")
    padded = F.pad(x, [size // 2] * 4, mode="replicate")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(-1).values


def noise(x: Tensor, surrogate: Surrogate, seed: int, *, sigma: float) -> Tensor:
    """Add normal noise with a standard deviation of `sigma`, in units of the pixel range."""
    check_pictures(x)
    _within("a sigma", sigma, 0, 1)
    return (x + sigma * randn(x.shape, Generator().manual_seed(seed), x)).clamp(0, 1)


def bit_depth(x: Tensor, surrogate: Surrogate, seed: int, *, bits: int) -> Tensor:
    """Round every channel to 1 to 8 bits.

    References:
        Feature Squeezing, Xu et al., 2018, arXiv 1704.01155
    """
    check_pictures(x)
    _within("bits", bits, 1, 8)
    levels = 2**bits - 1
    return (x * levels).round() / levels


@torch.no_grad()
def vae_round_trip(x: Tensor, surrogate: Surrogate, seed: int) -> Tensor:
    """Encode and decode with the surrogate's VAE, through the mean of the posterior."""
    return surrogate.decode(_encode(x, surrogate)).to(x)


@torch.no_grad()
def diffpure(x: Tensor, surrogate: Surrogate, seed: int, *, t: int = 150, steps: int = 15, prompt: str = "") -> Tensor:
    """Noise to training step t and run the stochastic reverse process, in the surrogate's latent space.

    The paper does so on pixels, where nothing is encoded: here a perturbation that moves the encoder's answer has moved
    what is purified. t is the paper's 0.15 of 1000 for ImageNet; `steps`, a divisor of t, evaluate the UNet, with
    `prompt` or without condition if that is empty.

    References:
        Diffusion Models for Adversarial Purification, Nie et al., 2022, arXiv 2205.07460
    """
    z, generator = _encode(x, surrogate), Generator().manual_seed(seed)
    condition = surrogate.embed([prompt]) if prompt else surrogate.unconditional()
    return surrogate.decode(_renoise(z, t, steps, condition, surrogate, generator)).to(x)


@torch.no_grad()
def denoise(x: Tensor, surrogate: Surrogate, seed: int, *, strength: float) -> Tensor:
    """Noise a little and denoise without a prompt: image-to-image of the attacker's model, at a low strength."""
    check_pictures(x)
    return SDEdit(strength=strength, guidance=1.0)(x.float(), Prompts(""), surrogate, seed).to(x)


@torch.no_grad()
def noisy_upscale(
    x: Tensor, surrogate: Surrogate, seed: int, *, sigma: float = 0.05, factor: int = 2, strength: float = 0.2
) -> Tensor:
    """Drown a perturbation in noise, have a model make a larger, clean picture of it, and shrink that.

    The paper takes Stable Diffusion's upscaler, a model of its own; here the attacker's model denoises the enlarged
    picture, which every attacker has.

    References:
        Adversarial Perturbations Cannot Reliably Protect Artists From Generative AI, Hoenig et al., 2024,
        arXiv 2406.12027
    """
    check_pictures(x)
    check_size(x.shape[-2], x.shape[-1], surrogate)
    if factor < 1:
        raise ValueError(f"expected a factor of at least 1, got {factor}; try 2")
    height, width = x.shape[-2:]
    larger = _resize(noise(x, surrogate, seed, sigma=sigma), factor * height, factor * width)
    return _resize(denoise(larger, surrogate, seed + 1, strength=strength), height, width)


@torch.no_grad()
def gridpure(
    x: Tensor, surrogate: Surrogate, seed: int, *, t: int = 10, steps: int = 1, rounds: int = 10, gamma: float = 0.3
) -> Tensor:
    """Purify overlapping patches with little noise, mix the result with the picture, and repeat.

    After the released code, whose patches of 256 px match its model of pixels, and which adds one of the four corners.
    The surrogate works on latents, so the grid lies on these, with patches half as wide as the model's square, and the
    VAE is passed once. Rounds on latents drift more: the code's 20 with a share 0.1 of each round's own input leave no
    face on the embedded model. So a share `gamma` of the picture's latents is mixed in, and a round takes one `step`.

    References:
        Can Protective Perturbation Safeguard Personal Data from Being Exploited by Stable Diffusion?, Zhao et al.,
        2023, arXiv 2312.00084
    """
    _within("rounds", rounds, 1, 1000)
    _within("gamma", gamma, 0, 1)
    original, condition, generator = _encode(x, surrogate), surrogate.unconditional(), Generator().manual_seed(seed)
    z, (size, origins) = original, _grid(original, surrogate)
    for _ in range(rounds):
        patches = torch.cat([_cut(z, size, origin) for origin in origins])
        pure = _renoise(patches, t, steps, condition, surrogate, generator).chunk(len(origins))
        z = (1 - gamma) * _merge(pure, origins, z) + gamma * original
    return surrogate.decode(z).to(x)


PURIFIERS: dict[str, Purifier] = {
    "jpeg-95": partial(jpeg, quality=95),
    "jpeg-75": partial(jpeg, quality=75),
    "jpeg-50": partial(jpeg, quality=50),
    "rescale": partial(rescale, factor=0.5),
    "lanczos": partial(lanczos, factor=0.5),
    "jpeg-75-half": partial(jpeg_lanczos, quality=75, factor=0.5),
    "crop-resize": partial(crop_resize, share=0.9),
    "blur": partial(blur, sigma=1),
    "median": partial(median, size=3),
    "noise": partial(noise, sigma=8 / 255),  # as large as the usual budget
    "bit-depth": partial(bit_depth, bits=4),  # steps of 17/255, twice the usual budget
    "vae": vae_round_trip,
    "diffpure": diffpure,
    "gridpure": gridpure,
    "denoise-05": partial(denoise, strength=0.05),
    "denoise-15": partial(denoise, strength=0.15),
    "noisy-upscale": noisy_upscale,
}


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (filter_matrix(a, b).to(x) for a, b in zip(x.shape[-2:], (height, width), strict=True))
    return (rows @ x @ columns.T).clamp(0, 1)


def _encode(x: Tensor, surrogate: Surrogate) -> Tensor:
    check_pictures(x)
    check_size(x.shape[-2], x.shape[-1], surrogate)
    return surrogate.posterior(x).mean


def _renoise(z: Tensor, t: int, steps: int, condition: Embedding, surrogate: Surrogate, generator: Generator) -> Tensor:
    """Noise latents to step t and go back in equal steps, with DDPM's noise in all but the last."""
    if not 1 <= steps <= t < TRAINED or t % steps:
        raise ValueError(f"expected t below {TRAINED} that steps divide, got t {t}, steps {steps}; try 150 and 15")
    schedule = surrogate.schedule
    times = _times(torch.arange(t, -1, -(t // steps)), schedule).to(z.device)
    z = noised(schedule, z, randn(z.shape, generator, z), times[0])
    for now, after in pairwise(times):
        output, fresh = surrogate.predict(z, now.expand(len(z)), condition), randn(z.shape, generator, z)
        clean, z = parts(schedule, z, output, now)[0], step(schedule, z, output, now, after, eta=1.0, fresh=fresh)
    return clean


def _times(steps: Tensor, schedule: Schedule) -> Tensor:
    """Return the times `(S,)` of training steps `(S,)` int64: on the straight path, where there is as much noise beside
    the signal as at these steps of Stable Diffusion's training, since a share of the noising means more there.
    """
    if isinstance(schedule, VP):
        return steps
    signal, noise = VP(STABLE_DIFFUSION)(steps)
    return noise / (signal + noise)


def _grid(z: Tensor, surrogate: Surrogate) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the patches' size and their top left corners on latents z; the last one wraps around."""
    side = surrogate.multiple // surrogate.factor * max(1, round(surrogate.size / 2 / surrogate.multiple))
    full, size = z.shape[-2:], (min(side, z.shape[-2]), min(side, z.shape[-1]))
    tops, lefts = ([*range(0, a - b, b // 2), a - b] for a, b in zip(full, size, strict=True))
    origins = [(top, left) for top in tops for left in lefts]
    if len(origins) > 1:
        top, left = (a - b // 2 if a > b else 0 for a, b in zip(full, size, strict=True))
        origins.append((top, left))
    return size, origins


def _cut(z: Tensor, size: tuple[int, int], origin: tuple[int, int]) -> Tensor:
    return z.roll((-origin[0], -origin[1]), (2, 3))[..., : size[0], : size[1]]


def _merge(patches: Sequence[Tensor], origins: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Lay the patches back and average where they overlap."""
    total, cover = torch.zeros_like(like), torch.zeros_like(like)
    for patch, origin in zip(patches, origins, strict=True):
        beyond = (0, like.shape[-1] - patch.shape[-1], 0, like.shape[-2] - patch.shape[-2])
        total += F.pad(patch, beyond).roll(origin, (2, 3))
        cover += F.pad(torch.ones_like(patch), beyond).roll(origin, (2, 3))
    return total / cover


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"expected {name} of {low} to {high}, got {value}; choose one in between")
