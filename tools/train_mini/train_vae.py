"""Train the autoencoder: L1, perceptual distance, patch discriminator and a tiny KL term, as Stable Diffusion's was.

    torchrun --nproc-per-node 2 tools/train_mini/train_vae.py DATA RUN --minutes 15 --crop 64
    torchrun --nproc-per-node 2 tools/train_mini/train_vae.py DATA RUN --minutes 45 --adversarial 0.3

Resumes from RUN/vae.pt, or starts from a packaged model with `--init` (with `--minutes 0` only to write vae.pt for
train_unet.py). The learning rate is constant and the exponential average of the weights is what ships, so that training
can stop and go on at any step.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distributed import FLOAT32, average_gradients, broadcast, save, start
from models import SIZE, build_vae
from perceptual import PerceptualDistance

KL_WEIGHT = 1e-6  # of mean-reduced terms; Stable Diffusion's 1e-6 on sums is 2e-8 in these units


def build_discriminator(width: int = 32) -> nn.Sequential:
    """Patch discriminator with three strided layers (pix2pix, Isola et al., 2017, arXiv 1611.07004)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for factor in (1, 2):
        layers += [nn.Conv2d(width * factor, width * factor * 2, 4, 2, 1), nn.GroupNorm(8, width * factor * 2)]
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 4, 1, 1))


def crops(data: np.ndarray, size: int, batch: int, rng: np.random.Generator) -> Tensor:
    """Draw flipped crops `(B, 3, size, size)` in [-1, 1] from pictures `(N, H, W, 3)` uint8."""
    out = []
    for index in rng.integers(0, len(data), batch):
        top, left = rng.integers(0, data.shape[1] - size + 1, 2)
        crop = data[index, top : top + size, left : left + size]
        out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def reconstruction_gradient(terms: list[tuple[float, Tensor]], output: Tensor) -> Tensor:
    """Sum the terms' gradients at the decoder's output, each scaled to its weight times the first one's norm.

    It balances unlike losses without a second pass through the decoder, which Stable Diffusion's adaptive weight needs.
    """
    gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0] for _, loss in terms]
    norm = gradients[0].norm()
    scaled = [weight * norm / (g.norm() + 1e-12) * g for (weight, _), g in zip(terms, gradients, strict=True)]
    return torch.stack(scaled).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.npy, (N, 128, 128, 3) uint8")
    parser.add_argument("run", type=Path, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--init", type=Path, help="packaged model to start from, when RUN has no checkpoint")
    parser.add_argument("--decoder-only", action="store_true", help="the latents stay what they are")
    parser.add_argument("--float32", action="store_true", help=FLOAT32)
    parser.add_argument("--crop", type=int, default=SIZE)
    parser.add_argument("--batch", type=int, default=8, help="pictures per process")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--perceptual", type=float, default=0.7, help="gradient norm against L1's")
    parser.add_argument("--adversarial", type=float, default=0.0, help="gradient norm against L1's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rank, workers = start(args.seed)
    args.run.mkdir(parents=True, exist_ok=True)
    data = np.load(args.data / "train.npy", mmap_mode="r")
    vae = AutoencoderKL.from_pretrained(args.init, subfolder="vae").float() if args.init else build_vae()
    critic, distance = build_discriminator(), PerceptualDistance()
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.lr / 2, betas=(0.5, 0.9), weight_decay=0)
    checkpoint, samples = args.run / "vae.pt", 0
    parts = {"vae": vae, "average": average, "critic": critic, "optimizer": optimizer, "critic_opt": critic_optimizer}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        samples = state.pop("samples")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for group in optimizer.param_groups:
            group["lr"] = args.lr
    if args.decoder_only:
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)
    rng = np.random.default_rng([args.seed, rank, samples])
    parameters, critic_parameters = [p for p in vae.parameters() if p.requires_grad], list(critic.parameters())
    begun, step, log = time.monotonic(), 0, []
    while broadcast(time.monotonic() - begun) < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100)
        x = crops(data, args.crop, args.batch, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            posterior = vae.encode(x).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
            terms = [(1.0, F.l1_loss(output, x)), (args.perceptual, distance(output, x).float())]
            if args.adversarial:
                critic.requires_grad_(False)
                terms.append((args.adversarial, -critic(output).float().mean()))
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        gradient = reconstruction_gradient(terms, output)
        optimizer.zero_grad()
        output.backward(gradient, retain_graph=True)
        if kl.requires_grad:
            (KL_WEIGHT * kl).backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if args.adversarial:
            critic.requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                real, fake = critic(x).float(), critic(output.detach()).float()
            critic_optimizer.zero_grad()
            (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
            average_gradients(critic_parameters)
            critic_optimizer.step()
        step += 1
        samples += args.batch * workers
        mse = F.mse_loss(output.detach().clamp(-1, 1), x).item()
        log.append([terms[0][1].item(), terms[1][1].item(), kl.item(), 10 * np.log10(4 / mse)])
        if step % 100 == 0 and rank == 0:
            l1, perceptual, divergence, psnr = np.mean(log[-100:], axis=0).tolist()
            seconds = time.monotonic() - begun
            row = {"samples": samples, "seconds": round(seconds), "l1": l1, "perceptual": perceptual}
            row |= {"kl": divergence, "psnr": psnr, "crop": args.crop}
            row["per_second"] = step * args.batch * workers / seconds
            with (args.run / "vae.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            save({name: part.state_dict() for name, part in parts.items()} | {"samples": samples}, checkpoint)
    if rank == 0:
        save({name: part.state_dict() for name, part in parts.items()} | {"samples": samples}, checkpoint)


if __name__ == "__main__":
    main()
