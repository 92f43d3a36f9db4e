"""The latent diffusion model that stands in for the attacker's, and the few things every stage asks of it.

Latents stay `(B, C, h, w)` for every family; what a denoiser packs, it packs inside `predict`.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from antidiffusion.models.schedule import Schedule, noised, target


@dataclass(frozen=True)
class Embedding:
    """All that a denoiser is told, float32.

    Arguments:
        tokens: One vector per token, `(B, L, d)`; B is 1 or the batch's size.
        pooled: The pooled vector of the models that have one, `(B, d2)`, or None.
        guidance: Scale that a guidance-distilled model is told, `(B,)`, or None for other models.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def __getitem__(self, index: slice) -> "Embedding":
        return Embedding(*(None if part is None else part[index] for part in self._parts))  # type: ignore[arg-type]

    def expand(self, count: int) -> "Embedding":
        """Return the same for a batch of `count`; B is 1 or that already."""
        parts = (None if part is None else part.expand(count, *part.shape[1:]) for part in self._parts)
        return Embedding(*parts)  # type: ignore[arg-type]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.tokens, self.pooled, self.guidance


def concatenate(*embeddings: tuple[Embedding, int]) -> Embedding:
    """Join embeddings, each of batch 1 or of the number beside it, to one batch."""
    expanded = [embedding.expand(count)._parts for embedding, count in embeddings]
    joined = ([part for part in parts if part is not None] for parts in zip(*expanded, strict=True))
    return Embedding(*(torch.cat(parts) if parts else None for parts in joined))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Posterior:
    """The encoder's normal distribution over scaled latents, mean and standard deviation `(B, C, h, w)`."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: Generator) -> Tensor:
        """Draw latents `(B, C, h, w)`."""
        return self.mean + self.std * randn(self.mean.shape, generator, self.mean)


class Places(NamedTuple):
    """Where the picture and the text stand in an attention layer: queries of the picture, keys of text and picture."""

    queries: slice
    text: slice
    picture: slice


TEXT_LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""What diffusers' DreamBooth LoRA scripts adapt in CLIP's text encoders."""
Word = tuple[str, range]
"""A word in lower case and the positions of its tokens in the embedding."""


def randn(shape: torch.Size | tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Draw normal noise on the generator's device, so that every device sees the same numbers."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Return token numbers `(B, length)`, padded and cut; the tokenizer's own window if no length is given."""
    length = length or tokenizer.model_max_length
    found = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return found.input_ids


def warn_of_cuts(prompts: Sequence[str], tokenizer: Any, room: int | None = None) -> None:
    """Warn of each prompt that is longer than the tokenizer's window, with the text that is cut off."""
    room = room or tokenizer.model_max_length - 2  # begin and end of text
    for ids in tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids:
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:])
            text = f"expected a prompt of at most {room} tokens, got {len(ids)}; cut off: {cut!r}; shorten the prompt"
            warnings.warn(text, stacklevel=3)


