"""What the embedded model is worth: fidelity and sensitivity of its encoder, speed, and a contact sheet.

    python benchmarks/mini.py [--model mini] [--out benchmarks/results/mini.json] [--sheet docs/mini.png]
    python benchmarks/mini.py --encoder-only --identities DIR [--vae DIR]    # the same portraits at another size

On held-out portraits: PSNR of the autoencoder; how far an untargeted attack on the encoder and random signs of the same
size move the latent, as mean squared shift over the latent's variance; and how similar SDEdit's result (strength 0.4)
stays to the clean picture's when the encoder is attacked. What `--identities` takes is made in tools/, by `python -m
portraits identities --side SIDE`; the UNet was trained at 128 pixels only, and edits larger pictures all the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from antidiffusion import Picture, Surrogate
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.card import versions
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.models.sampling import sample
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.pictures.tensors import to_picture
from antidiffusion.recipes.ascent import ascend

HERE = Path(__file__).parent
BUDGETS = (2, 4, 8, 16)
EDIT = "a portrait of a person, wearing sunglasses and a red shirt, on a green background"
PROMPTS = [
    "a portrait of a young woman with long red hair, smiling, wearing a green shirt, on a blue background",
    "a photo of an old man with a beard and white hair, wearing a purple turtleneck, on an orange background",
    "a portrait of a bald man wearing sunglasses and a yellow shirt, against a grey background",
    "a photo of a young man with short black hair, wearing a red beanie and a black turtleneck, on a green background",
    "a portrait of a woman with a blond bob and glasses, wearing a white shirt, looking surprised, on a red background",
    "a woman with black hair in a bun, tan skin, looking angry, wearing a brown v-neck sweater, on a purple background",
    "a photo of a man with curly brown hair and a moustache, wearing a blue shirt, on a yellow background",
    "a headshot of a middle-aged woman with a grey afro, dark skin, wearing a pink shirt, on a white background",
]


class LatentShift:
    """Squared distance of the latent from the clean picture's: the untargeted attack on the encoder."""

    def __init__(self, surrogate: Surrogate, clean: Tensor) -> None:
        self.surrogate, self.clean = surrogate, surrogate.posterior(clean).mean.detach()

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        return (self.surrogate.posterior(x).mean - self.clean).square().mean((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mini.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "mini.png")
    parser.add_argument("--encoder-only", action="store_true", help="fidelity and sensitivity only, no sheet")
    parser.add_argument("--identities", type=Path, help="rendered anew, idNN/KK.png, in place of benchmarks/portraits")
    parser.add_argument("--vae", type=Path, help="diffusers folder of an autoencoder in place of the model's")
    args = parser.parse_args()

    surrogate = Surrogate.from_pretrained(args.model)
    if args.vae:
        surrogate = replace(surrogate, vae=AutoencoderKL.from_pretrained(args.vae)).to("cpu")
    generator = Generator().manual_seed(0)
    files = sorted((HERE / "portraits").glob("*.png"))
    if args.identities:
        files = [args.identities / "id{}/{}.png".format(*file.stem.split("-")) for file in files]
    pictures = [Picture.read(file) for file in files]
    x = torch.cat([picture.tensor() for picture in pictures])
    with torch.no_grad():
        z = surrogate.posterior(x).mean
    decoded = surrogate.decode(z)
    result: dict = {"model_sha256": surrogate.sha256, "held_out_portraits": len(files), "versions": versions()}
    result["parameters"] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in zip(("vae", "unet", "text_encoder"), surrogate.modules, strict=True)
    }
    result["side"] = x.shape[-1]
    result["vae_psnr"] = statistics.mean(psnr(decoded, x).tolist())
    result["latent_std"] = z.std().item()
    clean_edit = edit(surrogate, x)
    result["sensitivity"] = {}
    for radius in BUDGETS:
        canvases = [Canvas(picture.pixels, picture.pixels.shape[:2]) for picture in pictures]
        for canvas in canvases:  # the gradient is zero at the clean picture itself
            canvas.delta.copy_(torch.randint(2, canvas.delta.shape, generator=generator) * 2 - 1)
        sizes = [radius / 8] * 40
        for _ in ascend([LatentShift(surrogate, x)], [canvases], Linf(radius), sizes=sizes, generator=generator):
            pass
        attacked = torch.cat([canvas.view() for canvas in canvases])
        signs = (torch.randint(2, x.shape, generator=generator) * 2 - 1) * radius / 255
        row = {}
        for name, y in {"attack": attacked, "random": (x + signs).clamp(0, 1)}.items():
            with torch.no_grad():
                row[f"{name}_shift"] = ((surrogate.posterior(y).mean - z).square().mean() / z.var()).item()
            row[f"{name}_edit_ssim"] = statistics.mean(ssim(edit(surrogate, y), clean_edit).tolist())
        result["sensitivity"][radius] = row
        print(radius, row, flush=True)
    if args.encoder_only:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        return
    begun = time.perf_counter()
    sample(PROMPTS[:1], surrogate, Generator().manual_seed(0), steps=25)
    result["seconds_per_picture_25_steps"] = round(time.perf_counter() - begun, 2)
    code = f"from antidiffusion import Surrogate; Surrogate.from_pretrained({args.model!r})"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    result["seconds_to_import_and_load"] = round(time.perf_counter() - begun, 2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")

    rows = [x, decoded, clean_edit]
    rows += [sample(PROMPTS, surrogate, Generator().manual_seed(seed), guidance=4) for seed in (0, 1)]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    to_picture(sheet[None]).write(args.sheet, overwrite=True)
    print(json.dumps(result, indent=1))


def edit(surrogate: Surrogate, x: Tensor) -> Tensor:
    return SDEdit(strength=0.4, guidance=3.0)(x, Prompts(EDIT), surrogate, seed=0)


if __name__ == "__main__":
    main()
