"""A UNet's attention recorded, changed or shared on the layers asked for; every other layer keeps fused attention.

References:
    Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al., 2022, arXiv 2208.01626
    MasaCtrl: Tuning-Free Mutual Self-Attention Control, Cao et al., 2023, arXiv 2304.08465
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionProcessor:
    """Attention processor of diffusers for the layers of a UNet; subclasses say how values are mixed."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        mixed = self.attend(query, key, value, attn.scale)
        output = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return output / attn.rescale_output_factor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Mix values `(B, heads, L, d)` at keys `(B, heads, L, d)` for queries `(B, heads, N, d)`, of which it has the
        shape."""
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


class EditingProcessor(AttentionProcessor):
    """Compute the probabilities and change them.

    Arguments:
        edit: From probabilities `(B, heads, N, L)` float32 to those that mix the values.
        applies: Whether layers with N query positions are changed; the others run fused.
    """

    def __init__(
        self, edit: Callable[[Tensor], Tensor], applies: Callable[[int], bool] = lambda positions: True
    ) -> None:
        self.edit, self.applies = edit, applies

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if not self.applies(query.shape[2]):
            return super().attend(query, key, value, scale)
        probabilities = self.edit((query @ key.transpose(-1, -2) * scale).float().softmax(-1))
        return probabilities.to(value.dtype) @ value


class RecordingProcessor(EditingProcessor):
    """Compute the probabilities and keep them.

    Arguments:
        maps: List that every call appends `(B, heads, N, L)` to.
        positions: Record only layers with this number N of query positions; None records any. A layer that is not
            recorded runs fused.
    """

    def __init__(self, maps: list[Tensor], positions: int | None = None) -> None:
        def record(probabilities: Tensor) -> Tensor:
            maps.append(probabilities)
            return probabilities

        super().__init__(record, lambda found: positions in (None, found))


class SharingProcessor(AttentionProcessor):
    """Give a whole batch the keys and values of its first entries, fused.

    Arguments:
        count: Entry i attends to what entry i modulo `count` attends to; the batch is a multiple of it.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        groups = len(query) // self.count
        key, value = (tensor[: self.count].repeat(groups, 1, 1, 1) for tensor in (key, value))
        return super().attend(query, key, value, scale)


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


def self_attention_layers(unet: Any) -> list[str]:
    """Name the self-attention processors in the order in which they run: down, middle, up."""
    stages = ("down_blocks.", "mid_block.", "up_blocks.")
    names = [name for name in unet.attn_processors if ".attn1." in name]
    return [name for stage in stages for name in names if name.startswith(stage)]


@contextmanager
def processed(unet: Any, layers: Collection[str], processor: AttentionProcessor) -> Iterator[None]:
    """Run the layers of these names with another processor inside the block; blocks can be nested.

    Arguments:
        unet: diffusers' UNet2DConditionModel.
        layers: Names as `cross_attention_layers` and `self_attention_layers` give them.
        processor: Takes their place; all other layers keep theirs.
    """
    before = unet.attn_processors
    # A checkpointed block would be recomputed when the processors are back: those with such layers keep everything.
    kept = [
        module
        for name, module in unet.named_modules()
        if getattr(module, "gradient_checkpointing", False) and any(layer.startswith(f"{name}.") for layer in layers)
    ]
    unet.set_attn_processor({name: processor if name in layers else value for name, value in before.items()})
    for module in kept:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        unet.set_attn_processor(before)
        for module in kept:
            module.gradient_checkpointing = True


@contextmanager
def record_attention(unet: Any, layers: list[str], positions: int | None = None) -> Iterator[list[Tensor]]:
    """Record the cross-attention probabilities of `layers` inside the block.

    Arguments:
        unet: diffusers' UNet2DConditionModel.
        layers: Names as `coarsest_layers` gives them.
        positions: Record only layers with this number of query positions, see `RecordingProcessor`.

    Returns:
        List that fills with one `(B, heads, N, L)` float32 map per recorded layer and forward pass.

    Raises:
        ValueError: If a layer is one of self-attention.
    """
    if any(".attn1." in layer for layer in layers):
        raise ValueError("expected cross-attention layers, got self-attention; record layers named attn2 only")
    maps: list[Tensor] = []
    with processed(unet, layers, RecordingProcessor(maps, positions)):
        yield maps


def mean_map(maps: list[Tensor]) -> Tensor:
    """Average maps `(B, heads, N, L)` over heads and layers: `(B, N, L)`, rows sum to 1."""
    if not maps:
        raise ValueError("expected at least one attention map, got none; name layers that the UNet has")
    return torch.stack([layer.mean(1) for layer in maps]).mean(0)
