"""What each kind of folder is taken for. Nothing here reads a weight: there are none."""

import json
from pathlib import Path
from typing import Any

import model_skeletons as skeletons
import pytest
from model_skeletons import SENTENCE

from antidiffusion.models.families import FAMILIES, STRAIGHT, VARIANCE_PRESERVING
from antidiffusion.models.headers import WeightsError
from antidiffusion.models.kinds import classify
from antidiffusion.models.weights import Location

REFUSED: dict[str, tuple[str, dict[str, dict[str, Any]], list[str]]] = {
    # family whose folder is changed, the changes, words of the sentence
    "XL refiner": ("sdxl", {"": {"text_encoder": [None, None], "tokenizer": [None, None]}}, ["refiner", "base model"]),
    "refiner by its score": ("sdxl", {"": {"requires_aesthetics_score": True}}, ["refiner", "base model"]),
    "five time ids": ("sdxl", {"unet": {"projection_class_embeddings_input_dim": 64 + 5 * 8}}, ["5 time ids"]),
    "XL without added embedding": ("sdxl", {"unet": {"addition_embed_type": None}}, ["added embedding"]),
    "added embedding of pictures": ("sd", {"unet": {"addition_embed_type": "image"}}, ["image added embedding"]),
    "inpainting": ("sd", {"unet": {"in_channels": 9}}, ["inpainting", "9 input channels"]),
    "XL inpainting": ("sdxl", {"unet": {"in_channels": 9}}, ["inpainting", "9 input channels"]),
    "depth": ("sd", {"unet": {"in_channels": 5}}, ["depth", "5 input channels"]),
    "InstructPix2Pix": ("sd", {"unet": {"in_channels": 8}}, ["InstructPix2Pix", "8 input channels"]),
    "upscaler": ("sd", {"unet": {"in_channels": 7, "num_class_embeds": 1000}}, ["upscaler", "num_class_embeds"]),
    "more outputs": ("sd", {"unet": {"out_channels": 8}}, ["8 and 4", "variance"]),
    "LCM": ("sd", {"unet": {"time_cond_proj_dim": 256}}, ["consistency", "time_cond_proj_dim"]),
    "IF": ("sd", {"unet": {"encoder_hid_dim_type": "text_proj"}}, ["IF", "encoder_hid_dim_type"]),
    "unCLIP": ("sd", {"unet": {"class_embed_type": "projection"}}, ["unCLIP", "class_embed_type"]),
    "GLIGEN": ("sd", {"unet": {"attention_type": "gated"}}, ["GLIGEN", "attention_type"]),
    "text of another width": ("sd", {"unet": {"cross_attention_dim": 48}}, ["width 48", "width 32"]),
    "another UNet": ("sd", {"unet": {"_class_name": "UNetMotionModel"}}, ["UNetMotionModel"]),
    "entry from the future": ("sd", {"unet": {"second_sight": True}}, ["second_sight", "update diffusers"]),
    "quantised UNet": ("sd", {"unet": {"quantization_config": {"bits": 4}}}, ["quantised", "float16"]),
    "quantised T5": ("flux", {"text_encoder_2": {"quantization_config": {"bits": 4}}}, ["quantised", "float16"]),
    "ControlNet": ("sd", {"": {"controlnet": ["diffusers", "ControlNetModel"]}}, ["controlnet", "ControlNetModel"]),
    "motion": ("sd", {"": {"motion_adapter": ["diffusers", "MotionAdapter"]}}, ["motion_adapter", "MotionAdapter"]),
    "picture instead of text": ("sd", {"": {"text_encoder": [None, None]}}, ["text_encoder", "got none"]),
    "other text encoder": ("sd", {"": {"text_encoder": ["transformers", "BertModel"]}}, ["CLIPTextModel", "BertModel"]),
    "other tokenizer": ("sd", {"": {"tokenizer": ["transformers", "BertTokenizer"]}}, ["tokenizer", "BertTokenizer"]),
    "own code": ("sd", {"": {"unet": ["my_unet", "MyUNet"]}}, ["MyUNet"]),
    "tiny autoencoder": ("sd", {"": {"vae": ["diffusers", "AutoencoderTiny"]}}, ["AutoencoderKL", "AutoencoderTiny"]),
    "RGB and depth": ("sd", {"vae": {"in_channels": 6, "out_channels": 6}}, ["3 channels", "got 6"]),
    "EDM": ("sdxl", {"scheduler": {"_class_name": "EDMEulerScheduler"}}, ["EDMEulerScheduler", "noise"]),
    "Playground 2.5": (
        "sdxl",
        {
            "scheduler": {"_class_name": "EDMDPMSolverMultistepScheduler"},
            "vae": {"latents_mean": [0.1] * 4, "latents_std": [5.0] * 4},
        },
        ["EDMDPMSolverMultistepScheduler"],
    ),
    "flow on a UNet": ("sd", {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, ["FlowMatchEuler"]),
    "flow sigmas": (
        "sd",
        {"scheduler": {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}},
        ["use_flow_sigmas"],
    ),
    "continuous time": ("sdxl", {"scheduler": {"timestep_type": "continuous"}}, ["EDM", "timestep_type"]),
    "unknown scheduler": ("sd", {"scheduler": {"_class_name": "MyScheduler"}}, ["MyScheduler"]),
    "no scheduler class": ("sd", {"scheduler": {"_class_name": None}}, ["got None"]),
    "unknown prediction": ("sd", {"scheduler": {"prediction_type": "score"}}, ["a prediction type", "'score'"]),
    "flow prediction": ("sd", {"scheduler": {"prediction_type": "flow_prediction"}}, ["'flow_prediction'"]),
    "noise of noise alone": ("sd", {"scheduler": {"rescale_betas_zero_snr": True}}, ["rescale_betas_zero_snr"]),
    "sigmoid betas": ("sd", {"scheduler": {"beta_schedule": "sigmoid"}}, ["'sigmoid'"]),
    "falling betas": ("sd", {"scheduler": {"beta_start": 0.02, "beta_end": 0.01}}, ["0.02 to 0.01"]),
    "large betas": ("sd", {"scheduler": {"beta_end": 1.2}}, ["to 1.2"]),
    "no betas": (  # without torchsde, diffusers does not say what this class takes for granted
        "sd",
        {"scheduler": {"_class_name": "DPMSolverSDEScheduler"}},
        ["num_train_timesteps"],
    ),
    "betas of text": ("sd", {"scheduler": {"beta_end": "large"}}, ["expected numbers"]),
    "trained betas": ("sd", {"scheduler": {"trained_betas": [0.1, 1.5]}}, ["trained_betas"]),
    "no size": ("sd", {"unet": {"sample_size": None}, "vae": {"sample_size": None}}, ["sample_size", "64 for 512"]),
    "no widths": ("sd", {"text_encoder": {"hidden_size": None}}, ["complete configurations"]),
    "two text encoders in SD3": (
        "sd3",
        {"": {"text_encoder_2": [None, None]}},
        ["text_encoder_2", "Stable Diffusion 3", "none"],
    ),
    "other pooled width": ("sd3", {"transformer": {"pooled_projection_dim": 90}}, ["pooled", "96"]),
    "other T5": ("sd3", {"text_encoder_3": {"d_model": 32}}, ["T5's 32"]),
    "SD3 inpainting": ("sd3", {"transformer": {"in_channels": 33}}, ["33 input channels"]),
    "betas in SD3": ("sd3", {"scheduler": {"_class_name": "DDIMScheduler"}}, ["DDIMScheduler"]),
    "path turned round": ("sd3", {"scheduler": {"invert_sigmas": True}}, ["invert_sigmas"]),
    "no shift": ("sd3", {"scheduler": {"shift": 0}}, ["positive shift"]),
    "FLUX fill": ("flux", {"transformer": {"in_channels": 384}}, ["FLUX fill", "384"]),
    "FLUX depth": ("flux", {"transformer": {"in_channels": 128}}, ["FLUX depth or canny", "128"]),
    "FLUX without T5": ("flux", {"": {"text_encoder_2": [None, None]}}, ["text_encoder_2", "none"]),
    "other CLIP in FLUX": ("flux", {"text_encoder": {"hidden_size": 16}}, ["CLIP"]),
    "other T5 in FLUX": ("flux", {"text_encoder_2": {"d_model": 32}}, ["T5"]),
    "FLUX ControlNet": ("flux", {"": {"controlnet": ["diffusers", "FluxControlNetModel"]}}, ["FluxControlNetModel"]),
    "FLUX.2 with Mistral": (
        "flux2",
        {"": {"text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]}},
        ["FLUX.2 klein", "Mistral3ForConditionalGeneration"],
    ),
    "FLUX.2 that is told its guidance": ("flux2", {"transformer": {"guidance_embeds": True}}, ["FLUX.2 dev"]),
    "other Qwen3": ("flux2", {"text_encoder": {"hidden_size": 16}}, ["Qwen3"]),
    "short Qwen3": ("flux2", {"text_encoder": {"num_hidden_layers": 20}}, ["20 layers"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_is_not_what_it_seems(kind: str, tmp_path: Path) -> None:
    family, changes, words = REFUSED[kind]
    folder = skeletons.write_folder(tmp_path / "model", family, changes)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert all(word in str(error.value) for word in [*words, str(folder)])
    assert "download" not in str(error.value)


@pytest.mark.parametrize(
    "pipeline",
    [
        "FluxKontextPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxPriorReduxPipeline",
        "Flux2Pipeline",
        "Flux2KleinKVPipeline",
        "ChromaPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableVideoDiffusionPipeline",
        "StableUnCLIPPipeline",
        "IFPipeline",
        "KandinskyV22Pipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "AnimateDiffPipeline",
        ["my_pipeline", "MyPipeline"],
        None,
    ],
)
def test_another_kind_of_pipeline(pipeline: Any, tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "sd", {"": {"_class_name": pipeline}})
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert (pipeline[-1] if isinstance(pipeline, list) else str(pipeline)) in str(error.value)
    assert all(row.title in str(error.value) for row in FAMILIES.values())


@pytest.mark.parametrize("family", skeletons.FOLDERS)
def test_a_folder_that_is_what_it_seems(family: str, tmp_path: Path) -> None:
    kind = classify(Location(skeletons.write_folder(tmp_path / "model", family)))
    assert (kind.family, kind.size) == (family, 512 if family.startswith("sd") and family != "sd3" else 1024)
    assert kind.scheduler["_class_name"] == skeletons.FOLDERS[family]["scheduler"][0]
    assert set(kind.tokenizers) == {part for part in skeletons.FOLDERS[family] if part.startswith("tokenizer")}
    assert kind.header is None


@pytest.mark.parametrize("name", sorted(VARIANCE_PRESERVING | STRAIGHT))
def test_every_scheduler_of_the_list_is_one_of_diffusers(name: str, tmp_path: Path) -> None:
    family = "sd" if name in VARIANCE_PRESERVING else "flux"
    folder = skeletons.write_folder(
        tmp_path / "model", family, {"scheduler": {"_class_name": name, "num_train_timesteps": 1000}}
    )
    config = classify(Location(folder)).scheduler
    if family == "sd":
        assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
        assert config.get("prediction_type", "epsilon") == "epsilon"


@pytest.mark.parametrize(
    ("unet", "vae", "side"),
    [
        (64, 512, 512),
        ([64, 64], 512, 512),
        ([64, 96], 512, 640),  # sqrt(64 * 96) = 78.4 positions are 627 pixels: the nearest multiple of 64
        ([8, 12], 512, 64),
        (None, 768, 768),
        (None, [512, 512], 512),
        ("large", 512, 512),
    ],
)
def test_the_side_of_the_pictures_in_training(unet: Any, vae: Any, side: int, tmp_path: Path) -> None:
    changes = {"unet": {"sample_size": unet}, "vae": {"sample_size": vae}}
    assert classify(Location(skeletons.write_folder(tmp_path / "model", "sd", changes))).size == side


def test_a_third_text_encoder_that_was_left_out(tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "sd3")
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="text_encoder_3"):
        kind = classify(Location(folder))
    assert "text_encoder_3" not in kind.configs and set(kind.tokenizers) == {"tokenizer", "tokenizer_2"}
    (folder / "text_encoder_3" / "pytorch_model.bin").touch()  # there it is, in a format that could run code
    with pytest.raises(WeightsError, match="run code"):
        classify(Location(folder))


def test_entries_that_a_scheduler_does_not_say_are_its_classs(tmp_path: Path) -> None:
    bare = skeletons.write_folder(tmp_path / "model", "sd")
    (bare / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "HeunDiscreteScheduler"}')
    config = classify(Location(bare)).scheduler
    assert (config["beta_start"], config["beta_schedule"], config["timestep_spacing"]) == (
        0.00085,
        "linear",
        "linspace",
    )


def test_what_a_folder_may_have_or_leave_out(tmp_path: Path) -> None:
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "image_encoder": [None, None]}
    skeletons.write_folder(tmp_path / "checked", "sd", {"": checker})
    assert classify(Location(tmp_path / "checked")).family == "sd"
    without = {"": {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}}
    kind = classify(Location(skeletons.write_folder(tmp_path / "small", "sd3", without)))
    assert "text_encoder_3" not in kind.configs and "tokenizer_3" not in kind.tokenizers
    playground = {"vae": {"latents_mean": [0.1] * 4, "latents_std": [5.0] * 4}}
    assert classify(Location(skeletons.write_folder(tmp_path / "playground", "sdxl", playground))).family == "sdxl"


def test_zero_terminal_snr_with_velocity(tmp_path: Path) -> None:
    scheduler = {"scheduler": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}}
    kind = classify(Location(skeletons.write_folder(tmp_path / "model", "sd", scheduler)))
    assert kind.scheduler["rescale_betas_zero_snr"] and kind.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("content", ["[]", "{", "", "null"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_is_none(content: str, file: str, tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "sd")
    (folder / file).write_text(content)
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert file in str(error.value)
    assert ("download" in str(error.value)) is not (content in ("[]", "null"))  # only if it is cut off


def test_numbers_of_a_folder_that_are_no_floating_point(tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "flux")
    skeletons.write_header(
        folder / "text_encoder_2" / "model.safetensors",
        {"shared.weight": ("U8", (8, 8)), "shared.weight.absmax": ("F32", (8,))},
    )
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert "quantised" in str(error.value) and "shared.weight" in str(error.value)


def test_a_cut_off_file_is_found_before_another_is_read(tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "sdxl")
    file = folder / "text_encoder_2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert str(file) in str(error.value) and "download the model again" in str(error.value)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = skeletons.write_folder(tmp_path / "model", "flux")
    part, first = folder / "transformer", "diffusion_pytorch_model-00001-of-00002.safetensors"
    (part / "diffusion_pytorch_model.safetensors").rename(part / first)
    weights = {"weight": first, "other": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(WeightsError, match=SENTENCE) as error:
        classify(Location(folder))
    assert "00002-of-00002" in str(error.value) and "download the model again" in str(error.value)
    skeletons.write_header(part / weights["other"], {"other": ("F32", (2, 2))})
    assert classify(Location(folder)).family == "flux"
