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

from antidiffusion.attacks.prior import PriorTuning
from antidiffusion.attacks.tuned import Task, Training, pipeline
from antidiffusion.models.base import Surrogate
from antidiffusion.models.loading import CARD
from antidiffusion.models.tuning import restored


@dataclass(frozen=True)
class DreamBooth(PriorTuning):
    """Tune every weight of the UNet, in float32; the defaults are the evaluation's of Anti-DreamBooth.

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
        encoders = surrogate.text_encoders if self.text_encoder else []
        parameters = [parameter for module in (surrogate.unet, *encoders) for parameter in module.parameters()]
        with restored(parameters):
            yield Training(parameters, self.learning_rate or surrogate.learning_rate, loss, partial(save, surrogate))


def save(surrogate: Surrogate, folder: Path) -> None:
    """Write the whole model as a diffusers folder, with the step sizes that suit it."""
    pipeline(surrogate).save_pretrained(folder)
    rates = {name: getattr(surrogate, name) for name in ("learning_rate", "lora_learning_rate")}
    (folder / CARD).write_text(json.dumps(rates) + "\n")
