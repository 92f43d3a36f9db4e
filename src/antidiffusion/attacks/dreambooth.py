"""DreamBooth: tune the whole denoiser to a few photos of one person under a rare word.

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

from antidiffusion.attacks.prior import PriorTuning
from antidiffusion.attacks.tuned import Task, Training
from antidiffusion.models.base import Surrogate
from antidiffusion.models.loading import CARD
from antidiffusion.models.tuning import restored


@dataclass(frozen=True)
class DreamBooth(PriorTuning):
    """Tune every weight of the denoiser, in float32; the defaults are the evaluation's of Anti-DreamBooth.

    Saves a complete folder that `Surrogate.from_pretrained` and diffusers' pipelines load.

    Arguments:
        learning_rate: None for the surrogate's `learning_rate`.
        text_encoder: Tune the text encoders too.
    """

    full_tuning = True

    batch_size: int = 2
    text_encoder: bool = False

    @contextmanager
    def _training(self, task: Task, surrogate: Surrogate) -> Iterator[Training]:
        loss = self._loss(task, surrogate, texts=self.text_encoder)
        tuned = surrogate.tunable(texts=self.text_encoder).values()
        parameters = [parameter for module, _ in tuned for parameter in module.parameters()]
        with restored(parameters):
            yield Training(parameters, self.learning_rate or surrogate.learning_rate, loss, partial(save, surrogate))


def save(surrogate: Surrogate, folder: Path) -> None:
    """Write the whole model as a diffusers folder, with the step sizes that suit it."""
    surrogate.pipeline().save_pretrained(folder)
    rates = {name: getattr(surrogate, name) for name in ("learning_rate", "lora_learning_rate")}
    (folder / CARD).write_text(json.dumps(rates) + "\n")
