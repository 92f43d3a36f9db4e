"""What the tuning attacks share: fit to pictures, then draw with the tuned model or save it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts, Texts, usual
from antidiffusion.failures import expect_finite
from antidiffusion.models.base import Embedding, Posterior, Surrogate
from antidiffusion.models.memory import checkpointed
from antidiffusion.models.sampling import check_size, sample
from antidiffusion.models.tuning import Loss, fit
from antidiffusion.pictures.tensors import check_pictures
from antidiffusion.progress import Progress, part, silent


@dataclass
class Tuned:
    """A surrogate inside the block in which it is tuned.

    Arguments:
        surrogate: The tuned model; edits that are given it inside the block are edits with the tuned model.
        losses: The loss before every step of the tuning.
        size: Height and width in pixels of the pictures it was tuned to.
        steps, guidance: Of drawing, as the attack has them: steps and scale of classifier-free guidance.
        write: Saves what was tuned in a folder that exists.
    """

    surrogate: Surrogate
    losses: list[float]
    size: tuple[int, int]
    steps: int
    guidance: float
    write: Callable[[Path], None] = field(repr=False)
    open: bool = True

    def sample(
        self,
        prompts: Texts,
        seed: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """Draw one picture `(B, 3, H, W)` in [0, 1] for each text, of the size of the pictures it was tuned to.

        Other steps or guidance than the attack's may be given.

        Raises:
            ValueError: If there is no text.
            RuntimeError: If the block was left.
        """
        self._check()
        texts = some_texts(prompts)
        options: Any = {"size": self.size, "progress": progress}
        options["steps"] = self.steps if steps is None else steps
        options["guidance"] = self.guidance if guidance is None else guidance
        return sample(texts, self.surrogate, Generator().manual_seed(seed), **options)

    def save(self, folder: str | Path) -> None:
        """Write what was tuned as diffusers reads it, safetensors only; each attack says the format.

        Every file is whole: it is written beside the folder first. Files of other names in it stay.

        Raises:
            RuntimeError: If the block was left.
        """
        self._check()
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
            self.write(Path(partial))
            for path in sorted(path for path in Path(partial).rglob("*") if path.is_file()):
                target = folder / path.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)

    def _check(self) -> None:
        if not self.open:
            raise RuntimeError("expected a tuned model, got one whose weights were restored; stay inside the block")


class Task(NamedTuple):
    """What a surrogate is tuned to.

    Arguments:
        posterior: Of the pictures, `(B, C, h, w)`.
        prompt, embedding: The text they are tuned to, and what the untuned model makes of it, batch 1.
        generator: Source of every draw.
        progress: Called after every step before the tuning starts.
    """

    posterior: Posterior
    prompt: str
    embedding: Embedding
    generator: Generator
    progress: Progress


class Training(NamedTuple):
    """What one attack fits: leaf tensors, AdamW's step size, the loss, and how the result is saved."""

    parameters: Sequence[Tensor]
    learning_rate: float
    loss: Loss
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Tuning:
    """A tuning attack; the call is `base.Attack`'s.

    The seed draws everything in the tuning, and again the noise of the pictures drawn with the tuned model.

    Arguments:
        steps: Steps of AdamW.
        learning_rate: Of AdamW; None for what the attack names.
        batch_size: Pictures in a step, drawn at random without repetition; all if there are fewer.
        guidance: Scale of classifier-free guidance in drawing, 1 to turn it off; None for what is usual for the model.
        sampling_steps: Steps of drawing; None for what is usual for the model.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass: less memory, more time.
    """

    full_tuning: ClassVar[bool] = False
    """Whether the model's own weights are tuned, which takes them in float32."""

    steps: int = 1000
    learning_rate: float | None = None
    batch_size: int = 1
    guidance: float | None = None
    sampling_steps: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sampling_steps"):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}; None is the default")

    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        before = self.steps + self._steps_before(surrogate)
        total = before + self._drawing(surrogate)[0]
        targets = some_texts(prompts.target)
        sources = [prompts.source] if isinstance(prompts.source, str) else list(prompts.source)
        if len(sources) != 1:
            raise ValueError(f"expected one source text that all pictures are tuned to, got {len(sources)}")
        tuned = self.tuned(x, sources[0], surrogate, seed, progress=part(progress, 0, total))
        with tuned as model:
            return model.sample(targets, seed, progress=part(progress, before, total))

    @contextmanager
    def tuned(
        self, x: Tensor, prompt: str, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Iterator[Tuned]:
        """Tune the surrogate for a block; its weights are afterwards what they were.

        Arguments:
            x: Pictures `(B, 3, H, W)` float32 in [0, 1], sides multiples of `surrogate.multiple`.
            prompt: The text they are tuned to, for example "a photo of sks person".
            surrogate: The model; the same object is tuned.
            seed: Decides every random draw.
            progress: Called after every step.

        Raises:
            ValueError: If the pictures, the text or a setting do not fit.
        """
        check_pictures(x)
        check_size(x.shape[-2], x.shape[-1], surrogate)
        if not prompt.strip():
            raise ValueError("expected a text that the pictures are tuned to, got none; try 'a photo of sks person'")
        generator, before = Generator().manual_seed(seed), self._steps_before(surrogate)
        total, losses = before + self.steps, list[float]()
        embedding = surrogate.embed([prompt])
        with torch.no_grad():
            posterior = surrogate.posterior(x)
        task = Task(posterior, prompt, embedding, generator, part(progress, 0, total))
        with self._training(task, surrogate) as (parameters, learning_rate, loss, write):
            options: Any = {"steps": self.steps, "learning_rate": learning_rate, "generator": generator}
            with checkpointed(surrogate.denoiser, self.gradient_checkpointing):
                for value in fit(parameters, loss, **options):
                    expect_finite(value, "the loss of the tuning")
                    losses.append(value)
                    progress("tuning", before + len(losses), total)
            size = (x.shape[-2], x.shape[-1])
            model = Tuned(surrogate, losses, size, *self._drawing(surrogate), write)
            try:
                yield model
            finally:
                model.open = False

    def _drawing(self, surrogate: Surrogate) -> tuple[int, float]:
        """Return the steps and the scale of guidance of drawing."""
        return usual(self.sampling_steps, self.guidance, surrogate)

    def _steps_before(self, surrogate: Surrogate) -> int:
        """Steps reported before the tuning starts."""
        return 0

    def _training(self, task: Task, surrogate: Surrogate) -> AbstractContextManager[Training]:
        """Make the attack's parameters tunable inside a block that gives the surrogate back unchanged."""
        raise NotImplementedError


def some_texts(texts: Texts) -> list[str]:
    """Return one text or several as a list; raise ValueError for none."""
    if not (listed := [texts] if isinstance(texts, str) else list(texts)):
        raise ValueError("expected at least one text to draw, got none; give the target prompts")
    return listed


def at_least_one(name: str, value: int) -> None:
    """Raise ValueError for a count below 1."""
    if value < 1:
        raise ValueError(f"expected {name} of at least 1, got {value}")
