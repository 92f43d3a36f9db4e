"""The latent diffusion model that stands in for the attacker's, and the few things every stage asks of it."""

import errno
import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from antidiffusion.models.weights import locate
from antidiffusion.process import uncollected

SUPPORTED = ("epsilon", "v_prediction", "flow_prediction", "sample")


@dataclass(frozen=True)
class Embedding:
    """A text embedding, float32.

    Arguments:
        tokens: One vector per token, `(B, L, d)`; B is 1 or the batch's size.
        pooled: The pooled vector of SDXL's second text encoder, `(B, d2)`, or None for other models.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, index: slice) -> "Embedding":
        return Embedding(self.tokens[index], None if self.pooled is None else self.pooled[index])


@dataclass(frozen=True)
class Posterior:
    """The encoder's normal distribution over scaled latents, mean and standard deviation `(B, C, h, w)`."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: Generator) -> Tensor:
        """Draw latents `(B, C, h, w)`."""
        return self.mean + self.std * randn(self.mean.shape, generator, self.mean)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process z_t = signal[t] z + noise[t] n and what the UNet is trained to predict.

    Arguments:
        signal: Factor of the clean latent at every training step, `(T,)` float32 in [0, 1].
        noise: Factor of the noise, `(T,)` float32 in [0, 1].
        prediction: "epsilon", "v_prediction", "flow_prediction" or "sample".

    References:
        Denoising Diffusion Probabilistic Models, Ho et al., 2020, arXiv 2006.11239
        Progressive Distillation, Salimans and Ho, 2022, arXiv 2202.00512 (v-prediction)
        Flow Matching for Generative Modeling, Lipman et al., 2022, arXiv 2210.02747
    """

    signal: Tensor
    noise: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in SUPPORTED:
            raise ValueError(f"expected a prediction type of {', '.join(SUPPORTED)}, got {self.prediction!r}")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Read a diffusers scheduler that has `alphas_cumprod`."""
        alphas = scheduler.alphas_cumprod.float()
        return cls(alphas.sqrt(), (1 - alphas).sqrt(), scheduler.config.prediction_type)

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        return tuple(table.to(like.device)[t].view(shape).to(like.dtype) for table in (self.signal, self.noise))  # type: ignore[return-value]

    def add_noise(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """Return z_t `(B, C, h, w)` for latents, noise `(B, C, h, w)` and steps `t: (B,)` int64."""
        signal, noise = self._factors(t, z)
        return signal * z + noise * n

    def target(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """Return what the UNet should answer for the same arguments: n, the velocity, n - z, or z."""
        if self.prediction == "epsilon":
            return n
        if self.prediction == "v_prediction":
            signal, noise = self._factors(t, z)
            return signal * n - noise * z
        return n - z if self.prediction == "flow_prediction" else z


def randn(shape: torch.Size | tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Draw normal noise on the generator's device, so that every device sees the same numbers."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def warn_of_cuts(prompts: Sequence[str], tokenizer: Any) -> None:
    """Warn of each prompt that is longer than the tokenizer's window, with the text that is cut off."""
    room = tokenizer.model_max_length - 2  # begin and end of text
    for ids in tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids:
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:])
            text = f"expected a prompt of at most {room} tokens, got {len(ids)}; cut off: {cut!r}; shorten the prompt"
            warnings.warn(text, stacklevel=3)


@contextmanager
def saved(tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor]]]:
    """Keep a copy of tensors in a temporary file inside the block, where memory is dearer than disk.

    Returns:
        Function that reads the copies back.

    Raises:
        OSError: If the disk of temporary files is full.
    """
    with tempfile.TemporaryFile(prefix="antidiffusion-") as file:
        try:
            torch.save(list(tensors), file)
        except RuntimeError as error:  # torch's word for a failed write
            raise OSError(
                errno.ENOSPC, f"no room for a copy of {len(tensors)} weights; set TMPDIR", tempfile.gettempdir()
            ) from error
        del tensors  # or what the caller parks would stay in memory

        def load() -> list[Tensor]:
            file.seek(0)
            return torch.load(file, weights_only=True)

        yield load


