"""An attention call over random codes, for timing."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.cache.view import KVView


class Size(NamedTuple):
    """The size of a call.

    heads: H.
    kv_heads: K.
    head_dim: D, of keys and of values.
    length: L, the number of queries and of exact tokens after the packed ones.
    packed_tokens: A multiple of 64.
    """

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    packed_tokens: int


def call(config: RotorConfig, size: Size, dtype: mx.Dtype) -> AttendCall:
    """Make a causal step of one sequence: packed tokens, then the tokens of the step.

    Args:
        config: The configuration, which fixes bits, rotation and sink.
        size: The size of the call.
        dtype: The dtype of queries and exact tokens.
    """
    keys, values = (_view(config, role, size, dtype) for role in ROLES)
    shape = (1, size.heads, size.length, size.head_dim)
    queries = mx.random.normal(shape).astype(dtype)
    return AttendCall(queries, keys, values, size.head_dim**-0.5, "causal")


def _view(config: RotorConfig, role: str, size: Size, dtype: mx.Dtype) -> KVView:
    coding = codec(config, size.head_dim, layer=0, role=role)
    front = (1, size.kv_heads, size.packed_tokens // BLOCK)
    random = np.random.default_rng(0)
    words = mx.array(random.integers(0, 2**32, (*front, *coding.words_shape), np.uint32))
    scales = mx.full((*front, BLOCK), 0.1, mx.float16)
    centres = mx.zeros((*front, size.head_dim), mx.float16) if role == KEY else None
    exact = mx.zeros((1, size.kv_heads, config.sink + size.length, size.head_dim), dtype)
    packed, tokens = size.packed_tokens, config.sink + size.packed_tokens + size.length
    return KVView(coding, exact, Packed(words, scales, centres), None, config.sink, packed, tokens)
