"""Read the parts of a model that is understood, complete and finite."""

from pathlib import Path
from typing import Any

import torch

from antidiffusion.failures import is_out_of_memory
from antidiffusion.models.families import T5
from antidiffusion.models.headers import DOES_NOT_FIT, Header, WeightsError, first_line, read_tensors
from antidiffusion.models.kinds import Kind
from antidiffusion.models.weights import variant


def read_part(kind: Kind, name: str, dtype: torch.dtype) -> Any:
    """Read one part's weights, from the single file if it holds them.

    Arguments:
        kind: The model.
        name: "vae", "unet", "transformer", "text_encoder", ...
        dtype: Of the weights.

    Raises:
        WeightsError: If a weight is missing, left over, of another shape or no number.
    """
    header = kind.header if kind.header and kind.header.find(kind.row.held[name]) else None
    where = header.file if header else kind.location.folder / name
    try:
        module = _from_file(kind, header, name, dtype) if header else _from_folder(kind, name, dtype)
        if absent := [key for key, value in module.state_dict().items() if value.is_meta]:
            raise ValueError(f"{len(absent)} tensors are missing, the first of them {absent[0]}")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, WeightsError) or is_out_of_memory(error):
            raise
        raise WeightsError(
            f"expected complete weights, got an error from {where}: {first_line(error)}; {DOES_NOT_FIT}"
        ) from error
    check_finite(module, name, where, dtype)
    return module


def read_tokenizer(kind: Kind, name: str) -> Any:
    """Read one tokenizer: "tokenizer", "tokenizer_2", ...

    Raises:
        WeightsError: If a file of it is missing or damaged.
    """
    import transformers

    where = kind.location.folder / name
    try:
        return getattr(transformers, kind.tokenizers[name]).from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"expected a tokenizer, got an error from {where}: {first_line(error)}; {DOES_NOT_FIT}"
        ) from error


def _from_file(kind: Kind, header: Header, name: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils as original

    library, class_name = kind.row.class_of(name)
    tensors, folder = read_tensors(header, kind.row.held[name]), str(kind.location.folder)
    options: dict[str, Any] = {"subfolder": name, "config": folder, "torch_dtype": dtype, "local_files_only": True}
    try:
        if library == "diffusers":
            return getattr(diffusers, class_name).from_single_file(tensors, **options)
        read = original.create_diffusers_t5_model_from_checkpoint
        if class_name != T5:
            read = original.create_diffusers_clip_model_from_ldm
        encoder = read(getattr(transformers, class_name), checkpoint=tensors, **options)
        encoder.tie_weights()  # T5's embedding stands in a file once
        return encoder
    except original.SingleFileComponentError as error:
        raise ValueError(str(error)) from error


def _from_folder(kind: Kind, name: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    library, class_name = kind.row.class_of(name)
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    module, info = getattr(diffusers if library == "diffusers" else transformers, class_name).from_pretrained(
        kind.location.folder,
        subfolder=name,
        variant=variant(kind.location.folder / name),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    # Both libraries fill what a file lacks with random numbers, drop what is left over, and only warn.
    for what, key in (
        ("missing", "missing_keys"),
        ("left over", "unexpected_keys"),
        ("of another shape", "mismatched_keys"),
    ):
        if names := sorted(str(found) for found in info.get(key) or () if not str(found).endswith("position_ids")):
            raise ValueError(f"{len(names)} tensors are {what}, the first of them {names[0]}")
    return module


def check_finite(module: Any, part: str, where: Path, dtype: torch.dtype) -> None:
    """Look at every weight.

    Raises:
        WeightsError: If one is NaN or infinite, with its name and what to do.
    """
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or value.numel() == 0:
            continue
        low, high = torch.aminmax(value)
        if torch.isfinite(low) and torch.isfinite(high):
            continue
        overflow = dtype == torch.float16 and not torch.isnan(low)
        remedy = (
            "the weights are too large for float16: use bfloat16 or float32"
            if overflow
            else "a merge or a training run went wrong before the file was written: use another file of this model"
        )
        raise WeightsError(
            f"expected finite weights, got {'NaN' if torch.isnan(low) else 'infinity'} in {name} of the {part} "
            f"({where}); {remedy}"
        )
