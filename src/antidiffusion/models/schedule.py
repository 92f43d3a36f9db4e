"""The way from a clean latent to noise and back, as pure functions: z_t = signal z + noise n.

A schedule knows times. On the variance-preserving path a time is a training step, int64, and -1 is the clean end; on
the straight path it is sigma in [0, 1], float32. Callers pass times on, or ask for one by its share of the noising.

References:
    Denoising Diffusion Probabilistic Models, Ho et al., 2020, arXiv 2006.11239
    Denoising Diffusion Implicit Models, Song et al., 2021, arXiv 2010.02502
    Progressive Distillation, Salimans and Ho, 2022, arXiv 2202.00512 (v-prediction)
    Flow Matching for Generative Modeling, Lipman et al., 2022, arXiv 2210.02747
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al., 2024, arXiv 2403.03206
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Schedule(Protocol):
    """A path of noising."""

    @property
    def prediction(self) -> str:
        """What the model answers: "epsilon" (the noise), "v_prediction", "sample" (the clean latent) or "flow"."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the clean latent and of the noise at times `t: (B,)`, each `(B,)` float32 in [0, 1]."""

    def time(self, share: Tensor) -> Tensor:
        """Return the times `(B,)` at shares of the noising `(B,)` in [0, 1)."""

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw `(count,)` times as the model's training does, on the generator's device."""

    def times(self, steps: int, positions: int) -> Tensor:
        """Return where a sampler of `steps` steps stands, `(steps + 1,)`, descending; the last one is clean.

        Arguments:
            steps: Of the whole way.
            positions: What the denoiser attends to, see `Surrogate.positions`; some shifts depend on it.
        """

    def first(self, steps: int, strength: float) -> int:
        """Return how many of `steps` steps an edit leaves out that undoes a share `strength` in (0, 1]."""


@dataclass(frozen=True)
class VP:
    """The variance-preserving path, signal^2 + noise^2 = 1, of Stable Diffusion 1, 2 and XL.

    Arguments:
        scheduler: Configuration of diffusers' DDIMScheduler.
    """

    scheduler: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS[:3]:
            known = ", ".join(PREDICTIONS[:3])
            raise ValueError(f"expected a prediction type of {known}, got {self.prediction!r}; name another model")

    @property
    def prediction(self) -> str:
        return self.scheduler["prediction_type"]

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        scheduler = self._ddim()
        alphas = torch.cat(
            [scheduler.alphas_cumprod, scheduler.final_alpha_cumprod[None]]
        ).float()  # -1 is the clean end
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _ddim(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(dict(self.scheduler))

    @cached_property
    def length(self) -> int:
        """Training steps, T."""
        return len(self._tables[0]) - 1

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._tables
        return signal.to(t.device)[t], noise.to(t.device)[t]

    def time(self, share: Tensor) -> Tensor:
        return (share * self.length).long()

    def draw(self, count: int, generator: Generator) -> Tensor:
        return torch.randint(self.length, (count,), generator=generator, device=generator.device)

    def times(self, steps: int, positions: int) -> Tensor:
        scheduler = self._ddim()
        scheduler.set_timesteps(steps)
        return torch.cat([scheduler.timesteps, scheduler.timesteps.new_tensor([-1])])

    def first(self, steps: int, strength: float) -> int:
        return steps - int(steps * strength)


@dataclass(frozen=True)
class Straight:
    """The straight path, signal = 1 - sigma and noise = sigma, of Stable Diffusion 3 and FLUX.

    Arguments:
        scheduler: Configuration of diffusers' FlowMatchEulerDiscreteScheduler.
        even: Whether a sampler's steps are even before the shift, as FLUX's are; those of Stable Diffusion 3 start from
            the scheduler's own, which are shifted already.
        density: What training times are drawn from: "uniform", or "logit-normal" with the scheduler's shift.
    """

    scheduler: Mapping[str, Any]
    even: bool = False
    density: str = "uniform"
    prediction: ClassVar[str] = "flow"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time(self, share: Tensor) -> Tensor:
        return share.float()

    def draw(self, count: int, generator: Generator) -> Tensor:
        if self.density == "uniform":
            return torch.rand(count, generator=generator, device=generator.device)
        sigma = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        shift = self.scheduler.get("shift") or 1.0
        return shift * sigma / (1 + (shift - 1) * sigma)

    def times(self, steps: int, positions: int) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler))
        options: dict[str, Any] = {}
        if self.scheduler.get("use_dynamic_shifting"):
            options["mu"] = self._shift(positions, steps)
        if self.even:
            options["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
        scheduler.set_timesteps(None if self.even else steps, **options)
        return scheduler.sigmas.float()

    def _shift(self, positions: int, steps: int) -> float:
        """Return the logarithm of the shift at a number of positions: a line through two given points for any steps."""
        few, many = self.scheduler.get("base_image_seq_len", 256), self.scheduler.get("max_image_seq_len", 4096)
        low, high = self.scheduler.get("base_shift", 0.5), self.scheduler.get("max_shift", 1.15)
        return low + (high - low) * (positions - few) / (many - few)

    def first(self, steps: int, strength: float) -> int:
        return steps - min(steps, math.ceil(steps * strength))


def _factors(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    signal, noise = schedule(t)
    shape = (-1, *[1] * (like.ndim - 1))
    return signal.to(like).view(shape), noise.to(like).view(shape)


def noised(schedule: Schedule, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
    """Return z_t `(B, C, h, w)` for latents, noise `(B, C, h, w)` and times `t: (B,)` or `()`."""
    signal, noise = _factors(schedule, t, z)
    return signal * z + noise * n


def target(schedule: Schedule, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
    """Return what the model should answer for the same arguments: n, the velocity, z, or n - z."""
    if schedule.prediction == "epsilon":
        return n
    if schedule.prediction == "v_prediction":
        signal, noise = _factors(schedule, t, z)
        return signal * n - noise * z
    return n - z if schedule.prediction == "flow" else z


def parts(schedule: Schedule, z_t: Tensor, answer: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clean latent and the noise, each `(B, C, h, w)`, that an answer for z_t at times t stands for."""
    signal, noise = _factors(schedule, t, z_t)
    if schedule.prediction == "epsilon":
        return (z_t - noise * answer) / signal, answer
    if schedule.prediction == "v_prediction":
        return signal * z_t - noise * answer, signal * answer + noise * z_t
    if schedule.prediction == "flow":
        return z_t - noise * answer, z_t + signal * answer
    return answer, (z_t - signal * answer) / noise


