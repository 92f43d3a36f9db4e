import itertools

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes.ascent import Momentum, ascend, batches, decayed, gradient, views

TARGET = torch.rand(1, 3, 32, 32, generator=Generator().manual_seed(5))


def closeness(x: Tensor, generator: Generator) -> Tensor:
    return -(x - TARGET).square().sum((1, 2, 3))


def noisy(x: Tensor, generator: Generator) -> Tensor:
    return (x * torch.randn(x.shape, generator=generator)).sum((1, 2, 3))


def canvas(seed: int, size: tuple[int, int] = (32, 32)) -> Canvas:
    return Canvas(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8), size)


def run(canvases: list[Canvas], objective=closeness, steps: int = 6) -> list[float]:
    groups = batches(canvases)
    options = {"steps": steps, "step_size": 1.0, "generator": Generator().manual_seed(0)}
    return list(ascend([objective] * len(groups), groups, Linf(8), **options))


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
            options = {"steps": steps, "step_size": 1.0, "generator": generator, "momentum": momentum}
            list(ascend([noisy], groups, Linf(8), **options))
    assert torch.equal(pictures[0].delta, pictures[1].delta)
    plain = canvas(0)
    run([plain], noisy)
    assert not torch.equal(plain.delta, pictures[0].delta)


def test_the_step_size_falls_to_a_hundredth() -> None:
    sizes = [decayed(2.0, done, 100) for done in range(101)]
    assert sizes[0] == 2 and sizes[-1] == pytest.approx(0.02)
    assert all(a - b == pytest.approx(0.0198) for a, b in itertools.pairwise(sizes))
