from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from PIL import Image
from torch import Generator, Tensor

import antidiffusion
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.inversion import check_settings, edit_beside_source, invert
from antidiffusion.models.base import NoiseSchedule, Surrogate, randn
from antidiffusion.models.sampling import denoise

PROMPT = "a portrait of a woman, wearing a white sweater, on a blue background"


def latents(x: Tensor, surrogate: Surrogate) -> Tensor:
    with torch.no_grad():
        return surrogate.encode(x, Generator().manual_seed(0))


def test_equals_diffusers(surrogate: Surrogate, x: Tensor) -> None:
    steps = 6
    z, embedding = latents(x, surrogate), surrogate.embed([PROMPT])
    surrogate.scheduler.set_timesteps(steps)
    # Its set_timesteps refuses "linspace", which SDXL's scheduler has here; the steps are then the forward scheduler's.
    theirs = DDIMInverseScheduler.from_config(dict(surrogate.schedule.scheduler), timestep_spacing="leading")
    theirs.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, surrogate.scheduler.timesteps.flip(0)) or len(surrogate.tokenizers) == 2
    expected = [z]
    for t in surrogate.scheduler.timesteps.flip(0):
        with torch.no_grad():
            output = surrogate.predict(expected[-1], t.expand(2), embedding)
        expected.append(theirs.step(output, t, expected[-1]).prev_sample)
    ours = invert(z, surrogate.scheduler.timesteps, embedding, surrogate)
    assert ours.shape == (steps + 1, 2, 4, 8, 8)
    torch.testing.assert_close(ours, torch.stack(expected[::-1]), rtol=1e-3, atol=1e-3)
    part = invert(z, surrogate.scheduler.timesteps[1:], embedding, surrogate)
    torch.testing.assert_close(part, ours[1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_perfect_model_adds_its_noise(
    tiny: Surrogate, monkeypatch: pytest.MonkeyPatch, prediction: str, spacing: str
) -> None:
    options = {"prediction_type": prediction, "timestep_spacing": spacing}
    scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config, **options)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    z, n = torch.randn(2, 2, 4, 8, 8, generator=Generator().manual_seed(0))
    monkeypatch.setattr(tiny, "scheduler", scheduler)
    monkeypatch.setattr(tiny, "predict", lambda z_t, t, embedding: schedule.target(z, n, t))
    scheduler.set_timesteps(5)
    timesteps, embedding = scheduler.timesteps[2:], tiny.embed([""])
    start = schedule.add_noise(z, n, torch.tensor([0, 0]))
    ours = invert(start, timesteps, embedding, tiny)
    expected = [schedule.add_noise(z, n, t.expand(2)) for t in timesteps] + [start]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-3, atol=1e-3)
    back = denoise(ours[0], timesteps, embedding, tiny, guidance=1)
    torch.testing.assert_close(back, start, rtol=1e-3, atol=1e-3)


def test_more_steps_come_back_closer(mini: Surrogate) -> None:
    portrait = Path(antidiffusion.__file__).parent / "mini" / "portraits" / "1.png"
    x = torch.from_numpy(np.asarray(Image.open(portrait).convert("RGB")) / 255).permute(2, 0, 1)[None].float()
    z, errors = latents(x, mini), []
    embedding = mini.embed([PROMPT])
    for steps in (4, 8, 16):
        mini.scheduler.set_timesteps(steps)
        timesteps = mini.scheduler.timesteps
        noise = invert(z, timesteps, embedding, mini)[0]
        back = denoise(noise, timesteps, embedding, mini, guidance=1)
        errors.append((back - z).square().mean() / z.var())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_guidance_and_progress(tiny: Surrogate, x: Tensor) -> None:
    z, embedding = latents(x, tiny), tiny.embed([PROMPT])
    tiny.scheduler.set_timesteps(3)
    calls: list[tuple[int, int]] = []
    options: Any = {"guidance": torch.tensor([1.0, 5.0]), "progress": lambda *call: calls.append(call[1:])}
    ours = invert(z, tiny.scheduler.timesteps, embedding, tiny, **options)
    plain = invert(z, tiny.scheduler.timesteps, embedding, tiny)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    torch.testing.assert_close(ours[:, 0], plain[:, 0], rtol=1e-4, atol=1e-4)
    assert (ours[0, 1] - plain[0, 1]).abs().max() > 1e-3


def test_phases_hold_for_their_steps(tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    active, seen = [""], list[tuple[str, int]]()
    predict = tiny.predict

    @contextmanager
    def phase(name: str) -> Any:
        active.append(name)
        yield
        active.pop()

    def watched(z: Tensor, t: Tensor, embedding: Any) -> Tensor:
        seen.append((active[-1], len(z)))
        return predict(z, t, embedding)

    monkeypatch.setattr(tiny, "predict", watched)
    phases = [(0, phase("never")), (1, phase("a")), (3, phase("b"))]
    calls: list[tuple[int, int]] = []
    options: Any = {"steps": 3, "guidance": 2.0, "progress": lambda *call: calls.append(call[1:])}
    edit_beside_source(x, Prompts("a hat"), tiny, 0, phases=phases, **options)
    assert seen == [("", 2)] * 3 + [("a", 6)] + [("b", 6)] * 2
    assert calls == [(done, 6) for done in range(1, 7)]


def test_settings() -> None:
    check_settings(1, {"share": 0.0, "other": 1.0})
    with pytest.raises(ValueError, match="expected at least 1 step, got 0"):
        check_settings(0, {})
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected share in \[0, 1\], got"):
            check_settings(5, {"share": share})


def test_noise_of_a_drawing_is_found_again(mini: Surrogate) -> None:
    noise = randn((1, 4, 8, 8), Generator().manual_seed(3), torch.empty(0))
    mini.scheduler.set_timesteps(10)
    timesteps, embedding = mini.scheduler.timesteps, mini.embed([PROMPT])
    drawn = denoise(noise, timesteps, embedding, mini, guidance=1)
    found = invert(drawn, timesteps, embedding, mini)[0]
    alike = torch.cosine_similarity(found.flatten(), noise.flatten(), dim=0)
    assert alike > 0.5
