import itertools
from functools import partial

import numpy as np
import pytest
import torch
from ascents import seeded, slope
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes import PhotoGuard
from antidiffusion.recipes.ascent import (
    Among,
    Mean,
    Momentum,
    ascend,
    batches,
    current,
    decayed,
    gradient,
    move,
    project,
    training,
    uniform,
    views,
    with_slope,
)
from antidiffusion.recipes.base import climb
from antidiffusion.recipes.objectives import Denoising

TARGET = torch.rand(1, 3, 32, 32, generator=Generator().manual_seed(5))


def closeness(x: Tensor, generator: Generator) -> Tensor:
    return -(x - TARGET).square().sum((1, 2, 3))


def noisy(x: Tensor, generator: Generator) -> Tensor:
    return (x * torch.randn(x.shape, generator=generator)).sum((1, 2, 3))


def canvas(seed: int, size: tuple[int, int] = (32, 32), **options) -> Canvas:
    return Canvas(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8), size, **options)


def run(canvases: list[Canvas], objective=closeness, steps: int = 6) -> list[float]:
    groups = batches(canvases)
    return list(ascend([objective] * len(groups), groups, Linf(8), sizes=[1.0] * steps, generator=seeded()))


def test_every_step_raises_a_smooth_objective() -> None:
    picture = canvas(0)
    values = run([picture], steps=9)
    assert len(values) == 9 and all(later > earlier for earlier, later in itertools.pairwise(values))
    assert picture.delta.abs().max() == 8


def test_the_value_is_the_mean_before_the_step() -> None:
    pair = [canvas(0), canvas(1)]
    expected = closeness(views(pair), Generator()).mean().item()
    assert run(pair, steps=1) == [pytest.approx(expected)]


def test_a_picture_does_not_depend_on_the_others_of_its_batch() -> None:
    pictures = [canvas(seed) for seed in range(3)]
    run(pictures)
    for seed, picture in enumerate(pictures):
        alone = canvas(seed)
        run([alone])
        assert torch.equal(alone.delta, picture.delta)


def test_the_gradient_is_the_sum_s_and_leaves_no_trace() -> None:
    x = torch.rand(3, 3, 32, 32, generator=Generator().manual_seed(0))
    slope, losses = gradient(closeness, x, Generator())
    torch.testing.assert_close(slope, -2 * (x - TARGET))
    assert losses.shape == (3,) and not losses.requires_grad and not x.requires_grad and x.grad is None


def test_the_seed_decides() -> None:
    first, second = canvas(0), canvas(0)
    assert run([first], noisy) == run([second], noisy)
    assert torch.equal(first.delta, second.delta)


def test_batches_group_by_view_and_lose_nothing() -> None:
    sizes = [(32, 32), (32, 64), (32, 32), (64, 32), (32, 64)]
    pictures = [canvas(i, size) for i, size in enumerate(sizes)]
    groups = batches(pictures)
    assert [[c.size for c in group] for group in groups] == [[(32, 32)] * 2, [(32, 64)] * 2, [(64, 32)]]
    assert {id(c) for group in groups for c in group} == {id(c) for c in pictures}
    assert [views(group).shape for group in groups] == [(2, 3, 32, 32), (2, 3, 32, 64), (1, 3, 64, 32)]


@pytest.mark.parametrize(("size", "sizes"), [((128, 128), [16, 4]), ((512, 512), [1] * 20), ((1024, 512), [1] * 20)])
def test_a_batch_is_at_most_one_picture_of_stable_diffusion_s_size(size: tuple[int, int], sizes: list[int]) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pictures = [Canvas(pixels, size) for _ in range(20)]
    groups = batches(pictures)
    assert [len(group) for group in groups] == sizes
    assert [id(c) for group in groups for c in group] == [id(c) for c in pictures]


def test_several_groups_all_move() -> None:
    pictures = [canvas(0), canvas(1, (32, 64))]
    run(pictures, noisy)
    assert all(c.delta.abs().max() > 0 for c in pictures)


def test_momentum_adds_directions_and_forgets_sizes() -> None:
    first, second = torch.randn(2, 2, 3, 4, 4, generator=Generator().manual_seed(0))
    momentum = Momentum(0.5)
    once = momentum(0, first)
    torch.testing.assert_close(once.abs().mean((1, 2, 3)), torch.ones(2))
    assert torch.equal(once.sign(), first.sign())
    expected = Momentum(0.0)(0, second) + 0.5 * once
    torch.testing.assert_close(momentum(0, 1000 * second), expected)
    assert torch.equal(momentum(1, second), Momentum(0.5)(0, second))
    assert momentum(2, torch.zeros(1, 3, 4, 4)).isfinite().all()


