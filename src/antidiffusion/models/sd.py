"""Stable Diffusion 1.x, 2.x and XL: a UNet on the variance-preserving path.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al., 2022, arXiv 2112.10752
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, Podell et al., 2023, arXiv 2307.01952
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from antidiffusion.models.base import TEXT_LORA_LAYERS, Embedding, Places, Surrogate, Word, token_ids
from antidiffusion.models.schedule import VP

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # what diffusers' DreamBooth LoRA scripts adapt in the UNet
STAGES = ("down_blocks.", "mid_block.", "up_blocks.")
PIECE = re.compile(r"[^\s,.;:!?]+|[,.;:!?]+")


@dataclass
class StableDiffusion(Surrogate):
    """Stable Diffusion 1.x and 2.x with one text encoder, XL with two."""

    schedule: VP

    @property
    def multiple(self) -> int:
        return self.factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def positions(self, height: int, width: int) -> int:
        return height * width // self.factor**2

    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        states, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = token_ids(tokenizer, prompts).to(self.device)
            if len(self.text_encoders) == 1:
                return Embedding(encoder(ids).last_hidden_state.float())
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return Embedding(torch.cat(states, -1).float(), pooled.float())

    def unconditional(self) -> Embedding:
        """Return the empty prompt's, or zeros for XL, as in diffusers."""
        empty = self.embed([""])
        if empty.pooled is None:
            return empty
        return Embedding(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        batch, added = len(z_t), None
        if embedding.pooled is not None:
            height, width = (side * self.factor for side in z_t.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=z_t.device)
            pooled = embedding.pooled.to(self.dtype)
            added = {"text_embeds": pooled.expand(batch, -1), "time_ids": sizes.expand(batch, -1)}
        tokens = embedding.tokens.to(self.dtype).expand(batch, -1, -1)
        with self._computing():
            output = self.denoiser(z_t.to(self.dtype), t, encoder_hidden_states=tokens, added_cond_kwargs=added)
        return output.sample.float()

    def _layers(self, kind: str) -> list[str]:
        names = [name for name in self.denoiser.attn_processors if f".{kind}." in name]
        return [name for stage in STAGES for name in names if name.startswith(stage)]

    def cross_layers(self) -> list[str]:
        return self._layers("attn2")

    def self_layers(self) -> list[str]:
        return self._layers("attn1")

    def map_layers(self) -> list[str]:
        """Name the cross-attention at the lowest resolution that has it, in the down and the up blocks.

        For Stable Diffusion that is latent/4 in `down_blocks.2` and `up_blocks.1`; the middle block is left out.
        """
        unet = self.denoiser
        down = max(i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions"))
        up = min(i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions"))
        coarsest = (f"down_blocks.{down}.", f"up_blocks.{up}.")
        return [name for name in self.cross_layers() if name.startswith(coarsest)]

    def places(self, layer: str, text: int, total: int) -> Places:
        everything, nothing = slice(None), slice(0, 0)
        crossed = ".attn2." in layer
        return Places(everything, everything if crossed else nothing, nothing if crossed else everything)

    def tunable(self, *, texts: bool = False) -> dict[str, tuple[Any, list[str]]]:
        found = {self.part: (self.denoiser, LORA_LAYERS)}
        if texts:
            named = zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=False)
            found |= {name: (encoder, TEXT_LORA_LAYERS) for name, encoder in named}
        return found

    def pipeline(self) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        parts: dict[str, Any] = {"vae": self.vae, "unet": self.denoiser}
        parts["scheduler"] = DDIMScheduler.from_config(dict(self.schedule.scheduler))
        for suffix, tokenizer, encoder in zip(("", "_2"), self.tokenizers, self.text_encoders, strict=False):
            parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
        if len(self.text_encoders) == 2:
            return StableDiffusionXLPipeline(**parts, add_watermarker=False)
        extras = dict.fromkeys(("safety_checker", "feature_extractor"))
        return StableDiffusionPipeline(**parts, **extras, requires_safety_checker=False)

    def words(self, text: str) -> list[Word]:
        """Cut a text into words and punctuation; CLIP's tokenizer never joins words, and starts with one token that
        begins the text. Positions beyond the window are left out.
        """
        tokenizer, found, start = self.tokenizers[0], list[Word](), 1
        for word in text.lower().split():
            pieces = PIECE.findall(word)
            lengths = [len(ids) for ids in tokenizer([word, *pieces], add_special_tokens=False).input_ids]
            if lengths[0] != sum(lengths[1:]):  # such as a name that was added to the tokenizer
                pieces, lengths = [word], [0, lengths[0]]
            for piece, length in zip(pieces, lengths[1:], strict=True):
                end = min(start + length, tokenizer.model_max_length - 1)
                found.append((piece, range(min(start, end), end)))
                start = end
        return found

    def features(self) -> list[Any]:
        """Return what the last up block's residual layers add: the paper's layers 9 to 11."""
        return [layer.conv2 for layer in self.denoiser.up_blocks[-1].resnets]


def build(scheduler: Mapping[str, Any], **parts: Any) -> StableDiffusion:
    """Put a model together from its scheduler's configuration and the arguments of `Surrogate`.

    Latents are not bounded: what clips a picture, by default in DDIM's class, must not clip them.
    """
    return StableDiffusion(schedule=VP(dict(scheduler) | {"clip_sample": False}), **parts)
