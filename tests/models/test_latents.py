"""Latent spaces: where their encoders come from, and what they say of a picture."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from latent_spaces import write
from safetensors.torch import load_file, save_file

from antidiffusion.models.latents import FOLDER, LatentSpaces, load_latents, shift
from antidiffusion.models.weights import WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("spaces"), {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16})


@pytest.fixture
def spaces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LatentSpaces:
    monkeypatch.setenv(FOLDER, str(folder))
    return load_latents("latents", device=CPU)


def test_all_spaces_or_those_named(spaces: LatentSpaces) -> None:
    assert list(spaces.encoders) == ["sd", "sdxl", "sd3", "flux"]
    assert list(load_latents("latents:flux+sd", device=CPU).encoders) == ["flux", "sd"]
    with pytest.raises(WeightsError, match="expected latent spaces of sd, sdxl, sd3, flux, got 'sd5'"):
        load_latents("latents:sd5", device=CPU)


def test_a_folder_holds_spaces_or_is_one(folder: Path) -> None:
    assert sorted(load_latents(str(folder), device=CPU).encoders) == ["flux", "sd", "sd3", "sdxl"]
    assert list(load_latents(str(folder / "sd3"), device=CPU).encoders) == ["sd3"]


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"madebyollin/taesd .*connect once, set ANTIDIFFUSION_LATENTS"):
        load_latents("latents", device=CPU, offline=True)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(WeightsError, match="a folder sd with an AutoencoderTiny"):
        load_latents("latents", device=CPU)


@pytest.mark.parametrize("damage", ["missing", "infinite", "cut"])
def test_a_damaged_encoder_is_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    AutoencoderTiny.from_pretrained(folder / "sd").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.startswith("encoder"))
    if damage == "missing":
        del state[name]
    if damage == "infinite":
        state[name][0] = float("inf")
    save_file(state, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WeightsError, match=str(tmp_path)):
        load_latents(str(tmp_path), device=CPU)


def test_latents_are_diffusers_own(spaces: LatentSpaces, folder: Path, x: torch.Tensor) -> None:
    for name in spaces.encoders:
        stock = AutoencoderTiny.from_pretrained(folder / name)
        with torch.no_grad():
            assert torch.allclose(spaces.encode(x, name), stock.encode(2 * x - 1).latents, atol=1e-5)
        assert (
            json.loads((folder / name / "config.json").read_text())["latent_channels"]
            == spaces.encode(x, name).shape[1]
        )


def test_a_shift_is_a_share_of_the_variance(spaces: LatentSpaces, x: torch.Tensor) -> None:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shift(z, 3 * z - 2 * z.mean((1, 2, 3), keepdim=True)), torch.full((2,), 4.0))
    assert set(spaces.shifts(x, x).values()) == {0.0}
    assert min(spaces.shifts(x, 1 - x).values()) > 0


def test_the_hash_tells_spaces_apart(spaces: LatentSpaces, folder: Path) -> None:
    assert spaces.sha256 == load_latents("latents", device=CPU).sha256
    assert len({load_latents(f"latents:{names}", device=CPU).sha256 for names in ("sd", "sdxl", "sd+sdxl")}) == 3
