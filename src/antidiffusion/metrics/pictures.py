"""What every measure asks of its pictures."""

from torch import Tensor


def check_pictures(x: Tensor) -> None:
    """Raise ValueError unless x is a batch of float pictures `(B, 3, H, W)` in [0, 1]."""
    if x.ndim != 4 or x.shape[1] != 3 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"expected float pictures (B, 3, H, W), got {x.dtype} {tuple(x.shape)}; stack RGB pictures")
    low, high = x.detach().aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"expected pixels in [0, 1], got {low:.4g} to {high:.4g}; divide by 255 or clamp")
