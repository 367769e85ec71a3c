"""A simulation of KVarN: a Hadamard matrix, then scales of tokens and channels, then rounding.

Source: Müller et al., KVarN, arXiv 2606.03458, and the authors' code in vLLM (pull request 46812).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import hadamard

from rotormlx.codec.format import BLOCK, KEY
from rotormlx.measure.baselines import FLOAT16_BITS, Array, as_float16

GROUPS = (64, 128)
ITERATIONS = 16
# Bounds in the published code for a deviation, the logarithm of a scale, and a step.
DEVIATIONS = (1e-3, 1e3)
LOG_SCALES = (-0.3, 10.0)
LEAST_DEVIATION, LEAST_STEP = 1e-8, 1e-10


@dataclass(frozen=True)
class KVarN:
    """KVarN: tokens and channels of a tile scaled to equal deviation, then minimum and step.

    A tile is ``group`` tokens of one head. After the Hadamard matrix, columns and rows are divided
    in turn by their standard deviation, 16 times; the scales of the iteration with the least
    imbalance are used. Rows of keys are channels, rows of values are tokens. Each row is rounded
    between its minimum and maximum. Stored as float16 are the step and the minimum of each row,
    both multiplied by the row's scale, and the scale of each column.

    The authors' default group is 128; 64 is their finer one and equals our block. Where the sources
    differ, the simulation takes what is better for KVarN: 16 iterations (the default of their
    function; their presets in vLLM use 8), and float32 vectors in and out (theirs are float16).
    Their exact sink of 128 tokens is left out, since all schemes share one rule of sink and window.
    The padding of their tiles is not counted in the bits.

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.
        group: Tokens per tile, 64 or 128. With 128, up to 64 more tokens stay unpacked.

    Raises:
        ValueError: If ``group`` has another value. ``decoded`` raises it if head_dim is not a power
            of two.
    """

    key_bits: int
    value_bits: int
    group: int = BLOCK

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f"[scheme] kvarn's group must be one of {', '.join(map(str, GROUPS))} tokens, but "
                f"{self.group} was given; choose one of them."
            )

    @property
    def block(self) -> int:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        return self.group

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        head_dim = x.shape[-1]
        if head_dim & (head_dim - 1):
            raise ValueError(
                f"[scheme] kvarn needs a head_dim that is a power of two, but this model's is "
                f"{head_dim}; leave kvarn out."
            )
        matrix = (hadamard(head_dim) / np.sqrt(head_dim)).astype(np.float32)
        tiles = (x @ matrix).reshape(*x.shape[:2], -1, self.group, head_dim)
        if role == KEY:
            coded = _rounded(tiles.swapaxes(-1, -2), self.key_bits).swapaxes(-1, -2)
        else:
            coded = _rounded(tiles, self.value_bits)
        out: Array = coded.reshape(x.shape) @ matrix
        return out

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        row, column = 2 * FLOAT16_BITS, FLOAT16_BITS
        if role == KEY:
            return self.key_bits + row / self.group + column / head_dim
        return self.value_bits + row / head_dim + column / self.group


def balance(tiles: Array) -> tuple[Array, Array]:
    """Return scales that give the rows and columns of tiles ``[..., R, C]`` equal deviations.

    Returns:
        Scales of the rows ``[..., R, 1]`` and of the columns ``[..., 1, C]``; divide tiles by both.
    """
    log_rows = np.zeros_like(tiles[..., :1])
    log_columns = np.zeros_like(tiles[..., :1, :])
    best_rows, best_columns, least = np.exp(log_rows), np.exp(log_columns), imbalance(tiles)
    scaled: Any = tiles
    for _ in range(ITERATIONS):
        log_columns = _turn(log_columns, scaled, -2)
        scaled = tiles / np.exp(log_columns) / np.exp(log_rows)
        log_rows = _turn(log_rows, scaled, -1)
        scaled = tiles / np.exp(log_columns) / np.exp(log_rows)
        found = imbalance(scaled)
        better = (found <= least)[..., 0, 0]
        least[better] = found[better]
        best_rows[better] = np.exp(log_rows)[better]
        best_columns[better] = np.exp(log_columns)[better]
    return best_rows, best_columns


def imbalance(tiles: Array) -> Array:
    """Return largest over least deviation, of columns plus of rows, ``[..., 1, 1]``; at least 2."""
    total: Array = np.zeros_like(tiles[..., :1, :1])
    for axis in (-2, -1):
        deviation = tiles.std(axis, ddof=1, keepdims=True)
        across = -3 - axis
        least = np.maximum(deviation.min(across, keepdims=True), LEAST_DEVIATION)
        total += deviation.max(across, keepdims=True) / least
    return total


def _turn(log_scale: Array, scaled: Array, axis: int) -> Array:
    deviation = scaled.std(axis, ddof=1, keepdims=True).clip(*DEVIATIONS)
    out: Array = (log_scale + np.log(deviation)).clip(*LOG_SCALES)
    return out


def _rounded(tiles: Array, bits: int) -> Array:
    """Return tiles ``[..., R, C]`` after coding and decoding."""
    rows, columns = balance(tiles)
    scaled = tiles / columns / rows
    low = scaled.min(-1, keepdims=True)
    step = ((scaled.max(-1, keepdims=True) - low) / (2**bits - 1)).clip(LEAST_STEP)
    codes = np.round((scaled - low) / step).clip(0, 2**bits - 1)
    return (codes * as_float16(rows * step) + as_float16(rows * low)) * as_float16(columns)
