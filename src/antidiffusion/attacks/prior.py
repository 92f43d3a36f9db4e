"""Prior preservation: learn the class beside the person, so that only the person's words draw the person.

References:
    DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, Ruiz et al., 2023,
    arXiv 2208.12242
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.tuned import Task, Tuning, at_least_one
from antidiffusion.models.base import Embedding, Posterior, Surrogate
from antidiffusion.models.sampling import sample
from antidiffusion.models.tuning import Loss, denoising, described, drawn
from antidiffusion.progress import part

TOGETHER = 4  # class pictures drawn at once, as in diffusers' script


@dataclass(frozen=True)
class PriorTuning(Tuning):
    """A tuning attack that may learn pictures of the class too, drawn with the untuned model.

    Arguments:
        class_prompt: What they are drawn from, for example "a photo of person"; None leaves them out.
        class_pictures: Number of these pictures.
        prior_weight: Weight of their loss.
    """

    class_prompt: str | None = None
    class_pictures: int = 200
    prior_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("class_pictures", self.class_pictures)

    def _steps_before(self, surrogate: Surrogate) -> int:
        steps, _ = self._drawing(surrogate)
        return 0 if self.class_prompt is None else -(-self.class_pictures // TOGETHER) * steps

    def _loss(self, task: Task, surrogate: Surrogate, *, texts: bool) -> Loss:
        """Draw the class pictures, if wanted, and return the loss of the whole task; call it before weights change.

        Arguments:
            task: What the surrogate is tuned to.
            surrogate: The model, untuned.
            texts: Whether parameters inside the text encoders are tuned.
        """

        def term(posterior: Posterior, prompt: str, embedding: Embedding) -> Loss:
            sampler = drawn(posterior, self.batch_size)
            return described(surrogate, [sampler], prompt) if texts else denoising(surrogate, [sampler], embedding)

        terms = [(1.0, term(task.posterior, task.prompt, task.embedding))]
        if self.class_prompt is not None:
            prior = self._prior(self.class_prompt, task, surrogate)
            terms.append((self.prior_weight, term(prior, self.class_prompt, surrogate.embed([self.class_prompt]))))

        def loss(generator: Generator) -> Tensor:
            return torch.stack([weight * term(generator) for weight, term in terms]).sum()

        return loss

    @torch.no_grad()
    def _prior(self, prompt: str, task: Task, surrogate: Surrogate) -> Posterior:
        """Draw the class pictures, as large as the person's, and encode them."""
        height, width = (side * surrogate.factor for side in task.posterior.mean.shape[-2:])
        steps, guidance = self._drawing(surrogate)
        options: Any = {"steps": steps, "guidance": guidance, "size": (height, width)}
        posteriors: list[Posterior] = []
        for first in range(0, self.class_pictures, TOGETHER):
            total = self._steps_before(surrogate)
            progress = part(task.progress, len(posteriors) * steps, total)
            prompts = [prompt] * min(TOGETHER, self.class_pictures - first)
            pictures = sample(prompts, surrogate, task.generator, progress=progress, **options)
            posteriors.append(surrogate.posterior(pictures))
        return Posterior(torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors]))
