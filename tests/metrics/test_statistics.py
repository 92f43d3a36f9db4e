import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from antidiffusion.metrics.statistics import Floats, bootstrap, percentiles, resample


def deviation(values: Floats, axis: int | None = None) -> Floats:
    return values.std(axis, ddof=1)


def figures(count: int, seed: int) -> Floats:
    return np.random.default_rng([1, seed]).standard_normal(count) + 3  # apart from the draws of the resamples


@pytest.mark.parametrize("confidence", [0.68, 0.95])
@pytest.mark.parametrize(("ours", "theirs"), [(np.mean, np.mean), (deviation, deviation)])
def test_equals_scipy_up_to_the_draws(ours: object, theirs: object, confidence: float) -> None:
    assert callable(ours) and callable(theirs)
    values = figures(30, 0)
    low, high = bootstrap(values, ours, seed=0, confidence=confidence, resamples=5000)
    options = {"confidence_level": confidence, "n_resamples": 5000, "method": "percentile"}
    expected = scipy.stats.bootstrap((values,), theirs, rng=np.random.default_rng(0), **options)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.02)


def test_covers_the_truth_as_often_as_it_says() -> None:
    intervals = [bootstrap(figures(40, seed), seed=0, resamples=400) for seed in range(150)]
    assert 0.87 <= sum(low <= 3 <= high for low, high in intervals) / len(intervals) <= 0.99


def test_a_row_of_figures_stays_together() -> None:
    """The ratio of paired columns is the same in every resample."""
    column = figures(10, 0)
    pairs = np.stack([column, 2 * column], 1)
    interval = bootstrap(pairs, lambda rows: rows[:, 1].sum() / rows[:, 0].sum(), seed=0)
    assert interval == pytest.approx((2, 2))


def test_constant_figures_seed_and_confidence() -> None:
    assert bootstrap([0.25] * 4, seed=0) == (0.25, 0.25)
    values = figures(12, 0).tolist()
    narrow, wide = bootstrap(values, seed=0, confidence=0.5), bootstrap(values, seed=0, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap(values, seed=0, confidence=0.5) == narrow != bootstrap(values, seed=1, confidence=0.5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_figures_that_are_missing_are_refused(values: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"expected finite values, got .*; "):
        bootstrap(values, seed=0)


@pytest.mark.parametrize("options", [{"confidence": 0.0}, {"confidence": 95}, {"resamples": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected a confidence in \(0, 1\) and .*; "):
        bootstrap([1.0, 2.0], seed=0, **options)  # type: ignore[arg-type]


def test_draws_stay_within_their_stratum() -> None:
    strata = ["a", "b", "a", "b", "b"]
    rows = resample(strata, seed=0, resamples=300)
    assert rows.shape == (300, 5)
    assert all(sorted(strata[index] for index in row) == sorted(strata) for row in rows)
    assert set(rows.flat) == set(range(5))
    assert (rows != resample(strata, seed=1, resamples=300)).any()


def test_percentiles_of_known_draws() -> None:
    assert percentiles(np.arange(101.0), 0.9) == pytest.approx((5, 95))
