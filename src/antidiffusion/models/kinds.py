"""What kind of model a location holds, from configurations and headers alone, before a weight is read."""

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidiffusion.models.families import FAMILIES, Family
from antidiffusion.models.headers import (
    DOES_NOT_FIT,
    Header,
    WeightsError,
    check_numbers,
    family_of,
    read_header,
    read_json,
    said,
    unused,
    wrong_channels,
)
from antidiffusion.models.weights import Location, has_weights, weight_files

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # on a variance-preserving path
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PRECISION = {"force_upcast"}  # says what dtype to compute in; FLUX.2's has it, and its class does not know it
# Parts of a folder that condition nothing and are never loaded.
IDLE = {"safety_checker", "feature_extractor", "image_encoder", "watermark", "scheduler"}


@dataclass(frozen=True)
class Kind:
    """A model that is understood, and not yet read.

    Arguments:
        location: Where it is.
        family: Key of `FAMILIES`.
        configs: Part -> its config.json; only parts that there are.
        scheduler: The scheduler's configuration: `_class_name`, every entry that its class has, and what a single file
            says of its noise.
        size: Side in pixels of the square that the model was trained on.
        tokenizers: Part -> class.
        header: Of the single file, or None.
        told: Entries of model_index.json that the family's `build` takes.
    """

    location: Location
    family: str
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    size: int
    tokenizers: dict[str, str]
    header: Header | None
    told: dict[str, Any]

    @property
    def row(self) -> Family:
        return FAMILIES[self.family]


def classify(location: Location) -> Kind:
    """Understand a model, before a weight is read.

    Raises:
        WeightsError: If anything in it is not understood, with what it is and what to do.
    """
    folder = location.folder
    index = read_json(folder / "model_index.json")
    key = _family(index, folder)
    row = FAMILIES[key]
    header = read_header(location.file) if location.file else None
    if header and (found := family_of(header)) != key:
        raise WeightsError(
            f"expected the configuration of {FAMILIES[found].title} for {header.file}, got that of {row.title} in "
            f"{folder}; name another with --model-config"
        )
    present = _parts(index, row, folder)
    for part in [part for part in row.optional if part in row.encoders and part in present]:
        if not (header and header.find(row.held[part])) and not has_weights(folder / part):
            warnings.warn(f"{folder} names a {part} and has none; the model does without, as it may", stacklevel=2)
            present = [name for name in present if name not in (part, part.replace("text_encoder", "tokenizer"))]
    configs = {part: read_json(folder / part / "config.json") for part in present if not part.startswith("tokenizer")}
    for part, config in configs.items():
        _check_part(part, config, row, folder / part)
    _check_channels(configs, row, folder)
    try:
        wrong = row.widths(configs)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"expected complete configurations, got {folder} without {error}; {DOES_NOT_FIT}") from error
    if wrong:
        raise WeightsError(f"expected parts that belong together, got {wrong} in {folder}; name the base model")
    if header and (left := unused(header, row, configs)):
        raise WeightsError(
            f"expected a file that is understood whole, got {len(left)} tensors in {header.file} that nothing uses, "
            f"the first of them {left[0]}; give a file without what was added to it"
        )
    for part in configs:
        if not (header and header.find(row.held[part])):
            for file in weight_files(folder / part):
                check_numbers(read_header(file))
    scheduler = _scheduler(folder, header, row)
    return Kind(
        location,
        key,
        configs,
        scheduler,
        _size(configs, row, folder),
        {p: index[p][1] for p in present if p.startswith("tokenizer")},
        header,
        {entry: index[entry] for entry in row.told if entry in index},
    )


def _family(index: Mapping[str, Any], folder: Path) -> str:
    pipeline = index.get("_class_name")
    pipeline = pipeline[-1] if isinstance(pipeline, list) and pipeline else pipeline
    for key, row in FAMILIES.items():
        if pipeline in row.pipelines:
            return key
    known = ", ".join(row.title for row in FAMILIES.values())
    raise WeightsError(
        f"expected a model of {known} that text alone conditions, got a {pipeline}: {folder}; "
        "name one of those as the surrogate"
    )


