"""What protecting in public latent spaces moves, in those spaces and in one that was left out, and what it costs.

Every picture is protected with all spaces, and with each of them left out; the row says, space by space and at the
attacker's side, what share of the clean latent's variance has moved on the written pixels, after the attacker's own
processing too, beside random signs of the same budget. Rows are appended as they are known; a stopped run goes on.

    python benchmarks/latents.py ENCODERS -o benchmarks/results/latents.jsonl [--steps 24] [--pictures DIR]
    python benchmarks/latents.py ENCODERS --time          # seconds at 512 px and 12 megapixels
    python benchmarks/latents.py --table benchmarks/results/latents.jsonl

ENCODERS holds the folders sd, sdxl, sd3 and flux. The photos are those that scikit-image's wheel ships (astronaut,
NASA, public domain; chelsea and coffee, CC0; rocket, SpaceX, CC0), cut to 512 px squares.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Generator

from antidiffusion.attacks.purify import PURIFIERS
from antidiffusion.models.latents import LatentSpaces, load_latents, shift
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.recipes.latents import Latents
from antidiffusion.recipes.random_sign import RandomSign

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
SIDES = (512, 1024)  # at which attackers look: Stable Diffusion 1 and 2; the others
WASHES = ("", "jpeg-75", "rescale")


def photos(folder: Path | None) -> dict[str, np.ndarray]:
    """Return pictures `(H, W, 3)` uint8 by name: the centre squares of the wheel's photos, or a folder's pictures."""
    shipped = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
    found = {}
    for path in sorted(folder.glob("*.png")) if folder else shipped:
        picture = Image.open(path).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        found[path.stem] = np.asarray(square if folder else square.resize((512, 512), Image.Resampling.LANCZOS))
    return found


def protected(pixels: np.ndarray, recipe: Any, spaces: LatentSpaces, seed: int) -> tuple[np.ndarray, float]:
    """Return the protected pixels and the seconds that they took."""
    begun = time.perf_counter()
    canvas = Canvas(pixels, view_size(*pixels.shape[:2], spaces.size, spaces.multiple))
    recipe([canvas], spaces, Generator().manual_seed(seed), lambda *_: None)
    return canvas.pixels(Linf(recipe.budget)), time.perf_counter() - begun


def seen(pixels: np.ndarray, spaces: LatentSpaces) -> dict[str, dict[str, torch.Tensor]]:
    """Return latents by the attacker's side and what he does first, then by space."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for side in SIDES:
        view = Canvas(pixels, (side, side)).clean_view
        for wash in WASHES if side == SIDES[0] else WASHES[:1]:
            x = PURIFIERS[wash](view, None, 0) if wash else view  # type: ignore[arg-type]
            with torch.no_grad():
                found[f"{side} {wash}".strip()] = {name: spaces.encode(x, name) for name in spaces.encoders}
    return found


def run(root: str, output: Path, steps: int, folder: Path | None) -> None:
    """Append what is not in the rows yet."""
    done = (
        {tuple(json.loads(line)[k] for k in ("picture", "recipe")) for line in output.open()} if output.exists() else ()
    )
    everything = load_latents(root, device=torch.device("cpu"))
    names = list(everything.encoders)
    for picture, pixels in photos(folder).items():
        before = None
        for recipe in ("random-sign", "all", *(f"without {name}" for name in names)):
            if (picture, recipe) in done:
                continue
            chosen = {k: v for k, v in everything.encoders.items() if recipe != f"without {k}"}
            method = RandomSign() if recipe == "random-sign" else Latents(steps=steps)
            other, seconds = protected(pixels, method, LatentSpaces(recipe, chosen), 0)
            before = before or seen(pixels, everything)
            moved = {
                place: {name: round(shift(before[place][name], z).mean().item(), 4) for name, z in latents.items()}
                for place, latents in seen(other, everything).items()
            }
            psnr = 10 * np.log10(255**2 / np.square(other.astype(float) - pixels).mean())
            row = {
                "picture": picture,
                "side": pixels.shape[0],
                "recipe": recipe,
                "steps": steps,
                "psnr": round(psnr, 2),
            }
            row |= {"linf": int(np.abs(other.astype(int) - pixels).max()), "seconds": round(seconds, 1)}
            with output.open("a") as file:
                file.write(json.dumps(row | {"moved": moved}) + "\n")


def timing(root: str) -> dict[str, float]:
    """Return seconds for a picture of 512 px and one of 12 megapixels, with the default recipe."""
    spaces = load_latents(root, device=torch.device("cpu"))
    pixels = next(iter(photos(None).values()))
    large = np.asarray(Image.fromarray(pixels).resize((4000, 3000), Image.Resampling.BICUBIC))
    return {f"{p.shape[1]} x {p.shape[0]}": round(protected(p, Latents(), spaces, 0)[1], 1) for p in (pixels, large)}


def table(path: Path) -> str:
    """Return Markdown: mean over pictures of each shift, and the ratio to random signs."""
    rows = [json.loads(line) for line in path.open()]
    places = list(rows[0]["moved"])
    spaces = list(rows[0]["moved"][places[0]])
    lines = [f"| recipe, n = {len({row['picture'] for row in rows})} | at | {' | '.join(spaces)} | PSNR |"]
    lines.append("| --- " * (len(spaces) + 3) + "|")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        group = [row for row in rows if row["recipe"] == recipe]
        for place in places:
            cells = []
            for space in spaces:
                values = [row["moved"][place][space] for row in group]
                noise = [row["moved"][place][space] for row in rows if row["recipe"] == "random-sign"]
                ratio = statistics.mean(values) / statistics.mean(noise)
                unseen = " (unseen)" if recipe == f"without {space}" else ""
                cells.append(f"{statistics.mean(values):.2f}, {ratio:.1f}x{unseen}")
            psnr = statistics.mean(row["psnr"] for row in group)
            lines.append(f"| {recipe} | {place} | {' | '.join(cells)} | {psnr:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="?")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--steps", type=int, default=Latents.steps)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
    elif options.time:
        print(json.dumps(timing(options.encoders)))
    else:
        run(options.encoders, options.output, options.steps, options.pictures)
