"""What a safetensors file is, read from its header: names, shapes and dtypes, and no tensor."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from antidiffusion.models.families import FAMILIES, Family


class WeightsError(ValueError):
    """A model cannot be used; the message is one sentence with the remedy."""


FUSE = (
    "fuse it into the model that it was made for with diffusers (load_lora_weights, fuse_lora, save_pretrained) and "
    "give that folder, or name that model alone"
)
BAKE = "merge it into the model that it was made for with the tool that made it, or name that model alone"
BASE = "name the model that it was made for, without it"
WHOLE = "give the whole model that it belongs to: the folder with a model_index.json, or a file that holds all parts"
# What a file is -> (pattern that one of its names matches from the start, remedy). The first that matches is said.
ADDITIONS = {
    "a LoHa adapter": (r".*\.hada_(w|t)\d", BAKE),
    "a LoKr adapter": (r".*\.lokr_(w|t)\d", BAKE),
    "an OFT or BOFT adapter": (r".*\.(oft_(blocks|diag|R)|boft_)", BAKE),
    "an IA3 adapter": (r".*\.(on_input|ia3_l)", BAKE),
    "a LoRA": (r"lora_|.*[._]lora[._]|.*\.lora_|.*_lora\.(up|down)|.*\.dora_scale$", FUSE),
    "a ControlNet": (r"control_model\.|controlnet_|lllite_|input_hint_block\.|.*zero_convs\.", BASE),
    "a T2I-Adapter": (r"adapter\.|body\.\d+\.(block1|resnets)", BASE),
    "an IP-Adapter": (r"image_proj(_model)?\.|ip_adapter\.", BASE),
    "a motion module for videos": (r".*motion_modules\.", BASE),
    "an upscaler of pictures": (r"conv_first\.|.*\.rdb\d\.|model\.0\.weight$", BASE),
}
# What a file is -> (pattern that all of its names match from the start, remedy).
PARTS = {
    "a text encoder alone": (
        r"(text_model|encoder\.block|decoder\.block|shared|text_projection|logit_scale|visual|vision_model|ln_final|"
        r"visual_projection|positional_embedding|token_embedding|transformer\.resblocks|encoder\.final|encoder\.embed_)",
        WHOLE,
    ),
    "an autoencoder alone": (
        r"(first_stage_model\.|vae\.|model_ema\.)?(encoder|decoder|quant_conv|post_quant_conv|loss|logvar|model_ema)\b",
        WHOLE,
    ),
    "a denoiser alone, in diffusers' layout": (
        r"(conv_in|conv_out|conv_norm_out|down_blocks|mid_block|up_blocks|time_embedding|add_embedding|class_embedding|"
        r"encoder_hid_proj|transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|time_text_embed|"
        r"pos_embed|norm_out|proj_out)\b",
        WHOLE,
    ),
    "a denoiser alone, without the names of the file that it is from": (
        r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.",
        WHOLE,
    ),
}
DOES_NOT_FIT = "give the folder as save_pretrained wrote it, or the configuration of this very model"
SCALED = re.compile(r"(?P<layer>.*)\.(scale_weight|weight_scale)$")
QUANTISED = re.compile(
    r".*\.(weight_scale_2|absmax|quant_map|nested_absmax|qweight|qzeros|wscales|smooth|weight_zero_point|"
    r"quant_state\..*|SCB|weight_format|block_scale|comfy_quant)$"
)


@dataclass(frozen=True)
class Header:
    """Names of a file's tensors with their shapes and dtypes as safetensors writes them, and its metadata."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def find(self, pattern: str) -> str | None:
        """Return the first name that the pattern matches from its start."""
        return next((name for name in self.shapes if re.match(pattern, name)), None)


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        WeightsError: If the file is damaged; only then does another download help.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            return Header(
                file,
                {name: tuple(part.get_shape()) for name, part in slices.items()},
                {name: str(part.get_dtype()) for name, part in slices.items()},
                opened.metadata() or {},
            )
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"expected complete weights, got {file}: {first_line(error)}; the file is damaged, download the model again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        WeightsError: If it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"expected a configuration, got no {path}; {DOES_NOT_FIT}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"expected a complete {path.name}, got {path}: {error}; the file is damaged, download the model again"
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(f"expected a JSON object, got {path} with a {type(found).__name__}; {DOES_NOT_FIT}")
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def refuse_strangers(header: Header) -> None:
    """Say what a file is that is no model.

    Raises:
        WeightsError: If it is an adapter, a part of a model, a shard or in a number format that is not understood.
    """
    what, remedy = "", ""
    for name, (pattern, cure) in ADDITIONS.items():
        if header.find(pattern):
            what, remedy = name, cure
            break
    else:
        for name, (pattern, cure) in PARTS.items():
            if all(re.match(pattern, key) for key in header.shapes):
                what, remedy = name, cure
                break
    if re.search(r"-\d{5}-of-\d{5}$", header.file.stem):
        what, remedy = "one shard of a model", "give the folder with all shards and a model_index.json"
    elif not what and _trained_as_lora(header) and not any(header.find(row.mark) for row in FAMILIES.values()):
        what, remedy = "a LoRA", FUSE
    elif not header.shapes:
        what, remedy = "a file without a tensor", "give another file"
    elif not what and len(header.shapes) <= 3 and all(len(shape) <= 2 for shape in header.shapes.values()):
        what, remedy = "a textual inversion, which adds a word to a model", BASE
    if what:
        raise WeightsError(f"expected a whole model, got {what}: {header.file}; {remedy}")


