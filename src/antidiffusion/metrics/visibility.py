"""How well a person can see the difference between two pictures: S-CIELAB.

Each picture is filtered as the eye filters patterns, finer ones more, and the results are compared as colours. So a
grain and blotches of one L-infinity distance, which PSNR and SSIM rank the wrong way round, are told apart. Thresholds
are of attentive viewers with both pictures side by side: what lies above them is not always noticed.

References:
    A Spatial Extension of CIELAB for Digital Color-Image Reproduction, Zhang and Wandell, 1997, SID Journal 5(1)
    Evaluation of Uniform Color Spaces Developed after the Adoption of CIELAB and CIELUV, Mahy et al., 1994
    IEC 61966-2-1 (sRGB)
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from antidiffusion.pictures.tensors import check_pictures

PIXELS_PER_DEGREE = 40.0
"""Of a screen of 96 dots an inch at 60 cm, one pixel of the picture on one of the screen: 39.6."""
JUST_NOTICEABLE = 2.3
"""A colour difference in CIELAB units that is just noticed (Mahy et al. 1994)."""
STRIP = 1 << 22  # pixels that are filtered at once: about 300 MB of temporaries
HALO = 4.0  # degrees that borders are mirrored and strips overlap: about the spread of the widest filter
BINS, LARGEST = 20_000, 200.0  # of the histogram that percentiles are read from: steps of 0.01

RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
XYZ_TO_OPPONENT = ((0.279, 0.720, -0.107), (-0.449, 0.290, -0.077), (0.086, -0.590, 0.501))
FILTERS = (
    ((0.921, 0.0283), (0.105, 0.133), (-0.108, 4.336)),  # luminance
    ((0.531, 0.0392), (0.330, 0.494)),  # red and green
    ((0.488, 0.0536), (0.371, 0.386)),  # blue and yellow
)
"""Of each opponent channel the weights and spreads, in degrees of visual angle, of exp(-r^2 / spread^2)."""


@torch.no_grad()
def visibility(x: Tensor, y: Tensor, *, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Tensor:
    """Return how far two pictures are apart to the eye.

    Arguments:
        x, y: Pictures `(B, 3, H, W)` float in [0, 1], sRGB, both sides at least 2.
        pixels_per_degree: Of visual angle; more is a viewer farther away.

    Returns:
        `(B, 3)`: mean, 95th and 99th percentile over the pixels of the difference in CIELAB units; above
        `JUST_NOTICEABLE` a person can see it. Percentiles are exact to 0.01.

    Raises:
        ValueError: If these are no pictures in [0, 1] of one shape, or the viewer is nowhere.
    """
    for z in (x, y):
        check_pictures(z)
    if x.shape != y.shape or min(x.shape[-2:]) < 2:
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"expected pictures of one shape, sides of at least 2 px, got {got}; match them")
    if not 1 <= pixels_per_degree <= 1000:
        raise ValueError(f"expected 1 to 1000 pixels per degree, got {pixels_per_degree}; a screen at 60 cm has 40")
    return torch.stack([_summary(*pair, pixels_per_degree) for pair in zip(x.split(1), y.split(1), strict=True)])


def seen(x: Tensor, y: Tensor) -> dict[str, float | bool]:
    """Return what a report says of one picture `(1, 3, H, W)` and its original: three figures, and the verdict.

    It is said to be visible if a twentieth of its pixels differ by more than `JUST_NOTICEABLE`.
    """
    mean, most, nearly_all = visibility(x, y)[0].tolist()
    return {"delta_e": mean, "delta_e_95": most, "delta_e_99": nearly_all, "visible": most > JUST_NOTICEABLE}


def _summary(x: Tensor, y: Tensor, pixels_per_degree: float) -> Tensor:
    """Return mean and percentiles of one pair, in strips that overlap as far as the eye compares."""
    height, width = x.shape[-2:]
    rows, halo = max(1, STRIP // width), round(HALO * pixels_per_degree)
    counts, total = torch.zeros(BINS, dtype=torch.float64), 0.0
    for top in range(0, height, rows):
        low, high = max(0, top - halo), min(height, top + rows + halo)
        apart = difference(x[..., low:high, :], y[..., low:high, :], pixels_per_degree)
        apart = apart[..., top - low : top - low + rows, :]
        total += apart.double().sum().item()
        counts += torch.histc(apart.float().cpu().clamp(max=LARGEST), BINS, 0, LARGEST).double()
    below = counts.cumsum(0) / counts.sum()
    percentiles = [(torch.searchsorted(below, share).item() + 0.5) * LARGEST / BINS for share in (0.95, 0.99)]
    if not total:
        percentiles = [0.0, 0.0]
    return torch.tensor([total / (height * width), *percentiles])


def difference(x: Tensor, y: Tensor, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Tensor:
    """Return the map `(B, H, W)` of differences in CIELAB units of pictures `(B, 3, H, W)` in [0, 1]."""
    a, b = (_lab(_as_the_eye(z, pixels_per_degree)) for z in (x, y))
    return (a - b).square().sum(1).sqrt()


def _as_the_eye(x: Tensor, pixels_per_degree: float) -> Tensor:
    """Return CIE XYZ of a picture, white at Y = 1, blurred channel by channel as the eye does."""
    height, width = x.shape[-2:]
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_opponent = x.new_tensor(XYZ_TO_OPPONENT)
    opponent = _mixed(linear, to_opponent @ x.new_tensor(RGB_TO_XYZ))
    edge = [min(side - 1, round(HALO * pixels_per_degree)) for side in (height, width)]
    padded = F.pad(opponent, (edge[1], edge[1], edge[0], edge[0]), mode="reflect")
    size = (padded.shape[-2], padded.shape[-1])
    answers = _answers(size, pixels_per_degree, x.dtype)
    channels = zip(padded.unbind(1), answers, strict=True)
    blurred = [torch.fft.irfft2(torch.fft.rfft2(channel) * answer.to(x.device), s=size) for channel, answer in channels]
    inner = torch.stack(blurred, 1)[..., edge[0] : edge[0] + height, edge[1] : edge[1] + width]
    return _mixed(inner, torch.linalg.inv(to_opponent))


@lru_cache(maxsize=1)
def _answers(size: tuple[int, int], pixels_per_degree: float, dtype: torch.dtype) -> list[Tensor]:
    """Return what each channel's filter does to the frequencies of `torch.fft.rfft2`, 1 to what is flat."""
    down, across = torch.fft.fftfreq(size[0], dtype=dtype), torch.fft.rfftfreq(size[1], dtype=dtype)
    squared = (down[:, None] ** 2 + across**2) * pixels_per_degree**2  # cycles per degree
    found = []
    for gaussians in FILTERS:
        total = sum(weight for weight, _ in gaussians)
        parts = [weight / total * torch.exp(-((torch.pi * spread) ** 2) * squared) for weight, spread in gaussians]
        found.append(torch.stack(parts).sum(0))
    return found


def _lab(xyz: Tensor) -> Tensor:
    """Return CIELAB of XYZ `(B, 3, H, W)` under sRGB's white."""
    white = xyz.new_tensor(RGB_TO_XYZ).sum(1)[:, None, None]
    t = xyz / white
    limit = 6 / 29
    root = torch.where(t > limit**3, t.clamp(min=limit**3) ** (1 / 3), t / (3 * limit**2) + 4 / 29)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, x)
