"""Where a model runs and in which precision: the policy behind "auto"."""

from typing import Any

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed")
"""Of the weights; "mixed" is float32 weights that compute in bfloat16."""


def device_of(name: str | torch.device) -> torch.device:
    """Return a device of this machine; "auto" is the fastest it has.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device of this machine, got {str(name)!r} ({reason}); use cpu") from error
    return torch.device(name)


def dtypes_of(
    name: str | torch.dtype, device: torch.device, *, small: bool, full_tuning: bool
) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the dtype of the weights and the one they compute in if it is another.

    Arguments:
        name: One of `DTYPES` or a dtype.
        device: Where the model runs.
        small: Whether the model has so few weights that half precision saves nothing.
        full_tuning: Whether the model's own weights will be tuned, for which half precision is too coarse.

    Raises:
        ValueError: If there is no such dtype.
    """
    if isinstance(name, torch.dtype):
        return name, None
    if name not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {name!r}; leave it at auto")
    if name == "auto":
        half = not small and computes_in_bfloat16(device)
        name = ("mixed" if full_tuning else "bfloat16") if half else "float32"
    if name == "mixed":
        return torch.float32, torch.bfloat16
    return getattr(torch, name), None


def computes_in_bfloat16(device: torch.device) -> bool:
    """Say whether the hardware computes in bfloat16, rather than emulating it.

    float16 is never a choice of ours: the mean over a latent divides gradients into its subnormal numbers.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
