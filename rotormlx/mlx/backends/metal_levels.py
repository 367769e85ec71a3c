"""The ways in which the Metal kernel of few query rows finds the level of a code.

All have equal results. Their speed depends on the GPU, so they are timed at first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx

from rotormlx.config import RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import choices, example
from rotormlx.mlx.backends.example import Size
from rotormlx.mlx.backends.kept import findings

# All ways, in the order of metal_kernels/lookup.h; then the ways of each width, the best by
# estimate first (docs/KERNELS.md). Only the table holds 256 levels.
WAYS = ("table", "arithmetic", "quad", "pairs")
OF_BITS = {
    2: ("quad", "pairs", "arithmetic", "table"),
    3: ("pairs", "quad", "arithmetic", "table"),
    4: ("pairs", "quad", "arithmetic", "table"),
    8: ("table",),
}
VARIABLE = "ROTORMLX_METAL_LEVELS"
# The size of the call that is timed: one layer in a decode step of one user.
SIZE = Size(heads=32, kv_heads=8, head_dim=128, length=1, packed_tokens=8192)

# Runs a call in the way of this name.
Run = Callable[[AttendCall, str], mx.array]


def ways(key_bits: int, value_bits: int) -> tuple[str, ...]:
    """Return the ways for keys and values of these widths, the best by estimate first.

    A width that does not have a way takes the table instead.
    """
    return max(OF_BITS[key_bits], OF_BITS[value_bits], key=len)


def chosen(key_bits: int, value_bits: int, run: Run) -> str:
    """Return the way that ``ROTORMLX_METAL_LEVELS`` names, else the fastest on this GPU.

    Raises:
        RuntimeError: If the variable names none of :func:`ways`.
    """
    name = os.environ.get(VARIABLE)
    if name is None:
        return _fastest(key_bits, value_bits, run)
    possible = ways(key_bits, value_bits)
    if name not in possible:
        raise RuntimeError(
            f"[attend] {VARIABLE} must be one of {', '.join(possible)} for keys of {key_bits} bits "
            f"and values of {value_bits}, but it is {name!r}; unset it."
        )
    return name


@cache
def _fastest(key_bits: int, value_bits: int, run: Run) -> str:
    possible = ways(key_bits, value_bits)
    if len(possible) == 1 or not mx.metal.is_available():
        return possible[0]
    call = example.call(RotorConfig(key_bits, value_bits), SIZE, mx.float16)
    name = f"levels of keys of {key_bits} and values of {value_bits} bits"
    return choices.fastest(
        findings("metal"), name, {way: partial(run, call, way) for way in possible}
    )


def template(key_bits: int, value_bits: int, way: str) -> list[tuple[str, object]]:
    """Return the kernel's template arguments for a way."""
    taken = (way if way in OF_BITS[bits] else "table" for bits in (key_bits, value_bits))
    return [
        (name, WAYS.index(way)) for name, way in zip(("KEY_WAY", "VALUE_WAY"), taken, strict=True)
    ]
