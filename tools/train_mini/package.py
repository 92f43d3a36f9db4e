"""Write a trained model as a Stable Diffusion folder that diffusers loads, with any transformers from 4.57 on."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from train_mini.loop import load_weights
from train_mini.models import build_prior, build_scheduler, build_vae, decoder_of, encoder_of
from train_mini.settings import Settings
from train_mini.unet import load_tokenizer

# A DreamBooth run on so small a model takes larger steps than Stable Diffusion's 5e-7 and 1e-4.
LEARNING_RATES = {"learning_rate": 5e-5, "lora_learning_rate": 1e-3}
PREFIX = "text_model."  # transformers 4 has it in front of the text encoder's keys; 5 writes none and reads both


def load_vae(settings: Settings, folder: Path) -> AutoencoderKL:
    """Load the trained autoencoder; without a trained decoder that half is random."""
    vae = build_vae(settings.channels)
    load_weights(folder / "encoder.safetensors", encoder_of(vae))
    if (folder / "decoder.safetensors").exists():
        load_weights(folder / "decoder.safetensors", decoder_of(vae))
    return vae.eval().requires_grad_(False)


def package(settings: Settings, name: str, folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model `name` of the stages' files in `folder` to `out`, which is replaced.

    Arguments:
        settings: Of the run.
        name: A key of its models.
        folder: With the stages' weights.
        out: For model_index.json and the parts.
        dtype: Of the weights in the files, float16 or float32. Whoever loads them without naming a precision computes
            in float32 either way.
    """
    tokenizer = load_tokenizer(folder, name)
    prior = build_prior(settings.models[name], len(tokenizer))
    load_weights(folder / f"{name}.safetensors", prior)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    StableDiffusionPipeline(
        vae=load_vae(settings, folder),
        text_encoder=prior["text_encoder"],
        tokenizer=tokenizer,
        unet=prior["unet"],
        scheduler=build_scheduler(settings.models[name].prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype).save_pretrained(partial)
    _for_all_versions(partial / "text_encoder")
    for file in ("vocab.json", "merges.txt"):  # transformers 4 reads these
        shutil.copy(folder / f"{name}-tokenizer" / file, partial / "tokenizer" / file)
    (partial / "antidiffusion.json").write_text(json.dumps(LEARNING_RATES) + "\n")
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)  # they are saved for the owner only
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _for_all_versions(folder: Path) -> None:
    """Give the text encoder's keys the prefix that transformers 4 wants, and a precision that fits the other parts'."""
    path = folder / "model.safetensors"
    state = load_file(path)
    state = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in state.items()}
    save_file(state, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    # transformers 5 loads in the precision written here, diffusers in float32: a pipeline of both would not run.
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
