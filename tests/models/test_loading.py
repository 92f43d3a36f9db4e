import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import cli
from conftest import Checkpoint
from model_skeletons import SENTENCE, change, edit, write_folder

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
