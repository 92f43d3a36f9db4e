"""diffusers' own text-to-image pipeline and a plain training loop: what the tuning attacks are held against."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor

PROMPT, PORTRAIT = "a photo of sks person", "a dslr portrait of sks person"


def load(folder: Path) -> Any:
    """Load a folder with a DDIM scheduler, as the surrogate draws."""
    unchecked: dict[str, Any] = {}
    if "StableDiffusionXL" not in (folder / "model_index.json").read_text():
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **unchecked)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: Sequence[str], seed: int) -> Tensor:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    generator = Generator().manual_seed(seed)
    return pipe(list(prompts), generator=generator, output_type="pt", **options).images


def embed(pipe: Any, prompt: str) -> dict[str, Any]:
    """The UNet's arguments for one text at 64 x 64 pixels, as functions of the text encoders."""
    if hasattr(pipe, "text_encoder_2"):
        tokens, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": added}
    tokens, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    return {"encoder_hidden_states": tokens}


def train(
    pipe: Any,
    parameters: Sequence[Tensor],
    terms: Sequence[tuple[float, Tensor, Callable[[], dict[str, Any]]]],
    generator: Generator,
    *,
    steps: int,
    learning_rate: float,
) -> list[float]:
    """Minimise weighted denoising losses of one random picture of each term in a step; returns the losses."""
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer, losses = torch.optim.AdamW(parameters, lr=learning_rate), []
    with torch.no_grad():
        posteriors = [pipe.vae.encode(2 * x - 1).latent_dist for _, x, _ in terms]
    for parameter in parameters:
        parameter.requires_grad_()
    for _ in range(steps):
        loss = torch.zeros(())
        for (weight, x, embedding), posterior in zip(terms, posteriors, strict=True):
            row = torch.randperm(len(x), generator=generator)[:1]
            mean, std = posterior.mean[row], posterior.std[row]
            z = (mean + std * torch.randn(mean.shape, generator=generator)) * pipe.vae.config.scaling_factor
            n = torch.randn(z.shape, generator=generator)
            t = torch.randint(1000, (1,), generator=generator)
            velocity = schedule.config.prediction_type == "v_prediction"
            target = schedule.get_velocity(z, n, t) if velocity else n
            output = pipe.unet(schedule.add_noise(z, n, t), t, **embedding()).sample
            loss = loss + weight * torch.nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
