"""What each kind of single file is taken for, by its header."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_skeletons as skeletons
import pytest
import torch
from conftest import Checkpoint, write
from model_skeletons import SENTENCE, write_header
from safetensors.torch import load_file, save_file

from antidiffusion.models.families import FAMILIES
from antidiffusion.models.headers import WeightsError, family_of, read_header, read_tensors, said, unused

F = ("F32", (8, 8))
LORA = "fuse it"
REFUSED: dict[str, tuple[list[str], list[str]]] = {  # names in the file, words of the sentence
    "kohya's LoRA": (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"], ["a LoRA", LORA]),
    "diffusers' LoRA": (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], ["a LoRA", LORA]),
    "older LoRA": (["unet.down_blocks.0.processor.to_q_lora.down.weight"], ["a LoRA", LORA]),
    "LoRA of a linear layer": (["unet.mid_block.to_k.lora_linear_layer.up.weight"], ["a LoRA", LORA]),
    "PEFT's LoRA": (["base_model.model.mid.to_q.lora_B.weight"], ["a LoRA", LORA]),
    "FLUX LoRA": (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], ["a LoRA", LORA]),
    "DoRA": (["lora_unet_mid.dora_scale"], ["a LoRA", LORA]),
    "LoHa": (["lora_unet_mid.hada_w1_a", "lora_unet_mid.hada_w1_b"], ["a LoHa adapter", "merge it"]),
    "LoKr": (["lycoris_mid.lokr_w1", "lycoris_mid.lokr_w2_a"], ["a LoKr adapter", "merge it"]),
    "OFT": (["lora_unet_mid.oft_blocks"], ["an OFT or BOFT adapter", "merge it"]),
    "IA3": (["lora_unet_mid.weight", "lora_unet_mid.on_input"], ["an IA3 adapter", "merge it"]),
    "ControlNet": (["control_model.time_embed.0.weight"], ["a ControlNet", "without it"]),
    "diffusers' ControlNet": (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], ["a ControlNet"]),
    "FLUX ControlNet": (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], ["a ControlNet"]),
    "ControlNet-LLLite": (["lllite_unet_input_blocks_4.down.0.weight"], ["a ControlNet"]),
    "T2I-Adapter": (["adapter.body.0.resnets.0.block1.weight"], ["a T2I-Adapter"]),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], ["an IP-Adapter"]),
    "motion module": (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], ["a motion module"]),
    "ESRGAN": (["conv_first.weight", "body.0.rdb1.conv1.weight"], ["an upscaler of pictures"]),
    "autoencoder": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.bias"], ["an autoencoder alone"]),
    "autoencoder, full names": (
        ["first_stage_model.encoder.conv_in.weight"],
        ["an autoencoder alone", "the whole model"],
    ),
    "CLIP": (["text_model.embeddings.position_embedding.weight"], ["a text encoder alone", "the whole model"]),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], ["a text encoder alone"]),
    "diffusers' UNet": (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], ["in diffusers' layout"]),
    "diffusers' FLUX": (["x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"], ["in diffusers' layout"]),
    "UNet without its prefix": (["input_blocks.0.0.weight", "out.2.weight"], ["a denoiser alone"]),
    "textual inversion": (["<cat-toy>"], ["a textual inversion", "without it"]),
    "XL textual inversion": (["clip_g", "clip_l"], ["a textual inversion", "without it"]),
    "nothing": ([], ["a file without a tensor"]),
    "refiner": (
        ["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight", "a", "b"],
        ["refiner", "base model"],
    ),
    "Playground": (["model.diffusion_model.label_emb.0.0.weight", "edm_mean", "edm_std", "a"], ["Playground", "EDM"]),
    "CosXL": (["model.diffusion_model.label_emb.0.0.weight", "edm_vpred.sigma_max", "a", "b"], ["CosXL", "EDM"]),
    "GLIGEN": (
        ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.norm1.bias", "a", "b", "c"],
        ["GLIGEN", "boxes"],
    ),
    "picture encoder": (
        ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.visual.proj", "a", "b"],
        ["another text or picture encoder"],
    ),
    "Chroma": (
        ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.bias", "a", "b"],
        ["Chroma"],
    ),
    "FLUX.2": (["double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight", "a", "b"], ["FLUX.2"]),
    "AuraFlow": (
        [
            "double_layers.0.attn.w2q.weight",
            "double_layers.0.attn.w1q.weight",
            "cond_seq_linear.weight",
            "t_embedder.mlp.0.weight",
        ],
        ["one of auraflow", "Stable Diffusion XL"],
    ),
    "no known layout": (["a.weight", "b.weight", "c.weight", "d.weight"], ["of no known layout"]),
    "4-bit matrices": (["a.weight", "a.weight.absmax", "a.weight.quant_map", "b"], ["quantised", "absmax"]),
    "SVDQuant": (["transformer_blocks.0.qkv_proj.qweight", "a", "b", "c"], ["quantised", "qweight"]),
    "NVFP4": (["model.diffusion_model.x.weight", "model.diffusion_model.x.weight_scale_2", "a", "b"], ["quantised"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_what_it_seems(kind: str, tmp_path: Path) -> None:
    names, words = REFUSED[kind]
    file = write_header(tmp_path / "model.safetensors", dict.fromkeys(names, F))
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        family_of(read_header(file))
    assert all(word in str(error.value) for word in [*words, str(file)])
    assert "download" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "words"),
    [
        ("model-00001-of-00003", {"model.diffusion_model.out.2.bias": F}, {}, ["one shard", "all shards"]),
        ("model", {"a": F, "b": F, "c": F, "d": F}, {"ss_network_module": "networks.lora"}, ["a LoRA", LORA]),
        ("model", {"a": F, "b": F}, {"modelspec.architecture": "stable-diffusion-v1/lora"}, ["a LoRA", LORA]),
        ("flux1-kontext-dev", skeletons.flux_file(), {}, ["Kontext", "rename"]),
        ("model", skeletons.flux_file(), {"modelspec.title": "Flux.1 Kontext"}, ["Kontext", "rename"]),
        ("model", skeletons.flux_file(channels=384), {}, ["a FLUX fill model", "384 input channels"]),
        ("model", skeletons.flux_file(channels=128), {}, ["a FLUX depth or canny model", "128 input channels"]),
        ("model", skeletons.flux_file() | {"img_in.weight_scale": ("F32", (3072,))}, {}, ["quantised", "img_in"]),
        ("model", skeletons.flux_file() | {"img_in.weight": ("U8", (3072, 64))}, {}, ["quantised", "img_in"]),
    ],
)
def test_a_file_by_more_than_its_names(
    name: str, tensors: Any, metadata: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    file = write_header(tmp_path / f"{name}.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        family_of(read_header(file))
    assert all(word in str(error.value) for word in words)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write("sdxl", tmp_path_factory.mktemp("sdxl"))


def copied(file: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Write a file's header, changed, without its numbers."""
    header = read_header(file)
    return write_header(target, change({name: (header.dtypes[name], shape) for name, shape in header.shapes.items()}))


