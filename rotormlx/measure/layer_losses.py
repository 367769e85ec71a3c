"""What the keys and the values of each layer lose by few bits, all else exact.

Layers differ by a factor of a hundred in what their errors do to a text;
:mod:`rotormlx.codec.layer_bits` gives the bits to those that need them.

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
                lost[place, role] = max(kl, 0.0)  # what is lost is; rounding may say -1e-10
    if not np.isfinite(lost).all():
        raise ValueError(
            "[calibration] A model must predict finite numbers for its layers to be measured, but "
            "this one does not; calibrate it without --layers."
        )
    return lost
