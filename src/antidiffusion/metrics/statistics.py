"""How far a figure over a few identities can be trusted."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor


def bootstrap(
    values: Sequence[float] | Tensor,
    statistic: Callable[[Tensor], Tensor] = torch.mean,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic.

    Arguments:
        values: One finite figure, or row of figures, for each independent unit, `(N, ...)`. Pictures of one identity
            are not independent: average over them first.
        statistic: Function of resampled values, `(N, ...)` float64, to a scalar.
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
    data = torch.as_tensor(values, dtype=torch.float64).cpu()
    if not data.ndim or not len(data) or not data.isfinite().all():
        raise ValueError(f"expected finite values, got {data.tolist()}; leave out units without a figure and say so")
    if not 0 < confidence < 1 or resamples < 1:
        got = f"{confidence} and {resamples}"
        raise ValueError(f"expected a confidence in (0, 1) and resamples of at least 1, got {got}; try 0.95 and 2000")
    rows = torch.randint(len(data), (resamples, len(data)), generator=Generator().manual_seed(seed))
    drawn = torch.stack([statistic(data[row]) for row in rows])
    low, high = drawn.quantile(torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=drawn.dtype)).tolist()
    return low, high
