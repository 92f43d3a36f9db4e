"""The one loop that fits parameters to pictures: prompt tuning, surrogate tuning, and the tuning attacks.

References:
    DreamBooth, Ruiz et al., 2023, arXiv 2208.12242
    LoRA, Hu et al., 2022, arXiv 2106.09685
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from antidiffusion.models.base import Embedding, Posterior, Surrogate
from antidiffusion.models.memory import saved
from antidiffusion.models.streaming import is_parked, is_streamed

LORA_RANK = 8
ADAPTER = "tuning"  # peft's name for ours
BUCKET = 2**20  # weights that take their step together: 4 MB of float32 gradients

Loss = Callable[[Generator], Tensor]
Sampler = Callable[[Generator], Tensor]  # draws latents (B, C, h, w), for example Posterior.sample


class Bucket:
    """Parameters that take their AdamW step together, as soon as the gradient of the last of them is known.

    Arguments:
        parameters: Leaf tensors that ask for gradients; these are freed after the step.
        learning_rate: AdamW's.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float) -> None:
        self._size = self._left = len(parameters)
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]

    def _arrived(self, parameter: Tensor) -> None:
        self._left -= 1
        if not self._left:
            self._step()

    def flush(self) -> None:
        """Take the step after a backward pass that did not reach every parameter."""
        if self._left < self._size:
            self._step()

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._left = self._size


def bucketed(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of parameters of at most `BUCKET` weights together, or of one larger parameter."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(map(Tensor.numel, bucket)) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def fit(
    parameters: Sequence[Tensor],
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    generator: Generator,
) -> Iterator[float]:
    """Minimise a loss with AdamW; yields the loss before every step.

    Parameters take their step inside the backward pass, a `Bucket` at a time, and the gradients are freed: all
    gradients together would cost as much memory as the weights.

    Arguments:
        parameters: Leaf tensors, updated in place; gradients are asked for inside the loop only.
        loss: Function of a generator that gives a scalar.
        steps: Number of steps.
        learning_rate: AdamW's; betas (0.9, 0.999) and weight decay 0.01 are torch's defaults.
        generator: Source of the loss's noise.
    """
    buckets: list[Bucket] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        for members in bucketed(parameters):
            buckets.append(Bucket(members, learning_rate))
        for _ in range(steps):
            value = loss(generator)
            value.backward()
            for bucket in buckets:
                bucket.flush()
            yield value.item()
    finally:
        for hook in [hook for bucket in buckets for hook in bucket.hooks]:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None


def constant(z: Tensor) -> Sampler:
    """Return a sampler that gives the same latents at every call and draws nothing."""
    return lambda generator: z


def drawn(posterior: Posterior, count: int) -> Sampler:
    """Return a sampler of at most `count` pictures of a posterior, other random ones at every call."""

    def sampler(generator: Generator) -> Tensor:
        rows = torch.randperm(len(posterior.mean), generator=generator, device=generator.device)[:count]
        rows = rows.to(posterior.mean.device)
        return Posterior(posterior.mean[rows], posterior.std[rows]).sample(generator)

    return sampler


def denoising(surrogate: Surrogate, samplers: Sequence[Sampler], embedding: Embedding) -> Loss:
    """Return the mean L_ldm over pictures whose latents come from samplers, one for each batch of alike latents.

    The activations of one batch are alive at a time: with several, each batch's are computed anew in the backward pass.
    """

    def one(z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return surrogate.denoising_loss(z, n, t, embedding)

    def loss(generator: Generator) -> Tensor:
        losses = []
        for sampler in samplers:
            z = sampler(generator)
            n, t = surrogate.draw(z, generator)
            losses.append(one(z, n, t) if len(samplers) == 1 else checkpoint(one, z, n, t, use_reentrant=False))
        return torch.cat(losses).mean()

    return loss


def described(surrogate: Surrogate, samplers: Sequence[Sampler], prompt: str) -> Loss:
    """Return `denoising` with the prompt embedded anew at every step: for parameters inside the text encoders."""
    return lambda generator: denoising(surrogate, samplers, surrogate.embed_with_gradient([prompt]))(generator)


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let float32 weights be tuned inside the block and give them back unchanged, from a temporary file.

    Raises:
        ValueError: If weights are in half precision, where steps of 5e-7 vanish, or are not held in memory.
    """
    if any(map(is_parked, parameters)):
        raise ValueError("expected weights in memory for full tuning, got parked ones; use LoRA tuning or more memory")
    for dtype in {parameter.dtype for parameter in parameters} - {torch.float32}:
        raise ValueError(f"expected float32 weights for full tuning, got {dtype}; use float32 or LoRA tuning")
    with saved([parameter.data for parameter in parameters]) as load:
        try:
            yield
        finally:
            for parameter, data in zip(parameters, load(), strict=True):
                parameter.data.copy_(data)


@contextmanager
def adapted(
    surrogate: Surrogate, rank: int = LORA_RANK, seed: int = 0, *, text_encoders: bool = False
) -> Iterator[list[Tensor]]:
    """Give the denoiser low-rank adapters inside the block and take them off again.

    Arguments:
        surrogate: The model; the same object is adapted.
        rank: Of the adapters; their scale is 1.
        seed: Decides the adapters' start.
        text_encoders: Give adapters to the text encoders too, see `Surrogate.tunable`.

    Returns:
        The adapters' matrices, float32 whatever the model's precision.

    Raises:
        ValueError: If a part has adapters already.
    """
    from diffusers.utils import recurse_remove_peft_layers
    from peft import LoraConfig

    parts = surrogate.tunable(texts=text_encoders)
    for name, (module, _) in parts.items():
        if present := getattr(module, "peft_config", None):
            raise ValueError(f"expected a {name} without adapters, got {', '.join(present)}; take them off first")
    adapters = []
    try:
        with torch.random.fork_rng():  # peft draws the adapters' start from the global generator
            torch.manual_seed(seed)
            for module, layers in parts.values():
                module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), ADAPTER)
                adapters += [parameter for name, parameter in module.named_parameters() if f".{ADAPTER}." in name]
        for parameter in adapters:
            parameter.data = parameter.data.float()
        yield adapters
    finally:
        for module, _ in parts.values():
            recurse_remove_peft_layers(module)
            vars(module).pop("peft_config", None)
            module._hf_peft_config_loaded = False
            module.requires_grad_(False)


@contextmanager
def tunable(surrogate: Surrogate, method: str) -> Iterator[tuple[list[Tensor], float]]:
    """Make the denoiser tunable inside the block and give it back unchanged.

    Arguments:
        surrogate: The model; the same object is tuned.
        method: "full" tunes every weight, see `restored`; "lora" tunes low-rank adapters, see `adapted`; "auto" picks
            full for float32 denoisers below 200 million weights that are held in memory, and LoRA otherwise.

    Returns:
        The parameters to fit and the learning rate that suits them.

    Raises:
        ValueError: If the method is unknown, or full tuning is asked of half precision.
    """
    parameters = list(surrogate.denoiser.parameters())
    if method == "auto":
        small = sum(parameter.numel() for parameter in parameters) < 2e8
        fits = surrogate.dtype == torch.float32 and not is_streamed(surrogate)
        method = "full" if small and fits else "lora"
    if method == "full":
        with restored(parameters):
            yield parameters, surrogate.learning_rate
    elif method == "lora":
        with adapted(surrogate) as adapters:
            yield adapters, surrogate.lora_learning_rate
    else:
        raise ValueError(f"expected full, lora or auto tuning, got {method!r}")
