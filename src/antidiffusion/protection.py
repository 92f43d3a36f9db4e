"""Protect pictures and say, with measured numbers, what was done to them."""

import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.models.attention import mean_map, record_attention
from antidiffusion.models.base import Surrogate, randn
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.picture import Picture, PictureError, linf
from antidiffusion.progress import Progress, silent
from antidiffusion.recipes import RECIPES, Recipe

HELD_OUT_PROMPT = "a photo of a person"  # no recipe tunes on it
HELD_OUT_STEPS = 8  # stratified times of the card's losses
HELD_OUT_STREAM = 0x9E3779B9  # flips bits among the 32 that a seed has for torch: no recipe draws this noise


@dataclass(frozen=True)
class Protected:
    """A protected picture and its report card.

    Arguments:
        picture: The protected pixels with the original's metadata.
        original: The untouched picture.
        card: What was done and measured, JSON values only.
        losses: The run's losses by stage.
    """

    picture: Picture
    original: Picture
    card: dict[str, Any]
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def save(self, path: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the picture, read it back, measure it, and write the card beside it: both files or neither.

        Returns:
            The card, with the written file's L-infinity distance in 1/255 units.

        Raises:
            PictureError: If a file cannot be written or exists.
            RuntimeError: If the written file is outside the budget.
        """
        path = Path(path)
        beside = card_path(path)
        if not overwrite and beside.exists():
            raise PictureError(f"{beside}: expected a new file, got an existing one; allow overwriting it")
        self.picture.write(path, overwrite=overwrite)
        partial = beside.with_name(f".{beside.name}.part")
        try:
            card = self._measure(path)
            partial.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n")
            partial.replace(beside)
        except BaseException as error:  # the next run would take a picture without a card for finished
            partial.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                got = error.strerror or str(error)
                raise PictureError(
                    f"{beside}: expected a writable place with room, got {got!r}; choose another"
                ) from error
            raise
        return card

    def _measure(self, path: Path) -> dict[str, Any]:
        """Return the card of the written file."""
        measured = linf(Picture.read(path), self.original)
        if measured > self.card["budget"]["requested"]:
            raise RuntimeError(
                f"expected {path} within {self.card['budget']['requested']:g}/255 of the original, got {measured}/255; "
                "this is a bug: please report it with the picture's format and size"
            )
        card = {"file": path.name} | self.card
        card["budget"] = self.card["budget"] | {"measured": measured, "measured_on": "the written file, read back"}
        return card


def card_path(picture: Path) -> Path:
    """Return where the report card of a protected picture is: beside it."""
    return picture.with_name(f"{picture.name}.json")


def protect(
    pictures: Sequence[Picture | str | Path],
    recipe: Recipe | str = "anti-diffusion",
    *,
    surrogate: Surrogate,
    seed: int = 0,
    together: bool = False,
    side: int | None = None,
    progress: Progress = silent,
) -> list[Protected]:
    """Protect pictures against tuning and editing with the surrogate's kind of model.

    Arguments:
        pictures: Pictures or paths of them.
        recipe: A recipe or its name in `RECIPES`.
        surrogate: The model to protect against; its weights are the same afterwards.
        seed: Of all randomness. A picture gives the same bytes alone and among others, unless `together`.
        together: Protect all pictures, of one person, jointly: one text embedding and one tuned surrogate.
        side: Resolution in pixels at which the surrogate looks; the model's own if None.
        progress: Called after every step with the stage's name, the steps done and the steps in all.

    Returns:
        One `Protected` a picture, in their order.

    Raises:
        PictureError: If a picture cannot be read.
        ValueError: If the recipe is unknown or has impossible settings.
    """
    if isinstance(pictures, str | Path | Picture):
        raise ValueError(f"expected a list of pictures, got {type(pictures).__name__}; put it in brackets")
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"expected a recipe of {', '.join(RECIPES)}, got {recipe!r}; see --help")
        recipe = RECIPES[recipe]
    Linf(recipe.budget)
    read = [picture if isinstance(picture, Picture) else Picture.read(picture) for picture in pictures]
    groups = [read] if together else [[picture] for picture in read]
    return [
        protected for group in groups for protected in _protect_group(group, recipe, surrogate, seed, side, progress)
    ]


def _protect_group(
    pictures: Sequence[Picture],
    recipe: Recipe,
    surrogate: Surrogate,
    seed: int,
    side: int | None,
    progress: Progress,
) -> list[Protected]:
    begun = time.perf_counter()
    sha256 = surrogate.sha256  # before the recipe tunes the weights
    canvases = []
    for picture in pictures:
        height, width, _ = picture.pixels.shape
        size = view_size(height, width, side or surrogate.size, surrogate.multiple)
        canvases.append(Canvas(picture.pixels, size, surrogate.device))
    trace = recipe(canvases, surrogate, Generator().manual_seed(seed), progress)
    seconds = time.perf_counter() - begun
    results = []
    for picture, canvas in zip(pictures, canvases, strict=True):
        budget = Linf(recipe.budget)
        protected = picture.with_pixels(canvas.pixels(budget))
        written = Canvas(protected.pixels, canvas.size, surrogate.device)
        x, y = picture.tensor(), protected.tensor()
        card = {
            "recipe": {"name": _name(recipe)} | asdict(recipe),  # type: ignore[call-overload]
            "seed": seed,
            "model": {"name": surrogate.name, "sha256": sha256, "dtype": surrogate.precision},
            "picture": {
                "width": picture.pixels.shape[1],
                "height": picture.pixels.shape[0],
                "seen_by_the_model": [canvas.size[1], canvas.size[0]],
                "protected_together": len(pictures),
                "notes": list(picture.notes),
            },
            "budget": {"requested": recipe.budget, "unit": "1/255, L-infinity"},
            "fidelity": _finite({"psnr": psnr(x, y).item(), "ssim": ssim(x, y).item()}),
            "effect": _finite(effect(surrogate, canvas.clean_view, written.clean_view, seed)),
            "cost": {"seconds": round(seconds, 2), "peak_memory_mb": round(peak_memory(surrogate.device) / 1e6)},
            "versions": versions(),
        }
        results.append(Protected(protected, picture, card, trace.losses))
    return results


def _name(recipe: Recipe) -> str:
    return next((name for name, known in RECIPES.items() if type(known) is type(recipe)), type(recipe).__name__)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with None for infinities (the PSNR of equal pictures) and NaN, which JSON cannot say."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


@torch.no_grad()
def effect(surrogate: Surrogate, clean: Tensor, protected: Tensor, seed: int) -> dict[str, Any]:
    """Measure what the untouched surrogate makes of a protected picture, at noise and steps that no recipe used.

    Arguments:
        surrogate: The model, not tuned.
        clean, protected: Views `(1, 3, h, w)` in [0, 1].
        seed: Of the noise; another stream than the recipes'.

    Returns:
        Denoising loss before and after with a held-out prompt and their ratio; share of the cross-attention mass that
        moved to another token (total variation, 0 to 1), and the begin-of-text token's share before and after.
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
    return {
        "prompt": HELD_OUT_PROMPT,
        "denoising_loss_before": losses[0],
        "denoising_loss_after": losses[1],
        "denoising_loss_ratio": losses[1] / losses[0],
        "attention_mass_moved": ((attention[0] - attention[1]).abs().sum(-1).mean() / 2).item(),
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
