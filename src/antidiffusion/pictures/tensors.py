"""What every function asks of pictures in a tensor, and the one way from there to 8 bits."""

from collections.abc import Collection

import torch
from torch import Tensor

from antidiffusion.pictures.picture import Bytes, Picture


def check_pictures(x: Tensor, channels: Collection[int] = (3,)) -> None:
    """Raise ValueError unless x is `(B, C, H, W)` float32 or float64 in [0, 1], B >= 1 and C one of `channels`."""
    if x.ndim != 4 or x.shape[1] not in channels or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        wanted = " or ".join(map(str, channels))
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"expected float32 pictures (B, {wanted}, H, W), got {got}; stack pictures of one size")
    check_range(x, "pixels")


def check_range(x: Tensor, name: str) -> None:
    """Raise ValueError unless every value is in [0, 1]."""
    low, high = x.detach().aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"expected {name} in [0, 1], got {low:.4g} to {high:.4g}; divide by 255 or clamp")


def to_bytes(x: Tensor) -> Bytes:
    """Round pictures `(B, C, H, W)` of any float type in [0, 1] to `(B, H, W, C)` uint8.

    Raises:
        ValueError: If these are no pictures of one or three channels in [0, 1].
    """
    x = x.detach().float()
    check_pictures(x, (1, 3))
    levels = (x * 255).round().to("cpu", torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def to_picture(x: Tensor) -> Picture:
    """Return pictures `(B, C, H, W)` in [0, 1] as one, side by side.

    Raises:
        ValueError: If these are no pictures of one or three channels in [0, 1].
    """
    return Picture(to_bytes(torch.cat(list(x), -1)[None] if len(x) > 1 else x)[0])
