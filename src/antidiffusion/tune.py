"""The one loop that fits parameters to pictures: prompt tuning, surrogate tuning, and the tuning attacks.

References:
    DreamBooth, Ruiz et al., 2023, arXiv 2208.12242
    LoRA, Hu et al., 2022, arXiv 2106.09685
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from antidiffusion.surrogate import Embedding, Surrogate, saved

LORA_RANK = 8
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # what diffusers' DreamBooth LoRA script adapts

Loss = Callable[[Generator], Tensor]
Sampler = Callable[[Generator], Tensor]  # draws latents (B, C, h, w), for example Posterior.sample


def fit(
    parameters: Sequence[Tensor],
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    generator: Generator,
) -> Iterator[float]:
    """Minimise a loss with AdamW; yields the loss before every step.

    A parameter takes its step inside the backward pass, as soon as its gradient is known, and the gradient is freed:
    all gradients together would cost as much memory as the weights.

    Arguments:
        parameters: Leaf tensors, updated in place; gradients are asked for inside the loop only.
        loss: Function of a generator that gives a scalar.
        steps: Number of steps.
        learning_rate: AdamW's; betas (0.9, 0.999) and weight decay 0.01 are torch's defaults.
        generator: Source of the loss's noise.
    """
    optimizers = {
        parameter: torch.optim.AdamW([parameter], lr=learning_rate, foreach=False) for parameter in parameters
    }

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    hooks = []
    try:
        for parameter in parameters:
            parameter.requires_grad_()
            hooks.append(parameter.register_post_accumulate_grad_hook(step))
        for _ in range(steps):
            value = loss(generator)
            value.backward()
            yield value.item()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)


def constant(z: Tensor) -> Sampler:
    """Return a sampler that gives the same latents at every call and draws nothing."""
    return lambda generator: z


def denoising(surrogate: Surrogate, samplers: Sequence[Sampler], embedding: Embedding) -> Loss:
    """Return the mean L_ldm over pictures whose latents come from samplers, one for each size of latent."""

    def loss(generator: Generator) -> Tensor:
        losses = []
        for sampler in samplers:
            z = sampler(generator)
            n, t = surrogate.draw(z, generator)
            losses.append(surrogate.denoising_loss(z, n, t, embedding))
        return torch.cat(losses).mean()

    return loss


@contextmanager
def tunable(surrogate: Surrogate, method: str) -> Iterator[tuple[list[Tensor], float]]:
    """Make the UNet tunable inside the block and give it back unchanged.

    Arguments:
        surrogate: The model; the same object is tuned.
        method: "full" tunes every weight of a float32 UNet and restores it from a temporary file afterwards; "lora"
            tunes low-rank adapters in float32 and removes them; "auto" picks full for float32 UNets below 200 million
            weights and LoRA otherwise.

    Returns:
        The parameters to fit and the learning rate that suits them.

    Raises:
        ValueError: If the method is unknown, or full tuning is asked of half precision, where steps of 5e-7 vanish.
    """
    unet = surrogate.unet
    if method == "auto":
        small = sum(parameter.numel() for parameter in unet.parameters()) < 2e8
        method = "full" if small and surrogate.dtype == torch.float32 else "lora"
    if method == "full":
        if surrogate.dtype != torch.float32:
            raise ValueError(
                f"expected float32 weights for full tuning, got {surrogate.dtype}; use float32 or LoRA tuning"
            )
        parameters = list(unet.parameters())
        with saved([parameter.data for parameter in parameters]) as load:
            try:
                yield parameters, surrogate.learning_rate
            finally:
                for parameter, data in zip(parameters, load(), strict=True):
                    parameter.data.copy_(data)
    elif method == "lora":
        from peft import LoraConfig

        with torch.random.fork_rng():  # peft draws the adapters' start from the global generator
            torch.manual_seed(0)
            unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_LAYERS), "tuning")
        adapters = [parameter for name, parameter in unet.named_parameters() if ".tuning." in name]
        for parameter in adapters:
            parameter.data = parameter.data.float()
        try:
            yield adapters, surrogate.lora_learning_rate
        finally:
            unet.unload_lora()
            unet.requires_grad_(False)
    else:
        raise ValueError(f"expected full, lora or auto tuning, got {method!r}")
