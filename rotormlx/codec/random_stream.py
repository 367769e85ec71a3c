"""The random numbers of the rotations, reproducible on every machine.

All numbers are computed with 64-bit integer arithmetic and then float64 ``+ - * / sqrt`` in a fixed
order. So every backend, language and version computes the same rotation, and no rotation has to be
stored (docs/FORMAT.md, section 4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Stream:
    """An endless sequence of 64-bit integers, named by a tuple of integers (SplitMix64).

    Args:
        name: Non-negative integers below 2**64; they are mixed into the seed in this order.
    """

    def __init__(self, *name: int) -> None:
        key = 0
        for word in name:
            key = _mix(((key + _GAMMA) & _MASK) ^ word)
        self._key = key

    def integers(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the first ``count`` integers, uint64 ``[count]``."""
        z = np.uint64(self._key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def signs(self, count: int) -> Floats:
        """Return the first ``count`` signs, float64 ``[count]``: -1 if bit 63 is set, else +1."""
        return 1.0 - 2.0 * (self.integers(count) >> np.uint64(63)).astype(np.float64)

    def uniforms(self, count: int) -> Floats:
        """Return the first ``count`` uniform numbers in [0, 1), float64 ``[count]``.

        A number is made of the upper 53 bits of an integer.
        """
        return (self.integers(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def disc(self, count: int) -> Floats:
        """Return the first ``count`` points inside the unit disc, float64 ``[count, 2]``.

        Candidates are pairs of uniform numbers scaled to [-1, 1). Those with
        ``0 < x*x + y*y < 1`` are kept, in order.
        """
        candidates = count
        while True:
            candidates = candidates * 3 // 2 + 16
            xy = 2.0 * self.uniforms(2 * candidates).reshape(-1, 2) - 1.0
            square = xy[:, 0] * xy[:, 0] + xy[:, 1] * xy[:, 1]
            inside = xy[(square > 0) & (square < 1)]
            if len(inside) >= count:
                return inside[:count]


class Sphere:
    """Points drawn one after the other, uniformly from unit spheres.

    A point of even dimension 2m consists of m directions in the plane, taken from the disc. Their
    squared lengths are the gaps between m - 1 sorted uniform numbers of [0, 1]. This gives exactly
    the uniform distribution. A point of odd dimension is a point of the next higher dimension
    without its last coordinate, normalized.

    Args:
        name: Name of the streams; 0 is appended for the discs, 1 for the gaps.
        pairs: Number of planar directions that all points together need.
    """

    def __init__(self, *name: int, pairs: int) -> None:
        self._discs = Stream(*name, 0).disc(pairs)
        self._uniforms = Stream(*name, 1).uniforms(pairs)
        self._pairs_used = 0
        self._uniforms_used = 0

    def point(self, dimension: int) -> Floats:
        """Return the next point, float64 ``[dimension]``, of norm 1 up to rounding."""
        m = (dimension + 1) // 2
        xy = self._discs[self._pairs_used : self._pairs_used + m]
        cuts = np.sort(self._uniforms[self._uniforms_used : self._uniforms_used + m - 1])
        self._pairs_used += m
        self._uniforms_used += m - 1

        gaps = np.diff(np.concatenate([[0.0], cuts, [1.0]]))
        square = xy[:, 0] * xy[:, 0] + xy[:, 1] * xy[:, 1]
        point = (np.sqrt(gaps / square)[:, None] * xy).reshape(-1)
        if dimension % 2:
            point = point[:dimension]
            point = point / np.sqrt(sequential_sum(point * point))
        return point


def sequential_sum(terms: Floats) -> Floats:
    """Return the sum over the first axis, added in order."""
    return np.asarray(np.add.accumulate(terms, axis=0)[-1])
