"""Stable Diffusion 3 and 3.5: a joint transformer on the straight path, told by two CLIPs and, if it is there, by T5.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al., 2024, arXiv 2403.03206
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from antidiffusion.models.base import Embedding, Places, token_ids
from antidiffusion.models.joint import JointTransformer
from antidiffusion.models.schedule import Straight

T5_TOKENS = 256  # what diffusers' pipeline gives T5 of a prompt


@dataclass
class StableDiffusion3(JointTransformer):
    """Stable Diffusion 3-medium, 3.5-medium and 3.5-large; two text encoders without T5, three with it."""

    guidance: ClassVar[float] = 7.0

    @property
    def _window(self) -> tuple[Any, int | None]:
        return (self.tokenizers[2], T5_TOKENS - 1) if len(self.text_encoders) == 3 else super()._window

    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)`: CLIP's 77 tokens, side by side and zero-padded to T5's width, then T5's 256.

        Where T5 is absent its tokens are zeros, as in diffusers.
        """
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.text_encoders[:2], strict=True):
            ids = token_ids(tokenizer, prompts, self.tokenizers[0].model_max_length)
            output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip, width = torch.cat(states, -1).float(), self.denoiser.config.joint_attention_dim
        t5 = clip.new_zeros(len(clip), T5_TOKENS, width)
        if len(self.text_encoders) == 3:
            ids = token_ids(self.tokenizers[2], prompts, T5_TOKENS)
            t5 = self.text_encoders[2](ids.to(self.device))[0].float()
        tokens = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], 1)
        return Embedding(tokens, torch.cat(pooled, -1).float())

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Ask the denoiser; where T5 is absent its tokens get no gradient.

        These zeros would take most of it, and a prompt tuned there is one that no text gives.
        """
        told = embedding.expand(len(z_t))
        if len(self.text_encoders) == 2:
            clip = self.tokenizers[0].model_max_length
            told = replace(told, tokens=torch.cat([told.tokens[:, :clip], told.tokens[:, clip:].detach()], 1))
        assert told.pooled is not None  # `embed` always gives it
        with self._computing():
            output = self.denoiser(
                z_t.to(self.dtype),
                timestep=1000 * t,
                encoder_hidden_states=told.tokens.to(self.dtype),
                pooled_projections=told.pooled.to(self.dtype),
            )
        return output.sample.float()

    def places(self, layer: str, text: int, total: int) -> Places:
        """Say where picture and text stand: the picture first; in the dual blocks' `attn2` it is alone."""
        if ".attn2." in layer:
            return Places(slice(None), slice(0, 0), slice(None))
        picture = slice(0, total - text)
        return Places(picture, slice(total - text, total), picture)

    def pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        parts: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
        for suffix, tokenizer, encoder in zip(("", "_2", "_3"), self.tokenizers, self.text_encoders, strict=False):
            parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.schedule.scheduler))
        return StableDiffusion3Pipeline(vae=self.vae, transformer=self.denoiser, scheduler=scheduler, **parts)


def build(scheduler: Mapping[str, Any], **parts: Any) -> StableDiffusion3:
    """Put a model together from its scheduler's configuration and the arguments of `Surrogate`.

    Times of training are logit-normal, as in the paper and by default in diffusers' scripts.
    """
    return StableDiffusion3(schedule=Straight(scheduler, density="logit-normal"), **parts)