def test_momentum_lasts_from_one_call_to_the_next() -> None:
    pictures = [canvas(0), canvas(0)]
    for picture, pieces in zip(pictures, ([6], [1] * 6), strict=True):
        generator, momentum, groups = Generator().manual_seed(0), Momentum(0.9), batches([picture])
        for steps in pieces:
            options = {"sizes": [1.0] * steps, "generator": generator, "direction": momentum}
            list(ascend([noisy], groups, Linf(8), **options))
    assert torch.equal(pictures[0].delta, pictures[1].delta)
    plain = canvas(0)
    run([plain], noisy)
    assert not torch.equal(plain.delta, pictures[0].delta)


def test_the_step_size_falls_to_a_hundredth() -> None:
    sizes = [decayed(2.0, done, 100) for done in range(101)]
    assert sizes[0] == 2 and sizes[-1] == pytest.approx(0.02)
    assert all(a - b == pytest.approx(0.0198) for a, b in itertools.pairwise(sizes))


def test_a_start() -> None:
    one = Canvas(np.full((64, 64, 3), 128, np.uint8), (64, 64))
    uniform(one, Linf(4), seeded())
    assert 3.9 < one.delta.abs().max() <= 4 and abs(one.delta.mean()) < 0.1
    assert one.delta.abs().mean() == pytest.approx(2, abs=0.05)
    before = one.delta.clone()
    current(one, Linf(4), seeded())
    assert torch.equal(one.delta, before)


def test_a_phase_starts_where_it_says_and_its_steps_may_shrink() -> None:
    reached: list[float] = []
    one = Canvas(np.full((64, 64, 3), 128, np.uint8), (64, 64))
    recipe, options = PhotoGuard(budget=64, steps=4, step_size=1), {"direction": Momentum(0.9)}
    for decay, last in ((True, 1 - 0.99 * 0.75), (False, 1)):
        reached.clear()
        one.delta.zero_()
        look = partial(lambda stage, done, total: reached.append(one.delta.mean().item()))
        climb(recipe, lambda clean: lambda x, generator: x.sum((1, 2, 3)), [one], Generator(), look, decay=decay)
        assert reached[0] == pytest.approx(1)
        assert reached[-1] - reached[-2] == pytest.approx(last, abs=1e-5)
    still = PhotoGuard(steps=1, step_size=0)
    climb(still, lambda clean: noisy, [one], seeded(), lambda *step: None, start=uniform, **options)
    assert one.delta.std() > 4


@pytest.mark.parametrize("luma", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_projection_keeps_ball_range_and_mask(luma: bool, masked: bool) -> None:
    mask = np.zeros((40, 50), bool)
    mask[5:30, 10:45] = True
    one = canvas(0, mask=mask if masked else None, luma=luma)
    assert one.delta.shape == (1, 1 if luma else 3, 40, 50)
    for seed in range(3):
        move(one, torch.randn(1, 3, 32, 32, generator=seeded(seed)), 5.5, Linf(7.5))
        moved = one.clean + one.delta
        assert 0 < one.delta.abs().max() <= 7.5 and moved.min() >= 0 and moved.max() <= 255
        assert not masked or not one.delta[..., ~torch.from_numpy(mask)].any()
        before = one.delta.clone()
        project(one, Linf(7.5))
        assert torch.equal(one.delta, before)
    difference = one.pixels(Linf(7.5)).astype(int) - one.clean[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() == 7 and (difference[~mask].any() != masked)
    assert (difference == difference[..., :1]).all() == luma


def test_a_draw_of_one_s_own_times(tiny: Surrogate) -> None:
    z, generator = torch.zeros(2, 4, 8, 8), seeded()
    seen = [Among([torch.arange(5), torch.arange(500, 503)])(tiny, z, generator)[1] for _ in range(40)]
    first, second = torch.stack(seen).unbind(1)
    assert set(first.tolist()) == set(range(5)) and set(second.tolist()) == {500, 501, 502}
    n, t = training(tiny, z, seeded())
    assert torch.equal(n, torch.randn(z.shape, generator=seeded())) and t.shape == (2,)


def test_mean_averages_values_and_gradients_over_consecutive_draws(tiny: Surrogate, x: Tensor) -> None:
    objective, generator, leaf = Denoising(tiny, tiny.embed(["a photo"])), seeded(), x.clone().requires_grad_()
    losses = torch.stack([objective(leaf, generator) for _ in range(3)]).mean(0)
    torch.testing.assert_close(Mean(objective, 3)(x, seeded()), losses)
    torch.testing.assert_close(Mean(objective, 3)(leaf, seeded()), losses)
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    torch.testing.assert_close(slope(Mean(objective, 3), x), expected, rtol=1e-3, atol=1e-7)
    inner = slope(lambda y, random: Mean(objective, 3)(y.square(), random), x.sqrt())  # of what is no leaf
    torch.testing.assert_close(inner, 2 * x.sqrt() * expected, rtol=1e-3, atol=1e-7)


def test_with_slope() -> None:
    x, gradient = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3)
    value = with_slope(torch.tensor([1.0, 2.0]), x, gradient)
    assert value.tolist() == [1, 2]
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], gradient)
