"""Away from the clean latent in several latent spaces: a protection that needs encoders only."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces, shift
from antidiffusion.pictures.canvas import Canvas, filter_matrix
from antidiffusion.progress import Progress
from antidiffusion.recipes.ascent import Momentum, uniform
from antidiffusion.recipes.base import PERTURBATION, Trace, climb

SCALES = (2 / 3, 4 / 3)  # of a view of 768 px: the 512 and 1024 px at which attackers look
QUALITIES = (60, 95)  # JPEG: what sites and attackers re-encode with
STEP = 8  # sides of a rescaled view are multiples of the encoders'


def rescaled(x: Tensor, generator: Generator) -> Tensor:
    """Resize pictures `(B, 3, h, w)` by a random factor of `SCALES`, as an attacker fits them to a model."""
    low, high = SCALES
    factor = low + (high - low) * torch.rand((), generator=generator).item()
    sides = [max(STEP, STEP * round(side * factor / STEP)) for side in x.shape[-2:]]
    rows, columns = (filter_matrix(old, new).to(x) for old, new in zip(x.shape[-2:], sides, strict=True))
    return rows @ x @ columns.T


def compressed(x: Tensor, generator: Generator) -> Tensor:
    """Pass pictures `(B, 3, h, w)` through JPEG of a random quality of `QUALITIES`; the gradient goes straight through.

    References:
        Obfuscated Gradients Give a False Sense of Security, Athalye et al., 2018, arXiv 1802.00420 (BPDA)
    """
    low, high = QUALITIES
    quality = int(torch.randint(low, high + 1, (), generator=generator))
    pixels = (x.detach() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    reread = []
    for picture in pixels:
        file = BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        reread.append(np.asarray(Image.open(file)))
    lossy = torch.from_numpy(np.stack(reread)).permute(0, 3, 1, 2).to(x) / 255
    return x + (lossy - x).detach()


def plain(x: Tensor, generator: Generator) -> Tensor:
    """Leave pictures as they are."""
    return x


PROCESSINGS = {"none": plain, "resize": rescaled, "jpeg": compressed}


@dataclass
class LatentShift:
    """Squared distance of latents from the clean picture's over their variance, one space a call, each in its turn.

    Both pictures first pass what an attacker's program does to a photo: nothing, a resize, or JPEG.

    Arguments:
        model: Latent spaces, or a model whose own space is the only one.
        clean: Pictures `(B, 3, h, w)` in [0, 1] that the latents move away from.
        processings: Names in `PROCESSINGS`, one of which is drawn at each call.
    """

    model: LatentSpaces | Surrogate
    clean: Tensor
    processings: Sequence[str] = tuple(PROCESSINGS)
    calls: int = field(default=0, init=False)
    known: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        space = self.spaces[self.calls % len(self.spaces)]
        self.calls += 1
        chosen = int(torch.randint(len(self.processings), (), generator=generator))
        process = PROCESSINGS[self.processings[chosen]]
        state = generator.get_state()
        after = self._encode(process(x, generator), space)
        if process is plain:
            return shift(self._clean(space), after)
        generator.set_state(state)  # the same resize, the same quality
        with torch.no_grad():
            before = self._encode(process(self.clean, generator), space)
        return shift(before, after)

    @cached_property
    def spaces(self) -> list[str]:
        """Names of the spaces."""
        return list(self.model.encoders) if isinstance(self.model, LatentSpaces) else [""]

    def _encode(self, x: Tensor, space: str) -> Tensor:
        return self.model.encode(x, space) if isinstance(self.model, LatentSpaces) else self.model.posterior(x).mean

    @torch.no_grad()
    def _clean(self, space: str) -> Tensor:
        if space not in self.known:
            self.known[space] = self._encode(self.clean, space)
        return self.known[space]


@dataclass(frozen=True)
class Latents:
    """Move the latent away from the clean picture's in every latent space in turn, by momentum sign steps.

    What it is for is any real photo when nobody knows the attacker's model: on encoders of four families at once a
    perturbation also acts in a space that it never saw (benchmarks/latents.py has the figures). With one model it moves
    that model's own latent.

    Arguments:
        budget: L-infinity budget in 1/255 units around the untouched picture.
        steps: Sign steps; each asks one space.
        step_size: Of the first step, in 1/255 units; a quarter of the budget if None. It falls to a hundredth.
        momentum: Weight of the earlier gradients, which are of the other spaces.
        processings: What an attacker's program may do to the photo first, see `PROCESSINGS`.

    References:
        Raising the Cost of Malicious AI-Powered Image Editing, Salman et al., 2023, arXiv 2302.06588 (encoders)
        Boosting Adversarial Attacks with Momentum, Dong et al., 2018, arXiv 1710.06081 (ensembles)
    """

    encoders_suffice: ClassVar[bool] = True

    budget: float = 8
    steps: int = 24
    step_size: float | None = None
    momentum: float = 0.9
    processings: tuple[str, ...] = tuple(PROCESSINGS)

    @property
    def counts(self) -> dict[str, int]:
        """Steps of each stage in a whole run."""
        return {PERTURBATION: self.steps}

    def __call__(
        self,
        canvases: Sequence[Canvas],
        surrogate: Surrogate | LatentSpaces,
        generator: Generator,
        progress: Progress,
    ) -> Trace:
        def objective(clean: Tensor) -> LatentShift:
            return LatentShift(surrogate, clean, self.processings)

        sized: Any = replace(self, step_size=self.step_size or self.budget / 4)
        direction = Momentum(self.momentum)
        return climb(sized, objective, canvases, generator, progress, start=uniform, direction=direction, decay=True)
