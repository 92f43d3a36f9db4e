"""diffusers' own pipelines, which ours are held against."""

from typing import Any

import diffusers

from antidiffusion.models.base import Surrogate


def pipeline(surrogate: Surrogate, kind: str = "", **more: Any) -> Any:
    """Wrap the surrogate's parts, and `more`, in StableDiffusion{kind}Pipeline, or StableDiffusionXL{kind}Pipeline."""
    parts: dict[str, Any] = {"vae": surrogate.vae, "unet": surrogate.denoiser} | more
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(dict(surrogate.schedule.scheduler))
    for suffix, tokenizer, encoder in zip(("", "_2"), surrogate.tokenizers, surrogate.text_encoders, strict=False):
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    if len(surrogate.tokenizers) == 2:
        built = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(**parts, add_watermarker=False)
    else:
        extras = dict.fromkeys(("safety_checker", "feature_extractor"))
        built = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**parts, **extras, requires_safety_checker=False)
    built.set_progress_bar_config(disable=True)
    return built
