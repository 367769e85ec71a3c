"""Chooses the bits of keys and values for each layer.

The effect of coding errors on the output differs between layers by a factor of a hundred. Once the
layers are measured (:mod:`rotormlx.measure.layer_losses`), a cache of a given size spends its bits
where they help most.

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
    """Return the bits of each part of a cache, chosen greedily.

    Every step widens the codes of the part that saves most loss per bit added.

    Args:
        loss: Loss of each part at 3 bits, any shape. At other bits it is assumed to be proportional
            to the squared error of a code.
        sizes: Number of values that a token adds to each part, the same shape.
        mean: Largest mean of the bits per code over all values.

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
    """Return the mean squared error of a code, on normal numbers of variance 1."""
    if bits in codebook.TRELLIS_ERRORS:
        return codebook.TRELLIS_ERRORS[bits]
    grid = (np.arange(200_000) + 0.5) / 25_000  # 0 to 8
    weight = np.exp(-np.square(grid) / 2)
    index = np.searchsorted(codebook.boundaries(bits), grid, side="right")
    levels = codebook.magnitudes(bits).astype(np.float64)
    return float((np.square(grid - levels[index]) * weight).sum() / weight.sum())
