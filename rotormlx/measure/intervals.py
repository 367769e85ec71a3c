"""Intervals at 95 % for means, quantiles and shares over the predictions of a text.

Neighbouring predictions are correlated, so the bootstrap draws runs of 16 of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, bootstrap

RUN = 16
RESAMPLES = 4000
LEVEL = 0.95
_AT_ONCE = 2**22  # numbers per step: 32 MB

Interval = tuple[float, float]


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the bootstrap interval of a mean.

    Args:
        values: Numbers ``[n]``, in the order of the predictions.
        seed: Seed of the resampling.
    """
    runs = [part.mean() for part in np.array_split(values, _runs(len(values)))]
    if np.ptp(runs) == 0:
        return float(runs[0]), float(runs[0])
    result = bootstrap(
        (np.array(runs),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def share_interval(hits: NDArray[np.bool_]) -> Interval:
    """Return the bootstrap interval of a share; Wilson's interval if all values are equal."""
    if hits.all() or not hits.any():
        return wilson(int(hits.sum()), len(hits))
    return mean_interval(hits.astype(np.float64))


def wilson(hits: int, trials: int) -> Interval:
    """Return Wilson's interval of a share of independent trials."""
    bounds = binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return float(bounds.low), float(bounds.high)


def median_interval(values: Sequence[int]) -> Interval | None:
    """Return the interval of a median of independent numbers, from ranks; None for fewer than 6."""
    rank = int(binom.ppf((1 - LEVEL) / 2, len(values), 0.5))
    if rank == 0:
        return None
    ordered = sorted(values)
    return float(ordered[rank - 1]), float(ordered[-rank])


def quantile_intervals(
    values: NDArray[np.float64], levels: Sequence[float], seed: int = 0
) -> list[Interval]:
    """Return the bootstrap intervals of quantiles.

    No interval extends beyond the largest value. One that ends there has only a lower bound: too
    few predictions are above the quantile.

    Args:
        values: Numbers ``[n]``, in the order of the predictions.
        levels: The quantiles, from 0 to 1.
        seed: Seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    runs = _runs(len(values))
    run_of = np.repeat(np.arange(runs), [len(p) for p in np.array_split(values, runs)])
    order = np.argsort(values)
    drawn = np.empty((RESAMPLES, len(levels)))
    step = max(1, _AT_ONCE // len(values))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        # How often each run is drawn, and from that how many numbers are at most each value.
        times = rng.multinomial(runs, np.full(runs, 1 / runs), size=size)
        up_to = np.cumsum(times[:, run_of[order]], axis=1)
        for column, level in enumerate(levels):
            places = (up_to >= level * up_to[:, -1:]).argmax(axis=1)
            drawn[start : start + size, column] = values[order[places]]
    tail = (1 - LEVEL) / 2
    bounds = np.quantile(drawn, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return [(float(low), float(high)) for low, high in bounds.T]


def _runs(count: int) -> int:
    return max(2, count // RUN)
