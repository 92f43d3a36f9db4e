"""FLUX.2 [klein]: double and single transformer blocks on the straight path, told by hidden states of Qwen3.

The latents of this family are the autoencoder's squares of 2 x 2, which the transformer takes for one position each:
4 x 32 channels at a sixteenth of the pixels' sides.

References:
    FLUX.2 [klein], Black Forest Labs, 2026, https://github.com/black-forest-labs/flux2
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from antidiffusion.models.base import Embedding, Places, Posterior
from antidiffusion.models.flux import picture_ids
from antidiffusion.models.joint import JointTransformer
from antidiffusion.models.schedule import Straight

TOKENS = 512  # what diffusers' pipeline gives Qwen3 of a prompt in its chat template
HIDDEN = (9, 18, 27)  # hidden states of Qwen3 that stand side by side in a token; 0 is what goes into the first layer
FEW, MANY = (10, 200)  # steps at which the shift is a given line of the positions
SHIFT = {FEW: (8.73809524e-05, 1.89833333), MANY: (0.00016927, 0.45666666)}  # slope and offset
LARGE = 4300  # positions above which the shift is that of many steps for any number


@dataclass(frozen=True)
class StepShifted(Straight):
    """The straight path with FLUX.2's shift, which depends on the number of steps too."""

    def _shift(self, positions: int, steps: int) -> float:
        """Return the logarithm of the shift: a line through what it is at few and at many steps."""
        few, many = (slope * positions + offset for slope, offset in (SHIFT[FEW], SHIFT[MANY]))
        return many if positions > LARGE else few + (many - few) * (steps - FEW) / (MANY - FEW)


@dataclass
class Flux2Klein(JointTransformer):
    """FLUX.2 [klein] base, led away from the empty prompt, and models of its shape."""

    guidance: ClassVar[float] = 4.0
    steps: ClassVar[int] = 50
    patch: ClassVar[int] = 1
    lora_layers: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]
    distilled: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """Channels of a latent: those of four of the autoencoder's."""
        return 4 * super().channels

    @property
    def factor(self) -> int:
        """Pixels per latent position along a side: 16."""
        return 2 * super().factor

    @property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """The running statistics of the autoencoder's batch norm, one of each for a channel of a square."""
        norm = self.vae.bn
        mean, variance = (values.float().view(1, -1, 1, 1) for values in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).rsqrt()

    def posterior(self, x: Tensor) -> Posterior:
        dtype = next(self.vae.parameters()).dtype
        with self._computing():
            distribution = self.vae.encode((2 * x - 1).to(dtype)).latent_dist
        shift, factor = self._normalisation
        mean, std = (F.pixel_unshuffle(part.float(), 2) for part in (distribution.mean, distribution.std))
        return Posterior((mean - shift) * factor, std * factor)

    def decode_with_gradient(self, z: Tensor) -> Tensor:
        shift, factor = self._normalisation
        latents = F.pixel_shuffle(z / factor + shift, 2).to(next(self.vae.parameters()).dtype)
        with self._computing():
            return self.vae.decode(latents).sample.float() / 2 + 0.5

    @property
    def _window(self) -> tuple[Any, int | None]:
        before = self._asked("prompt").partition("prompt")[0]
        return self.tokenizers[0], TOKENS - len(self.tokenizers[0](before).input_ids)

    def _asked(self, prompt: str) -> str:
        """Return a prompt as Qwen3 reads it: what a user says, and the start of an answer without thinking."""
        said = [{"role": "user", "content": prompt}]
        asked: str = self.tokenizers[0].apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return asked

    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)`: three of Qwen3's hidden states side by side."""
        texts = [self._asked(prompt) for prompt in prompts]
        read = self.tokenizers[0](
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        # Called whole, since its weights may be fetched by that; of its answer's logits, none but one position's.
        found = self.text_encoders[0](**read, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return Embedding(torch.cat([found.hidden_states[layer] for layer in HIDDEN], -1).float())

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        tokens, (height, width) = embedding.expand(len(z_t)).tokens, z_t.shape[-2:]
        with self._computing():
            output = self.denoiser(
                hidden_states=z_t.to(self.dtype).flatten(2).transpose(1, 2),
                timestep=t,
                encoder_hidden_states=tokens.to(self.dtype),
                txt_ids=F.pad(torch.arange(tokens.shape[1], device=z_t.device)[:, None], (3, 0)),
                img_ids=F.pad(picture_ids(height, width, z_t.device), (0, 1)),
            )
        return output.sample.float().transpose(1, 2).unflatten(2, (height, width))

    def places(self, layer: str, text: int, total: int) -> Places:
        """Say where picture and text stand: the text first, in double and in single blocks."""
        picture = slice(text, total)
        return Places(picture, slice(0, text), picture)

    def tunable(self, *, texts: bool = False) -> dict[str, tuple[Any, list[str]]]:
        """Return the transformer, whatever `texts` says: Qwen3 is tuned by no stock script."""
        count = len(self.denoiser.single_transformer_blocks)
        # With the block: in double blocks "attn.to_out" is no layer but a list of two.
        outputs = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(count)]
        return {self.part: (self.denoiser, [*self.lora_layers, *outputs])}

    def pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(self.schedule.scheduler)),
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            transformer=self.denoiser,
            is_distilled=self.distilled,
        )


@dataclass
class Flux2KleinDistilled(Flux2Klein):
    """FLUX.2 [klein], distilled to few steps without guidance."""

    guidance: ClassVar[float] = 1.0
    steps: ClassVar[int] = 4
    distilled: ClassVar[bool] = True


def build(scheduler: Mapping[str, Any], *, is_distilled: bool = False, **parts: Any) -> Flux2Klein:
    """Put a model together from its scheduler's configuration and the arguments of `Surrogate`.

    Arguments:
        is_distilled: What model_index.json says. Times of training are uniform.
    """
    family = Flux2KleinDistilled if is_distilled else Flux2Klein
    return family(schedule=StepShifted(scheduler, even=True), **parts)
