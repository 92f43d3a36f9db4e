"""Load a model of any family, safetensors only: find it, tell its kind, build it. No other module names families."""

import json
from typing import Any

import torch

from antidiffusion.models import flux, sd3
from antidiffusion.models.base import Surrogate
from antidiffusion.models.precision import device_of, dtypes_of
from antidiffusion.models.schedule import VP
from antidiffusion.models.sd import StableDiffusion
from antidiffusion.models.weights import Location, WeightsError, locate
from antidiffusion.process import uncollected

# Arguments of `Surrogate` that differ from Stable Diffusion's: the embedded model has a hundredth of its weights.
CARD = "antidiffusion.json"


SMALL = 2**29  # bytes of all weights on disk: below, a model stays in float32


def load(
    model: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    full_tuning: bool = False,
    config: str | None = None,
    offline: bool = False,
) -> Surrogate:
    """Load a model.

    Arguments:
        model: "mini" (the embedded model), a diffusers folder, a `.safetensors` file in the original layout, or a
            hub id. A local path never touches the network.
        device: Where the weights go; "auto" is the fastest of this machine.
        dtype: Of the weights: "float32", "bfloat16", "float16", "mixed" (float32 weights that compute in bfloat16), a
            torch.dtype, or "auto".
        full_tuning: Whether the model's own weights will be tuned, for which half precision is too coarse.
        config: Diffusers folder or hub id with the configuration and tokenizer of a single file.
        offline: Use only what is on this machine.

    Raises:
        WeightsError: If the model cannot be found or is of a kind that is not supported.
        ValueError: If there is no such device or dtype.
    """
    where = device_of(device)
    with uncollected():
        location = locate(model, config=config, offline=offline)
        files = [location.file] if location.file else location.folder.glob("*/*.safetensors")
        small = sum(file.stat().st_size for file in files) < SMALL
        weights, autocast = dtypes_of(dtype, where, small=small, full_tuning=full_tuning)
        index = json.loads((location.folder / "model_index.json").read_text())
        family = (index.get("transformer") or [None, None])[1]
        if family in TRANSFORMERS:
            parts = _transformer_parts(location, weights, index)
            return TRANSFORMERS[family](name=model, autocast=autocast, **parts).to(where)
        return StableDiffusion(name=model, autocast=autocast, **load_parts(location, weights)).to(where)


TRANSFORMERS = {"SD3Transformer2DModel": sd3.build, "FluxTransformer2DModel": flux.build}


def _transformer_parts(location: Location, dtype: torch.dtype, index: dict[str, Any]) -> dict[str, Any]:
    import diffusers
    import transformers

    folder = location.folder
    named = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[0]}
    encoders = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if name in named]
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config,
        "vae": diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **options),
        "denoiser": getattr(diffusers, named["transformer"]).from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype, **options
        ),
        "text_encoders": [
            _complete(
                getattr(transformers, named[name]).from_pretrained(
                    folder, subfolder=name, dtype=dtype, output_loading_info=True, **options
                )
            )
            for name in encoders
        ],
        "tokenizers": [
            getattr(transformers, named[name.replace("text_encoder", "tokenizer")]).from_pretrained(
                folder / name.replace("text_encoder", "tokenizer")
            )
            for name in encoders
        ],
        "size": json.loads((folder / "vae" / "config.json").read_text())["sample_size"],
    }


def load_parts(location: Location, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `StableDiffusion` but its name.

    Raises:
        WeightsError: If the folder is no Stable Diffusion 1.x, 2.x or XL, or a part is missing or damaged.
    """
    from diffusers import DDIMScheduler
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    path = location.folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"expected a complete model_index.json, got {path}: {error}; download it again") from error
    unet_class = (index.get("unet") or [None, None])[1]
    if unet_class != "UNet2DConditionModel":
        raise WeightsError(
            f"expected a Stable Diffusion 1.x, 2.x or XL model, got a {index.get('_class_name', 'pipeline')}; "
            "name one of those as the surrogate"
        )
    try:
        parts = _from_file(location, dtype, index) if location.file else _from_folder(location, dtype, index)
        for module in (parts["vae"], parts["denoiser"], *parts["text_encoders"]):
            if absent := [name for name, value in module.state_dict().items() if value.is_meta]:
                raise ValueError(f"{len(absent)} tensors are missing, the first of them {absent[0]}")
        # Latents are not bounded; schedulers of other classes leave clip_sample out, and DDIM's default is to clip.
        scheduler = DDIMScheduler.from_pretrained(location.folder, subfolder="scheduler", clip_sample=False)
        parts["schedule"] = VP(scheduler.config)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        raise WeightsError(
            f"expected complete weights, got an error from {location.file or location.folder}: "
            f"{str(error).splitlines()[0]}; download the model again"
        ) from error
    if parts["denoiser"].config.in_channels != parts["vae"].config.latent_channels:
        raise WeightsError(
            f"expected a text-to-image UNet, got one with {parts['denoiser'].config.in_channels} input channels; "
            "name the base model instead of its inpainting or depth variant"
        )
    card = location.folder / CARD
    if card.is_file():
        parts |= json.loads(card.read_text())
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    parts["size"] = int(parts["denoiser"].config.sample_size) * factor
    return parts


def _tokenizers(location: Location, index: dict[str, Any]) -> list[Any]:
    from transformers import CLIPTokenizer

    names = [name for name in ("tokenizer", "tokenizer_2") if (index.get(name) or [None])[0]]
    return [CLIPTokenizer.from_pretrained(location.folder / name) for name in names]


def _text_encoders(index: dict[str, Any]) -> dict[str, Any]:
    import transformers

    names = [name for name in ("text_encoder", "text_encoder_2") if (index.get(name) or [None])[0]]
    return {name: getattr(transformers, index[name][1]) for name in names}


def _safe(vae: Any, dtype: torch.dtype) -> Any:
    """Return the autoencoder in a dtype it works in: `force_upcast` says that float16 overflows."""
    return vae.float() if dtype == torch.float16 and getattr(vae.config, "force_upcast", False) else vae


def _from_folder(location: Location, dtype: torch.dtype, index: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = location.folder
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **options)
    return {
        "vae": _safe(vae, dtype),
        "denoiser": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **options),
        "text_encoders": [
            _complete(kind.from_pretrained(folder, subfolder=name, dtype=dtype, output_loading_info=True, **options))
            for name, kind in _text_encoders(index).items()
        ],
        "tokenizers": _tokenizers(location, index),
    }


def _complete(loaded: tuple[Any, dict[str, Any]]) -> Any:
    # transformers fills what a file lacks with random numbers and only warns.
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise ValueError(f"{len(absent)} tensors are missing, the first of them {absent[0]}")
    return model


def _from_file(location: Location, dtype: torch.dtype, index: dict[str, Any]) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    encoders = _text_encoders(index)
    kind = StableDiffusionXLPipeline if "text_encoder_2" in encoders else StableDiffusionPipeline
    pipeline = kind.from_single_file(
        str(location.file),
        config=str(location.folder),
        torch_dtype=dtype,
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
    )
    return {
        "vae": _safe(pipeline.vae, dtype),
        "denoiser": pipeline.unet,
        "text_encoders": [getattr(pipeline, name) for name in encoders],
        "tokenizers": _tokenizers(location, index),
    }