@pytest.mark.parametrize("channels", [5, 8, 9])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_file_that_is_told_more_than_text(name: str, channels: int, request: Any, tmp_path: Path) -> None:
    entry = {"model.diffusion_model.input_blocks.0.0.weight": ("F32", (32, channels, 3, 3))}
    file = copied(request.getfixturevalue(name).file, tmp_path / "model.safetensors", lambda names: names | entry)
    with pytest.raises(WeightsError, match=f"{channels} input channels"):
        family_of(read_header(file))


TRANSFORMER: dict[str, dict[str, Any]] = {"transformer": {}}


def configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    return {part: json.loads((checkpoint.folder / part / "config.json").read_text()) for part in ("unet", "vae")}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_name_of_a_good_file_is_used(name: str, request: Any) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name)
    header = read_header(checkpoint.file)
    family = family_of(header)
    assert family == {"sd15": "sd", "sdxl": "sdxl"}[name]
    assert unused(header, FAMILIES[family], configs(checkpoint)) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.77.0.in_layers.0.weight",
        "model.diffusion_model.position_net.linears.0.weight",
        "first_stage_model.decoder.time_mix.weight",
        "cond_stage_model.transformer.vision_model.embeddings.weight",
        "optimizer.state",
    ],
)
def test_a_name_that_nothing_uses(name: str, sd15: Checkpoint, tmp_path: Path) -> None:
    file = copied(sd15.file, tmp_path / "model.safetensors", lambda names: names | {name: F})
    assert unused(read_header(file), FAMILIES["sd"], configs(sd15)) == [name]


def test_a_model_with_the_metadata_of_what_was_merged_into_it(sd15: Checkpoint, tmp_path: Path) -> None:
    header = read_header(sd15.file)
    tensors = {name: (header.dtypes[name], shape) for name, shape in header.shapes.items()}
    file = write_header(tmp_path / "model.safetensors", tensors, {"ss_network_module": "networks.lora"})
    assert family_of(read_header(file)) == "sd"


def test_names_that_are_no_weights_may_stay(sd15: Checkpoint, tmp_path: Path) -> None:
    more = [
        "cond_stage_model.logit_scale",
        "model_ema.decay",
        "logvar",
        "lvlb_weights",
        "first_stage_model.loss.logvar",
        "v_pred",
        "sqrt_alphas_cumprod",
    ]
    file = copied(sd15.file, tmp_path / "model.safetensors", lambda names: names | dict.fromkeys(more, F))
    assert family_of(read_header(file)) == "sd"
    assert unused(read_header(file), FAMILIES["sd"], configs(sd15)) == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
def test_a_flux_file(guidance: bool, prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: value for name, value in skeletons.flux_file(guidance=guidance).items()}
    header = read_header(write_header(tmp_path / "model.safetensors", tensors))
    assert family_of(header) == "flux" and unused(header, FAMILIES["flux"], TRANSFORMER) == []
    more = write_header(tmp_path / "more.safetensors", tensors | {f"{prefix}double_blocks.0.img_attn.gate.weight": F})
    assert unused(read_header(more), FAMILIES["flux"], TRANSFORMER) == [f"{prefix}double_blocks.0.img_attn.gate.weight"]


