"""Cross-attention probabilities of a UNet, recorded on the layers asked for; every other layer keeps fused attention.

References:
    Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al., 2022, arXiv 2208.01626
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RecordingProcessor:
    """Attention processor of diffusers that computes the probabilities itself and keeps them.

    Arguments:
        maps: List that every call appends `(B, heads, N, L)` to.
        positions: Record only layers with this number N of query positions; None records any. A layer that is not
            recorded runs fused.
    """

    def __init__(self, maps: list[Tensor], positions: int | None = None) -> None:
        self.maps, self.positions = maps, positions

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise ValueError("expected a cross-attention layer, got self-attention; record layers named attn2 only")
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        if self.positions not in (None, query.shape[2]):
            mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        else:
            probabilities = (query @ key.transpose(-1, -2) * attn.scale).float().softmax(-1)
            self.maps.append(probabilities)
            mixed = probabilities.to(value.dtype) @ value
        output = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return output / attn.rescale_output_factor


def coarsest_layers(unet: Any) -> list[str]:
    """Name the cross-attention processors at the lowest resolution that has them, in the down and the up blocks.

    For Stable Diffusion that is latent/4 in `down_blocks.2` and `up_blocks.1`; the middle block is left out.
    """
    down = max(i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions"))
    up = min(i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions"))
    return cross_attention_layers(unet, (f"down_blocks.{down}.", f"up_blocks.{up}."))


def cross_attention_layers(unet: Any, prefixes: tuple[str, ...] = ("down_blocks.", "up_blocks.")) -> list[str]:
    """Name the cross-attention processors whose names start with one of `prefixes`."""
    return [name for name in unet.attn_processors if ".attn2." in name and name.startswith(prefixes)]


@contextmanager
def record_attention(unet: Any, layers: list[str], positions: int | None = None) -> Iterator[list[Tensor]]:
    """Record the probabilities of `layers` inside the block.

    Arguments:
        unet: diffusers' UNet2DConditionModel.
        layers: Names as `coarsest_layers` gives them.
        positions: Record only layers with this number of query positions, see `RecordingProcessor`.

    Returns:
        List that fills with one `(B, heads, N, L)` float32 map per recorded layer and forward pass.
    """
    maps: list[Tensor] = []
    before = unet.attn_processors
    recorder = RecordingProcessor(maps, positions)
    # A checkpointed block would be recomputed when the processors are back: those with recorded layers keep everything.
    kept = [
        module
        for name, module in unet.named_modules()
        if getattr(module, "gradient_checkpointing", False) and any(layer.startswith(f"{name}.") for layer in layers)
    ]
    unet.set_attn_processor({name: recorder if name in layers else value for name, value in before.items()})
    for module in kept:
        module.gradient_checkpointing = False
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)
        for module in kept:
            module.gradient_checkpointing = True


def mean_map(maps: list[Tensor]) -> Tensor:
    """Average maps `(B, heads, N, L)` over heads and layers: `(B, N, L)`, rows sum to 1."""
    if not maps:
        raise ValueError("expected at least one attention map, got none; name layers that the UNet has")
    return torch.stack([layer.mean(1) for layer in maps]).mean(0)
