"""Stable Diffusion 3, 3.5 and FLUX.1 dev and schnell at reduced width, with random weights."""

import re
from pathlib import Path
from typing import Any

import torch

T5_WIDTH = 32
SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 12,
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    # the transformer, text encoders, scheduler
    "sd3": (SD3, ["clip", "clip"], {"shift": 3.0}),
    "sd35": (SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, ["clip", "clip", "t5"], {"shift": 3.0}),
    "flux-dev": (FLUX | {"guidance_embeds": True}, ["clip", "t5"], DYNAMIC),
    "flux-schnell": (FLUX, ["clip", "t5"], {"shift": 1.0}),
}


def build_pipeline(name: str, tokenizer: Path) -> Any:
    """Build a pipeline with random weights.

    Arguments:
        name: One of `ARCHITECTURES`.
        tokenizer: Folder of a tokenizer of CLIP.
    """
    import diffusers

    config, encoders, schedule = ARCHITECTURES[name]
    kind = "Flux" if name.startswith("flux") else "SD3"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "transformer": getattr(diffusers, f"{kind}Transformer2DModel")(**config),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**schedule),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(16, 16, 32, 32),
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=1,
                latent_channels=16,
                norm_num_groups=8,
                sample_size=64,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=0.3611,
                shift_factor=0.1159,
            ),
        }
        for suffix, encoder in zip(("", "_2", "_3"), encoders, strict=False):
            text = _t5() if encoder == "t5" else _clip(tokenizer, projected=kind == "SD3")
            parts[f"tokenizer{suffix}"], parts[f"text_encoder{suffix}"] = text
        parts["transformer"].requires_grad_(False)
        for key, layer in parts["transformer"].named_modules():
            if re.search(r"(to|add)_[qk](_proj)?$", key):
                layer.weight *= 4  # maps that are not uniform
            elif re.search(r"norm\w*\.linear$", key):
                layer.weight *= 3  # blocks that are told the time do something
    if kind == "Flux":
        return diffusers.FluxPipeline(**parts)
    return diffusers.StableDiffusion3Pipeline(**({"text_encoder_3": None, "tokenizer_3": None} | parts))


def _clip(folder: Path, *, projected: bool) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return tokenizer, T5EncoderModel(config)