def test_an_sd3_file(tmp_path: Path) -> None:
    header = read_header(write_header(tmp_path / "model.safetensors", skeletons.sd3_file()))
    assert family_of(header) == "sd3" and unused(header, FAMILIES["sd3"], TRANSFORMER) == []
    assert header.find(FAMILIES["sd3"].held["vae"]) is None
    name = "model.diffusion_model.joint_blocks.1.context_block.mlp.fc1.weight"  # the last block has none
    more = write_header(tmp_path / "more.safetensors", skeletons.sd3_file() | {name: F})
    assert unused(read_header(more), FAMILIES["sd3"], TRANSFORMER) == [name]


def test_a_file_without_a_tensor_that_its_layout_needs(tmp_path: Path) -> None:
    tensors = {name: value for name, value in skeletons.sd3_file().items() if not name.endswith("x_embedder.proj.bias")}
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        unused(read_header(write_header(tmp_path / "model.safetensors", tensors)), FAMILIES["sd3"], TRANSFORMER)
    assert "x_embedder.proj.bias" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    if content.startswith(b"\x10"):
        assert read_header(file).shapes == {}
        return
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        read_header(file)
    assert "download the model again" in str(error.value)


def test_float8_with_a_factor_is_the_product(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(4, 8, generator=generator).to(torch.float8_e4m3fn)
    marks = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "a.scale_input": torch.ones(())}
    tensors = {
        "a.weight": small,
        "a.scale_weight": torch.tensor([0.25]),
        "b.weight": small.clone(),
        "b.bias": torch.ones(4),
    }
    tensors |= {"c.weight": small.clone(), "c.weight_scale": torch.tensor(3.0)}
    save_file(tensors | marks, tmp_path / "model.safetensors")
    read = read_tensors(read_header(tmp_path / "model.safetensors"), "")
    assert set(read) == {"a.weight", "b.weight", "b.bias", "c.weight"}
    assert torch.equal(read["a.weight"], small.float() * 0.25) and torch.equal(read["c.weight"], small.float() * 3)
    assert torch.equal(read["b.weight"].float(), small.float())
    assert set(read_tensors(read_header(tmp_path / "model.safetensors"), r"b\.")) == {"b.weight", "b.bias"}


V, EPS = {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}
SAYS: dict[str, tuple[list[str], dict[str, str], str | None, dict[str, Any]]] = {
    # names, metadata, .yaml beside the file, what is said
    "nothing": ([], {}, None, {}),
    "v_pred": (["v_pred"], {}, None, V),
    "v_pred and ztsnr": (["v_pred", "ztsnr"], {}, None, V | {"rescale_betas_zero_snr": True}),
    "metadata, v": ([], {"modelspec.prediction_type": "v"}, None, V),
    "metadata, epsilon": ([], {"modelspec.prediction_type": "epsilon"}, None, EPS),
    "yaml, v": ([], {}, "parameterization: v", V),
    "yaml, eps": ([], {}, "parameterization: eps", EPS),
    "yaml, by default": ([], {}, "}, target: ldm.models.diffusion.ddpm.LatentDiffusion, other: {", EPS),
    "yaml, betas": ([], {}, "linear_start: 0.001, linear_end: 0.02", {"beta_start": 0.001, "beta_end": 0.02}),
    "yaml, XL": ([], {}, "denoiser_config: {params: {scaling_config: {target: sgm.VScaling}}}", V),
    "names before metadata": (["v_pred"], {"modelspec.prediction_type": "epsilon"}, None, V),
    "yaml before metadata": ([], {"modelspec.prediction_type": "epsilon"}, "parameterization: v", V),
    "names before yaml": (["v_pred"], {}, "parameterization: eps", V),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_a_file_says_of_its_noise(case: str, tmp_path: Path) -> None:
    names, metadata, beside, expected = SAYS[case]
    file = write_header(tmp_path / "model.safetensors", dict.fromkeys(["w", *names], F), metadata)
    if beside:
        file.with_suffix(".yaml").write_text("model: {params: {" + beside + "}}")
    assert said(read_header(file)) == expected


@pytest.mark.parametrize(
    ("beside", "word"),
    [
        ("model: [", "configuration"),
        ("[]", "configuration"),
        ("model: {}", "params"),
        ("model: {params: {denoiser_config: {params: {scaling_config: {target: x.EDMScaling}}}}}", "EDM"),
        ("model: {params: {denoiser_config: {params: {scaling_config: {target: x.VScalingWithEDMcNoise}}}}}", "EDM"),
    ],
)
def test_a_yaml_that_is_not_understood(beside: str, word: str, tmp_path: Path) -> None:
    file = write_header(tmp_path / "model.safetensors", {"w": F})
    file.with_suffix(".yaml").write_text(beside)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        said(read_header(file))
    assert word in str(error.value) and "model.yaml" in str(error.value)


def test_names_shapes_and_dtypes_are_the_files(sd15: Checkpoint) -> None:
    header = read_header(sd15.file)
    assert {name: tuple(value.shape) for name, value in load_file(sd15.file).items()} == header.shapes
    assert set(header.dtypes.values()) == {"F32", "I64"}
