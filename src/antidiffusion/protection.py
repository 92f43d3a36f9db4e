"""Protect pictures and say, with measured numbers, what was done to them."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Generator

from antidiffusion.card import card_path, marked, measured, peak_memory, versions
from antidiffusion.failures import expect_finite
from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.models.memory import low_memory as lean
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.files import atomic
from antidiffusion.pictures.jpeg import write_jpeg
from antidiffusion.pictures.picture import Picture, PictureError, linf
from antidiffusion.progress import Progress, silent
from antidiffusion.recipes import RECIPES, Recipe


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

    def save(self, path: str | Path, *, overwrite: bool = False, quality: int | None = None) -> dict[str, Any]:
        """Write the picture, read it back, measure it, and write the card beside it: both files or neither.

        Arguments:
            path: File to write; its suffix decides the format.
            overwrite: Replace existing files, though never the one that the original was read from.
            quality: Of a JPEG, which alone may leave the budget: by a stated bound, see `antidiffusion.pictures.jpeg`.

        Returns:
            The card, with the written file's L-infinity distance in 1/255 units.

        Raises:
            PictureError: If a file cannot be written or exists.
            RuntimeError: If the written file is outside the budget.
        """
        path = Path(path)
        if self.original.source is not None and path.exists() and path.samefile(self.original.source):
            raise PictureError(f"{path}: expected a new file, got the picture's own; choose another name")
        with atomic(path, card_path(path), overwrite=overwrite) as (part, beside):
            try:
                allowed = self._write(part, quality)
            except PictureError as error:  # which knows only the hidden folder
                raise PictureError(str(error).replace(str(part), str(path))) from error
            card = {"file": path.name} | self.card
            card["budget"] = self.card["budget"] | self._measure(part, path, allowed, quality)
            beside.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n")
        return card

    def _write(self, path: Path, quality: int | None) -> float:
        """Write the file and return how far it may be from the original, in 1/255."""
        budget = self.card["budget"]["requested"]
        if quality is not None:
            return budget + write_jpeg(marked(self.picture), path, quality)
        picture = self.picture if path.suffix.lower() == ".bmp" else marked(self.picture)  # BMP holds bare pixels
        picture.write(path)
        return budget

    def _measure(self, part: Path, path: Path, allowed: float, quality: int | None) -> dict[str, Any]:
        """Return what the card says of the written file's distance."""
        distance = linf(Picture.read(part), self.original)
        if distance > allowed and quality is not None:
            got = f"{distance}/255 at quality {quality}"
            raise PictureError(f"{path}: expected a JPEG within {allowed:g}/255, got {got}; use a higher quality")
        if distance > allowed:
            raise RuntimeError(
                f"expected {path} within {allowed:g}/255 of the original, got {distance}/255; "
                "this is a bug: please report it with the picture's format and size"
            )
        found = {"measured": distance, "measured_on": "the written file, read back"}
        if quality is None:
            return found
        return found | {"jpeg_quality": quality, "allowed_as_jpeg": allowed}


