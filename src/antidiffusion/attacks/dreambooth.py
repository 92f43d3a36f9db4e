"""DreamBooth: tune the whole UNet to a few photos of one person under a rare word.

References:
    DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, Ruiz et al., 2023,
    arXiv 2208.12242
    Anti-DreamBooth: Protecting Users from Personalized Text-to-image Synthesis, Van Le et al., 2023, arXiv 2303.15433
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.tuned import Task, Training, Tuning, at_least_one, pipeline
from antidiffusion.loading import CARD
from antidiffusion.sampling import sample
from antidiffusion.surrogate import Embedding, Posterior, Surrogate
from antidiffusion.tune import Loss, denoising, described, drawn, restored

TOGETHER = 4  # class pictures drawn at once, as in diffusers' script


@dataclass(frozen=True)
class DreamBooth(Tuning):
    """Tune every weight of the UNet, in float32; the defaults are the evaluation's of Anti-DreamBooth.

    Saves a complete folder that `Surrogate.from_pretrained` and diffusers' pipelines load.

    Arguments:
        learning_rate: None for the surrogate's `learning_rate`.
        text_encoder: Tune the text encoders too.
        class_prompt: Text of prior preservation, for example "a photo of person": pictures of it, drawn with the
            untuned model, are learnt beside the person's; None leaves it out.
        class_pictures: Number of these pictures.
        prior_weight: Weight of their loss.
    """

    batch_size: int = 2
    text_encoder: bool = False
    class_prompt: str | None = None
    class_pictures: int = 200
    prior_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("class_pictures", self.class_pictures)

    @property
    def _steps_before(self) -> int:
        return 0 if self.class_prompt is None else -(-self.class_pictures // TOGETHER) * self.sampling_steps

    @contextmanager
    def _training(self, task: Task, surrogate: Surrogate) -> Iterator[Training]:
        terms = [(1.0, self._loss(task.posterior, task.prompt, task.embedding, surrogate))]
        if self.class_prompt is not None:
            prior = self._prior(self.class_prompt, task, surrogate)
            embedding = surrogate.embed([self.class_prompt])
            terms.append((self.prior_weight, self._loss(prior, self.class_prompt, embedding, surrogate)))

        def loss(generator: Generator) -> Tensor:
            return torch.stack([weight * term(generator) for weight, term in terms]).sum()

        encoders = surrogate.text_encoders if self.text_encoder else []
        parameters = [parameter for module in (surrogate.unet, *encoders) for parameter in module.parameters()]
        with restored(parameters):
            yield Training(parameters, self.learning_rate or surrogate.learning_rate, loss, partial(save, surrogate))

    def _loss(self, posterior: Posterior, prompt: str, embedding: Embedding, surrogate: Surrogate) -> Loss:
        sampler = drawn(posterior, self.batch_size)
        if self.text_encoder:
            return described(surrogate, [sampler], prompt)
        return denoising(surrogate, [sampler], embedding)

    @torch.no_grad()
    def _prior(self, prompt: str, task: Task, surrogate: Surrogate) -> Posterior:
        """Draw the class pictures, as large as the person's, and encode them."""
        height, width = (side * surrogate.factor for side in task.posterior.mean.shape[-2:])
        options: Any = {"steps": self.sampling_steps, "guidance": self.guidance, "size": (height, width)}
        posteriors: list[Posterior] = []
        for first in range(0, self.class_pictures, TOGETHER):
            before = len(posteriors) * self.sampling_steps

            def report(done: int, _: int, before: int = before) -> None:
                task.report(before + done)

            prompts = [prompt] * min(TOGETHER, self.class_pictures - first)
            pictures = sample(prompts, surrogate, task.generator, progress=report, **options)
            posteriors.append(surrogate.posterior(pictures))
        return Posterior(torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors]))


def save(surrogate: Surrogate, folder: Path) -> None:
    """Write the whole model as a diffusers folder, with the step sizes that suit it."""
    pipeline(surrogate).save_pretrained(folder)
    rates = {name: getattr(surrogate, name) for name in ("learning_rate", "lora_learning_rate")}
    (folder / CARD).write_text(json.dumps(rates) + "\n")
