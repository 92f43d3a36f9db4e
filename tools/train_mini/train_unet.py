"""Train the UNet and the text encoder together on cached latents of the finished autoencoder.

    torchrun --nproc-per-node 2 tools/train_mini/train_unet.py DATA RUN --minutes 300

Needs RUN/vae.pt of train_vae.py; resumes from RUN/unet.pt, or starts from a packaged model with `--init`. The learning
rate is constant and the exponential average of the weights is what ships, so that training can stop and go on at any
step.

References:
    Efficient Diffusion Training via Min-SNR Weighting Strategy, Hang et al., 2023, arXiv 2303.09556
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from distributed import FLOAT32, average_gradients, broadcast, save, start
from models import TOKENS, build_scheduler, build_text_encoder, build_unet, build_vae
from tokenizer import build_tokenizer

MIN_SNR = 5.0
DROP_CAPTION = 0.1  # for classifier-free guidance


@torch.no_grad()
def encode(data: np.ndarray, run: Path, bfloat16: bool) -> dict[str, Tensor]:
    """Encode every picture and its mirror image, a share in each process.

    Returns:
        mean and std `(2 N, 4, h, w)`, pictures first, and the scaling factor.
    """
    average = AveragedModel(build_vae())
    average.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["average"])
    rank, workers = dist.get_rank(), dist.get_world_size()
    share = data[len(data) * rank // workers : len(data) * (rank + 1) // workers]
    moments = []
    for first in range(0, len(share), 16):
        x = torch.from_numpy(share[first : first + 16].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            posterior = average.module.encode(torch.cat([x, x.flip(-1)])).latent_dist
        moments.append(torch.stack([posterior.mean.float(), posterior.std.float()]).unflatten(1, (2, -1)))
    shares: list[Tensor] = [torch.empty(0)] * workers
    dist.all_gather_object(shares, torch.cat(moments, 2))
    mean, std = torch.cat(shares, 2).flatten(1, 2)
    factor = 1 / (mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))).std()
    return {"mean": mean, "std": std, "scaling_factor": factor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.npy, (N, 128, 128, 3) uint8, and captions.json")
    parser.add_argument("run", type=Path, help="folder of the checkpoints and the log")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--init", type=Path, help="packaged model to start from, when RUN has no checkpoint")
    parser.add_argument("--float32", action="store_true", help=FLOAT32)
    parser.add_argument("--batch", type=int, default=32, help="pictures per process")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rank, workers = start(args.seed)
    captions = json.loads((args.data / "captions.json").read_text())
    cache = args.run / "latents.pt"
    if cache.exists():
        latents = torch.load(cache, weights_only=True)
    else:
        latents = encode(np.load(args.data / "train.npy", mmap_mode="r"), args.run, not args.float32)
    if rank == 0:
        save(latents, cache)
        if not (args.run / "tokenizer").exists():
            if args.init:
                shutil.copytree(args.init / "tokenizer", args.run / "tokenizer")
            else:
                build_tokenizer(captions, args.run / "tokenizer")
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(args.run / "tokenizer")

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids

    ids, empty = tokens(captions).repeat(2, 1), tokens([""])
    if args.init:
        unet = UNet2DConditionModel.from_pretrained(args.init, subfolder="unet")
        text_encoder = CLIPTextModel.from_pretrained(args.init, subfolder="text_encoder")
    else:
        unet, text_encoder = build_unet(), build_text_encoder(len(tokenizer))
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).float()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = build_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    checkpoint, samples = args.run / "unet.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        samples = state.pop("samples")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank + samples)
    parameters = list(model.parameters())
    begun, step, losses = time.monotonic(), 0, []
    while broadcast(time.monotonic() - begun) < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200)
        index = torch.randint(0, len(ids), (args.batch,), generator=generator)
        mean, std = latents["mean"][index], latents["std"][index]
        z = (mean + std * torch.randn(mean.shape, generator=generator)) * latents["scaling_factor"]
        drop = torch.rand(args.batch, 1, generator=generator) < DROP_CAPTION
        t = torch.randint(0, 1000, (args.batch,), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            embedding = model["text_encoder"](torch.where(drop, empty, ids[index])).last_hidden_state
            output = model["unet"](scheduler.add_noise(z, noise, t), t, embedding).sample.float()
        weight = (MIN_SNR / snr[t]).clamp(max=1)
        loss = ((output - noise).square().mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        samples += args.batch * workers
        losses.append(loss.item())
        if step % 100 == 0 and rank == 0:
            seconds = time.monotonic() - begun
            row = {"samples": samples, "seconds": round(seconds), "loss": float(np.mean(losses[-100:]))}
            row["per_second"] = step * args.batch * workers / seconds
            with (args.run / "unet.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            save({name: part.state_dict() for name, part in parts.items()} | {"samples": samples}, checkpoint)
    if rank == 0:
        save({name: part.state_dict() for name, part in parts.items()} | {"samples": samples}, checkpoint)


if __name__ == "__main__":
    main()
