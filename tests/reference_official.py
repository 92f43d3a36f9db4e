"""The released Anti-Diffusion procedure, written plainly and apart from the package: what `official` is held against.

It imports nothing of `antidiffusion`. Stock diffusers modules, torch's global generator, images in [-1, 1], naive
softmax attention all over the UNet, every weight of the UNet and the autoencoder differentiated at every step, a deep
copy of the models first. It is as slow as the released code on purpose: the speed benchmark compares with it, too.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, AAAI 2025, arXiv 2503.05595
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

ALPHA = 2e-3  # the step and the radius of a round's ball, of pictures in [-1, 1]
EPSILON = 1e-2
POSITIONS = 16 * 16
MAP_FACTOR = 100


def encode(vae: Any, image: Tensor) -> Tensor:
    """Return a posterior sample of the latents, scaled, of `image: (1, 3, H, W)` in [-1, 1]."""
    return vae.encode(image).latent_dist.sample() * vae.config.scaling_factor


def draw(latents: Tensor, scheduler: Any) -> tuple[Tensor, Tensor]:
    """Draw noise like the latents, then one uniform training step a picture, `(B,)` int64."""
    noise = torch.randn_like(latents, memory_format=torch.contiguous_format)  # channels-last is drawn in another order
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    return noise, t


def target(scheduler: Any, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return what the UNet is trained to answer."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, t)
    raise ValueError(f"expected epsilon or v_prediction, got {scheduler.config.prediction_type!r}; use another model")


@contextmanager
def cross_attention(unet: Any) -> Iterator[list[Tensor]]:
    """Collect the 16 x 16 cross-attention maps of the down and up blocks, `(heads, 256, L)`, for one picture."""
    maps: list[Tensor] = []
    layers = [
        module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and name.startswith(("down_blocks.", "up_blocks."))
    ]

    def watched(scores: Any) -> Any:
        def get_attention_scores(*arguments: Any, **options: Any) -> Tensor:
            result = scores(*arguments, **options)
            if result.shape[1] == POSITIONS:
                maps.append(result)
            return result

        return get_attention_scores

    for layer in layers:
        layer.get_attention_scores = watched(layer.get_attention_scores)
    try:
        yield maps
    finally:
        for layer in layers:
            del layer.get_attention_scores


def attention_loss(maps: list[Tensor]) -> Tensor:
    """MSE to zero of the mean map, times 100 and clamped; of every layer the second half of the heads."""
    if not maps:
        return torch.zeros(())
    mean = torch.cat([layer[len(layer) // 2 :] for layer in maps]).mean(0)
    scaled = (mean * MAP_FACTOR).clamp(0, 1)
    return F.mse_loss(scaled, torch.zeros_like(scaled))


def prompt_step(
    unet: Any, scheduler: Any, latents: Tensor, embedding: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """One step of prompt tuning."""
    noise, t = draw(latents, scheduler)
    output = unet(scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=embedding).sample
    optimizer.zero_grad()
    F.mse_loss(output, noise).backward()
    optimizer.step()


def tune_prompt(vae: Any, unet: Any, scheduler: Any, image: Tensor, embedding: Tensor, steps: int) -> Tensor:
    """Fit the embedding to the picture, from where it is; one posterior sample serves all steps."""
    with torch.no_grad():
        latents = encode(vae, image)
    embedding = embedding.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([embedding], lr=1e-3)
    for _ in range(steps):
        prompt_step(unet, scheduler, latents, embedding, optimizer)
    return embedding.detach()


def image_gradient(vae: Any, unet: Any, scheduler: Any, image: Tensor, embedding: Tensor) -> Tensor:
    """Return the gradient of L_ldm minus the attention loss; the weights' gradients are computed too, and dropped."""
    image = image.detach().clone().requires_grad_()
    latents = encode(vae, image)
    noise, t = draw(latents, scheduler)
    with cross_attention(unet) as maps:
        output = unet(scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=embedding).sample
    loss = F.mse_loss(output, target(scheduler, latents, noise, t)) - attention_loss(maps)
    loss.backward()
    unet.zero_grad()
    vae.zero_grad()
    return image.grad


def perturb(vae: Any, unet: Any, scheduler: Any, image: Tensor, embedding: Tensor, steps: int) -> Tensor:
    """Ascend inside the ball around the picture as it is now, not as it once was."""
    centre = image.detach().clone()
    for _ in range(steps):
        moved = image + ALPHA * image_gradient(vae, unet, scheduler, image, embedding).sign()
        image = (centre + (moved - centre).clamp(-EPSILON, EPSILON)).clamp(-1, 1).detach()
    return image


def tuning_step(
    vae: Any, unet: Any, scheduler: Any, image: Tensor, embedding: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """One step of tuning the UNet on the picture; the autoencoder's gradients are computed too, and dropped."""
    latents = encode(vae, image)
    noise, t = draw(latents, scheduler)
    output = unet(scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=embedding).sample
    optimizer.zero_grad()
    F.mse_loss(output, target(scheduler, latents, noise, t)).backward()
    optimizer.step()
    vae.zero_grad()


def protect_official(
    vae: Any,
    unet: Any,
    text_encoder: Any,
    tokenizer: Any,
    scheduler: Any,
    image: Tensor,
    rounds: int = 5,
    steps: int = 10,
    prompt_steps: int = 30,
    tuning_steps: int = 20,
    seed: int = 42,
    learning_rate: float = 5e-7,
) -> Tensor:
    """Protect one picture as the released code does in its demo settings.

    Arguments:
        vae, unet, text_encoder, tokenizer, scheduler: Parts of a Stable Diffusion pipeline; left as they are.
        image: `(1, 3, H, W)` float32 in [-1, 1].
        rounds, steps, prompt_steps, tuning_steps: The schedule.
        seed: For torch's global generator.
        learning_rate: AdamW's when the UNet is tuned.

    Returns:
        The protected picture, `(1, 3, H, W)` in [-1, 1].
    """
    vae, unet, text_encoder = (deepcopy(module).requires_grad_(True) for module in (vae, unet, text_encoder))
    unet.set_attn_processor(AttnProcessor())  # the released code replaces the UNet's attention only
    torch.manual_seed(seed)
    length = tokenizer.model_max_length
    tokens = tokenizer([""], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    embedding = text_encoder(tokens.input_ids.to(image.device))[0]
    embedding = tune_prompt(vae, unet, scheduler, image, embedding, prompt_steps)
    image = perturb(vae, unet, scheduler, image, embedding, steps)
    for i in range(rounds):
        optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2)
        for _ in range(tuning_steps):
            tuning_step(vae, unet, scheduler, image, embedding, optimizer)
        image = perturb(vae, unet, scheduler, image, embedding, steps)
        if i < rounds - 1:  # nothing uses the embedding after the last round
            embedding = tune_prompt(vae, unet, scheduler, image, embedding, prompt_steps)
    return image