def _trained_as_lora(header: Header) -> bool:
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    return "lora" in architecture or "ss_network_module" in header.metadata


def check_numbers(header: Header) -> None:
    """Refuse numbers that stand for others: only floating point, and float8 with one factor a matrix, are understood.

    Raises:
        WeightsError: With the tensor that is not understood.
    """
    odd = header.find(QUANTISED.pattern)
    for name, dtype in header.dtypes.items():
        found = SCALED.match(name)
        if found and len([side for side in header.shapes[name] if side != 1]) > 0:
            odd = odd or name
        if dtype in ("U8", "I8", "F4", "F8_E8M0") and len(header.shapes[name]) > 1:
            odd = odd or name
    if odd:
        raise WeightsError(
            f"expected floating-point weights, got quantised ones: {odd} in {header.file}; "
            "give the float16, bfloat16 or float32 file of the same model"
        )


def family_of(header: Header) -> str:
    """Return the row of `FAMILIES` whose single file this is.

    Raises:
        WeightsError: If it is the file of no family, or of a look-alike.
    """
    refuse_strangers(header)
    check_numbers(header)
    for mark, meaning in LOOKALIKES.items():
        if header.find(mark):
            raise WeightsError(
                f"expected a model that text alone conditions, got {meaning}: {header.file}; name its base model"
            )
    found = next((key for key, family in FAMILIES.items() if header.find(family.mark)), None)
    if found is None:
        known = ", ".join(family.title for family in FAMILIES.values())
        name = stock_name(header)
        what = "of no known layout" if name == "v1" else f"of {name}"
        raise WeightsError(f"expected a file of {known}, got one {what}: {header.file}; name one of those")
    family = FAMILIES[found]
    entry = header.find(family.entry)
    channels = header.shapes[entry][1] if entry else family.channels
    if channels != family.channels:
        raise WeightsError(f"{wrong_channels(channels, family.channels)}: {header.file}; name its base model")
    if "kontext" in f"{header.file.name} {' '.join(header.metadata.values())}".lower():
        raise WeightsError(
            f"expected a model that text alone conditions, got what names itself FLUX.1 Kontext: {header.file}; "
            "name FLUX.1-dev (if the name alone is wrong, rename the file)"
        )
    return found


def wrong_channels(got: int, expected: int) -> str:
    """Say what a denoiser with other input channels is, without the place and the remedy."""
    what = CHANNELS.get(got, "one that is told more than text")
    return f"expected a text-to-image model with {expected} input channels, got {what} with {got} input channels"


CHANNELS = {
    5: "a depth model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
    128: "a FLUX depth or canny model",
    384: "a FLUX fill model",
}
# Names that mean more than the weights beside them.
LOOKALIKES = {
    r"conditioner\.embedders\.0\.model\.": "Stable Diffusion XL's refiner",
    r"edm_(mean|std)$": "a Playground 2.5 file, whose noise is EDM's",
    r"edm_vpred\.": "a CosXL file, whose noise is EDM's",
    r"(model\.diffusion_model\.)?distilled_guidance_layer\.": "Chroma",
    r"(model\.diffusion_model\.)?(single_stream_modulation|double_stream_modulation_img)\.": "FLUX.2",
    r".*\.fuser\.": "a GLIGEN model, which is told boxes",
    r"embedder\.|cond_stage_model\.(?!model|transformer|logit_scale|text_projection)": (
        "a model with another text or picture encoder"
    ),
}


