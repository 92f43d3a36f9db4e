"""What happens to pictures on their way to an encoder: noise, random signs, JPEG, blur, another size; and attacks.

Everything is drawn on the device and has constant shapes, so that a step with it can be captured.

References:
    Information technology: digital compression and coding of continuous-tone still images, ITU-T T.81, 1992, annex K
    Towards Deep Learning Models Resistant to Adversarial Attacks, Madry et al., 2017, arXiv 1706.06083
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99"""
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
QUALITY = (30.0, 95.0)
SIGMA = 1.6  # pixels, of the strongest blur
SHARES = (0.5, 0.75)  # sizes that pictures are brought to and back from


def tables(text: str) -> Tensor:
    values = [float(value) for value in text.split()]
    return torch.tensor(values + [99.0] * (64 - len(values))).view(8, 8)


class Degrade(nn.Module):
    """Change each eighth of a batch in another way, the first not at all.

    Arguments:
        radius: Smallest and largest radius of noise in [-1, 1] pixels: its standard deviation or, of signs, its size.
    """

    def __init__(self, radius: tuple[float, float]) -> None:
        super().__init__()
        self.low, self.high = radius
        n, k = torch.arange(8.0), torch.arange(8.0)[:, None]
        dct = torch.cos(math.pi * (2 * n + 1) * k / 16) * torch.where(k == 0, math.sqrt(1 / 8), 0.5)
        taps = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / SIGMA) ** 2)
        self.register_buffer("dct", dct)
        self.register_buffer("luma", tables(LUMA))
        self.register_buffer("chroma", tables(CHROMA))
        self.register_buffer("ycbcr", torch.tensor(YCBCR))
        self.register_buffer("rgb", torch.linalg.inv(torch.tensor(YCBCR)))
        self.register_buffer("taps", taps / taps.sum())

    def uniform(self, x: Tensor, low: float, high: float, generator: Generator) -> Tensor:
        """Draw one number in [low, high) for each picture, `(B, 1, 1, 1)`."""
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)

    def grain(self, x: Tensor, generator: Generator) -> Tensor:
        return x + self.uniform(x, self.low, self.high, generator) * normal(x, generator)

    def signs(self, x: Tensor, generator: Generator) -> Tensor:
        return x + self.uniform(x, self.low, self.high, generator) * normal(x, generator).sign()

    def jpeg(self, x: Tensor, generator: Generator) -> Tensor:
        """Quantise as JPEG does at a quality in `QUALITY`, with chroma at half size; all but the lossless part."""
        quality = self.uniform(x, *QUALITY, generator)[:, 0]
        scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
        y = torch.einsum("rc,bchw->brhw", self.ycbcr, x.float()) * 127.5
        luma = self.quantised(y[:, :1], self.luma * scale)
        chroma = self.quantised(F.avg_pool2d(y[:, 1:], 2), self.chroma * scale)
        chroma = F.interpolate(chroma, x.shape[-2:], mode="bilinear")
        return torch.einsum("rc,bchw->brhw", self.rgb, torch.cat([luma, chroma], 1)) / 127.5

    def quantised(self, y: Tensor, steps: Tensor) -> Tensor:
        """Round the cosine coefficients of planes `y: (B, C, H, W)`, in blocks, to multiples of `steps: (B, 8, 8)`."""
        b, c, h, w = y.shape
        blocks = y.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
        steps = steps.clamp(1, 255)[:, None, None, None]
        blocks = self.dct.T @ ((self.dct @ blocks @ self.dct.T / steps).round() * steps) @ self.dct
        return blocks.permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)

    def blur(self, x: Tensor, generator: Generator) -> Tensor:
        across = self.taps.view(1, 1, 1, -1).expand(3, 1, 1, -1)
        soft = F.conv2d(F.pad(x, (4, 4, 0, 0), "replicate"), across, groups=3)
        soft = F.conv2d(F.pad(soft, (0, 0, 4, 4), "replicate"), across.transpose(2, 3), groups=3)
        return torch.lerp(x, soft, self.uniform(x, 0, 1, generator))

    def resize(self, x: Tensor, generator: Generator) -> Tensor:
        parts = []
        for part, share in zip(x.tensor_split(len(SHARES)), SHARES, strict=True):
            size = [round(share * side) for side in x.shape[-2:]]
            small = F.interpolate(part, size, mode="bilinear", antialias=True)
            parts.append(F.interpolate(small, x.shape[-2:], mode="bilinear"))
        return torch.cat(parts)

    def grainy_jpeg(self, x: Tensor, generator: Generator) -> Tensor:
        return self.jpeg(self.grain(x, generator).clamp(-1, 1), generator)

    def soft_grain(self, x: Tensor, generator: Generator) -> Tensor:
        return self.grain(self.blur(x, generator), generator)

    @torch.no_grad()
    def forward(self, x: Tensor, generator: Generator) -> Tensor:
        """Return pictures `x: (B, 3, H, W)` in [-1, 1], changed. Mix kinds before: the order decides what happens."""
        ways = (self.grain, self.signs, self.jpeg, self.blur, self.resize, self.grainy_jpeg, self.soft_grain)
        # Every eighth picture: a batch that is sorted by kind has every change of every kind.
        parts = [x[i :: len(ways) + 1] for i in range(len(ways) + 1)]
        changed = [parts[0], *[way(part, generator) for way, part in zip(ways, parts[1:], strict=True) if len(part)]]
        return torch.cat(changed).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def normal(x: Tensor, generator: Generator) -> Tensor:
    """Draw noise like `x`."""
    return torch.randn(x.shape, generator=generator, device=x.device)


def attack(
    gain: Callable[[Tensor], Tensor], x: Tensor, radius: Tensor | float, steps: int, generator: Generator
) -> Tensor:
    """Climb `gain` by sign steps from random signs, inside an L-infinity ball.

    Arguments:
        gain: Function of pictures that returns a scalar.
        x: Pictures `(B, 3, H, W)` in [-1, 1].
        radius: In these units, for all or for each, `(B, 1, 1, 1)`.
        steps: Steps, each of 2.5 / steps of the radius and at most half of it; without any, the start is returned.
        generator: Draws the start.

    Returns:
        Attacked pictures `(B, 3, H, W)` in [-1, 1].
    """
    size = radius * min(0.5, 2.5 / max(1, steps))
    y = (x + radius * normal(x, generator).sign() * (0.5 if steps else 1)).clamp(-1, 1)
    for _ in range(steps):
        y = y.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(gain(y), y)
        y = y.detach() + size * gradient.sign()
        y = torch.minimum(torch.maximum(y, x - radius), x + radius).clamp(-1, 1)
    return y.detach()
