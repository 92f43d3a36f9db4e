import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from antidiffusion.metrics.distribution import frechet, kid

SIZES = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))


def features(count: int, width: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features `(count, width)`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    return spread * torch.randn(count, width, generator=generator) @ mixing + shift


@settings(max_examples=40)
@given(SIZES)
def test_kid_equals_a_double_loop(sizes: tuple[int, int, int, int]) -> None:
    n, m, d, seed = sizes
    a, b = features(n, d, seed).double().numpy(), features(m, d, seed + 1, shift=0.5).double().numpy()

    def mean(x: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]]) -> float:
        return sum((sum(p * q for p, q in zip(x[i], y[j], strict=True)) / d + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, [(i, j) for i in range(n) for j in range(n) if i != j])
    expected += mean(b, b, [(i, j) for i in range(m) for j in range(m) if i != j])
    expected -= 2 * mean(a, b, [(i, j) for i in range(n) for j in range(m)])
    assert kid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kid_is_unbiased() -> None:
    values = torch.tensor([kid(features(8, 3, 2 * seed), features(11, 3, 2 * seed + 1)) for seed in range(400)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 3 * error and (values < 0).float().mean() > 0.3
    shifted = torch.tensor([kid(features(8, 3, 2 * s), features(11, 3, 2 * s + 1, shift=1)) for s in range(400)])
    assert shifted.mean() > 10 * error


@settings(max_examples=40)
@given(st.tuples(st.integers(20, 60), st.integers(20, 60), st.integers(1, 8), st.integers(0, 99)))
def test_frechet_equals_the_formula_with_a_matrix_root(sizes: tuple[int, int, int, int]) -> None:
    n, m, d, seed = sizes
    a, b = features(n, d, seed).double().numpy(), features(m, d, seed + 1, 1.5, 0.3).double().numpy()
    first, second = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(first @ second)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * np.real(root))
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=40)
@given(SIZES)
def test_frechet_of_moved_and_scaled_features_is_known(sizes: tuple[int, int, int, int]) -> None:
    """Also for fewer features than dimensions, where a matrix root is lost in rounding."""
    n, _, d, seed = sizes
    a, shift = features(n, d, seed), torch.arange(1.0, d + 1)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-4)
    spread = float(a.double().var(0).sum())
    centred = a.double() - a.double().mean(0)
    assert frechet(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-9)  # (3 - 1)^2 times the variance


@settings(max_examples=40)
@given(SIZES)
def test_symmetry_order_and_rotation(sizes: tuple[int, int, int, int]) -> None:
    n, m, d, seed = sizes
    a, b = features(n, d, seed), features(m, d, seed + 1, shift=0.5)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()).Q
    for measure in (kid, frechet):
        value = measure(a, b)
        assert measure(b, a) == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert measure(a.flip(0), b.roll(1, 0)) == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert measure(a.double() @ rotation, b.double() @ rotation) == pytest.approx(value, rel=1e-9, abs=1e-8)
    assert frechet(a, b) >= 0


def test_farther_is_larger() -> None:
    for measure in (kid, frechet):
        values = [measure(features(50, 4, 0), features(50, 4, 1, shift=shift)) for shift in (0, 0.5, 1, 2)]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])


def test_many_wide_features_keep_their_digits() -> None:
    """Of 600 dimensions, far from zero, half unused: two float32 covariance matrices could not tell these apart."""
    a = features(700, 300, 0)
    a = torch.cat([a, torch.zeros(700, 300)], 1) + 100
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    b = a.clone()
    b[:, 599] += 0.01
    assert frechet(a, b) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("measure", [kid, frechet])
def test_wrong_features_are_refused(measure: object) -> None:
    assert callable(measure)
    x = torch.rand(4, 3)
    for a, b in ((x, x[:, :2]), (x[:1], x), (x, x[0]), (x[:, :0], x[:, :0]), (x, x * math.nan), (x, x / 0)):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            measure(a, b)
