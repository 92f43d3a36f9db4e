"""Every part is read whole, finite and from where the kind says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sd_layout
import torch
import transformer_layout
from conftest import TOKENIZER, Checkpoint, build_pipeline
from model_skeletons import SENTENCE, change, edit
from safetensors.torch import load_file, save_file

from antidiffusion.models.base import Surrogate
from antidiffusion.models.headers import WeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(sd15: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a good folder, to damage."""
    return Path(shutil.copytree(sd15.folder, tmp_path / "model"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


DAMAGE = {
    "truncated unet": lambda f: cut(f / "unet" / WEIGHTS),
    "truncated vae": lambda f: cut(f / "vae" / WEIGHTS),
    "truncated text encoder": lambda f: cut(f / "text_encoder" / "model.safetensors"),
    "empty unet": lambda f: (f / "unet" / WEIGHTS).write_bytes(b""),
    "no unet": lambda f: shutil.rmtree(f / "unet"),
    "no vae weights": lambda f: (f / "vae" / WEIGHTS).unlink(),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder"),
    "no tokenizer": lambda f: shutil.rmtree(f / "tokenizer"),
    "no scheduler": lambda f: shutil.rmtree(f / "scheduler"),
    "pickled unet": lambda f: pickle(f / "unet" / WEIGHTS),
    "half a configuration": lambda f: cut(f / "unet" / "config.json"),
    "wrong shapes": lambda f: edit(f / "unet" / "config.json", cross_attention_dim=48),
    "half an index": lambda f: cut(f / "model_index.json"),
    "missing tensors": lambda f: save_file(
        dict(list(load_file(f / "unet" / WEIGHTS).items())[:-5]), f / "unet" / WEIGHTS, {"format": "pt"}
    ),
    "missing text tensors": lambda f: save_file(
        dict(list(load_file(f / "text_encoder" / "model.safetensors").items())[:-5]),
        f / "text_encoder" / "model.safetensors",
        {"format": "pt"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder(folder: Path, damage: str, no_network: None) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "missing tensors", "a LoRA", "other architecture"])
def test_a_damaged_single_file(sd15: Checkpoint, tmp_path: Path, damage: str, no_network: None) -> None:
    file, state = tmp_path / "model.safetensors", load_file(sd15.file)
    if damage == "missing tensors":
        state = {key: value for key, value in state.items() if "input_blocks.4" not in key}
    elif damage == "a LoRA":
        state = {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(4, 32)}
    elif damage == "other architecture":
        state = {key.replace("model.diffusion_model.", "double_blocks."): value for key, value in state.items()}
    save_file(state, file)
    if damage == "truncated":
        cut(file)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(file), config=str(sd15.folder))
    assert str(file) in str(error.value)


def spoiled(value: float) -> Any:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return spoil


NUMBERS = {  # part -> file, tensor
    "unet": (f"unet/{WEIGHTS}", "mid_block.resnets.0.conv1.weight"),
    "vae": (f"vae/{WEIGHTS}", "decoder.conv_out.bias"),
    "text_encoder": ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", NUMBERS)
def test_a_weight_that_is_no_number(part: str, value: float, folder: Path) -> None:
    file, name = NUMBERS[part]
    change(folder / file, **{name: spoiled(value)})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(folder))
    found = "NaN" if value != value else "infinity"
    assert all(word in str(error.value) for word in [f"got {found} in", name.split(".", 1)[1], part, "another file"])
    assert "download" not in str(error.value)


def test_a_weight_that_is_no_number_in_a_single_file(sd15: Checkpoint, tmp_path: Path) -> None:
    file = Path(shutil.copy(sd15.file, tmp_path / "model.safetensors"))
    change(file, **{"model.diffusion_model.out.2.bias": spoiled(float("nan"))})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(file), config=str(sd15.folder))
    assert "got NaN in conv_out.bias of the unet" in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(("part", "name"), [("unet", "conv_in.extra"), ("text_encoder", "text_model.extra")])
def test_tensors_that_are_left_over(part: str, name: str, folder: Path) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    change(file, **{name: lambda _: torch.ones(2)})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(folder))
    assert "left over" in str(error.value) and "extra" in str(error.value) and "download" not in str(error.value)


def test_a_folder_with_half_precision_alone(sd15: Checkpoint, tmp_path: Path, no_network: None) -> None:
    build_pipeline("sd15").to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    half, full = (Surrogate.from_pretrained(str(path)) for path in (tmp_path / "fp16", sd15.folder))
    assert half.dtype == torch.float32
    found, expected = half.denoiser.state_dict(), full.denoiser.state_dict()
    assert all(torch.equal(found[name], expected[name].half().float()) for name in expected)


def test_float8_with_a_factor(sd15: Checkpoint, tmp_path: Path) -> None:
    file, state, expected = tmp_path / "model.safetensors", load_file(sd15.file), {}
    marks: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name in [name for name in state if name.startswith("model.diffusion_model") and state[name].ndim == 2]:
        scale = state[name].abs().max() / 448
        small = (state[name] / scale).to(torch.float8_e4m3fn)
        state[name], expected[name] = small, small.float() * scale
        if name.endswith("weight"):
            marks[name.replace("weight", "scale_weight")] = scale.reshape(1)
    save_file(state | marks, file)
    scaled = Surrogate.from_pretrained(str(file), config=str(sd15.folder))
    save_file(state | expected, file)
    assert scaled.sha256 == Surrogate.from_pretrained(str(file), config=str(sd15.folder)).sha256
    assert scaled.sha256 != Surrogate.from_pretrained(str(sd15.file), config=str(sd15.folder)).sha256


def test_a_single_file_without_an_autoencoder_takes_the_configurations(sd15: Checkpoint, tmp_path: Path) -> None:
    state = {name: value for name, value in load_file(sd15.file).items() if not name.startswith("first_stage_model")}
    save_file(state, tmp_path / "model.safetensors")
    whole = Surrogate.from_pretrained(str(sd15.folder))
    assert (
        Surrogate.from_pretrained(str(tmp_path / "model.safetensors"), config=str(sd15.folder)).sha256 == whole.sha256
    )


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux-dev"])
def test_transformers(name: str, tmp_path: Path, no_network: None) -> None:
    pipeline = transformer_layout.build_pipeline(name, TOKENIZER)
    pipeline.save_pretrained(tmp_path / name)
    surrogate = Surrogate.from_pretrained(str(tmp_path / name))
    state = pipeline.transformer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in surrogate.denoiser.state_dict().items())
    assert surrogate.size == 64 and len(surrogate.text_encoders) == len(surrogate.tokenizers)
    if name != "flux-dev":
        file = tmp_path / "model.safetensors"
        found = sd_layout.sd3(state) | sd_layout.vae(pipeline.vae)
        if pipeline.text_encoder_3:
            t5 = pipeline.text_encoder_3.state_dict()
            found["text_encoders.t5xxl.transformer.shared.weight"] = t5.pop("shared.weight")
            found |= {f"text_encoders.t5xxl.transformer.{key}": t5[key] for key in t5 if "embed_tokens" not in key}
        save_file(found, file)
        for part in ("transformer", "vae", "text_encoder_3"):  # or it could be the folder's that is loaded
            for weights in (tmp_path / name / part).glob("*.safetensors"):
                weights.unlink()
        single = Surrogate.from_pretrained(str(file), config=str(tmp_path / name))
        assert single.sha256 == surrogate.sha256