@dataclass
class Surrogate(ABC):
    """A latent diffusion model with frozen weights; each family says how it embeds, answers and attends.

    Arguments:
        name: What the user asked for, as the report card prints it.
        vae: diffusers' autoencoder.
        denoiser: diffusers' UNet or transformer.
        text_encoders, tokenizers: transformers', one of each for every text encoder that the model has.
        schedule: The path of noising.
        size: Side in pixels of the square that the model was trained on.
        learning_rate, lora_learning_rate: AdamW step sizes of surrogate tuning, full and LoRA; the defaults are the
            paper's and that of diffusers' DreamBooth LoRA script.
        autocast: Half precision that denoiser and autoencoder compute in where their weights are float32, or None.
    """

    name: str
    vae: Any
    denoiser: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    schedule: Schedule
    size: int
    learning_rate: float = 5e-7
    lora_learning_rate: float = 1e-4
    autocast: torch.dtype | None = None

    joint: ClassVar[bool] = False
    """Whether text and picture attend to each other in one softmax, as in transformers."""
    guidance: ClassVar[float] = 7.5
    """Scale of classifier-free guidance that the family is usually drawn with; 1 for models without."""
    steps: ClassVar[int] = 50
    """Steps that the family is usually drawn with."""
    part: ClassVar[str] = "unet"
    """diffusers' name of the denoiser in a pipeline, with which the keys of saved adapters begin."""

    def __post_init__(self) -> None:
        for module in self.modules:
            module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> "Surrogate":
        """Load a model of any family; arguments and errors as `antidiffusion.models.loading.load`."""
        from antidiffusion.models.loading import load

        return load(model, **options)

    def to(self, device: str | torch.device) -> "Surrogate":
        """Move the weights to a device, channels-last on CPU and CUDA, whose convolutions are faster so."""
        last = torch.device(device).type in ("cpu", "cuda")
        for module in self.modules:
            module.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
        return self

    @property
    def modules(self) -> list[Any]:
        return [self.vae, self.denoiser, *self.text_encoders]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def precision(self) -> str:
        """Name of the weights' dtype, and of the other one if another one computes."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.autocast) if dtype]
        return " with autocast to ".join(names)

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    @property
    def channels(self) -> int:
        """Channels of a latent, C."""
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent position along a side: 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def blocks(self) -> list[Any]:
        """The denoiser's parts that run one after the other and can be held one at a time; none where it has none."""
        return []

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Sides in pixels must be multiples of this."""

    @abstractmethod
    def positions(self, height: int, width: int) -> int:
        """Return how many positions of the picture, of sides in pixels, the denoiser attends to at its finest."""

    @cached_property
    def sha256(self) -> str:
        """Hash of every weight, in the loaded dtype: the same for a folder and a single file."""
        digest = hashlib.sha256()
        for module in self.modules:
            for key, value in sorted(module.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def posterior(self, x: Tensor) -> Posterior:
        """Encode pictures `x: (B, 3, H, W)` in [0, 1] to a distribution over scaled latents, float32."""
        dtype = next(self.vae.parameters()).dtype
        with self._computing():
            distribution = self.vae.encode((2 * x - 1).to(dtype)).latent_dist
        shift, factor = self._normalisation
        return Posterior((distribution.mean.float() - shift) * factor, distribution.std.float() * factor)

    @property
    def _normalisation(self) -> tuple[float | Tensor, float | Tensor]:
        """What is subtracted from the autoencoder's latents, and what they are then multiplied by."""
        config = self.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, config.scaling_factor / std

    def encode(self, x: Tensor, generator: Generator) -> Tensor:
        """Return latents z `(B, C, h, w)` float32, a posterior sample of pictures `x: (B, 3, H, W)` in [0, 1]."""
        return self.posterior(x).sample(generator)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return pictures `(B, 3, H, W)` float32 in [0, 1] of latents `z: (B, C, h, w)`."""
        return self.decode_with_gradient(z).clamp(0, 1)

    def decode_with_gradient(self, z: Tensor) -> Tensor:
        """Return pictures as `decode` does, but not clamped to [0, 1]: a clamp would stop the gradient."""
        shift, factor = self._normalisation
        latents = (z / factor + shift).to(next(self.vae.parameters()).dtype)
        with self._computing():
            return self.vae.decode(latents).sample.float() / 2 + 0.5

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)`; text beyond the window is cut, as in diffusers, with a warning that names it."""
        warn_of_cuts(prompts, *self._window)
        return self.embed_with_gradient(prompts)

    @property
    def _window(self) -> tuple[Any, int | None]:
        """The tokenizer that reads most of a prompt, and how many tokens that is if it does not say so itself."""
        return self.tokenizers[0], None

    @abstractmethod
    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)` as a function of the text encoders' weights, which some attacks tune."""

    def unconditional(self) -> Embedding:
        """Return what guidance leads away from, batch 1: the empty prompt, if the family says nothing else."""
        return self.embed([""])

    @abstractmethod
    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Ask the denoiser, with gradient to latents and embedding.

        Arguments:
            z_t: Noisy latents `(B, C, h, w)` float32.
            t: Times of the schedule, `(B,)`.
            embedding: Of the prompts, batch 1 or B.

        Returns:
            The answer `(B, C, h, w)` float32, what `schedule.prediction` says.
        """

    def guided(self, embedding: Embedding, guidance: float | Tensor, count: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Prepare the denoiser with classifier-free guidance; one call answers with and without the prompts.

        Arguments:
            embedding: Of the prompts, batch 1 or B.
            guidance: Scale for all or for each, `(B,)`. Entries of scale 1 are not guided; the answers without a prompt
                of the others stand in the denoiser's batch after all B.
            count: B.

        Returns:
            Function of latents `(B, C, h, w)` and their time, `()`, that returns the denoiser's answer `(B, C, h, w)`.

        References:
            Classifier-Free Diffusion Guidance, Ho and Salimans, 2022, arXiv 2207.12598
        """
        scale = torch.as_tensor(guidance, dtype=torch.float32, device=self.device).expand(count)
        chosen = (scale != 1).nonzero().flatten()
        scale, total = scale[chosen, None, None, None], count + len(chosen)
        if len(chosen):
            embedding = concatenate((embedding, count), (self.unconditional(), len(chosen)))

        def predict(z: Tensor, t: Tensor) -> Tensor:
            answers = self.predict(torch.cat([z, z[chosen]]), t.expand(total), embedding)
            output, unguided = answers[:count], answers[count:]
            return output.index_copy(0, chosen, unguided + scale * (output[chosen] - unguided))

        return predict

    def draw(self, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw noise `(B, C, h, w)` and training times `(B,)` for latents z."""
        n = randn(z.shape, generator, z)
        return n, self.schedule.draw(len(z), generator).to(z.device)

    def denoising_loss(self, z: Tensor, n: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Return L_ldm per picture, `(B,)`: the mean squared error of the denoiser's answer."""
        output = self.predict(noised(self.schedule, z, n, t), t, embedding)
        return (output - target(self.schedule, z, n, t)).square().mean((1, 2, 3))

    @abstractmethod
    def cross_layers(self) -> list[str]:
        """Name the attention layers in which the picture reads the text, in the order in which they run."""

    @abstractmethod
    def self_layers(self) -> list[str]:
        """Name the attention layers in which the picture reads itself, in the order in which they run."""

    @abstractmethod
    def map_layers(self) -> list[str]:
        """Name the few layers of `cross_layers` whose maps the semantic disturbance loss and the card read."""

    @abstractmethod
    def places(self, layer: str, text: int, total: int) -> Places:
        """Say where picture and text stand in a layer.

        Arguments:
            layer: Name of one of `cross_layers` or `self_layers`.
            text: Tokens of the embedding, L.
            total: Keys that the layer sees.
        """

    @abstractmethod
    def tunable(self, *, texts: bool = False) -> dict[str, tuple[Any, list[str]]]:
        """Return what a tuning attack tunes: diffusers' name of the part, its module, and the layers LoRA adapts.

        Arguments:
            texts: The text encoders too, those that stock scripts tune.
        """

    @abstractmethod
    def pipeline(self) -> Any:
        """Wrap the modules in diffusers' own text-to-image pipeline; nothing is copied."""

    def words(self, text: str) -> list[Word]:
        """Cut a text into words and punctuation, with the positions of their tokens in the embedding.

        Raises:
            ValueError: If the family's tokens are no words of the text.
        """
        raise ValueError(f"expected a model of Stable Diffusion 1, 2 or XL to edit by words, got {self.name}; name one")

    def features(self) -> list[Any]:
        """Return the modules whose outputs are the denoiser's features in SimAC.

        Raises:
            ValueError: If nobody has said which they are for this family.
        """
        raise ValueError(f"expected a model with a UNet for its features, got {self.name}; take another recipe")