def stock_name(header: Header) -> str:
    """Return what diffusers calls a single file; "v1" also stands for what it does not know."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        return infer_diffusers_model_type(_empty(header))
    except (KeyError, ValueError, RuntimeError, IndexError, UnboundLocalError):  # it guesses from a part of the names
        return "v1"


def _empty(header: Header) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}


class _Origins(TorchFunctionMode):
    """Notes on every tensor the names that it is made from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        origins = {name for part in tree_leaves((args, kwargs)) for name in getattr(part, "origins", ())}
        for part in tree_leaves(result):
            if origins and isinstance(part, Tensor):
                part.origins = origins | getattr(part, "origins", set())  # type: ignore[attr-defined]
        return result


def unused(header: Header, family: Family, configs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names in a single file that diffusers would drop without a word, and that are weights.

    diffusers' converters run on tensors without data, and each answer says which names it is made from.

    Arguments:
        configs: The configuration of the denoiser and of the autoencoder.

    Raises:
        WeightsError: If what the layout needs is missing.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    loose = re.compile("|".join([family.loose, LOOSE, *(p for k, p in family.held.items() if k.startswith("text"))]))
    left = {name for name in header.shapes if not loose.match(name)}
    for part, kind in (family.denoiser, ("vae", "AutoencoderKL")):
        if header.find(family.held[part]) is None:
            continue
        tensors = _empty(header)
        for name, tensor in tensors.items():
            tensor.origins = {name}  # type: ignore[attr-defined]
        convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        try:
            with _Origins():
                converted = convert(checkpoint=tensors, config=configs[part])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"expected complete weights, got {header.file} whose {part} cannot be read: {first_line(error)}; "
                f"{DOES_NOT_FIT}"
            ) from error
        left -= {name for tensor in converted.values() for name in getattr(tensor, "origins", ())}
    return sorted(left)


LOOSE = rf"{SCALED.pattern}|.*\.(scale_input|input_scale)$|(.*\.)?scaled_fp8$"


def read_tensors(header: Header, pattern: str) -> dict[str, Tensor]:
    """Read the tensors of a single file whose names a pattern matches from the start.

    float8 that is stored with a factor becomes the float32 that it stands for.
    """
    from safetensors import safe_open

    with safe_open(header.file, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in header.shapes if re.match(pattern, name)}
    scales = {found["layer"]: tensors[name] for name in tensors if (found := SCALED.match(name))}
    for layer, scale in scales.items():
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float() * scale.float()
    return {name: tensor for name, tensor in tensors.items() if not re.match(LOOSE, name)}


def said(header: Header) -> dict[str, Any]:
    """Return what a file says of its noise, which outranks the configuration: entries of a scheduler's.

    Read from names without meaning as weights (`v_pred`, `ztsnr`), from the .yaml of the original program beside the
    file, and from the metadata (modelspec.prediction_type), in this order.

    Raises:
        WeightsError: If the .yaml cannot be read, or says that the noise is another family's.
    """
    found = _metadata_says(header.metadata) | _yaml_says(header.file.with_suffix(".yaml"))
    if "v_pred" in header.shapes:
        found["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        found["rescale_betas_zero_snr"] = True
    return found


def _metadata_says(metadata: dict[str, str]) -> dict[str, Any]:
    said = metadata.get("modelspec.prediction_type", "").lower()
    types = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    return {"prediction_type": types[said]} if said in types else {}


def _yaml_says(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        model = yaml.safe_load(path.read_text())["model"]
        params = model["params"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise WeightsError(
            f"expected the configuration of a model beside its file, got {path}: {first_line(error)}; "
            "move it away if it belongs to something else"
        ) from error
    found: dict[str, Any] = {}
    scaling = str(((params.get("denoiser_config") or {}).get("params") or {}).get("scaling_config"))
    if "EDM" in scaling:
        raise WeightsError(f"expected variance-preserving noise, got EDM's in {path}; name another model")
    said = params.get("parameterization")
    if said is None and str(model.get("target")).endswith("LatentDiffusion"):
        said = "eps"  # what the original program takes for granted
    if said == "v" or "VScaling" in scaling:
        found["prediction_type"] = "v_prediction"
    elif said == "eps" or "EpsScaling" in scaling:
        found["prediction_type"] = "epsilon"
    named = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
    return found | {new: params[old] for old, new in named.items() if old in params}
