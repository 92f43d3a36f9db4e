"""Perturbations stay what they were before the rooms and the interface of models were redesigned.

`tests/data/perturbations.npz` holds what every recipe did, in few steps, to one small picture on random models of three
of Stable Diffusion's architectures, as commit 54538c2 computed it. With that commit's `src` first on PYTHONPATH

    python tests/recipes/test_same_bytes.py

writes the file anew. Models, tokenizer and picture come from this module alone and from the public interface, so that
nothing else decides the bytes; a hash of the weights tells when another torch draws other ones.
"""

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from antidiffusion import RECIPES, Picture, Surrogate, protect

DATA = Path(__file__).parents[1] / "data/perturbations.npz"
TUNED = {"rounds": 1, "steps": 2, "prompt_steps": 2, "tuning_steps": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # name: recipe and settings
    "anti-diffusion": ("anti-diffusion", TUNED),
    "anti-diffusion, attention": ("anti-diffusion", TUNED | {"rounds": 0, "steps": 3, "sdl_weight": 1.0}),
    "anti-diffusion, lora": ("anti-diffusion", TUNED | {"tuning": "lora"}),
    "official": ("official", TUNED),
    "random-sign": ("random-sign", {}),
    "advdm": ("advdm", {"steps": 3}),
    "sds-minus": ("sds-minus", {"steps": 3}),
    "sds-plus": ("sds-plus", {"steps": 3}),
    "photoguard": ("photoguard", {"steps": 3}),
    "photoguard-diffusion": ("photoguard-diffusion", {"steps": 2, "denoising_steps": 2, "draws": 2}),
    "mist": ("mist", {"steps": 3}),
    "fsmg": ("fsmg", {"steps": 3, "tuning_steps": 2}),
    "aspl": ("aspl", {"rounds": 2, "steps": 2, "tuning_steps": 1}),
    "simac": ("simac", {"rounds": 1, "steps": 2, "tuning_steps": 1, "selection_steps": 2, "candidates": 2}),
    "diffusion-guard": ("diffusion-guard", {"steps": 3}),
    "diffusion-guard, masked": ("diffusion-guard", {"steps": 3, "mask": "mask.png"}),
}
UNET = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 16, "sample_size": 8}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8}
UNET |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32}
XL = {"block_out_channels": (32, 32), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
XL |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64}
XL |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
XL |= {"projection_class_embeddings_input_dim": 32 + 6 * 8}
MODELS: dict[str, tuple[dict[str, Any], list[int], str]] = {  # UNet, widths of the text encoders, prediction type
    "sd15": (UNET, [32], "epsilon"),
    "sd21": (UNET | {"use_linear_projection": True}, [32], "v_prediction"),
    "sdxl": (UNET | XL, [32, 32], "epsilon"),
}


def build(name: str, folder: Path) -> str:
    """Save a model with random weights as a diffusers folder and return the weights' hash."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(code) + end for end in ("", "</w>") for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    config, widths, prediction = MODELS[name]
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**config),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(16, 16, 16, 16),
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                norm_num_groups=8,
                sample_size=64,
            ),
        }
        for suffix, width in zip(("", "_2"), widths, strict=False):
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
            special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
            options = CLIPTextConfig(
                vocab_size=len(vocabulary),
                **sizes,
                **special,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=24,
            )
            parts[f"text_encoder{suffix}"] = (CLIPTextModelWithProjection if suffix else CLIPTextModel)(options)
    for key, module in parts["unet"].named_modules():
        if key.endswith(("to_q", "to_k")):
            module.weight.data *= 4  # maps that are not uniform
    digest = hashlib.sha256()
    for part in parts.values():
        for value in part.state_dict().values():
            digest.update(value.numpy().tobytes())
    parts["scheduler"] = diffusers.DDIMScheduler(
        **schedule, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
    )
    parts |= {f"tokenizer{suffix}": tokenizer for suffix, _ in zip(("", "_2"), widths, strict=False)}
    if len(widths) == 2:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **extras)
    pipeline.save_pretrained(folder / name)
    return digest.hexdigest()


def picture() -> Picture:
    """Return a picture of 80 x 64 pixels, smooth with some texture: the models see it scaled."""
    y, x = np.mgrid[:64, :80]
    texture = np.random.default_rng(0).integers(0, 40, (64, 80, 3))
    return Picture((np.stack([2 * x, 3 * y, x + y], -1) + texture).clip(0, 255).astype(np.uint8))


def perturbation(surrogate: Surrogate, run: str, folder: Path) -> np.ndarray:
    """Return what a run moved in the middle of the picture, `(32, 40, 3)` int8, computed in one thread."""
    name, settings = RUNS[run]
    options: dict[str, Any] = {"side": 128 if name == "official" else 64}  # 128, so that there are 16 x 16 positions
    if "mask" in settings:
        mask = np.zeros((64, 80, 3), np.uint8)
        mask[12:54, 16:64] = 255
        Image.fromarray(mask).save(folder / settings["mask"])
        masked = {"mask": str(folder / settings["mask"])}
        if hasattr(RECIPES[name], "mask"):  # commit 54538c2
            settings = settings | masked
        else:
            settings, options = {key: value for key, value in settings.items() if key != "mask"}, options | masked
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = replace(RECIPES[name], **settings)  # type: ignore[type-var]
        (protected,) = protect([picture()], recipe, surrogate=surrogate, **options)
    finally:
        torch.set_num_threads(threads)
    return (protected.picture.pixels.astype(int) - protected.original.pixels).astype(np.int8)[16:48, 20:60]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Surrogate]:
    folder = tmp_path_factory.mktemp("models")
    digest = build(request.param, folder)
    return request.param, digest, Surrogate.from_pretrained(str(folder / request.param))


@pytest.mark.parametrize("run", RUNS)
def test_a_recipe_perturbs_as_it_did(
    model: tuple[str, str, Surrogate], run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antidiffusion.card.HELD_OUT_STEPS", 1)
    name, digest, surrogate = model
    with np.load(DATA) as data:
        if str(data[f"{name}/weights"]) != digest:
            pytest.skip("this torch draws other weights from the seed than the one that wrote the data")
        expected = data[f"{name}/{run}"]
    got = perturbation(surrogate, run, tmp_path)
    assert (got == expected).mean() >= 0.99
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] >= 0.99


def main() -> None:
    """Write the data, with the code that PYTHONPATH names."""
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in MODELS:
            data[f"{name}/weights"] = build(name, folder)
            surrogate = Surrogate.from_pretrained(str(folder / name))
            data |= {f"{name}/{run}": perturbation(surrogate, run, folder) for run in RUNS}
    np.savez_compressed(DATA, **data)


if __name__ == "__main__":
    main()
