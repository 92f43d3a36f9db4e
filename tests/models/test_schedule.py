"""Against diffusers' schedulers, on a stand-in for the model whose answers depend on latents and time."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from antidiffusion.models.schedule import PREDICTIONS, VP, Schedule, Straight, noised, parts, step, target

STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE |= {"clip_sample": False}
ENDS = [{}, {"steps_offset": 1, "set_alpha_to_one": False}]
# Stable Diffusion 3 shifts by a constant, FLUX.1 by the picture's size, FLUX.1-schnell not at all.
STATIC: dict[str, Any] = {"shift": 3.0}
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
DYNAMIC |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}


def vp(**options: Any) -> tuple[VP, DDIMScheduler]:
    scheduler = DDIMScheduler(**STABLE | options)
    return VP(scheduler.config), scheduler


def straight(config: dict[str, Any], **options: Any) -> tuple[Straight, FlowMatchEulerDiscreteScheduler]:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    return Straight(scheduler.config, **options), scheduler


def schedule_of(prediction: str) -> Schedule:
    return Straight({}) if prediction == "flow" else vp(prediction_type=prediction)[0]


def normal(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=Generator().manual_seed(seed))


def answer(z_t: Tensor, t: Tensor) -> Tensor:
    """What stands for a model: smooth in latents and time."""
    return torch.tanh(z_t.flip(-1) + 0.3 * torch.sin(t / 100.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_exact_answer_gives_back_latent_and_noise(prediction: str, seed: int) -> None:
    schedule, generator = schedule_of(prediction), Generator().manual_seed(seed)
    z, n = normal(5, seed).double(), normal(5, seed + 1).double()
    t = schedule.time(0.02 + 0.96 * torch.rand(5, generator=generator))
    signal, noise = (factor.double().view(-1, 1, 1, 1) for factor in schedule(t))
    z_t = noised(schedule, z, n, t)
    torch.testing.assert_close(z_t, signal * z + noise * n)
    torch.testing.assert_close(parts(schedule, z_t, target(schedule, z, n, t), t), (z, n), rtol=1e-4, atol=1e-4)
    s = schedule.time(torch.full((5,), 0.01))
    moved = step(schedule, z_t, target(schedule, z, n, t), t, s)
    torch.testing.assert_close(moved, noised(schedule, z, n, s), rtol=1e-4, atol=1e-4)


def test_noise_and_velocity_are_the_scheduler_s() -> None:
    schedule, scheduler = vp(prediction_type="v_prediction")
    z, n, t = normal(3), normal(3, 1), torch.tensor([0, 400, 999])
    assert torch.equal(noised(schedule, z, n, t), scheduler.add_noise(z, n, t))
    assert torch.equal(target(schedule, z, n, t), scheduler.get_velocity(z, n, t))
    flow, euler = straight(STATIC)
    t = euler.sigmas[[0, 300, 900]]
    expected = euler.scale_noise(z, euler.timesteps[[0, 300, 900]], n)
    torch.testing.assert_close(noised(flow, z, n, t), expected)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a prediction type of epsilon, .*, got 'score'; name another model"):
        VP({"prediction_type": "score"})


def test_times_of_shares_and_draws() -> None:
    share = (torch.arange(8) + 0.5) / 8
    schedule, flow = vp()[0], Straight({})
    assert schedule.time(share).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert torch.equal(flow.time(share), share)
    t = schedule.draw(4000, Generator().manual_seed(0))
    assert t.dtype == torch.int64 and 0 <= t.min() < 10 and 990 <= t.max() < 1000
    assert torch.equal(t, schedule.draw(4000, Generator().manual_seed(0)))
    drawn = {
        name: Straight(STATIC, density=name).draw(20000, Generator().manual_seed(0))
        for name in ("uniform", "logit-normal")
    }
    assert all(sigma.min() > 0 and sigma.max() < 1 for sigma in drawn.values())
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(drawn["uniform"].quantile(quartiles), quartiles, atol=0.02, rtol=0)
    plain = (torch.tensor([-0.6745, 0.0, 0.6745])).sigmoid()  # of a normal distribution
    torch.testing.assert_close(
        drawn["logit-normal"].quantile(quartiles), 3 * plain / (1 + 2 * plain), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("end", ENDS)
def test_times_on_the_variance_preserving_path(spacing: str, end: dict[str, Any]) -> None:
    schedule, scheduler = vp(timestep_spacing=spacing, **end)
    for steps in (1, 4, 25, 30, 50):
        scheduler.set_timesteps(steps)
        times = schedule.times(steps, 64)
        assert torch.equal(times[:-1], scheduler.timesteps) and times[-1] == -1
    assert [schedule.first(50, strength) for strength in (1, 0.5, 0.33)] == [0, 25, 34]


@pytest.mark.parametrize("prediction", PREDICTIONS[:3])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("steps", [25, 50])
def test_steps_and_inverse_steps_are_ddim_s(prediction: str, end: dict[str, Any], steps: int) -> None:
    schedule, scheduler = vp(prediction_type=prediction, **end)
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    inverse.set_timesteps(steps)
    times, z = schedule.times(steps, 64), normal()
    ours = theirs = z
    for t, s in pairwise(times):
        ours = step(schedule, ours, answer(ours, t), t, s)
        theirs = scheduler.step(answer(theirs, t), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = theirs = z
    for t, s in pairwise(times.flip(0)):
        ours = step(schedule, ours, answer(ours, s), t, s)
        theirs = inverse.step(answer(theirs, s), s, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_eta_1_is_ddpm_s_step() -> None:
    schedule, scheduler = vp()
    scheduler.set_timesteps(25)
    times, z, fresh = schedule.times(25, 64), normal(), normal(seed=1)
    for t, s in pairwise(times):
        theirs = scheduler.step(answer(z, t), t, z, eta=1.0, variance_noise=fresh).prev_sample
        ours = step(schedule, z, answer(z, t), t, s, eta=1.0, fresh=fresh)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected fresh noise for eta 1.0, got None; draw it"):
        step(schedule, z, z, times[0], times[1], eta=1.0)


def test_a_whole_way_of_noise_keeps_the_marginals() -> None:
    """On either path, fresh noise leaves z_t what `noised` makes: signal z + noise of unit variance."""
    for schedule in (vp(rescale_betas_zero_snr=True, prediction_type="v_prediction")[0], Straight({"shift": 3.0})):
        generator, z = Generator().manual_seed(0), torch.full((4, 4, 64, 64), 0.7)
        times = schedule.times(6, 64)
        z_t = noised(schedule, z, torch.randn(z.shape, generator=generator), times[0])
        for t, s in pairwise(times[:-1]):
            signal, noise = schedule(t)
            n = (z_t - signal * z) / noise
            fresh = torch.randn(z.shape, generator=generator)
            z_t = step(schedule, z_t, target(schedule, z, n, t), t, s, eta=1.0, fresh=fresh)
            signal, noise = schedule(s)
            assert float(z_t.mean()) == pytest.approx(float(signal) * 0.7, abs=0.02)
            assert float(z_t.std()) == pytest.approx(float(noise), rel=0.02)


@pytest.mark.parametrize("config", [STATIC, DYNAMIC, {"shift": 1.0}])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("side", [256, 512, 1024])
def test_times_and_steps_are_euler_s(config: dict[str, Any], even: bool, side: int) -> None:
    """Even steps are FLUX's own grid, the others Stable Diffusion 3's, as their pipelines ask for them."""
    schedule, scheduler = straight(config, even=even)
    positions = (side // 16) ** 2
    shift = calculate_shift(positions, 256, 4096, 0.5, 1.15) if config.get("use_dynamic_shifting") else None
    for steps in (4, 28):
        grid = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if even else {"num_inference_steps": steps}
        scheduler.set_timesteps(**grid, **({} if shift is None else {"mu": shift}))
        times = schedule.times(steps, positions)
        torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=1e-6)
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
        ours = theirs = normal()
        for (t, s), stock in zip(pairwise(times), scheduler.timesteps, strict=True):
            ours = step(schedule, ours, answer(ours, t), t, s)
            theirs = scheduler.step(answer(theirs, t), stock, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_larger_picture_is_shifted_further() -> None:
    schedule = straight(DYNAMIC, even=True)[0]
    small, large = (schedule.times(8, (side // 16) ** 2)[1:-1] for side in (256, 1024))
    assert (large > small).all()


def test_an_edit_on_the_straight_path_rounds_its_steps_up() -> None:
    schedule = Straight({})
    assert [schedule.first(28, strength) for strength in (1, 0.5, 0.33, 0.01)] == [0, 14, 18, 27]


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])  # the others' answers stand for another pair at each time
def test_up_and_down_with_the_same_answers_returns(prediction: str) -> None:
    schedule, z = schedule_of(prediction), normal()
    times = schedule.times(10, 64).flip(0)[1:]
    answers, up = [], z
    for t, s in pairwise(times):
        answers.append(answer(up, s))
        up = step(schedule, up, answers[-1], t, s)
    assert (up - z).abs().max() > 0.1
    for (s, t), found in zip(pairwise(times.flip(0)), answers[::-1], strict=True):
        up = step(schedule, up, found, s, t)
    torch.testing.assert_close(up, z, rtol=1e-4, atol=1e-4)
