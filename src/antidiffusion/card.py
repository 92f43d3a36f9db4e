"""The report card of a protected picture: what was done to it and what that changed, in measured numbers."""

import json
import math
import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from antidiffusion import __version__
from antidiffusion.failures import expect_finite
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.metrics.visibility import seen
from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Surrogate, randn
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.pictures.picture import Picture
from antidiffusion.recipes.semantic import divergence

MARK = "protected_by"  # a field of `antidiffusion.pictures.metadata`
SEEN = 1024  # pixels of a side that visibility is measured on
HELD_OUT_PROMPT = "a photo of a person"  # no recipe tunes on it
HELD_OUT_STEPS = 8  # stratified times of the card's losses
HELD_OUT_STREAM = 0x9E3779B9  # flips bits among the 32 that a seed has for torch: no recipe draws this noise


def card_path(picture: Path) -> Path:
    """Return where the report card of a protected picture is: beside it."""
    return picture.with_name(f"{picture.name}.json")


def read_card(picture: Path) -> dict[str, Any] | None:
    """Return the report card beside a picture that this package protected, or None if there is none of that picture."""
    try:
        card = json.loads(card_path(picture).read_bytes())
        known = card["file"] == picture.name and {"recipe", "seed", "model", "budget"} <= card.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no card, or a JSON file of something else
        return None
    return card if known and picture.is_file() else None


def marked(picture: Picture) -> Picture:
    """Return the picture with the mark by which this package knows its own, even without the card."""
    return replace(picture, metadata=picture.metadata.with_text(MARK, f"antidiffusion {__version__}"))


def is_marked(picture: Picture) -> bool:
    """Tell whether this package made the file that a picture was read from."""
    return MARK in picture.metadata.texts


def relative(path: Path, folder: Path) -> str:
    """Return a file's path as seen from a folder, or its name where there is no such path (two drives of Windows)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.name


def measured(
    original: Picture, protected: Picture, canvas: Canvas, surrogate: Surrogate | LatentSpaces, seed: int, budget: Linf
) -> dict[str, Any]:
    """Measure what a protection changed: in the picture, and in what the untouched surrogate makes of it.

    Arguments:
        original, protected: The picture before and after.
        canvas: The one that was protected.
        surrogate: The model, not tuned.
        seed: Of the measurement's noise.
        budget: Of the protection.

    Returns:
        The card's sections "fidelity", with the visibility of the middle of the picture, and "effect"; the PSNR of
        equal pictures is None.

    Raises:
        NotFiniteError: If the model's answers are no numbers.
    """
    x, y = original.tensor(), protected.tensor()
    written = Canvas(protected.pixels, canvas.size, surrogate.device)
    decibel = psnr(x, y).item()
    return {
        "fidelity": {
            "psnr": decibel if math.isfinite(decibel) else None,
            "ssim": ssim(x, y).item(),
            **seen(middle(x), middle(y)),
        },
        "effect": latent_effect(surrogate, canvas, written, original, seed, budget)
        if isinstance(surrogate, LatentSpaces)
        else effect(surrogate, canvas.clean_view, written.clean_view, seed),
    }


def middle(x: Tensor) -> Tensor:
    """Cut the middle out of a picture `(1, 1 or 3, H, W)`, at most `SEEN` pixels a side, in colour: seeing is slow."""
    height, width = x.shape[-2:]
    top, left = max(0, height - SEEN) // 2, max(0, width - SEEN) // 2
    return x[..., top : top + SEEN, left : left + SEEN].expand(-1, 3, -1, -1)


def latent_effect(
    spaces: LatentSpaces, canvas: Canvas, written: Canvas, original: Picture, seed: int, budget: Linf
) -> dict[str, Any]:
    """Measure how far latents moved in every space, and how far random signs of the same budget move them.

    Arguments:
        spaces: The latent spaces.
        canvas, written: The picture before and after, with one view size.
        original: The picture before.
        seed: Of the signs; another stream than the recipes'.
        budget: What the signs take up.

    Returns:
        By space, the mean squared distance over the clean latents' variance, of the protection and of the signs.
    """
    generator = Generator().manual_seed(seed ^ HELD_OUT_STREAM)
    signs = torch.randint(2, original.pixels.shape, generator=generator).numpy() * 2 - 1
    noisy = (original.pixels + budget.levels * signs).clip(0, 255).astype(np.uint8)
    control = Canvas(noisy, canvas.size, spaces.device)
    shifts = [spaces.shifts(canvas.clean_view, other.clean_view) for other in (written, control)]
    for values in shifts:
        expect_finite(torch.tensor(list(values.values())), "the encoders' answers to the picture")
    return {"latent_shift": shifts[0], "latent_shift_of_random_signs": shifts[1]}


@torch.no_grad()
def effect(surrogate: Surrogate, clean: Tensor, protected: Tensor, seed: int) -> dict[str, Any]:
    """Measure what the untouched surrogate makes of a protected picture, at noise and steps that no recipe used.

    Arguments:
        surrogate: The model, not tuned.
        clean, protected: Views `(1, 3, h, w)` in [0, 1].
        seed: Of the noise; another stream than the recipes'.

    Returns:
        Denoising loss before and after with a held-out prompt and their ratio; share of the attention mass that moved
        to another token of the text, or to the picture where these share one softmax (total variation, 0 to 1); and the
        share of the text's first token, which only CLIP has for a beginning, before and after.

    Raises:
        NotFiniteError: If the model's answers are no numbers.
    """
    embedding = surrogate.embed([HELD_OUT_PROMPT])
    t = surrogate.schedule.time((torch.arange(HELD_OUT_STEPS) + 0.5) / HELD_OUT_STEPS).to(surrogate.device)
    layers = surrogate.map_layers()
    losses, attention = [], []
    for x in (clean, protected):
        z = surrogate.posterior(x).mean
        generator = Generator().manual_seed(seed ^ HELD_OUT_STREAM)
        total, maps = 0.0, []
        for step in t.split(1):  # one at a time: a large model's activations need not live eightfold
            n = randn(z.shape, generator, z)
            with record_attention(surrogate, layers) as recorded:
                total += surrogate.denoising_loss(z, n, step, embedding).item() / len(t)
            maps.append(mean_map(recorded))
        losses.append(total)
        attention.append(torch.cat(maps))
    for values in (torch.tensor(losses), *attention):
        expect_finite(values, "the model's answers to the picture")
    return {
        "prompt": HELD_OUT_PROMPT,
        "denoising_loss_before": losses[0],
        "denoising_loss_after": losses[1],
        "denoising_loss_ratio": losses[1] / losses[0] if losses[0] else None,
        "attention_mass_moved": divergence(attention[1], attention[0]).mean().item(),
        "begin_token_share_before": attention[0][..., 0].mean().item(),
        "begin_token_share_after": attention[1][..., 0].mean().item(),
    }


def peak_memory(device: torch.device) -> int:
    """Return the process's peak memory in bytes: of the accelerator on CUDA, resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("antidiffusion", "torch", "diffusers", "transformers", "pillow")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
