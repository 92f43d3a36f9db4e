from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_pipelines import pipeline
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate, randn
from antidiffusion.models.sampling import denoise, sample

PROMPTS = ["a photo of a person", "a red hat"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Surrogate], list[Tensor]]:
    """Record the steps that a surrogate's UNet is asked for."""

    def watch(surrogate: Surrogate) -> list[Tensor]:
        steps: list[Tensor] = []
        predict = surrogate.predict

        def recorded(z: Tensor, t: Tensor, embedding: Any) -> Tensor:
            steps.append(t)
            return predict(z, t, embedding)

        monkeypatch.setattr(surrogate, "predict", recorded)
        return steps

    return watch


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equals_diffusers(surrogate: Surrogate, generator: Generator, guidance: float) -> None:
    ours = sample(PROMPTS, surrogate, generator, steps=4, guidance=guidance, size=(64, 128))
    latents = randn((2, 4, 8, 16), Generator().manual_seed(0), torch.empty(0))
    options: Any = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 64, "width": 128}
    theirs = pipeline(surrogate)(PROMPTS, latents=latents, output_type="pt", **options).images
    assert ours.shape == (2, 3, 64, 128)
    assert (ours - theirs).abs().max() < 1e-3
    assert ours.std() > 0.01


def test_equals_diffusers_with_the_embedded_model(mini: Surrogate, generator: Generator) -> None:
    ours = sample(PROMPTS[:1], mini, generator, steps=3)
    side = mini.size // mini.factor
    latents = randn((1, 4, side, side), Generator().manual_seed(0), torch.empty(0))
    options: Any = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": mini.size, "width": mini.size}
    theirs = pipeline(mini)(PROMPTS[:1], latents=latents, output_type="pt", **options).images
    assert ours.shape == (1, 3, mini.size, mini.size)
    assert (ours - theirs).abs().max() < 1e-3


def test_the_seed_decides_the_picture(tiny: Surrogate) -> None:
    first, same, other = (sample(PROMPTS[:1], tiny, Generator().manual_seed(s), steps=2) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (first.dtype, first.shape) == (torch.float32, (1, 3, tiny.size, tiny.size))
    assert first.min() >= 0
    assert first.max() <= 1


def test_the_prompt_matters_and_a_batch_does_not(tiny: Surrogate, generator: Generator) -> None:
    noise = randn((1, 4, 8, 8), generator, torch.empty(0)).expand(2, -1, -1, -1)
    tiny.scheduler.set_timesteps(2)
    options: Any = {"surrogate": tiny, "guidance": 5.0}
    both = denoise(noise, tiny.scheduler.timesteps, tiny.embed(PROMPTS), **options)
    for prompt, z in zip(PROMPTS, both, strict=True):
        alone = denoise(noise[:1], tiny.scheduler.timesteps, tiny.embed([prompt]), **options)
        torch.testing.assert_close(alone[0], z, rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_guidance_1_is_unguided(
    tiny: Surrogate, generator: Generator, counted: Callable[[Surrogate], list[Tensor]]
) -> None:
    noise = randn((1, 4, 8, 8), generator, torch.empty(0))
    embedding = tiny.embed(PROMPTS[:1])
    tiny.scheduler.set_timesteps(3)
    timesteps, z = tiny.scheduler.timesteps, noise
    for t in timesteps:
        z = tiny.scheduler.step(tiny.predict(z, t[None], embedding), t, z).prev_sample
    steps = counted(tiny)
    assert torch.equal(denoise(noise, timesteps, embedding, tiny, guidance=1), z)
    assert torch.equal(torch.cat(steps), timesteps)
    steps.clear()
    assert not torch.equal(denoise(noise, timesteps, embedding, tiny, guidance=2), z)
    assert torch.equal(torch.cat(steps), timesteps.repeat_interleave(2))


def test_guidance_of_each_and_one_call(
    tiny: Surrogate, generator: Generator, counted: Callable[[Surrogate], list[Tensor]]
) -> None:
    noise = randn((3, 4, 8, 8), generator, torch.empty(0))
    tiny.scheduler.set_timesteps(2)
    timesteps, embedding = tiny.scheduler.timesteps, tiny.embed([*PROMPTS, ""])
    each = [5.0, 1.0, 2.0]
    alone = [
        denoise(noise[i : i + 1], timesteps, embedding[i : i + 1], tiny, guidance=scale) for i, scale in enumerate(each)
    ]
    steps = counted(tiny)
    together = denoise(noise, timesteps, embedding, tiny, guidance=torch.tensor(each))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)
    assert [len(step) for step in steps] == [3 + 2] * 2  # those of scale 1 are asked once


def test_after_every_step_the_latents_can_be_changed(tiny: Surrogate, generator: Generator) -> None:
    noise = randn((1, 4, 8, 8), generator, torch.empty(0))
    tiny.scheduler.set_timesteps(3)
    timesteps, embedding = tiny.scheduler.timesteps, tiny.embed(PROMPTS[:1])
    seen: list[tuple[int, Tensor]] = []

    def restart(done: int, z: Tensor) -> Tensor:
        seen.append((done, z))
        return noise if done == 2 else z

    z = denoise(noise, timesteps, embedding, tiny, guidance=1, after=restart)
    assert [done for done, _ in seen] == [1, 2, 3] and torch.equal(z, seen[-1][1])
    assert torch.equal(z, denoise(noise, timesteps[2:], embedding, tiny, guidance=1))


def test_progress(tiny: Surrogate, generator: Generator) -> None:
    calls: list[tuple[str, int, int]] = []
    sample(PROMPTS[:1], tiny, generator, steps=3, guidance=1, progress=lambda *call: calls.append(call))
    assert calls == [("drawing", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize("size", [(64, 65), (72, 64), (0, 64), (-64, 64)])
def test_impossible_sizes(tiny: Surrogate, generator: Generator, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 64, got {size[1]} x {size[0]}; resize"):
        sample(PROMPTS, tiny, generator, size=size)
