from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers_pipelines import pipeline
from PIL import Image
from torch import Generator, Tensor

import antidiffusion
from antidiffusion.models.base import Surrogate, randn
from antidiffusion.models.sampling import denoise, invert, sample, way_down
from antidiffusion.models.schedule import VP, Schedule, Straight, noised, step, target

PROMPTS = ["a photo of a person", "a red hat"]
PORTRAIT = "a portrait of a woman, wearing a white sweater, on a blue background"


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
    noise, times = randn((1, 4, 8, 8), generator, torch.empty(0)).expand(2, -1, -1, -1), way_down(tiny, 64, 64, 2)
    options: Any = {"surrogate": tiny, "guidance": 5.0}
    both = denoise(noise, times, tiny.embed(PROMPTS), **options)
    for prompt, z in zip(PROMPTS, both, strict=True):
        alone = denoise(noise[:1], times, tiny.embed([prompt]), **options)
        torch.testing.assert_close(alone[0], z, rtol=1e-4, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_guidance_1_is_unguided(
    tiny: Surrogate, generator: Generator, counted: Callable[[Surrogate], list[Tensor]]
) -> None:
    noise = randn((1, 4, 8, 8), generator, torch.empty(0))
    embedding = tiny.embed(PROMPTS[:1])
    times, z = way_down(tiny, 64, 64, 3), noise
    for t, s in pairwise(times):
        z = step(tiny.schedule, z, tiny.predict(z, t[None], embedding), t, s)
    steps = counted(tiny)
    assert torch.equal(denoise(noise, times, embedding, tiny, guidance=1), z)
    assert torch.equal(torch.cat(steps), times[:-1])
    steps.clear()
    assert not torch.equal(denoise(noise, times, embedding, tiny, guidance=2), z)
    assert torch.equal(torch.cat(steps), times[:-1].repeat_interleave(2))


def test_guidance_of_each_and_one_call(
    tiny: Surrogate, generator: Generator, counted: Callable[[Surrogate], list[Tensor]]
) -> None:
    noise = randn((3, 4, 8, 8), generator, torch.empty(0))
    times, embedding = way_down(tiny, 64, 64, 2), tiny.embed([*PROMPTS, ""])
    each = [5.0, 1.0, 2.0]
    alone = [
        denoise(noise[i : i + 1], times, embedding[i : i + 1], tiny, guidance=scale) for i, scale in enumerate(each)
    ]
    steps = counted(tiny)
    together = denoise(noise, times, embedding, tiny, guidance=torch.tensor(each))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)
    assert [len(step) for step in steps] == [3 + 2] * 2  # those of scale 1 are asked once


def test_after_every_step_the_latents_can_be_changed(tiny: Surrogate, generator: Generator) -> None:
    noise = randn((1, 4, 8, 8), generator, torch.empty(0))
    times, embedding = way_down(tiny, 64, 64, 3), tiny.embed(PROMPTS[:1])
    seen: list[tuple[int, Tensor]] = []

    def restart(done: int, z: Tensor) -> Tensor:
        seen.append((done, z))
        return noise if done == 2 else z

    z = denoise(noise, times, embedding, tiny, guidance=1, after=restart)
    assert [done for done, _ in seen] == [1, 2, 3] and torch.equal(z, seen[-1][1])
    assert torch.equal(z, denoise(noise, times[2:], embedding, tiny, guidance=1))


