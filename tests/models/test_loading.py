import gc
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sd_layout
import torch
import transformer_layout
from command_line import cli
from conftest import TOKENIZER, Checkpoint, build_pipeline
from model_skeletons import SENTENCE, write_folder
from safetensors.torch import load_file, save_file

from antidiffusion.models.base import Surrogate
from antidiffusion.models.headers import WeightsError
from antidiffusion.models.kinds import Kind, classify
from antidiffusion.models.loading import trial
from antidiffusion.models.weights import Location

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


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def change(file: Path, **tensors: Any) -> None:
    """Change tensors of a file: a function of what is there, or None to leave it out."""
    state = load_file(file)
    for name, function in tensors.items():
        if function is None:
            del state[name]
        else:
            state[name] = function(state.get(name))
    save_file(state, file, {"format": "pt"})


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


@pytest.mark.parametrize(
    ("file", "name", "factor", "words"),
    [
        (f"unet/{WEIGHTS}", "conv_in.weight", 1e6, ["infinity", "unet", "too large for float16", "bfloat16"]),
        (f"vae/{WEIGHTS}", "encoder.conv_in.weight", 1e5, ["autoencoder in float16", "NaN or infinity", "bfloat16"]),
    ],
)
def test_half_precision_that_overflows(file: str, name: str, factor: float, words: list[str], folder: Path) -> None:
    change(folder / file, **{name: lambda tensor: tensor * factor})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(folder), dtype="float16")
    assert all(word in str(error.value) for word in words)
    assert Surrogate.from_pretrained(str(folder), dtype="float32").size == 64


def test_an_answer_that_is_no_number(folder: Path) -> None:
    change(folder / "unet" / WEIGHTS, **{"conv_norm_out.weight": lambda tensor: tensor * 3e38})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        Surrogate.from_pretrained(str(folder))
    assert "from the denoiser in float32" in str(error.value) and "another file" in str(error.value)


def test_a_model_that_no_list_knows_fails_its_trial(tiny: Surrogate) -> None:
    other = replace(tiny, denoiser=tiny.vae.decoder)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        trial(other)
    assert "denoises a latent" in str(error.value) and tiny.name in str(error.value)


def test_the_trial_draws_no_random_number_of_others(tiny: Surrogate) -> None:
    state = torch.get_rng_state()
    trial(tiny)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_a_file_outranks_the_configuration(sd15: Checkpoint, tmp_path: Path) -> None:
    file = Path(shutil.copy(sd15.file, tmp_path / "model.safetensors"))
    change(file, v_pred=lambda _: torch.zeros(1), ztsnr=lambda _: torch.zeros(1))
    schedule = Surrogate.from_pretrained(str(file), config=str(sd15.folder)).schedule
    assert schedule.prediction == "v_prediction"
    signal, _ = schedule(torch.tensor([0, 999]))
    assert signal[0] > 0.99 and signal[1] < 1e-4  # the last step is noise alone
    plain = Surrogate.from_pretrained(str(sd15.file), config=str(sd15.folder)).schedule
    assert plain.prediction == "epsilon" and plain(torch.tensor([999]))[0] > 0.06


def test_the_betas_are_the_folders(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    signal, _ = Surrogate.from_pretrained(str(folder)).schedule(torch.arange(1000))
    torch.testing.assert_close(signal, (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_latents_are_normalised_as_the_folder_says(folder: Path, tiny: Surrogate, x: torch.Tensor) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 3.0, 4.0, 5.0]
    edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    plain, found = tiny.posterior(x), Surrogate.from_pretrained(str(folder)).posterior(x)
    means, stds = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    factor = tiny.vae.config.scaling_factor
    torch.testing.assert_close(found.mean, (plain.mean / factor - means) * factor / stds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, plain.std / stds, rtol=1e-4, atol=1e-6)


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
        found = original_sd3(state) | sd_layout.vae(pipeline.vae)
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


def original_sd3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the original names of a Stable Diffusion 3 or 3.5 transformer."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "transformer_blocks": "joint_blocks",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    found = {}
    for name, value in state.items():
        fused = re.match(r"transformer_blocks\.(\d+)\.(attn2?)\.(to_q|add_q_proj)\.(\w+)$", name)
        if fused:
            block, attention, kind, rest = fused.groups()
            side = "x_block" if kind == "to_q" else "context_block"
            parts = [state[name.replace(kind, kind.replace("_q", f"_{part}"))] for part in "qkv"]
            found[f"joint_blocks.{block}.{side}.{attention}.qkv.{rest}"] = torch.cat(parts)
        elif not re.search(r"attn2?\.(to_[kv]|add_[kv]_proj)\.", name):
            swapped = name.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context"))
            halves = value.chunk(2)[::-1] if swapped else [value]  # the original has the shift first
            found[sd_layout.rename(name, names)] = torch.cat(list(halves))
    return {f"model.diffusion_model.{name}": value.contiguous().clone() for name, value in found.items()}


def test_the_command_refuses_a_model_before_a_picture_is_read(tmp_path: Path, no_network: None) -> None:
    picture = tmp_path / "none.png"
    picture.write_text("no picture")
    refiner = write_folder(tmp_path / "refiner", "sdxl", {"": {"requires_aesthetics_score": True}})
    run = cli("protect", picture, "--model", refiner)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "got a refiner" in run.err and "none.png" not in run.err


def test_a_local_path_never_touches_the_network(checkpoint: Checkpoint, surrogate: Surrogate, no_network: None) -> None:
    for path, config in ((checkpoint.folder, None), (checkpoint.file, str(checkpoint.folder))):
        assert Surrogate.from_pretrained(str(path), config=config).sha256 == surrogate.sha256


def test_the_mini_model_needs_no_hub(mini: Surrogate, no_network: None) -> None:
    assert Surrogate.from_pretrained("mini").sha256 == mini.sha256


def test_a_sampler_never_clips_latents(surrogate: Surrogate) -> None:
    config = surrogate.schedule.scheduler
    assert config["clip_sample"] is False and config["steps_offset"] == 1


def test_the_card_sets_the_learning_rates(folder: Path) -> None:
    stock = Surrogate.from_pretrained(str(folder))
    assert (stock.learning_rate, stock.lora_learning_rate) == (5e-7, 1e-4)
    (folder / "antidiffusion.json").write_text('{"learning_rate": 1e-5, "lora_learning_rate": 1e-3}')
    other = Surrogate.from_pretrained(str(folder))
    assert (other.learning_rate, other.lora_learning_rate) == (1e-5, 1e-3)


def test_parts_are_loaded_without_garbage_collection(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []

    def noting(location: Location) -> Kind:
        collected.append(gc.isenabled())
        return classify(location)

    monkeypatch.setattr("antidiffusion.models.loading.classify", noting)
    Surrogate.from_pretrained(str(checkpoint.folder))
    assert collected == [False] and gc.isenabled()
