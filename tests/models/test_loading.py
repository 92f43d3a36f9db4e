import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Checkpoint
from safetensors.torch import load_file, save_file
from test_weights import SENTENCE

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
