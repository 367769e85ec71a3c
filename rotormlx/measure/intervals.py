"""Intervals at 95 % of what neighbouring predictions give: means, quantiles and shares.

Neighbouring predictions are alike, so the bootstrap draws runs of 16 of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RUN = 16
RESAMPLES = 4000
LEVEL = 0.95
_TAIL = (1 - LEVEL) / 2
_AT_ONCE = 2**22  # numbers of one step: 32 MB

Interval = tuple[float, float]


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Bootstrap interval of a mean.

    Args:
        values: Numbers ``[n]``, neighbours side by side.
        seed: Selects what is drawn.
    """
    runs = np.array([part.mean() for part in np.array_split(values, _runs(len(values)))])
    if np.ptp(runs) == 0:
        return float(runs[0]), float(runs[0])
    drawn = np.random.default_rng(seed).integers(len(runs), size=(RESAMPLES, len(runs)))
    low, high = np.quantile(runs[drawn].mean(axis=1), [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def share_interval(hits: NDArray[np.bool_]) -> Interval:
    """Bootstrap interval of a share; Wilson's where all are alike and nothing can be drawn."""
    if hits.all() or not hits.any():
        return wilson(int(hits.sum()), len(hits))
    return mean_interval(hits.astype(np.float64))


def wilson(hits: int, trials: int) -> Interval:
    """Wilson's interval of a share of independent trials."""
    share, z = hits / trials, NormalDist().inv_cdf(1 - _TAIL)
    middle = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    low, high = ((middle + side) / (1 + z**2 / trials) for side in (-half, half))
    return (low if hits else 0.0), (high if hits < trials else 1.0)


def sign_test(fewer: int, trials: int) -> float:
    """Two-sided p of at most ``fewer`` heads, or as few tails, in fair throws; 1 for no throw."""
    return min(1.0, 2 * _at_most(fewer, trials))


def median_interval(values: Sequence[int]) -> Interval | None:
    """Interval of the median of a few independent numbers, from ranks; None for fewer than 6."""
    rank = next(k for k in range(len(values) + 1) if _at_most(k, len(values)) >= _TAIL)
    if rank == 0:
        return None
    ordered = sorted(values)
    return float(ordered[rank - 1]), float(ordered[-rank])


def quantile_intervals(
    values: NDArray[np.float64], levels: Sequence[float], seed: int = 0
) -> list[Interval]:
    """Bootstrap intervals of quantiles.

    No interval reaches beyond the largest value. One that ends there says only "at least": too few
    predictions lie above the quantile.

    Args:
        values: Numbers ``[n]``, neighbours side by side.
        levels: Which quantiles, from 0 to 1.
        seed: Selects what is drawn.
    """
    rng = np.random.default_rng(seed)
    runs = _runs(len(values))
    run_of = np.repeat(np.arange(runs), [len(p) for p in np.array_split(values, runs)])
    order = np.argsort(values)
    drawn = np.empty((RESAMPLES, len(levels)))
    step = max(1, _AT_ONCE // len(values))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        # How often each run is drawn, and so how many numbers lie up to each value.
        times = rng.multinomial(runs, np.full(runs, 1 / runs), size=size)
        up_to = np.cumsum(times[:, run_of[order]], axis=1)
        for column, level in enumerate(levels):
            places = (up_to >= level * up_to[:, -1:]).argmax(axis=1)
            drawn[start : start + size, column] = values[order[places]]
    bounds = np.quantile(drawn, [_TAIL, 1 - _TAIL], axis=0, method="inverted_cdf")
    return [(float(low), float(high)) for low, high in bounds.T]


def _at_most(heads: int, throws: int) -> float:
    """How likely at most ``heads`` heads are in fair throws."""
    return sum(math.comb(throws, k) for k in range(heads + 1)) / 2**throws


def _runs(count: int) -> int:
    return max(2, count // RUN)
