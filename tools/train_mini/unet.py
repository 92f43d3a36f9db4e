"""Train UNet and text encoder on the encoder's latents of captioned portraits.

References:
    Efficient Diffusion Training via Min-SNR Weighting Strategy, Hang et al., 2023, arXiv 2303.09556
    Progressive Distillation for Fast Sampling of Diffusion Models, Salimans and Ho, 2022, arXiv 2202.00512 (velocity)
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from train_mini.data import Store
from train_mini.degrade import normal
from train_mini.encoder import moments
from train_mini.loop import Average, Machine, Training, adam, load_weights
from train_mini.models import build_prior, build_scheduler, build_vae, encoder_of
from train_mini.settings import TOKENS, Settings
from train_mini.tokenizer import build_tokenizer

ENCODE = 64  # pictures at a time


@torch.no_grad()
def encode_portraits(settings: Settings, data: Path, folder: Path, machine: Machine) -> dict[str, Tensor]:
    """Encode every portrait that is there and its mirror image; kept in latents.pt until the encoder is another.

    Returns:
        "mean" and "std" `(2, N, 4, h, w)` float16 on the processor, "rows" `(N,)` of the portraits, and "mark", the sum
        of the encoder's weights.
    """
    encoder = encoder_of(build_vae(settings.channels)).eval()
    load_weights(folder / "encoder.safetensors", encoder)
    mark = torch.stack([p.double().abs().sum() for p in encoder.parameters()]).sum()
    path, store = folder / "latents.pt", Store(data, "portraits")
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["mark"].equal(mark):
            return kept
    encoder.to(machine.device, memory_format=torch.channels_last)
    rows = store.rows()
    parts: list[list[Tensor]] = [[], []]
    for some in np.array_split(rows, -(-len(rows) // ENCODE)):
        x = torch.from_numpy(store.pictures[some]).to(machine.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        for side, y in enumerate((x, x.flip(-1))):
            with machine.autocast():
                mean, log_variance = moments(encoder, y)
            parts[side].append(torch.stack([mean, (log_variance / 2).exp()]).half().cpu())
    mean, std = torch.stack([torch.cat(side, 1) for side in parts], 1)
    kept = {"mean": mean, "std": std, "rows": torch.from_numpy(rows), "mark": mark}
    torch.save(kept, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return kept


def load_tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder / f"{name}-tokenizer")


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return token ids `(N, TOKENS)` int64; longer texts are cut."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def train_unet(settings: Settings, name: str, data: Path, folder: Path, machine: Machine) -> Training:
    """Prepare the stage of the model `name`; `folder` has the encoder's weights."""
    own, device = settings.models[name], machine.device
    latents = encode_portraits(settings, data, folder, machine)
    texts = Store(data, "portraits").texts(latents["rows"].numpy())
    if not (folder / f"{name}-tokenizer").exists():
        build_tokenizer(texts, folder / f"{name}-tokenizer", own.vocabulary)
    tokenizer = load_tokenizer(folder, name)
    ids, empty = tokenise(tokenizer, texts).to(device), tokenise(tokenizer, [""]).to(device)
    mean, std = latents["mean"].to(device), latents["std"].to(device)
    torch.manual_seed(own.seed)
    model = build_prior(own, len(tokenizer)).to(device).train()
    generator = machine.generator(own.seed)
    average, optimizer = Average(model), adam(model, (0.9, 0.99), 0.01)
    alphas = build_scheduler(own.prediction).alphas_cumprod.to(device)
    signal, noise_level, snr = alphas.sqrt(), (1 - alphas).sqrt(), alphas / (1 - alphas)
    velocity, count = own.prediction == "v_prediction", mean.shape[1]
    # Both weights are min(SNR, 5) in the error of the clean latent.
    weights = snr.clamp(max=own.min_snr) / (snr + 1 if velocity else snr)

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (own.batch,), generator=generator, device=device)

    def step() -> dict[str, Tensor]:
        side, row, t = integers(2), integers(count), integers(1000)
        z, spread = mean[side, row].float(), std[side, row].float()
        z = z + spread * normal(z, generator)
        noise = normal(z, generator)
        dropped = torch.rand(own.batch, 1, generator=generator, device=device) < own.drop
        s, n = signal[t].view(-1, 1, 1, 1), noise_level[t].view(-1, 1, 1, 1)
        with machine.autocast():
            states = model["text_encoder"](torch.where(dropped, empty, ids[row])).last_hidden_state
            output = model["unet"](s * z + n * noise, t, states, return_dict=False)[0].float()
        target = s * noise - n * z if velocity else noise
        loss = ((output - target).square().mean((1, 2, 3)) * weights[t]).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()
        return {"loss": loss.detach()}

    return Training(
        name=name,
        model=model,
        step=step,
        optimizers={"adam": optimizer},
        rates={"adam": own.rate},
        average=average,
        generator=generator,
        progress=torch.zeros((), device=device),
        warmup=own.warmup,
        samples=own.batch,
    )
