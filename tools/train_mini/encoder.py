"""Distil the teacher's encoder: the same latents for pictures as they are, degraded and attacked.

The posterior's variance is fitted to a hundredth of the squared error that is left, so that it says where the encoder
is unsure and latents drawn from it stay close.

References:
    TAESD, Bohan, 2023, github.com/madebyollin/taesd (MIT): the teacher, itself a distilled Stable Diffusion encoder
    Adversarially Robust Distillation, Goldblum et al., 2019, arXiv 1905.09747
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from train_mini.degrade import Degrade, attack
from train_mini.loop import Average, Machine, Training, adam
from train_mini.models import build_vae, encoder_of
from train_mini.pools import Pools
from train_mini.settings import SCALING, Settings

VARIANCE = 0.01  # of the squared error, what the posterior's variance is
VARIANCE_WEIGHT = 0.01


def load_teacher(folder: Path, device: torch.device) -> AutoencoderTiny:
    """Load the tiny autoencoder whose latents are Stable Diffusion's, already scaled.

    Raises:
        FileNotFoundError: If it is not there.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"expected an AutoencoderTiny in {folder}, found none; give its folder with --teacher")
    teacher = AutoencoderTiny.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    return teacher.to(device, memory_format=torch.channels_last)


def moments(encoder: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance `(B, 4, h, w)` of scaled latents of pictures `x: (B, 3, H, W)` in [-1, 1]."""
    mean, log_variance = encoder["quant_conv"](encoder["encoder"](x)).float().chunk(2, 1)
    # diffusers clamps the unscaled one so.
    return mean * SCALING, log_variance.clamp(-30, 20) + 2 * math.log(SCALING)


def train_encoder(settings: Settings, data: Path, teacher_folder: Path, machine: Machine) -> Training:
    """Prepare the stage."""
    own, device = settings.encoder, machine.device
    torch.manual_seed(own.seed)  # diffusers draws the first weights from the global generator
    encoder = encoder_of(build_vae(settings.channels)).to(device, memory_format=torch.channels_last).train()
    teacher = load_teacher(teacher_folder, device)
    generator = machine.generator(own.seed)
    pools = Pools(data, own.batch, device, generator)
    low, high = (2 * value / 255 for value in own.radius)
    degrade = Degrade((low, high)).to(device)
    average, optimizer = Average(encoder), adam(encoder, (0.9, 0.99))
    third = own.attacked // 3
    total = sum(own.batch.values())

    def student(x: Tensor) -> Tensor:
        return moments(encoder, x)[0]

    def answer(x: Tensor) -> Tensor:
        return teacher.encode(x).latents.float()

    def attacked(x: Tensor) -> Tensor:
        """Push a third from the student's latents, a third from the teacher's, and a third to where the two differ."""
        with torch.no_grad():
            clean, truth = student(x[:third]), answer(x[third : 2 * third])

        def gain(y: Tensor) -> Tensor:
            mine, its = student(torch.cat([y[:third], y[2 * third :]])), answer(y[third:])
            pushed = (mine[:third] - clean).square().sum() + (its[:third] - truth).square().sum()
            return pushed + (mine[third:] - its[third:]).square().sum()

        return attack(gain, x, degrade.uniform(x, low, high, generator), own.attack_steps, generator)

    def step() -> dict[str, Tensor]:
        x = pools.draw()
        changed = degrade(x, generator)  # not under autocast: JPEG's cosines need more than eight bits
        chosen = x[torch.randint(0, total, (3 * third,), generator=generator, device=device)]
        with machine.autocast():
            y = torch.cat([changed, attacked(chosen)]).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                target = answer(y)
            mean, log_variance = moments(encoder, y)
        error = (mean - target).square()
        uncertain = (log_variance + VARIANCE * error.detach() / log_variance.exp()).mean()
        loss = error.mean() + VARIANCE_WEIGHT * uncertain
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        average.update()
        parts = error.detach().mean((1, 2, 3))
        return {
            "loss": error.detach().mean(),
            "clean": parts[: -(-total // 8)].mean(),
            "attacked": parts[total:].mean(),
            "teacher_variance": target.var(),
        }

    return Training(
        name="encoder",
        model=encoder,
        step=step,
        optimizers={"adam": optimizer},
        rates={"adam": own.rate},
        average=average,
        generator=generator,
        progress=torch.zeros((), device=device),
        warmup=own.warmup,
        samples=total + 3 * third,
        refresh=pools.refresh,
    )