@contextmanager
def recomputed(layers: Sequence[Any]) -> Iterator[None]:
    """Keep only what goes into each layer inside the block, and compute the rest anew in the backward pass.

    diffusers' switch for the autoencoder recomputes whole levels, whose activations are twice as large.
    """
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class Surrogate:
    """A latent diffusion model with frozen weights.

    Arguments:
        name: What the user asked for, as the report card prints it.
        vae, unet: diffusers' AutoencoderKL and UNet2DConditionModel.
        text_encoders, tokenizers: One of each, or two for SDXL.
        scheduler: diffusers' DDIMScheduler with the model's noise schedule; attacks sample with it.
        size: Side in pixels of the square that the model was trained on.
        learning_rate, lora_learning_rate: AdamW step sizes of surrogate tuning, full and LoRA; the defaults are the
            paper's and that of diffusers' DreamBooth LoRA script.
        autocast: Half precision that UNet and autoencoder compute in where their weights are float32, or None.
    """

    name: str
    vae: Any
    unet: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any
    size: int
    learning_rate: float = 5e-7
    lora_learning_rate: float = 1e-4
    autocast: torch.dtype | None = None
    schedule: NoiseSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        for module in self.modules:
            module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        config: str | None = None,
        offline: bool = False,
    ) -> "Surrogate":
        """Load Stable Diffusion 1.x, 2.x or XL.

        Arguments:
            model: "mini" (the embedded model), a diffusers folder, a `.safetensors` file in the original layout, or a
                hub id. A local path never touches the network.
            device: Where the weights go.
            dtype: Of the weights: float32, bfloat16 or float16.
            autocast: Compute in this half precision nevertheless: bfloat16, or float16 where nothing is tuned.
            config: Diffusers folder or hub id with the configuration and tokenizer of a single file.
            offline: Use only what is on this machine.

        Raises:
            WeightsError: If the model cannot be found or has a layout that is not supported.
        """
        from antidiffusion.models.loading import load_parts, trial

        with uncollected():
            parts = load_parts(locate(model, config=config, offline=offline), dtype)
        surrogate = cls(name=model, autocast=autocast, **parts).to(device)
        trial(surrogate)
        return surrogate

    def to(self, device: str | torch.device) -> "Surrogate":
        """Move the weights to a device, channels-last on CPU and CUDA, whose convolutions are faster so."""
        last = torch.device(device).type in ("cpu", "cuda")
        for module in self.modules:
            module.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
        return self

    @property
    def modules(self) -> list[Any]:
        return [self.vae, self.unet, *self.text_encoders]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def precision(self) -> str:
        """Name of the weights' dtype, and of the other one if another one computes."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.autocast) if dtype]
        return " with autocast to ".join(names)

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    @property
    def factor(self) -> int:
        """Pixels per latent position along a side: 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Sides in pixels must be multiples of this for every level of the UNet to be whole."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

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
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        factor = self.vae.config.scaling_factor
        return Posterior((distribution.mean.float() - shift) * factor, distribution.std.float() * factor)

    def encode(self, x: Tensor, generator: Generator) -> Tensor:
        """Return latents z `(B, C, h, w)` float32, a posterior sample of pictures `x: (B, 3, H, W)` in [0, 1]."""
        return self.posterior(x).sample(generator)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return pictures `(B, 3, H, W)` float32 in [0, 1] of latents `z: (B, C, h, w)`."""
        return self.decode_with_gradient(z).clamp(0, 1)

    def decode_with_gradient(self, z: Tensor) -> Tensor:
        """Return pictures as `decode` does, but not clamped to [0, 1]: a clamp would stop the gradient."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = (z / self.vae.config.scaling_factor + shift).to(next(self.vae.parameters()).dtype)
        with self._computing():
            return self.vae.decode(latents).sample.float() / 2 + 0.5

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)`; text beyond the window is cut, as in diffusers, with a warning that names it."""
        warn_of_cuts(prompts, self.tokenizers[0])
        return self.embed_with_gradient(prompts)

    def embed_with_gradient(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts `(B)` as a function of the text encoders' weights, which some attacks tune."""
        states, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)
            if len(self.text_encoders) == 1:
                return Embedding(encoder(ids).last_hidden_state.float())
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return Embedding(torch.cat(states, -1).float(), pooled.float())

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Ask the UNet: noisy latents `z_t: (B, C, h, w)`, steps `t: (B,)` int64; returns `(B, C, h, w)` float32."""
        batch = len(z_t)
        added = None
        if embedding.pooled is not None:
            height, width = (side * self.factor for side in z_t.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=z_t.device)
            pooled = embedding.pooled.to(self.dtype)
            added = {"text_embeds": pooled.expand(batch, -1), "time_ids": sizes.expand(batch, -1)}
        tokens = embedding.tokens.to(self.dtype).expand(batch, -1, -1)
        with self._computing():
            output = self.unet(z_t.to(self.dtype), t, encoder_hidden_states=tokens, added_cond_kwargs=added)
        return output.sample.float()

    def draw(self, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw noise `(B, C, h, w)` and uniform training steps `(B,)` for latents z."""
        n = randn(z.shape, generator, z)
        t = torch.randint(len(self.schedule.signal), (len(z),), generator=generator, device=generator.device)
        return n, t.to(z.device)

    def denoising_loss(self, z: Tensor, n: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
        """Return L_ldm per picture, `(B,)`: the mean squared error of the UNet's answer."""
        output = self.predict(self.schedule.add_noise(z, n, t), t, embedding)
        return (output - self.schedule.target(z, n, t)).square().mean((1, 2, 3))

    @contextmanager
    def low_memory(self) -> Iterator[None]:
        """Protect with less memory and more time inside the block.

        Activations are recomputed in the backward pass, and the text encoders and the decoder, which no stage needs,
        are on disk: `embed` and `decode` do not work here.
        """
        from diffusers.models.resnet import ResnetBlock2D

        parked = [p for module in (*self.text_encoders, self.vae.decoder) for p in module.parameters()]
        residuals = [module for module in self.vae.encoder.modules() if isinstance(module, ResnetBlock2D)]
        self.unet.enable_gradient_checkpointing()
        try:
            with recomputed(residuals), saved([parameter.data for parameter in parked]) as load:
                for parameter in parked:
                    parameter.data = parameter.data[:0].clone()
                try:
                    yield
                finally:
                    for parameter, data in zip(parked, load(), strict=True):
                        parameter.data = data
        finally:
            self.unet.disable_gradient_checkpointing()

    @contextmanager
    def offload(self) -> Iterator[None]:
        """Keep the text encoders and the autoencoder on the CPU inside the block, but while one of them is called.

        For attacks on an accelerator that the UNet nearly fills. A call whose gradient is wanted leaves its module on
        the UNet's device until the next one without, since the backward pass reads its weights.
        """
        device, parts = self.device, [*self.text_encoders, *self.vae.children()]

        def fetch(module: Any, inputs: Any) -> None:
            module.to(device)

        def park(module: Any, inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                module.to("cpu")

        hooks = []
        try:
            for module in parts:
                module.to("cpu")
                hooks += [module.register_forward_pre_hook(fetch), module.register_forward_hook(park)]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in parts:
                module.to(device)
