"""The loss from few bits in the keys or the values of a single layer, with everything else exact.

The effect of a layer's errors differs between layers by a factor of a hundred;
:mod:`rotormlx.codec.layer_bits` distributes the bits accordingly.

Source: docs/results/bits.md, "Bits by layer".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.measure import scoring
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.probe import compress

Floats = NDArray[np.float64]
# 3 bits in the keys or in the values, and 8 bits in the other, whose error is 1/800 as large.
_ONE_ROLE = (RotorConfig(3, 8, window=0), RotorConfig(8, 3, window=0))
_START = 2 * BLOCK  # the first prediction that reads a packed block after the sink


def losses(
    model: Any, ids: Sequence[int], layers: Sequence[int], tell: Callable[[int], None]
) -> Floats:
    """Measure the loss from 3 bits in the keys or the values of one layer, all else exact.

    Computation is in float32, because the rounding of 16 bits is larger than most layers' loss.

    Args:
        model: An mlx-lm model.
        ids: The tokens of the text, more than two blocks after the sink.
        layers: Indices of the layers to measure.
        tell: Called with the number of tokens read. The text is read once, and then twice per
            layer.

    Returns:
        Mean KL divergence of the next token, ``[layers, 2]``: for keys and for values.

    Raises:
        ValueError: If the model's predictions are not finite.
    """
    exact = RotorConfig(window=len(ids))  # nothing is packed

    def read(coded: int | None, config: RotorConfig = exact) -> scoring.Scores:
        def make(layer: int) -> RotorKVCache:
            return RotorKVCache(config if layer == coded else exact, layer)

        return scoring.score(model, ids, compress(make_prompt_cache(model), make), progress=tell)

    lost = np.zeros((len(layers), len(_ONE_ROLE)))
    with hosts.MLX_LM.in_place(), numpy_linear(), scoring.computing_in(model, "float32"):
        reference = read(None)
        for place, layer in enumerate(layers):
            for role, config in enumerate(_ONE_ROLE):
                coded = read(layer, config)
                kl = scoring.differences(reference, coded, start=_START).kl.mean()
                lost[place, role] = max(kl, 0.0)  # rounding can give -1e-10
    if not np.isfinite(lost).all():
        raise ValueError(
            "[calibration] A model must predict finite numbers to measure its layers, but this one "
            "does not; calibrate it without --layers."
        )
    return lost
