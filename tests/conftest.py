"""Models of Stable Diffusion's architectures at reduced width, with random weights, in both layouts."""

import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_layout
from command_line import draw
from hypothesis import settings
from safetensors.torch import load_file, save_file
from sd_layout import original_state, rename

import antidiffusion.card
import antidiffusion.cli.shared
import antidiffusion.models.latents
import antidiffusion.models.weights
from antidiffusion.models.base import Surrogate

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")

TOKENIZER = Path(antidiffusion.models.weights.__file__).parents[1] / "mini" / "model" / "tokenizer"
VERSION_1 = {  # UNet2DConditionModel's defaults are Stable Diffusion 1.x
    "block_out_channels": (32, 64, 64, 64),
    "norm_num_groups": 16,
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
VERSION_2 = VERSION_1 | {"cross_attention_dim": 64, "attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True}
VERSION_XL = VERSION_1 | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 32 + 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64 + 6 * 8,
}
ARCHITECTURES = {  # UNet, widths of the text encoders, prediction type, scheduler of the published folder
    "sd15": (VERSION_1, [32], "epsilon", "PNDMScheduler"),
    "sd21-base": (VERSION_2, [64], "epsilon", "PNDMScheduler"),
    "sd21": (VERSION_2, [64], "v_prediction", "DDIMScheduler"),
    "sdxl": (VERSION_XL, [32, 64], "epsilon", "EulerDiscreteScheduler"),
}


@dataclass(frozen=True)
class Checkpoint:
    """One model in diffusers' layout and in the original one."""

    name: str
    folder: Path
    file: Path


def build_pipeline(name: str) -> Any:
    """Build a pipeline with random weights."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    config, widths, prediction, scheduler = ARCHITECTURES[name]
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedule |= {"timestep_spacing": "leading"}  # as published; of these classes only Euler's has another default
    if scheduler == "DDIMScheduler":
        schedule |= {"clip_sample": False, "set_alpha_to_one": False}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**config),
            "scheduler": getattr(diffusers, scheduler)(**schedule, prediction_type=prediction),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(32, 32, 64, 64),
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
                norm_num_groups=16,
                sample_size=64,
                force_upcast=name == "sdxl",
            ),
        }
        for suffix, width in zip(("", "_2"), widths, strict=False):
            options = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                hidden_act="gelu" if width == 64 else "quick_gelu",
            )
            parts[f"text_encoder{suffix}"] = (CLIPTextModelWithProjection if suffix else CLIPTextModel)(options)
            parts[f"tokenizer{suffix}"] = tokenizer
    for layer in (module for key, module in parts["unet"].named_modules() if key.endswith(("to_q", "to_k"))):
        layer.weight.data *= 4  # maps that are not uniform
    if len(widths) == 2:
        return diffusers.StableDiffusionXLPipeline(**parts)
    extras = ("safety_checker", "feature_extractor")
    return diffusers.StableDiffusionPipeline(**parts, **dict.fromkeys(extras), requires_safety_checker=False)


def publish(folder: Path) -> None:
    """Give a folder what the published Stable Diffusion 1.5 has: parts we never load, and old names of weights."""
    index = folder / "model_index.json"
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    checker |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | checker))
    text, vae = folder / "text_encoder" / "model.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = {f"text_model.{key}": value for key, value in load_file(text).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(state, text, {"format": "pt"})
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({rename(key, old): value for key, value in load_file(vae).items()}, vae, {"format": "pt"})


def write(name: str, root: Path) -> Checkpoint:
    """Save a pipeline in both layouts."""
    pipeline = build_pipeline(name)
    checkpoint = Checkpoint(name, root / name, root / f"{name}.safetensors")
    pipeline.save_pretrained(checkpoint.folder)
    if name == "sd15":
        publish(checkpoint.folder)
    save_file(original_state(pipeline), checkpoint.file)
    return checkpoint


@pytest.fixture(scope="session", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Every architecture in turn."""
    return write(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def surrogate(checkpoint: Checkpoint) -> Surrogate:
    """Every architecture in turn, from its folder, in float32."""
    return Surrogate.from_pretrained(str(checkpoint.folder))


@pytest.fixture(scope="session", params=transformer_layout.ARCHITECTURES)
def joint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    """Every joint transformer in turn, from its folder, in float32."""
    return Surrogate.from_pretrained(str(write_joint(request.param, tmp_path_factory.mktemp("joint"))))


def write_joint(name: str, root: Path) -> Path:
    """Save a joint transformer as a folder."""
    transformer_layout.build_pipeline(name, TOKENIZER).save_pretrained(root / name)
    return root / name


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One checkpoint for tests of what all have in common."""
    return write("sd15", tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def tiny(sd15: Checkpoint) -> Surrogate:
    """The fast one: Stable Diffusion 1.5's architecture at 64 x 64 pixels."""
    return Surrogate.from_pretrained(str(sd15.folder))


@pytest.fixture(scope="session")
def mini() -> Surrogate:
    """The embedded model."""
    return Surrogate.from_pretrained("mini")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """A smooth picture with some texture, `(64, 96, 3)` uint8."""
    y, x = np.mgrid[:64, :96]
    texture = np.random.default_rng(0).integers(0, 40, (64, 96, 3))
    return (np.stack([2 * x, 3 * y, x + y], -1) + texture).clip(0, 255).astype(np.uint8)


@pytest.fixture
def x() -> torch.Tensor:
    """Two pictures `(2, 3, 64, 64)` in [0, 1]."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection and every function that asks the hub fail."""
    import huggingface_hub

    assert huggingface_hub.hf_hub_download  # its names are imported when they are first asked for

    def blocked(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was asked for {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    fetching = {"hf_hub_download", "model_info", "list_repo_files", "list_repo_tree", "file_exists", "repo_info"}
    libraries = ("huggingface_hub", "diffusers", "transformers")
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in libraries]:
        for name in fetching & vars(module).keys():
            monkeypatch.setattr(module, name, blocked)
    assert huggingface_hub.hf_hub_download is blocked


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photos/a.png` and `photos/b.png`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 1)
    Path("photos").mkdir()
    draw("photos/a.png", 0)
    draw("photos/b.png", 1, height=100)
    return tmp_path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photos/a.jpg`, `photos/trip/b.PNG` and things that are no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 1)
    folder = Path("photos")
    (folder / "trip").mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "trip/b.PNG")):
        draw(folder / name, seed)
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def loaded(here: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`here`, and whatever model is asked for, a tiny one is there already."""
    monkeypatch.setattr(antidiffusion.cli.shared, "load_surrogate", lambda model, *options, **named: tiny)
    monkeypatch.setattr(antidiffusion.models.latents, "names_latents", lambda model: False)  # it is a whole one
    return here


@pytest.fixture
def unused(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`here`, and no model may be loaded: the mistake must be found before."""

    def refuse(*options: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(antidiffusion.cli.shared, "load_surrogate", refuse)
    Path("empty").mkdir()
    return here
