"""What transformers have in common in which picture and text attend to each other in one softmax.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al., 2024, arXiv 2403.03206
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from antidiffusion.models.base import TEXT_LORA_LAYERS, Surrogate
from antidiffusion.models.schedule import Straight

# What diffusers' DreamBooth LoRA scripts adapt in the joint layers.
ATTENTION_LORA_LAYERS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]


@dataclass
class JointTransformer(Surrogate):
    """A transformer on the straight path; families say how they embed, answer, and order picture and text."""

    schedule: Straight

    joint: ClassVar[bool] = True
    steps: ClassVar[int] = 28
    part: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 2
    """Latent positions that the transformer takes for one, along a side."""
    lora_layers: ClassVar[list[str]] = ATTENTION_LORA_LAYERS
    """What a LoRA adapts in the transformer."""

    @property
    def blocks(self) -> list[Any]:
        return [*self.denoiser.transformer_blocks, *getattr(self.denoiser, "single_transformer_blocks", [])]

    @property
    def multiple(self) -> int:
        return self.factor * self.patch

    def positions(self, height: int, width: int) -> int:
        return height * width // self.multiple**2

    def cross_layers(self) -> list[str]:
        return [name for name in self.denoiser.attn_processors if name.endswith(".attn.processor")]

    def self_layers(self) -> list[str]:
        return list(self.denoiser.attn_processors)

    def map_layers(self) -> list[str]:
        """Name the first joint layer.

        All layers have all positions: recorded, one of FLUX.1 takes 2 GB at 1024 pixels. What is wanted of the first
        alone, the forward pass can be cut after.

        References:
            VETO, 2026, arXiv 2607.27292
        """
        return self.cross_layers()[:1]

    def tunable(self, *, texts: bool = False) -> dict[str, tuple[Any, list[str]]]:
        found = {self.part: (self.denoiser, self.lora_layers)}
        if texts:  # T5 is tuned by no stock script
            named = zip(("text_encoder", "text_encoder_2"), self.clips, strict=False)
            found |= {name: (encoder, TEXT_LORA_LAYERS) for name, encoder in named}
        return found

    @property
    def clips(self) -> list[Any]:
        """The text encoders but T5."""
        return [encoder for encoder in self.text_encoders if encoder.config.model_type != "t5"]
