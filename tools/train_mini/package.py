"""Assemble the trained parts into a Stable Diffusion pipeline folder: float16 safetensors, as diffusers saves it.

python tools/train_mini/package.py RUN OUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTokenizer

from models import build_scheduler, build_text_encoder, build_unet, build_vae

# A DreamBooth run on so small a model takes larger steps than Stable Diffusion's 5e-7 and 1e-4.
LEARNING_RATES = {"learning_rate": 5e-5, "lora_learning_rate": 1e-3}


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    vae = AveragedModel(build_vae())
    vae.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["average"])
    model = AveragedModel(nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(len(tokenizer))}))
    model.load_state_dict(torch.load(run / "unet.pt", weights_only=True)["average"])
    factor = torch.load(run / "latents.pt", weights_only=True)["scaling_factor"].item()
    vae.module.register_to_config(scaling_factor=factor)
    StableDiffusionPipeline(
        vae=vae.module,
        text_encoder=model.module["text_encoder"],
        tokenizer=tokenizer,
        unet=model.module["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):  # transformers 4 reads these
        shutil.copy(run / "tokenizer" / name, out / "tokenizer" / name)
    (out / "antidiffusion.json").write_text(json.dumps(LEARNING_RATES) + "\n")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # they are saved for the owner only


if __name__ == "__main__":
    main()
