"""Faster attention over exact keys for measurements on a CPU.

For a long text, MLX's CPU build spends nearly all its time in attention. So while a model is
measured on a CPU, attention of chunks is computed with numpy's BLAS, in float32 for every dtype, as
MLX does on a GPU. The result has the dtype that MLX would have given. Calls with few queries, such
as decode steps, stay with MLX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from numpy.typing import NDArray

Array = NDArray[np.float32]
Codes = tuple[mx.array, mx.array, mx.array]

# The smallest number of queries with which numpy is faster than MLX.
FEWEST = 8


@contextmanager
def numpy_attention() -> Iterator[None]:
    """Let ``mx.fast.scaled_dot_product_attention`` compute with numpy, if MLX runs on a CPU.

    The attention of mlx-lm's quantized cache does too, over dequantized keys and values.
    """
    fast, over_codes = (
        mx.fast.scaled_dot_product_attention,
        base.quantized_scaled_dot_product_attention,
    )

    def attend(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        **rest: Any,
    ) -> mx.array:
        if q.shape[2] < FEWEST or not (isinstance(mask, mx.array) or mask in (None, "causal")):
            return fast(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)
        wide: NDArray[Any] | str | None = None if isinstance(mask, mx.array) else mask
        if isinstance(mask, mx.array):
            wide = np.array(mask) if mask.dtype == mx.bool_ else _float32(mask)
        out = attended(
            _float32(q),
            _float32(k),
            _float32(v),
            scale,
            mask=wide,
            sinks=None if sinks is None else _float32(sinks),
        )
        return mx.array(out).astype(mx.result_type(q, k, v))

    def attend_codes(
        queries: mx.array,
        q_keys: Codes,
        q_values: Codes,
        scale: float,
        mask: Any,
        group_size: int = 64,
        bits: int = 8,
    ) -> mx.array:
        if queries.shape[2] < FEWEST:
            return over_codes(queries, q_keys, q_values, scale, mask, group_size, bits)

        def vectors(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)

        return attend(queries, vectors(*q_keys), vectors(*q_values), scale=scale, mask=mask)

    with ExitStack() as stack:
        if mx.default_device() == mx.Device(mx.cpu):
            stack.enter_context(patch.object(mx.fast, "scaled_dot_product_attention", attend))
            stack.enter_context(
                patch.object(base, "quantized_scaled_dot_product_attention", attend_codes)
            )
        yield


def attended(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    mask: NDArray[Any] | str | None = None,
    sinks: Array | None = None,
) -> Array:
    """Return attention of grouped queries in float32.

    Args:
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, K, S, D]``.
        v: Values ``[B, K, S, Dv]``.
        scale: Factor of the scores.
        mask: ``"causal"``, booleans that are true for visible keys, or numbers to add to scores;
            None if all keys are visible.
        sinks: A score per query head, ``[H]``, that takes part in the softmax but has no value.

    Returns:
        The output ``[B, H, L, Dv]``.
    """
    batch, heads, length, _ = q.shape
    groups, tokens = k.shape[1:3]
    rows: Array = (np.float32(scale) * q).reshape(batch, groups, -1, q.shape[-1])
    scores: Array = (rows @ k.swapaxes(-1, -2)).reshape(batch, heads, length, tokens)
    if mask is not None:
        scores += _added(mask, length, tokens)
    highest = scores.max(-1, keepdims=True)
    if sinks is not None:
        np.maximum(highest, sinks[:, None, None], out=highest)
    scores -= highest
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - highest)
    out: Array = (scores.reshape(batch, groups, -1, tokens) @ v).reshape(*q.shape[:3], -1)
    return out / total


def _added(mask: NDArray[Any] | str, length: int, tokens: int) -> NDArray[Any]:
    """Return the numbers that a mask adds to scores ``[..., L, S]``."""
    if isinstance(mask, str):
        mask = np.arange(tokens) <= np.arange(length)[:, None] + tokens - length
    if mask.dtype != np.bool_:
        return mask
    return np.where(mask, np.float32(0), np.float32(-np.inf))


def _float32(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), copy=None)
