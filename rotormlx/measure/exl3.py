"""A simulation of exllamav3's quantized cache: 32 values share a Hadamard matrix and a scale.

Source: turboderp-org/exllamav3, ``exllamav3_ext/cache/q_cache_kernels.cuh`` and ``lmq.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import hadamard

from rotormlx.codec.format import BLOCK, KEY
from rotormlx.measure.baselines import FLOAT16_BITS, Array, as_float16, require_multiple

GROUP = 32
# The parameter a of its compander, which maps t in [-1, 1] to a * t + (1 - a) * t^3.
COMPANDER = 0.65
LEAST_SCALE = 1e-10


@dataclass(frozen=True)
class Exl3:
    """exllamav3: 32 channels of a token, Hadamard, largest magnitude as float16 scale, 2^b levels.

    The levels are the centres of 2^b equal parts of [-1, 1]. The compander, a cubic, moves them
    towards zero, near Lloyd-Max levels. Codes are chosen with the unrounded scale; the stored scale
    is rounded. Vectors are float32 here and float16 in exllamav3, which favours exllamav3.

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.
        compander: Whether the cubic moves the levels; off by default, as in exllamav3. For normal
            numbers it reduces the error at 2 and 3 bits, and increases it a little at more bits.
    """

    key_bits: int
    value_bits: int
    compander: bool = False

    block = BLOCK

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        require_multiple("exl3", x.shape[-1], GROUP)
        matrix = (hadamard(GROUP) / np.sqrt(GROUP)).astype(np.float32)
        rotated = x.reshape(*x.shape[:-1], -1, GROUP) @ matrix
        scale = np.abs(rotated).max(-1, keepdims=True) + np.float32(LEAST_SCALE)
        levels = self._levels(rotated / scale, self._bits(role))
        out: Array = (levels * as_float16(scale) @ matrix).reshape(x.shape)
        return out

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        return self._bits(role) + FLOAT16_BITS / GROUP

    def _levels(self, x: Array, bits: int) -> Array:
        """Return the level of each number in [-1, 1]."""
        half = 2 ** (bits - 1)
        position = _expanded(x) if self.compander else x
        codes = np.floor(position * half + half).clip(0, 2 * half - 1)
        t = ((2 * codes + 1) / (2 * half) - 1).astype(np.float32)
        return _compressed(t) if self.compander else t

    def _bits(self, role: str) -> int:
        return self.key_bits if role == KEY else self.value_bits


def _compressed(t: Array) -> Array:
    out: Array = t * np.float32(COMPANDER) + t**3 * np.float32(1 - COMPANDER)
    return out


def _expanded(x: Array) -> Array:
    """Return the t with ``_compressed(t) == x``, by Cardano's formula."""
    b = 1 - COMPANDER
    half = x / (2 * b)
    root = np.sqrt(half * half + (COMPANDER / b / 3) ** 3)
    out: Array = np.cbrt(half + root) + np.cbrt(half - root)
    return out
