"""Chooses the bits of keys and values for each layer.

Layers differ by a factor of a hundred in what their errors do to a text. Once each is measured
(:mod:`rotormlx.measure.layer_losses`), a cache of a given size spends every bit where it helps
most.

Source: docs/results/bits.md, "Bits by layer", has measurements.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from rotormlx.codec import codebook
from rotormlx.config import BITS

Floats = NDArray[np.float64]


def allotted(loss: Floats, sizes: Floats, mean: float) -> NDArray[np.int64]:
    """Bits for each part of a cache, greedily: a step goes where it saves most for its bits.

    Args:
        loss: What each part loses at 3 bits, any shape. With other bits it is taken to be
            proportional to the squared error of a code.
        sizes: Values that a token adds to each part, the same shape.
        mean: Bits of a code that all parts together may have.

    Returns:
        Bits, the same shape. Their mean over all values is at most ``mean``, and as near to it as
        a step allows.
    """
    widths = np.array(BITS)
    error = np.array([squared_error(bits) for bits in BITS])
    index = np.zeros(loss.shape, np.int64)
    budget = mean * sizes.sum() * (1 + 1e-9)
    while True:
        wider = np.minimum(index + 1, len(BITS) - 1)
        cost = sizes * (widths[wider] - widths[index])
        fits = (cost > 0) & ((sizes * widths[index]).sum() + cost <= budget)
        if not fits.any():
            return widths[index]
        saved = loss * (error[index] - error[wider])
        rate = np.where(fits, saved / np.where(fits, cost, 1), -1)
        index[np.unravel_index(rate.argmax(), rate.shape)] += 1


@cache
def squared_error(bits: int) -> float:
    """Mean squared error of a code, on normal numbers of variance 1."""
    if bits in codebook.TRELLIS_ERRORS:
        return codebook.TRELLIS_ERRORS[bits]
    grid = (np.arange(200_000) + 0.5) / 25_000  # 0 to 8
    weight = np.exp(-np.square(grid) / 2)
    index = np.searchsorted(codebook.boundaries(bits), grid, side="right")
    levels = codebook.magnitudes(bits).astype(np.float64)
    return float((np.square(grid - levels[index]) * weight).sum() / weight.sum())