def protect(
    pictures: Sequence[Picture | str | Path],
    recipe: Recipe | str = "anti-diffusion",
    *,
    surrogate: Surrogate | LatentSpaces,
    seed: int = 0,
    together: bool = False,
    side: int | None = None,
    mask: Picture | str | Path | None = None,
    luma: bool = False,
    low_memory: bool = False,
    progress: Progress = silent,
) -> list[Protected]:
    """Protect pictures against tuning and editing with the surrogate's kind of model.

    Arguments:
        pictures: Pictures or paths of them.
        recipe: A recipe or its name in `RECIPES`.
        surrogate: The model to protect against; its weights are the same afterwards. Latent spaces suffice for some
            recipes.
        seed: Of all randomness. A picture gives the same bytes alone and among others, unless `together`.
        together: Protect all pictures, of one person, jointly: one text embedding and one tuned surrogate.
        side: Resolution in pixels at which the surrogate looks; the model's own if None.
        mask: A picture as large as the others, white where these may change; anywhere if None.
        luma: Move the channels of a pixel alike, so that colours stay.
        low_memory: Recompute instead of keeping, and have on disk what is not needed: half of the memory, more time.
        progress: Called after every step with the stage's name, the steps done and the steps in all.

    Returns:
        One `Protected` a picture, in their order.

    Raises:
        PictureError: If a picture cannot be read.
        ValueError: If the recipe is unknown, has impossible settings or no meaning for the model, or the mask does not
            fit the pictures.
    """
    if isinstance(pictures, str | Path | Picture):
        raise ValueError(f"expected a list of pictures, got {type(pictures).__name__}; put it in brackets")
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"expected a recipe of {', '.join(RECIPES)}, got {recipe!r}; see --help")
        recipe = RECIPES[recipe]
    Linf(recipe.budget)
    expect_enough(surrogate, recipe)
    read = [picture if isinstance(picture, Picture) else Picture.read(picture) for picture in pictures]
    where = Where(None if mask is None else white(mask), luma)
    groups = [read] if together else [[picture] for picture in read]
    how: dict[str, Any] = {"seed": seed, "side": side, "where": where, "low_memory": low_memory, "progress": progress}
    return [protected for group in groups for protected in _protect_group(group, recipe, surrogate, **how)]


def expect_enough(surrogate: Surrogate | LatentSpaces, recipe: Recipe) -> None:
    """Raise ValueError if a recipe asks for more than the encoders of latent spaces."""
    if isinstance(surrogate, LatentSpaces) and not getattr(recipe, "encoders_suffice", False):
        able = [name for name, known in RECIPES.items() if getattr(known, "encoders_suffice", False)]
        raise ValueError(
            f"expected a whole model for the recipe {_name(recipe)}, got latent spaces, which have encoders only; name "
            f"a model, or take a recipe of {', '.join(able)}"
        )


@dataclass(frozen=True)
class Where:
    """Where perturbations may be: a mask `(H, W)` bool, or None, and whether channels move alike."""

    mask: np.ndarray | None
    luma: bool

    @property
    def card(self) -> dict[str, Any]:
        """What the report card says of it."""
        return {"luma": self.luma, "mask_share": None if self.mask is None else round(float(self.mask.mean()), 4)}


def white(mask: Picture | str | Path) -> np.ndarray:
    """Return where a picture is white, `(H, W)` bool."""
    picture = mask if isinstance(mask, Picture) else Picture.read(mask)
    return picture.pixels.mean(-1) > 127.5


def _protect_group(
    pictures: Sequence[Picture],
    recipe: Recipe,
    surrogate: Surrogate | LatentSpaces,
    *,
    seed: int,
    side: int | None,
    where: Where,
    low_memory: bool,
    progress: Progress,
) -> list[Protected]:
    begun = time.perf_counter()
    sha256 = surrogate.sha256  # before the recipe tunes the weights
    canvases = []
    for picture in pictures:
        height, width, _ = picture.pixels.shape
        size = view_size(height, width, side or surrogate.size, surrogate.multiple)
        canvases.append(Canvas(picture.pixels, size, surrogate.device, mask=where.mask, luma=where.luma))
    with lean(surrogate) if low_memory else nullcontext():
        trace = recipe(canvases, cast(Surrogate, surrogate), Generator().manual_seed(seed), progress)
    seconds = time.perf_counter() - begun
    results = []
    for picture, canvas in zip(pictures, canvases, strict=True):
        expect_finite(canvas.delta, "the perturbation")
        protected = picture.with_pixels(canvas.pixels(Linf(recipe.budget)))
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
            "budget": {"requested": recipe.budget, "unit": "1/255, L-infinity"} | where.card,
            **measured(picture, protected, canvas, surrogate, seed, Linf(recipe.budget)),
            "cost": {"seconds": round(seconds, 2), "peak_memory_mb": round(peak_memory(surrogate.device) / 1e6)},
            "versions": versions(),
        }
        results.append(Protected(protected, picture, card, trace.losses))
    return results


def _name(recipe: Recipe) -> str:
    return next((name for name, known in RECIPES.items() if type(known) is type(recipe)), type(recipe).__name__)
