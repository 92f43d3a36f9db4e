"""The main job on the embedded model, shown on one page: protect, edit, compare."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from antidiffusion.attacks.base import Attack, Prompts
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.files import atomic
from antidiffusion.pictures.picture import Bytes, Picture
from antidiffusion.pictures.tensors import to_picture
from antidiffusion.progress import Progress
from antidiffusion.protection import protect
from antidiffusion.recipes import RandomSign, Recipe

PROMPTS = Prompts("a portrait of a person, wearing sunglasses and a red shirt", source="a portrait of a person")
ATTACKS: dict[str, Attack] = {"SDEdit": SDEdit(strength=0.5, guidance=3.0), "MasaCtrl": MasaCtrl(guidance=5.0)}
MAGNIFY = 10
VERSIONS = ("clean", "random noise", "protected")


@dataclass(frozen=True)
class Shown:
    """One version of a portrait on the page: the picture, and by attack its edit and how near the clean one is."""

    name: str
    picture: str
    perturbation: str
    edits: dict[str, str]
    linf: int
    psnr: float
    edit_ssim: dict[str, float]


def run_demo(output: Path, surrogate: Surrogate, recipe: Recipe, *, seed: int, progress: Progress) -> Path:
    """Protect the bundled portraits, edit every version twice with one prompt and the same noise, and write the page.

    Arguments:
        output: Folder for `index.html`, the pictures and the cards; files in it are replaced.
        surrogate: The model that protects and edits.
        recipe: The protection.
        seed: Of all randomness.
        progress: As in `protect`.

    Returns:
        Path of the page.
    """
    output.mkdir(parents=True, exist_ok=True)
    portraits = sorted(resources.files("antidiffusion").joinpath("mini", "portraits").iterdir(), key=str)
    people = []
    for number, path in enumerate(portraits, 1):

        def named(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"portrait {number} of {len(portraits)}: {stage}", done, total)

        original = Picture.read(str(path))
        (noise,) = protect([original], RandomSign(recipe.budget), surrogate=surrogate, seed=seed)
        (protected,) = protect([original], recipe, surrogate=surrogate, seed=seed, progress=named)
        versions = dict(zip(VERSIONS, (original, noise.picture, protected.picture), strict=True))
        stem = Path(str(path)).stem
        edits: dict[str, dict[str, Picture]] = {method: {} for method in ATTACKS}
        for method, attack in ATTACKS.items():
            for name, picture in versions.items():
                edit = to_picture(attack(picture.tensor(), PROMPTS, surrogate, seed))
                edit.write(output / f"{stem}-{name.replace(' ', '-')}-{method.lower()}.png", overwrite=True)
                edits[method][name] = edit
                named(f"{method}, {name}", 1, 1)
        card = protected.save(output / f"{stem}-protected.png", overwrite=True)
        shown = [_shown(name, versions[name], original, edits) for name in VERSIONS]
        people.append({"shown": shown, "curves": _curves(protected.losses), "card": json.dumps(card, indent=2)})
    environment = Environment(
        loader=PackageLoader("antidiffusion", "templates"), autoescape=True, undefined=StrictUndefined
    )
    settings = {"prompt": PROMPTS.target, "attacks": list(ATTACKS), "magnify": MAGNIFY, "budget": f"{recipe.budget:g}"}
    page = output / "index.html"
    with atomic(page, overwrite=True) as (part,):
        part.write_text(environment.get_template("demo.html").render(people=people, **settings), encoding="utf-8")
    return page


def _shown(name: str, picture: Picture, original: Picture, edits: Mapping[str, Mapping[str, Picture]]) -> Shown:
    difference = picture.pixels.astype(np.int16) - original.pixels
    magnified = np.clip(128 + MAGNIFY * difference, 0, 255).astype(np.uint8)
    return Shown(
        name=name,
        picture=_embed(picture.pixels),
        perturbation=_embed(magnified),
        edits={method: _embed(group[name].pixels) for method, group in edits.items()},
        linf=int(np.abs(difference).max()),
        psnr=psnr(picture.tensor(), original.tensor()).item(),
        edit_ssim={
            method: ssim(group[name].tensor(), group["clean"].tensor()).item() for method, group in edits.items()
        },
    )


def _embed(pixels: Bytes) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(losses: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Turn losses by stage into SVG polylines in a box of 100 x 40, each scaled to its own range."""
    curves = []
    for stage, values in losses.items():
        low, high = min(values), max(values)
        points = [
            f"{100 * i / max(1, len(values) - 1):.1f},{40 - 38 * (v - low) / ((high - low) or 1):.1f}"
            for i, v in enumerate(values)
        ]
        curves.append({"stage": stage, "points": " ".join(points), "low": low, "high": high, "steps": len(values)})
    return curves
