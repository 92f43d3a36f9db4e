"""FLUX.1: double and single transformer blocks on the straight path, told by T5 and CLIP's pooled vector.

References:
    FLUX.1 [dev] and [schnell], Black Forest Labs, 2024, https://github.com/black-forest-labs/flux
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from antidiffusion.models.base import Embedding, Places, token_ids
from antidiffusion.models.joint import ATTENTION_LORA_LAYERS, JointTransformer
from antidiffusion.models.schedule import Straight

T5_TOKENS = 512  # what diffusers' pipeline gives T5 of a prompt


@dataclass
class Flux(JointTransformer):
    """FLUX.1 [dev], which is told its guidance, and models of its shape that are not."""

    guidance: ClassVar[float] = 3.5
    lora_layers: ClassVar[list[str]] = [
        *ATTENTION_LORA_LAYERS,
        *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
    ]

    @property
    def _window(self) -> tuple[Any, int | None]:
        return self.tokenizers[1], T5_TOKENS - 1

    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)`: T5's tokens, CLIP's pooled vector, and the guidance that stock scripts tune with."""
        (clip_tokenizer, t5_tokenizer), (clip, t5) = self.tokenizers, self.text_encoders
        pooled = clip(token_ids(clip_tokenizer, prompts).to(self.device)).pooler_output.float()
        tokens = t5(token_ids(t5_tokenizer, prompts, T5_TOKENS).to(self.device))[0].float()
        distilled = self.denoiser.config.guidance_embeds
        return Embedding(tokens, pooled, tokens.new_full((len(tokens),), self.guidance) if distilled else None)

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        told, (height, width) = embedding.expand(len(z_t)), z_t.shape[-2:]
        assert told.pooled is not None  # `embed` always gives it
        with self._computing():
            output = self.denoiser(
                hidden_states=packed(z_t.to(self.dtype)),
                timestep=t,
                guidance=told.guidance,
                pooled_projections=told.pooled.to(self.dtype),
                encoder_hidden_states=told.tokens.to(self.dtype),
                txt_ids=z_t.new_zeros(told.tokens.shape[1], 3),
                img_ids=picture_ids(height // self.patch, width // self.patch, z_t.device),
            )
        return unpacked(output.sample.float(), height, width)

    def guided(self, embedding: Embedding, guidance: float | Tensor, count: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Prepare the denoiser with guidance: one that is told its guidance answers once, for the prompts."""
        if not self.denoiser.config.guidance_embeds:
            return super().guided(embedding, guidance, count)
        scale = torch.as_tensor(guidance, dtype=torch.float32, device=self.device).expand(count)
        told = replace(embedding.expand(count), guidance=scale)
        return lambda z, t: self.predict(z, t.expand(count), told)

    def places(self, layer: str, text: int, total: int) -> Places:
        """Say where picture and text stand: the text first, in double and in single blocks."""
        picture = slice(text, total)
        return Places(picture, slice(0, text), picture)

    def pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        parts: dict[str, Any] = {}
        for suffix, tokenizer, encoder in zip(("", "_2"), self.tokenizers, self.text_encoders, strict=True):
            parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.schedule.scheduler))
        return FluxPipeline(vae=self.vae, transformer=self.denoiser, scheduler=scheduler, **parts)


@dataclass
class FluxSchnell(Flux):
    """FLUX.1 [schnell], distilled to few steps without guidance."""

    guidance: ClassVar[float] = 1.0
    steps: ClassVar[int] = 4


def packed(z: Tensor) -> Tensor:
    """Return latents `(B, C, h, w)` as FLUX reads them: squares of 2 x 2 in a row, `(B, h w / 4, 4 C)`."""
    batch, channels, height, width = z.shape
    squares = z.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def unpacked(rows: Tensor, height: int, width: int) -> Tensor:
    """Return the latents `(B, C, h, w)` of `packed` ones."""
    squares = rows.reshape(len(rows), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(len(rows), -1, height, width)


def picture_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return the places of `height * width` squares of a picture, `(height * width, 3)`: 0, row, column."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def build(scheduler: Mapping[str, Any], **parts: Any) -> Flux:
    """Put a model together from its scheduler's configuration and the arguments of `Surrogate`.

    [schnell] is the one that is not told its guidance and whose steps are not shifted; times of training are uniform,
    as by default in diffusers' scripts.
    """
    told = parts["denoiser"].config.guidance_embeds
    family = Flux if told or scheduler.get("use_dynamic_shifting") else FluxSchnell
    return family(schedule=Straight(scheduler, even=True), **parts)
