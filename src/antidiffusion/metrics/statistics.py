"""How far a figure over a few identities can be trusted."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], float | np.floating] = np.mean,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic.

    Arguments:
        values: One finite figure, or row of figures, for each independent unit, `(N, ...)`. Pictures of one identity
            are not independent: average over them first.
        statistic: Function of resampled values, `(N, ...)` float64, to a number.
        seed: Decides the resamples.
        confidence: Share of the resampled statistics inside the interval, in (0, 1).
        resamples: Number of resamples; the percentile method wants a thousand or more.

    Returns:
        Lower and upper end. Below about ten units the interval is too narrow.

    Raises:
        ValueError: If there are no values, one of them is not finite, or a setting is out of range.

    References:
        Bootstrap Methods: Another Look at the Jackknife, Efron, 1979
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.ndim or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"expected finite values, got {data.tolist()}; leave out units without a figure and say so")
    if not 0 < confidence < 1 or resamples < 1:
        got = f"{confidence} and {resamples}"
        raise ValueError(f"expected a confidence in (0, 1) and resamples of at least 1, got {got}; try 0.95 and 2000")
    drawn = [statistic(data[row]) for row in resample([0] * len(data), seed=seed, resamples=resamples)]
    return percentiles(np.asarray(drawn, dtype=np.float64), confidence)


def resample(strata: Sequence[Hashable], *, seed: int, resamples: int = 2000) -> npt.NDArray[np.intp]:
    """Draw units with replacement, within each stratum as many as it has.

    Arguments:
        strata: Of each unit, for example its data set; one at least.
        seed: Decides the draws.
        resamples: Number of draws.

    Returns:
        Indices of units `(resamples, N)`, a stratum's beside each other.
    """
    generator = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    drawn = [np.asarray(own)[generator.integers(len(own), size=(resamples, len(own)))] for own in members.values()]
    return np.concatenate(drawn, axis=1)


def percentiles(drawn: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Return the ends between which the middle share `confidence` of resampled statistics `(resamples,)` lies."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
