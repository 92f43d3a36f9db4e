"""Folders and files of models with all that is read before a weight: configurations and headers, and no numbers."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

SENTENCE = r"^expected [^\n]+, got [^\n]+; [^\n]+$"  # expected, got, remedy
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "I64": 8}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def write_header(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whose numbers are a hole in the file: any size costs nothing."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 64, 64], "latent_channels": 4, "sample_size": 512}
CLIP = {"hidden_size": 32, "projection_dim": 32}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 32,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
MMDIT_VAE = VAE | {"latent_channels": 16, "sample_size": 1024}
FOLDERS: dict[str, dict[str, Any]] = {  # model_index.json's class, then part -> (class, configuration)
    "sd": {
        "": "StableDiffusionPipeline",
        "unet": ("UNet2DConditionModel", UNET),
        "vae": ("AutoencoderKL", VAE),
        "text_encoder": ("CLIPTextModel", CLIP),
        "tokenizer": ("CLIPTokenizer", {}),
        "scheduler": ("PNDMScheduler", BETAS | {"_class_name": "PNDMScheduler"}),
    },
    "sdxl": {
        "": "StableDiffusionXLPipeline",
        "unet": (
            "UNet2DConditionModel",
            UNET
            | {
                "cross_attention_dim": 96,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64 + 6 * 8,
            },
        ),
        "vae": ("AutoencoderKL", VAE | {"sample_size": 1024}),
        "text_encoder": ("CLIPTextModel", CLIP),
        "text_encoder_2": ("CLIPTextModelWithProjection", {"hidden_size": 64, "projection_dim": 64}),
        "tokenizer": ("CLIPTokenizer", {}),
        "tokenizer_2": ("CLIPTokenizer", {}),
        "scheduler": ("EulerDiscreteScheduler", BETAS | {"_class_name": "EulerDiscreteScheduler"}),
    },
    "sd3": {
        "": "StableDiffusion3Pipeline",
        "transformer": (
            "SD3Transformer2DModel",
            {
                "_class_name": "SD3Transformer2DModel",
                "in_channels": 16,
                "out_channels": 16,
                "sample_size": 128,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 96,
            },
        ),
        "vae": ("AutoencoderKL", MMDIT_VAE),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP),
        "text_encoder_2": ("CLIPTextModelWithProjection", {"hidden_size": 64, "projection_dim": 64}),
        "text_encoder_3": ("T5EncoderModel", {"d_model": 64}),
        "tokenizer": ("CLIPTokenizer", {}),
        "tokenizer_2": ("CLIPTokenizer", {}),
        "tokenizer_3": ("T5TokenizerFast", {}),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
    },
    "flux": {
        "": "FluxPipeline",
        "transformer": (
            "FluxTransformer2DModel",
            {
                "_class_name": "FluxTransformer2DModel",
                "in_channels": 64,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 32,
            },
        ),
        "vae": ("AutoencoderKL", MMDIT_VAE),
        "text_encoder": ("CLIPTextModel", CLIP),
        "text_encoder_2": ("T5EncoderModel", {"d_model": 64}),
        "tokenizer": ("CLIPTokenizer", {}),
        "tokenizer_2": ("T5TokenizerFast", {}),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
    },
    "flux2": {
        "": "Flux2KleinPipeline",
        "transformer": (
            "Flux2Transformer2DModel",
            {
                "_class_name": "Flux2Transformer2DModel",
                "in_channels": 128,
                "joint_attention_dim": 96,
                "guidance_embeds": False,
            },
        ),
        "vae": (
            "AutoencoderKLFlux2",
            VAE | {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "sample_size": 1024},
        ),
        "text_encoder": ("Qwen3ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 36}),
        "tokenizer": ("Qwen2TokenizerFast", {}),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
    },
}


def write_folder(root: Path, family: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write a folder of a family.

    Arguments:
        changes: "part" -> entries of its configuration to change; "" stands for model_index.json.
    """
    spec, changes = FOLDERS[family], changes or {}
    index: dict[str, Any] = {"_class_name": spec[""]}
    for part, (name, config) in ((part, value) for part, value in spec.items() if part):
        index[part] = ["transformers" if part.startswith(("text", "token")) else "diffusers", name]
        folder = root / part
        folder.mkdir(parents=True)
        if part.startswith("tokenizer"):
            continue
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / file).write_text(json.dumps(config | dict(changes.get(part, {}))))
        if part != "scheduler":
            stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
            write_header(folder / f"{stem}.safetensors", {"weight": ("F32", (2, 2))})
    (root / "model_index.json").write_text(json.dumps(index | dict(changes.get("", {}))))
    return root


def linear(name: str, out: int, into: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{name}.weight": ("BF16", (out, into)), f"{name}.bias": ("BF16", (out,))}


def flux_file(*, guidance: bool = True, channels: int = 64) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what a FLUX.1 file holds in its original layout, with one block of each kind, at full width."""
    width = 3072
    found = linear("img_in", width, channels) | linear("txt_in", width, 4096)
    for name, size in ({"time_in": 256, "vector_in": 768} | ({"guidance_in": 256} if guidance else {})).items():
        found |= linear(f"{name}.in_layer", width, size) | linear(f"{name}.out_layer", width, width)
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        found |= linear(f"{block}_mod.lin", 6 * width, width) | linear(f"{block}_attn.qkv", 3 * width, width)
        found |= linear(f"{block}_attn.proj", width, width)
        found |= linear(f"{block}_mlp.0", 4 * width, width) | linear(f"{block}_mlp.2", width, 4 * width)
        found |= {f"{block}_attn.norm.{part}_norm.scale": ("BF16", (128,)) for part in ("query", "key")}
    single = "single_blocks.0"
    found |= linear(f"{single}.linear1", 7 * width, width) | linear(f"{single}.linear2", width, 5 * width)
    found |= linear(f"{single}.modulation.lin", 3 * width, width)
    found |= {f"{single}.norm.{part}_norm.scale": ("BF16", (128,)) for part in ("query", "key")}
    return found | linear("final_layer.linear", 64, width) | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def sd3_file(width: int = 64) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the transformer of a Stable Diffusion 3 file holds in its original layout, with two blocks."""
    start = "model.diffusion_model."
    found = {"pos_embed": ("F32", (1, 36, width)), "x_embedder.proj.weight": ("F16", (width, 16, 2, 2))}
    found |= {"x_embedder.proj.bias": ("F16", (width,))}
    found |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    found |= linear("y_embedder.mlp.0", width, 96) | linear("y_embedder.mlp.2", width, width)
    found |= linear("context_embedder", width, 64)
    for block in range(2):
        for side, last in (("x_block", False), ("context_block", block == 1)):
            name = f"joint_blocks.{block}.{side}"
            found |= linear(f"{name}.attn.qkv", 3 * width, width)
            found |= linear(f"{name}.adaLN_modulation.1", (2 if last else 6) * width, width)
            if not last:
                found |= linear(f"{name}.attn.proj", width, width)
                found |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
    found |= linear("final_layer.linear", 64, width) | linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return {start + name: value for name, value in found.items()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(file: Path, **functions: Any) -> None:
    """Replace tensors of a safetensors file by functions of what is there, or of None."""
    state = load_file(file)
    save_file(state | {name: function(state.get(name)) for name, function in functions.items()}, file, {"format": "pt"})
