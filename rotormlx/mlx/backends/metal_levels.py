"""How the Metal kernel of few query rows finds the level of a code: several ways, one result.

Which is the fastest depends on the GPU, so they are timed at first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import choices
from rotormlx.mlx.backends.kept import findings
from rotormlx.mlx.cache.view import KVView

# In the order of metal_kernels/lookup.h; and those of each width, the best by estimate first
# (docs/KERNELS.md). 256 levels are too many for any but the table.
WAYS = ("table", "arithmetic", "quad", "pairs")
OF_BITS = {
    2: ("quad", "pairs", "arithmetic", "table"),
    3: ("pairs", "quad", "arithmetic", "table"),
    4: ("pairs", "quad", "arithmetic", "table"),
    8: ("table",),
}
VARIABLE = "ROTORMLX_METAL_LEVELS"
# The call that is timed: what one user's step reads of a layer.
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 8192, 32, 8, 128

# Runs a call in a way.
Run = Callable[[AttendCall, str], mx.array]


def ways(key_bits: int, value_bits: int) -> tuple[str, ...]:
    """Ways for keys and values of these widths, the best by estimate first.

    Where only one of the two widths has a way, the other takes the table.
    """
    return max(OF_BITS[key_bits], OF_BITS[value_bits], key=len)


def chosen(key_bits: int, value_bits: int, run: Run) -> str:
    """The one of :func:`ways` that is used.

    That is what ``ROTORMLX_METAL_LEVELS`` names, else the fastest on this GPU.

    Raises:
        RuntimeError: If the variable names none of them.
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
    call = _example(key_bits, value_bits)
    name = f"levels of keys of {key_bits} and values of {value_bits} bits"
    return choices.fastest(
        findings("metal"), name, {way: partial(run, call, way) for way in possible}
    )


def _example(key_bits: int, value_bits: int) -> AttendCall:
    """A step over codes drawn at random."""
    keys, values = (_example_view(RotorConfig(key_bits, value_bits), role) for role in ROLES)
    queries = mx.random.normal((1, HEADS, 1, HEAD_DIM)).astype(mx.float16)
    return AttendCall(queries, keys, values, HEAD_DIM**-0.5)


def _example_view(config: RotorConfig, role: str) -> KVView:
    coding = codec(config, HEAD_DIM, layer=0, role=role)
    front = (1, KV_HEADS, TOKENS // BLOCK)
    random = np.random.default_rng(0)
    words = mx.array(random.integers(0, 2**32, (*front, *coding.words_shape), np.uint32))
    scales = mx.full((*front, BLOCK), 0.1, mx.float16)
    centres = mx.zeros((*front, HEAD_DIM), mx.float16) if role == KEY else None
    exact = mx.zeros((1, KV_HEADS, BLOCK, HEAD_DIM), mx.float16)
    counts = (config.sink, TOKENS, TOKENS + BLOCK)
    return KVView(coding, exact, Packed(words, scales, centres), None, *counts)


def template(key_bits: int, value_bits: int, way: str) -> list[tuple[str, object]]:
    """The kernel's template arguments."""
    taken = (way if way in OF_BITS[bits] else "table" for bits in (key_bits, value_bits))
    return [
        (name, WAYS.index(way)) for name, way in zip(("KEY_WAY", "VALUE_WAY"), taken, strict=True)
    ]
