"""Latent spaces of real models without the models: their encoders alone, as small public networks distilled from them.

An encoder is the first thing that every tuning and every edit asks, and these cost a hundredth of a model. Each was
distilled from the autoencoder of the family it is named after and gives that family's scaled latents by design; it is
not that autoencoder, so what is measured on it is evidence about the family, not proof.

References:
    Tiny AutoEncoder for Stable Diffusion, Bohan, 2023, github.com/madebyollin/taesd (MIT)
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antidiffusion.models.headers import WeightsError

LATENTS = "latents"
FOLDER = "ANTIDIFFUSION_LATENTS"
"""Environment variable: a folder that holds one folder for each space."""

HUB = {  # 5 MB each
    "sd": "madebyollin/taesd",  # Stable Diffusion 1.x and 2.x
    "sdxl": "madebyollin/taesdxl",
    "sd3": "madebyollin/taesd3",  # 3 and 3.5
    "flux": "madebyollin/taef1",  # FLUX.1 dev and schnell
}

SIZE = 768  # pixels: between the 512 of Stable Diffusion 1 and 2 and the 1024 of the others


@dataclass
class LatentSpaces:
    """Encoders of several latent spaces, frozen, float32.

    Arguments:
        name: What the user asked for, as the report card prints it.
        encoders: diffusers' AutoencoderTiny by the name of its space.
        size: Side in pixels of the square at which pictures are looked at.
    """

    name: str
    encoders: dict[str, Any]
    size: int = SIZE

    def __post_init__(self) -> None:
        for module in self.modules:
            module.eval().requires_grad_(False)

    @property
    def modules(self) -> list[Any]:
        return list(self.encoders.values())

    def to(self, device: str | torch.device) -> "LatentSpaces":
        """Move the encoders to a device."""
        for module in self.modules:
            module.to(device, memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.modules[0].parameters()).device

    @property
    def precision(self) -> str:
        """Name of the weights' dtype."""
        return str(next(self.modules[0].parameters()).dtype).removeprefix("torch.")

    @property
    def multiple(self) -> int:
        """Sides in pixels must be multiples of this."""
        return 8

    @cached_property
    def sha256(self) -> str:
        """Hash of every encoder's weights and of which space they stand for."""
        digest = hashlib.sha256()
        for name, module in self.encoders.items():
            digest.update(name.encode())
            for key, value in sorted(module.encoder.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encode(self, x: Tensor, space: str) -> Tensor:
        """Return latents `(B, C, h, w)` of pictures `x: (B, 3, H, W)` in [0, 1] in one space; gradient to x."""
        return self.encoders[space].encode(2 * x - 1).latents

    @torch.no_grad()
    def shifts(self, clean: Tensor, other: Tensor) -> dict[str, float]:
        """Return how far pictures moved in every space: mean squared distance over the clean latents' variance.

        Arguments:
            clean, other: Pictures `(B, 3, H, W)` in [0, 1], alike in size.
        """
        return {name: shift(self.encode(clean, name), self.encode(other, name)).mean().item() for name in self.encoders}


def shift(clean: Tensor, other: Tensor) -> Tensor:
    """Return the squared distance of latents `(B, C, h, w)` over the variance of the clean ones, `(B,)`."""
    variance = clean.var((1, 2, 3), correction=0).clamp(min=1e-12)
    return (other - clean).square().mean((1, 2, 3)) / variance


def names_latents(model: str) -> bool:
    """Say whether a model's name means latent spaces rather than a whole model."""
    return model.partition(":")[0] == LATENTS or bool(tiny_folders(Path(model).expanduser()))


def load_latents(model: str, *, device: torch.device, offline: bool = False) -> LatentSpaces:
    """Load encoders of latent spaces.

    Arguments:
        model: "latents" for all spaces, "latents:sd+flux" for some, or a folder: of one AutoencoderTiny, or with one
            for each space. The environment variable `ANTIDIFFUSION_LATENTS` names a folder that is taken instead of the
            hub.
        device: Where they go.
        offline: Use only what is on this machine.

    Raises:
        WeightsError: If a space has no such name, or its encoder is not to be had.
    """
    if model.partition(":")[0] != LATENTS:
        folders = tiny_folders(Path(model).expanduser())
    else:
        chosen = model.partition(":")[2].split("+") if ":" in model else list(HUB)
        if unknown := [name for name in chosen if name not in HUB]:
            raise WeightsError(f"expected latent spaces of {', '.join(HUB)}, got {unknown[0]!r}; try latents:sd+flux")
        folders = {name: _folder(name, offline) for name in chosen}
    return LatentSpaces(model, {name: _encoder(folder) for name, folder in folders.items()}).to(device)


def tiny_folders(path: Path) -> dict[str, Path]:
    """Return the folders of AutoencoderTiny that a path is or holds, by name; none if it is something else."""
    found = {folder.name: folder for folder in (path, *sorted(path.glob("*/"))) if _is_tiny(folder)}
    return {path.name: path} if path.name in found else found


def _is_tiny(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name") == "AutoencoderTiny"
    except (OSError, ValueError, AttributeError):
        return False


def _folder(name: str, offline: bool) -> Path:
    if root := os.environ.get(FOLDER):
        folder = Path(root).expanduser() / name
        if not _is_tiny(folder):
            raise WeightsError(
                f"expected {FOLDER} to hold a folder {name} with an AutoencoderTiny, got {root}; "
                f"save {HUB[name]} there, or leave {name} out with latents:NAME+NAME"
            )
        return folder
    from huggingface_hub import snapshot_download

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE")
    try:
        wanted = ["config.json", "*.safetensors"]
        return Path(snapshot_download(HUB[name], allow_patterns=wanted, local_files_only=offline))
    except (OSError, ValueError) as error:  # the hub's errors are both, according to the cause
        raise WeightsError(
            f"expected the encoder {HUB[name]} (5 MB, MIT), got no copy on this machine and no connection; connect "
            f"once, set {FOLDER} to a folder with {', '.join(HUB)}, or name a model of yours with --model "
            "(--model mini is there to try the program, and protects no real photo)"
        ) from error


def _encoder(folder: Path) -> Any:
    from diffusers import AutoencoderTiny
    from safetensors import SafetensorError

    try:
        loaded, info = AutoencoderTiny.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"expected an AutoencoderTiny in {folder}, got: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"expected all weights in {folder}, got {len(missing)} missing ({missing[0]}); save it anew")
    if not all(value.isfinite().all() for value in loaded.encoder.state_dict().values()):
        raise WeightsError(f"expected finite weights in {folder}, got NaN or infinity; take another file")
    loaded.decoder = None  # nothing here draws
    return loaded
