"""What `protect` takes when no model is named."""

import json
from pathlib import Path

import pytest
from command_line import cli
from latent_spaces import write

from antidiffusion.cli.shared import LATENTS_NOTE
from antidiffusion.models.latents import FOLDER


@pytest.fixture
def spaces(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write(here / "spaces", {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16})
    monkeypatch.setenv(FOLDER, str(root))
    return root


def test_without_a_model_pictures_are_protected_in_latent_spaces(spaces: Path) -> None:
    run = cli("protect", "photos/a.png", "--steps", "4", "--side", "64")
    assert run.code == 0, run.err
    assert LATENTS_NOTE in run.err
    assert "latents    moved by this share of their variance (random signs): sd " in run.out
    card = json.loads(Path("photos/a-protected.png.json").read_text())
    assert (card["recipe"]["name"], card["model"]["name"]) == ("latents", "latents")
    assert card["budget"]["measured"] <= 8
    assert list(card["effect"]["latent_shift"]) == ["sd", "sdxl", "sd3", "flux"]


def test_some_spaces_a_preset_and_a_forecast(spaces: Path) -> None:
    run = cli("protect", "photos/a.png", "--model", "latents:sd+flux", "--quick", "--side", "64", "--dry-run")
    assert run.code == 0, run.err
    assert "for 1 picture(s)" in run.out
    assert not Path("photos/a-protected.png").exists()


def test_other_recipes_and_attacks_want_a_whole_model(spaces: Path) -> None:
    run = cli("protect", "photos/a.png", "--recipe", "aspl", "--side", "64")
    assert run.code in (1, 2)
    assert "expected a whole model for the recipe aspl, got latent spaces" in run.err
    for model in ("latents", str(spaces)):
        run = cli("sample", "a cat", "-o", "x.png", "--model", model)
        assert run.code == 2
        assert "encoders only" in run.err


def test_offline_says_what_to_do(here: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    run = cli("protect", "photos/a.png")
    assert run.code == 2
    assert "expected the encoder madebyollin/taesd" in run.err
    assert not Path("photos/a-protected.png").exists()
