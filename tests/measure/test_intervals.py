"""Intervals cover what they should, and know that neighbours are alike."""

from __future__ import annotations

import numpy as np
import pytest

from rotormlx.measure import intervals
from rotormlx.measure.scoring import quantile


def test_interval_of_independent_numbers_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=4096)
    low, high = intervals.mean_interval(values)
    # 256 runs of 16: the deviation of the deviation is 4 %, of 4,000 resamples 2 %.
    assert high - low == pytest.approx(2 * 1.96 * 2 / 64, rel=0.2)
    assert low < values.mean() < high


def test_interval_knows_that_neighbours_are_alike() -> None:
    values = np.random.default_rng(1).normal(size=4096)
    alike = np.repeat(values[:256], 16)
    widths = [np.ptp(intervals.mean_interval(v)) for v in (values, alike)]
    # 16 times fewer independent numbers: 4 times as wide.
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.3)


@pytest.mark.parametrize(("level", "count"), [(0.5, 4096), (0.99, 4096), (0.999, 30_000)])
def test_interval_of_a_quantile_of_independent_numbers(level: float, count: int) -> None:
    """Distribution-free: ranks within 1.96 sqrt(n q (1 - q)) of the quantile's own."""
    values = np.random.default_rng(2).exponential(size=count)
    [(low, high)] = intervals.quantile_intervals(values, [level])
    deviation = 1.96 * np.sqrt(count * level * (1 - level))
    ranks = np.searchsorted(np.sort(values), [low, quantile(values, level), high])
    # The deviation of a bound from 4,000 resamples of clumped draws is well below a quarter.
    assert ranks[1] - ranks[0] == pytest.approx(deviation, rel=0.25)
    assert ranks[2] - ranks[1] == pytest.approx(deviation, rel=0.25)


def test_interval_of_a_quantile_knows_that_neighbours_are_alike() -> None:
    values = np.random.default_rng(3).exponential(size=4096)
    alike = np.repeat(values[:256], 16)
    [own], [wide] = (intervals.quantile_intervals(v, [0.5]) for v in (values, alike))
    # 16 times fewer independent numbers: 4 times as wide, within the luck of 256 numbers.
    assert np.ptp(wide) == pytest.approx(4 * np.ptp(own), rel=0.5)


def test_intervals_of_several_quantiles_are_in_order() -> None:
    values = np.random.default_rng(4).exponential(size=1000)
    found = intervals.quantile_intervals(values, [0.5, 0.99, 0.999])
    for level, (low, high) in zip([0.5, 0.99, 0.999], found, strict=True):
        assert low <= quantile(values, level) <= high
        assert {low, high} <= set(values)
    # One value lies above the 99.9 % of 1,000, so the interval ends at the largest.
    assert found[2][1] == values.max()


@pytest.mark.parametrize(("level", "wanted"), [(0.5, 2), (0.51, 3), (0.75, 3), (0.999, 9)])
def test_quantile_is_one_of_the_values(level: float, wanted: float) -> None:
    assert quantile(np.array([9.0, 1, 2, 3]), level) == wanted


def test_share_of_alike_answers_is_not_certain() -> None:
    # Wilson: n / (n + z²) with z = 1.95996.
    assert intervals.share_interval(np.ones(100, bool)) == pytest.approx((0.9630, 1), abs=1e-4)
    assert intervals.share_interval(np.zeros(100, bool)) == pytest.approx((0, 0.0370), abs=1e-4)
    hits = np.arange(1600) % 4 > 0
    low, high = intervals.share_interval(hits ^ (np.arange(1600) < 100))
    assert 0.5 < low < 0.75 - 50 / 1600 < high < 0.8


def test_interval_of_the_median_of_a_few() -> None:
    # P(at most 3 of 16 below the median) is 0.011, of 4 it would be 0.038: ranks 4 and 13.
    values = [int(v) for v in np.random.default_rng(5).permutation(16)]
    assert intervals.median_interval(values) == (3, 12)
    # All of 5 lie on one side in 1 of 16 cases, of 6 in 1 of 32.
    assert intervals.median_interval(values[:5]) is None
    assert intervals.median_interval([7, 1, 5, 9, 3, 8]) == (1, 9)
    assert intervals.median_interval([]) is None