def step(
    schedule: Schedule,
    z_t: Tensor,
    answer: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    eta: float = 0.0,
    fresh: Tensor | None = None,
) -> Tensor:
    """Go from time t to time s with the pair (clean latent, noise) that an answer stands for.

    Down it is DDIM's step, and Euler's on the straight path; up it is the inverse of these, asked at t. With `eta` 1 it
    is DDPM's.

    Arguments:
        schedule: The path.
        z_t: Latents `(B, C, h, w)` at time t.
        answer: The model's, `(B, C, h, w)`.
        t, s: Times `(B,)` or `()`.
        eta: Share of fresh noise, in [0, 1].
        fresh: Normal noise `(B, C, h, w)`, read if eta is not 0.

    Returns:
        Latents `(B, C, h, w)` at time s.

    Raises:
        ValueError: If eta asks for fresh noise and there is none.
    """
    clean, n = parts(schedule, z_t, answer, t)
    signal, noise = _factors(schedule, s, z_t)
    if not eta:
        return signal * clean + noise * n
    if fresh is None:
        raise ValueError(f"expected fresh noise for eta {eta}, got None; draw it")
    before, above = _factors(schedule, t, z_t)
    share = eta**2 * (1 - (before / signal * noise / above) ** 2)
    return signal * clean + noise * ((1 - share).sqrt() * n + share.sqrt() * fresh)