def _named(index: Mapping[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _parts(index: Mapping[str, Any], row: Family, folder: Path) -> list[str]:
    """Return the parts that there are, each of a class that is understood."""
    if index.get("requires_aesthetics_score") or (
        _named(index, "text_encoder_2") and "text_encoder" in row.encoders and not _named(index, "text_encoder")
    ):
        raise WeightsError(
            f"expected a base model, got a refiner or another model without its first text encoder: {folder}; "
            "name the base model that it refines"
        )
    known: dict[str, tuple[str, ...]] = {row.denoiser[0]: (row.denoiser[1],), "vae": (row.vae,)}
    known |= {part: (kind,) for part, kind in row.encoders.items()} | dict(row.tokenizers)
    for part, kinds in known.items():
        name = _named(index, part)
        if name not in kinds and not (name is None and part in row.optional):
            raise WeightsError(
                f"expected {part} of {kinds[0]} in a model of {row.title}, got {name or 'none'} in {folder}; "
                "name a model without the other part"
            )
    for part in index:
        if not part.startswith("_") and part not in known and part not in IDLE and (name := _named(index, part)):
            raise WeightsError(
                f"expected a model that text alone conditions, got one with {part} of {name} in {folder}; "
                "name the base model"
            )
    return [part for part in known if _named(index, part)]


def _check_part(part: str, config: Mapping[str, Any], row: Family, folder: Path) -> None:
    if "quantization_config" in config:
        raise WeightsError(
            f"expected floating-point weights, got quantised ones by {folder / 'config.json'}; "
            "give the float16, bfloat16 or float32 folder of the same model"
        )
    library, name = row.class_of(part)
    if library == "transformers":
        return
    import diffusers

    if (got := config.get("_class_name", name)) != name:
        raise WeightsError(f"expected {part} of {name}, got {got} in {folder}; name the base model")
    if part == row.denoiser[0]:
        for entry, (plain, meaning) in row.plain.items():
            if (value := config.get(entry, plain)) != plain:
                raise WeightsError(
                    f"expected a model that text alone conditions, got {meaning}: {entry} is {value!r} in {folder}; "
                    "name the base model that it was made from"
                )
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    for entry, value in config.items():
        if entry not in signature and entry not in PRECISION and not entry.startswith("_") and value:
            raise WeightsError(
                f"expected entries that diffusers {diffusers.__version__} knows, got {entry} = {value!r} in {folder}; "
                "update diffusers, or name another model"
            )


def _check_channels(configs: Mapping[str, Mapping[str, Any]], row: Family, folder: Path) -> None:
    denoiser, vae = configs[row.denoiser[0]], configs["vae"]
    expected = vae.get("latent_channels", 4) * row.patch
    if (got := denoiser.get("in_channels", row.channels)) != expected:
        raise WeightsError(f"{wrong_channels(got, expected)}: {folder}; name the base model")
    if (out := denoiser.get("out_channels") or got) != got:
        raise WeightsError(
            f"expected as many output as input channels, got {out} and {got} in {folder}; name a model that predicts "
            "no variance"
        )
    if sides := {vae.get(name, 3) for name in ("in_channels", "out_channels")} - {3}:
        raise WeightsError(
            f"expected an autoencoder of pictures with 3 channels, got {max(sides)} in {folder}; name the base model"
        )


def _scheduler(folder: Path, header: Header | None, row: Family) -> dict[str, Any]:
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = config.get("_class_name")
    if name not in row.schedulers:
        raise WeightsError(
            f"expected the noise of {row.title} (as {min(row.schedulers)} has it), got {name} in {path}; "
            "name a model that was trained with that noise"
        )
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
        if parameter.default is not parameter.empty
    }
    config = defaults | config | (said(header) if header else {})
    try:
        wrong = _straight(config) if "Flow" in name else _preserving(config)
    except TypeError as error:
        raise WeightsError(f"expected numbers in a noise schedule, got {path}: {error}; {DOES_NOT_FIT}") from error
    if "Flow" not in name:
        config["prediction_type"] = config.get("prediction_type") or "epsilon"
    if wrong:
        raise WeightsError(f"{wrong} in {path}; name another model, or correct the entry if it is wrong")
    return config


def _preserving(config: Mapping[str, Any]) -> str | None:
    if config.get("use_flow_sigmas"):
        return "expected variance-preserving noise, got a straight path (use_flow_sigmas)"
    if config.get("timestep_type", "discrete") != "discrete":
        return f"expected steps of training, got EDM's continuous noise (timestep_type {config['timestep_type']!r})"
    prediction = config.get("prediction_type") or "epsilon"
    if prediction not in PREDICTIONS:
        return f"expected a prediction type of {', '.join(PREDICTIONS)}, got {prediction!r}"
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        return "expected velocity with a last step of noise alone (rescale_betas_zero_snr), got 'epsilon'"
    if (trained := config.get("trained_betas")) is not None:
        return None if all(0 < beta < 1 for beta in trained) else "expected betas in (0, 1), got others (trained_betas)"
    if absent := {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps"} - config.keys():
        return f"expected a whole schedule, got none of {', '.join(sorted(absent))}"
    if config["beta_schedule"] not in BETAS:
        return f"expected betas of {', '.join(BETAS)}, got {config['beta_schedule']!r}"
    low, high = config["beta_start"], config["beta_end"]
    return None if 0 < low <= high < 1 else f"expected rising betas in (0, 1), got {low} to {high}"


def _straight(config: Mapping[str, Any]) -> str | None:
    if config.get("invert_sigmas"):
        return "expected a path from the picture to noise, got the reverse (invert_sigmas)"
    return None if config.get("shift", 1.0) > 0 else f"expected a positive shift, got {config['shift']}"


def _size(configs: Mapping[str, Mapping[str, Any]], row: Family, folder: Path) -> int:
    """Return the side in pixels of the square with the area that the model was trained on."""
    denoiser, vae = configs[row.denoiser[0]], configs["vae"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = factor * 2 ** (len(denoiser.get("block_out_channels", (1, 1))) - 1)
    for value, unit in ((denoiser.get("sample_size"), factor), (vae.get("sample_size"), 1)):
        sides: list[Any] = value if isinstance(value, list) else [value] * 2
        if len(sides) == 2 and all(isinstance(side, int) and side * unit >= MIN_SIDE for side in sides):
            side = math.sqrt(sides[0] * sides[1]) * unit
            return int(side) if sides[0] == sides[1] else max(1, round(side / multiple)) * multiple
    if row.side:
        return row.side
    raise WeightsError(
        f"expected the size that the model was trained on, got sample_size "
        f"{denoiser.get('sample_size')!r} in {folder / row.denoiser[0]}; write its side in latent positions there, "
        "for example 64 for 512 pixels"
    )


MIN_SIDE = 16  # pixels; the default of an autoencoder that does not say is 32
