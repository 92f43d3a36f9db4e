"""Stable Diffusion's and FLUX's architectures, without their weights: what the cost benchmarks run on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from antidiffusion.models import flux, sd3
from antidiffusion.models.joint import JointTransformer
from antidiffusion.models.schedule import VP
from antidiffusion.models.sd import StableDiffusion

TOKENS = 77

VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
VIT_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNET: dict[str, Any] = {"layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280)}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Shape:
    """One version of Stable Diffusion.

    Arguments:
        name: As the results name it.
        side: Of the square that it was trained on, in pixels.
        texts: Configuration of each text encoder; the second of two has a projection.
        unet: What differs from the other versions.
    """

    name: str
    side: int
    texts: tuple[dict[str, int], ...]
    unet: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "1.5": Shape("Stable Diffusion 1.5", 512, (VIT_L,), {"attention_head_dim": (8,) * 4, "cross_attention_dim": 768}),
    "2.1": Shape(
        "Stable Diffusion 2.1-base",
        512,
        (VIT_H,),
        {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    "xl": Shape(
        "Stable Diffusion XL",
        1024,
        (VIT_L, VIT_BIG_G),
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
    ),
}


T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
TRANSFORMERS: dict[str, tuple[str, Any, tuple[dict[str, int], ...], dict[str, Any]]] = {
    # name, family, CLIPs (T5-XXL follows), what the transformer's configuration says
    "flux": ("FLUX.1 [dev]", flux, (VIT_L,), {"guidance_embeds": True}),
    "sd3.5": (
        "Stable Diffusion 3.5-medium",
        sd3,
        (VIT_L, VIT_BIG_G),
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
}


def divided(config: dict[str, Any], divisor: int) -> dict[str, Any]:
    """Return a configuration whose channels are `divisor` (a power of two) times fewer."""
    result = dict(config)
    result["norm_num_groups"] = 32 // divisor
    result["block_out_channels"] = tuple(width // divisor for width in config["block_out_channels"])
    if "attention_head_dim" in config:
        result["attention_head_dim"] = tuple(max(1, heads // divisor) for heads in config["attention_head_dim"])
    return result


class Ids:
    """Stands in for a tokenizer, whose vocabulary is part of the weights: every prompt fills CLIP's window."""

    model_max_length = TOKENS
    input_ids: torch.Tensor

    def __call__(self, prompts: list[str], add_special_tokens: bool = True, **options: Any) -> "Ids":
        length = options.get("max_length", TOKENS) if add_special_tokens else TOKENS - 2
        self.input_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        return self


def build(version: str = "2.1", device: str = "meta", precision: str = "float32", divisor: int = 1) -> StableDiffusion:
    """Build the surrogate with random weights, directly in their dtype so that building needs no more than the weights.

    Arguments:
        version: A key of `SHAPES`.
        device: "meta" for shapes only.
        precision: The weights' dtype, or "mixed": float32 with autocast to bfloat16.
        divisor: UNet and autoencoder have this many times fewer channels, for a quick try.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape, mixed = SHAPES[version], precision == "mixed"
    dtype = torch.float32 if mixed else getattr(torch, precision)
    with torch.device("meta"):
        vae = AutoencoderKL(**divided(VAE | {"sample_size": shape.side}, divisor))
        unet = UNet2DConditionModel(**divided(UNET | shape.unet | {"sample_size": shape.side // 8}, divisor))
        encoders = [
            kind(CLIPTextConfig(**config, max_position_embeddings=TOKENS, projection_dim=config["hidden_size"]))
            for kind, config in zip((CLIPTextModel, CLIPTextModelWithProjection), shape.texts, strict=False)
        ]
    for module in (vae, unet, *encoders):
        module.to(dtype)
        if device != "meta":
            module.to_empty(device=device)
            fill(module)
    schedule = VP(
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False).config
    )
    tokenizers = [Ids() for _ in encoders]
    parts = (f"{shape.name} shape", vae, unet, encoders, tokenizers, schedule, shape.side)
    return StableDiffusion(*parts, autocast=torch.bfloat16 if mixed else None).to(device)


def build_transformer(version: str, side: int) -> JointTransformer:
    """Build a transformer's surrogate on the meta device in bfloat16: shapes only.

    Arguments:
        version: A key of `TRANSFORMERS`.
        side: Of the pictures that it sees, in pixels.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    name, family, clips, config = TRANSFORMERS[version]
    text, transformer = (
        (CLIPTextModel, FluxTransformer2DModel)
        if family is flux
        else (CLIPTextModelWithProjection, SD3Transformer2DModel)
    )
    with torch.device("meta"):
        encoders = [
            text(CLIPTextConfig(**clip, max_position_embeddings=TOKENS, projection_dim=clip["hidden_size"]))
            for clip in clips
        ]
        encoders.append(T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu", is_encoder_decoder=False)))
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(
                **VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
            ),
            "denoiser": transformer(**config),
            "text_encoders": encoders,
        }
    for module in (parts["vae"], parts["denoiser"], *encoders):
        module.to(torch.bfloat16)
    scheduler = {"shift": 3.0, "use_dynamic_shifting": family is flux}
    built: JointTransformer = family.build(
        scheduler, name=f"{name} shape", tokenizers=[Ids() for _ in encoders], size=side, **parts
    )
    return built


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Fill weights with values that keep activations finite: norms pass, everything else is small and random."""
    for name, weight in module.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            weight.uniform_(-1, 1).mul_((3 / weight[0].numel()) ** 0.5)
    for name, buffer in module.named_buffers():
        buffer.copy_(
            torch.arange(buffer.numel()).view_as(buffer) if "position_ids" in name else torch.zeros_like(buffer)
        )