def test_progress(tiny: Surrogate, generator: Generator) -> None:
    calls: list[tuple[str, int, int]] = []
    sample(PROMPTS[:1], tiny, generator, steps=3, guidance=1, progress=lambda *call: calls.append(call))
    assert calls == [("drawing", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize("size", [(64, 65), (72, 64), (0, 64), (-64, 64)])
def test_impossible_sizes(tiny: Surrogate, generator: Generator, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 64, got {size[1]} x {size[0]}; resize"):
        sample(PROMPTS, tiny, generator, size=size)


def latents(x: Tensor, surrogate: Surrogate) -> Tensor:
    with torch.no_grad():
        return surrogate.encode(x, Generator().manual_seed(0))


def test_inversion_equals_diffusers(surrogate: Surrogate, x: Tensor) -> None:
    steps = 6
    z, embedding, times = latents(x, surrogate), surrogate.embed([PORTRAIT]), way_down(surrogate, 64, 64, steps)
    theirs = DDIMInverseScheduler.from_config(dict(surrogate.schedule.scheduler))
    theirs.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, times[:-1].flip(0))
    expected = [z]
    for t in times[:-1].flip(0):
        with torch.no_grad():
            output = surrogate.predict(expected[-1], t.expand(2), embedding)
        expected.append(theirs.step(output, t, expected[-1]).prev_sample)
    ours = invert(z, times, embedding, surrogate)
    assert ours.shape == (steps + 1, 2, 4, 8, 8)
    torch.testing.assert_close(ours, torch.stack(expected[::-1]), rtol=1e-3, atol=1e-3)
    part = invert(z, times[1:], embedding, surrogate)
    torch.testing.assert_close(part, ours[1:], rtol=1e-3, atol=1e-3)


SCHEDULES = [
    *({"prediction_type": p, "timestep_spacing": s} for p in ("epsilon", "sample") for s in ("leading", "trailing")),
    {"shift": 3.0},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: "-".join(map(str, options.values())))
def test_a_perfect_model_adds_its_noise(
    tiny: Surrogate, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    vp = "prediction_type" in options
    schedule: Schedule = VP({**tiny.schedule.scheduler, **options}) if vp else Straight(options)
    z, n = torch.randn(2, 2, 4, 8, 8, generator=Generator().manual_seed(0))
    monkeypatch.setattr(tiny, "schedule", schedule)
    monkeypatch.setattr(tiny, "predict", lambda z_t, t, embedding: target(schedule, z, n, t))
    times, embedding = way_down(tiny, 64, 64, 5)[2:], tiny.embed([""])
    expected = torch.stack([noised(schedule, z, n, t) for t in times])
    ours = invert(expected[-1], times, embedding, tiny)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    back = denoise(ours[0], times, embedding, tiny, guidance=1)
    torch.testing.assert_close(back, expected[-1], rtol=1e-3, atol=1e-3)


def test_more_steps_come_back_closer(mini: Surrogate) -> None:
    portrait = Path(antidiffusion.__file__).parent / "mini" / "portraits" / "1.png"
    x = torch.from_numpy(np.asarray(Image.open(portrait).convert("RGB")) / 255).permute(2, 0, 1)[None].float()
    z, embedding, errors = latents(x, mini), mini.embed([PORTRAIT]), []
    for steps in (4, 8, 16):
        times = way_down(mini, *x.shape[-2:], steps)
        noise = invert(z, times, embedding, mini)[0]
        back = denoise(noise, times, embedding, mini, guidance=1)
        errors.append((back - z).square().mean() / z.var())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_inversion_with_guidance_and_progress(tiny: Surrogate, x: Tensor) -> None:
    z, embedding, times = latents(x, tiny), tiny.embed([PORTRAIT]), way_down(tiny, 64, 64, 3)
    calls: list[tuple[str, int, int]] = []
    options: Any = {"guidance": torch.tensor([1.0, 5.0]), "progress": lambda *call: calls.append(call)}
    ours = invert(z, times, embedding, tiny, **options)
    plain = invert(z, times, embedding, tiny)
    assert calls == [("inverting", done, 3) for done in (1, 2, 3)]
    torch.testing.assert_close(ours[:, 0], plain[:, 0], rtol=1e-4, atol=1e-4)
    assert (ours[0, 1] - plain[0, 1]).abs().max() > 1e-3


def test_noise_of_a_drawing_is_found_again(mini: Surrogate) -> None:
    noise = randn((1, 4, 8, 8), Generator().manual_seed(3), torch.empty(0))
    times, embedding = way_down(mini, 64, 64, 10), mini.embed([PORTRAIT])
    drawn = denoise(noise, times, embedding, mini, guidance=1)
    found = invert(drawn, times, embedding, mini)[0]
    assert torch.cosine_similarity(found.flatten(), noise.flatten(), dim=0) > 0.5
