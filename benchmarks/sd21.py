"""Stable Diffusion 2.1-base's architecture, without its weights: what the cost benchmarks run on."""

from typing import Any

import torch
from torch import nn

from antidiffusion.surrogate import Surrogate

TOKENS, WIDTH = 77, 1024
SIDE = 512

UNET: dict[str, Any] = {
    "sample_size": SIDE // 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": WIDTH,
    "layers_per_block": 2,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "sample_size": 768,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "vocab_size": 49408,
    "max_position_embeddings": TOKENS,
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
    """Stands in for CLIP's tokenizer, whose vocabulary is part of the weights: every prompt fills the window."""

    model_max_length = TOKENS
    input_ids: torch.Tensor

    def __call__(self, prompts: list[str], add_special_tokens: bool = True, **options: Any) -> "Ids":
        self.input_ids = torch.zeros(len(prompts), TOKENS if add_special_tokens else TOKENS - 2, dtype=torch.int64)
        return self


def build(device: str = "meta", dtype: torch.dtype = torch.float32, divisor: int = 1) -> Surrogate:
    """Build the surrogate with random weights, directly in `dtype` so that building needs no more than the weights.

    Arguments:
        device: "meta" for shapes only.
        dtype: Of every weight.
        divisor: Channels are this many times fewer, for a quick try.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        modules: list[nn.Module] = [
            AutoencoderKL(**divided(VAE, divisor)),
            UNet2DConditionModel(**divided(UNET, divisor)),
            CLIPTextModel(CLIPTextConfig(**TEXT)),
        ]
    for module in modules:
        module.to(dtype)
        if device != "meta":
            module.to_empty(device=device)
            fill(module)
    vae, unet, text_encoder = modules
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Surrogate("sd-2.1-base shape", vae, unet, [text_encoder], [Ids()], scheduler, SIDE).to(device)


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
