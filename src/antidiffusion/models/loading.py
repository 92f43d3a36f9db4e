"""Load a model of any family: find it, understand it, read its parts, and try one step."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from antidiffusion.failures import is_out_of_memory
from antidiffusion.models.base import Surrogate
from antidiffusion.models.headers import WeightsError, first_line, read_json
from antidiffusion.models.kinds import Kind, classify
from antidiffusion.models.latents import LatentSpaces, load_latents, names_latents
from antidiffusion.models.parts import read_part, read_tokenizer
from antidiffusion.models.precision import device_of, dtypes_of
from antidiffusion.models.streaming import stream
from antidiffusion.models.weights import locate
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
    low_memory: bool = False,
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
        low_memory: Hold a transformer's blocks one at a time, for good: an accelerator never holds them together.
        config: Diffusers folder or hub id with the configuration and tokenizer of a single file.
        offline: Use only what is on this machine.

    Raises:
        WeightsError: If the model cannot be found, or anything in it is not understood, missing, left over, damaged
            or no number.
        ValueError: If there is no such device or dtype.
    """
    if names_latents(model):
        raise WeightsError(
            f"expected a whole model, got {model}, which has encoders only: pictures can be protected with it, not "
            "drawn, edited or tuned to; name another model"
        )
    where = device_of(device)
    with uncollected():
        location = locate(model, config=config, offline=offline)
        files = [location.file] if location.file else location.folder.glob("*/*.safetensors")
        small = sum(file.stat().st_size for file in files) < SMALL
        weights, autocast = dtypes_of(dtype, where, small=small, full_tuning=full_tuning)
        kind = classify(location)
        build = import_module(kind.row.module).build
        surrogate: Surrogate = build(
            kind.scheduler, name=model, autocast=autocast, **kind.told, **_parts(kind, weights)
        )
        if low_memory and surrogate.blocks:
            _ = surrogate.sha256  # of all weights: most are gone from here on
            stream(surrogate, where)
        trial(surrogate.to(where))
    return surrogate


def load_protector(model: str, *, device: str | torch.device = "auto", **options: Any) -> Surrogate | LatentSpaces:
    """Load what pictures can be protected with: a model, see `load`, or latent spaces, see `load_latents`."""
    if not names_latents(model):
        return load(model, device=device, **options)
    with uncollected():
        return load_latents(model, device=device_of(device), offline=options.get("offline", False))


def _parts(kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `Surrogate` that are read from disk."""
    vae = read_part(kind, "vae", dtype)
    if dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae = vae.float()  # the entry says that float16 overflows
    card = kind.location.folder / CARD
    return {
        "vae": vae,
        "denoiser": read_part(kind, kind.row.denoiser[0], dtype),
        "text_encoders": [read_part(kind, name, dtype) for name in kind.row.encoders if name in kind.configs],
        "tokenizers": [read_tokenizer(kind, name) for name in kind.tokenizers],
        "size": kind.size,
    } | (read_json(card) if card.is_file() else {})


@torch.no_grad()
def trial(surrogate: Surrogate) -> None:
    """Encode one smallest picture and ask the denoiser once: what no list of look-alikes knows shows here.

    Raises:
        WeightsError: If an answer has another shape than its question, or is no number.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        x = torch.rand(1, 3, surrogate.multiple, surrogate.multiple, generator=generator).to(surrogate.device)
        z = surrogate.encode(x, generator)
        embedding = surrogate.embed([""])
        embedding = replace(embedding, tokens=embedding.tokens[:, :8])  # T5 gives 512 of them
        n, t = surrogate.draw(z, generator)
        answer = surrogate.predict(n, t, embedding)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            f"expected a model that denoises a latent when it is told a text, got {type(error).__name__} from "
            f"{surrogate.name}: {first_line(error)}; name a base model of one of the families in the documentation"
        ) from error
    for part, tensor in {"autoencoder": z, "text encoder": embedding.tokens, "denoiser": answer}.items():
        if not tensor.isfinite().all():
            half = "float32" not in surrogate.precision or surrogate.autocast
            remedy = "use --dtype bfloat16 or float32" if half else "use another file of this model"
            raise WeightsError(
                f"expected finite numbers from the {part} in {surrogate.precision}, got NaN or infinity from "
                f"{surrogate.name}; {remedy}"
            )
    if answer.shape != z.shape:
        raise WeightsError(
            f"expected an answer of the latent's shape {tuple(z.shape)}, got {tuple(answer.shape)} from "
            f"{surrogate.name}; name a base model"
        )
