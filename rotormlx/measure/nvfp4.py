"""A simulation of NVFP4: 4-bit floats, with an 8-bit scale per 16 and one float32 scale for all.

Source: NVIDIA's NVFP4 format, as vLLM and TensorRT-LLM keep a cache in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rotormlx.codec.format import BLOCK
from rotormlx.measure.baselines import Array, require_multiple

GROUP = 16
BITS, SCALE_BITS = 4, 8


@dataclass(frozen=True)
class FloatFormat:
    """A small float: sign, exponent, mantissa; no infinity.

    Args:
        mantissa_bits: Bits after the point.
        least_exponent: Smallest exponent of a normal number; smaller numbers have equal steps.
        largest: Largest number; larger ones are clipped to it.
    """

    mantissa_bits: int
    least_exponent: int
    largest: float

    def nearest(self, x: Array) -> Array:
        """Return the nearest numbers of the format; ties go to the even mantissa."""
        exponent = np.maximum(np.frexp(x)[1] - 1, self.least_exponent)
        step = np.ldexp(np.float32(1), exponent - self.mantissa_bits)
        out: Array = (np.rint(x / step) * step).clip(-self.largest, self.largest)
        return out


E2M1 = FloatFormat(1, 0, 6.0)
E4M3 = FloatFormat(3, -6, 448.0)


@dataclass(frozen=True)
class Nvfp4:
    """NVFP4: 16 channels of a token share a scale that maps the largest of them to 6.

    Codes are e2m1, the scales of 16 are e4m3, and a float32 scale of the whole tensor maps the
    largest scale to 448. In practice the float32 scale is calibrated or loaded. Here every call has
    its own, which is the best case for NVFP4, and its 32 bits are not counted.
    """

    block = BLOCK

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        require_multiple("nvfp4", x.shape[-1], GROUP)
        groups = x.reshape(*x.shape[:-1], -1, GROUP)
        largest = np.abs(groups).max(-1, keepdims=True)
        tensor_scale = np.float32(largest.max() / (E2M1.largest * E4M3.largest)) or np.float32(1)
        scale = E4M3.nearest(largest / E2M1.largest / tensor_scale) * tensor_scale
        divisor: Any = np.where(scale == 0, np.float32(1), scale)
        out: Array = (E2M1.nearest(groups / divisor) * scale).reshape(x.shape)
        return out

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`rotormlx.measure.baselines.Simulation`."""
        return BITS + SCALE_BITS / GROUP
