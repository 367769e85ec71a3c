"""Bits where they count: what the keys and the values of each layer lose, and the bits they get.

Layers differ by a factor of a hundred in what their errors do to a text. So each is measured with
all others exact, and a cache of a given size then gives every bit to whom it helps most.

Source: docs/RESULTS.md, "Bits by layer", has what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK
from rotormlx.config import BITS, RotorConfig
from rotormlx.measure import quality
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.mlx import hook
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.probe import compress

Floats = NDArray[np.float64]
# 3 bits in the keys, and in the values; the error of 8 bits is 1/800 of theirs.
_ONE_ROLE = (RotorConfig(3, 8, window=0), RotorConfig(8, 3, window=0))
_START = 2 * BLOCK  # the first prediction that reads a packed block behind the sink


def losses(
    model: Any, ids: Sequence[int], layers: Sequence[int], tell: Callable[[int], None]
) -> Floats:
    """What a text loses by 3 bits in the keys or the values of one layer, all else exact.

    Computed in float32: the rounding of 16 bits is larger than what most layers lose.

    Args:
        model: An mlx-lm model.
        ids: The text, more than two blocks behind the sink.
        layers: The layers to measure.
        tell: Told of the tokens that are read, for each of them once more than twice.

    Returns:
        Mean KL divergence of the next token, ``[layers, 2]``, keys and values.

    Raises:
        ValueError: If the model's predictions are not finite.
    """
    exact = RotorConfig(window=len(ids))  # nothing is packed

    def read(coded: int | None, config: RotorConfig = exact) -> quality.Scores:
        def make(layer: int) -> RotorKVCache:
            return RotorKVCache(config if layer == coded else exact, layer)

        return quality.score(model, ids, compress(make_prompt_cache(model), make), progress=tell)

    found = np.zeros((len(layers), len(_ONE_ROLE)))
    with hook.in_place(), numpy_linear(), quality.computing_in(model, "float32"):
        reference = read(None)
        for place, layer in enumerate(layers):
            for role, config in enumerate(_ONE_ROLE):
                scores = read(layer, config)
                kl = quality.differences(reference, scores, start=_START).kl.mean()
                found[place, role] = max(kl, 0.0)  # what is lost is; rounding may say -1e-10
    if not np.isfinite(found).all():
        raise ValueError(
            "[calibration] A model must predict finite numbers for its layers to be measured, but "
            "this one does not; calibrate it without --layers."
        )
    return found


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
    """Of the codebook, on normal numbers of variance 1."""
    grid = (np.arange(200_000) + 0.5) / 25_000  # 0 to 8
    weight = np.exp(-np.square(grid) / 2)
    index = np.searchsorted(codebook.boundaries(bits), grid, side="right")
    levels = codebook.magnitudes(bits).astype(np.float64)
    return float((np.square(grid - levels[index]) * weight).sum() / weight.sum())
