"""Faster attention over exact keys for measurements on a CPU.

MLX's CPU build reads 4,096 tokens of SmolLM2 in chunks of 64 at a few tokens a second, nearly all of
it in attention. So while a model is measured on a CPU, chunks attend with numpy's BLAS, in float32
whatever the dtype, as MLX does on a GPU; the result goes back in the dtype it would have had. Calls
of few queries, such as decoding, stay with MLX.
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

# Queries from which numpy is faster than MLX.
FEWEST = 8


@contextmanager
def numpy_attention() -> Iterator[None]:
    """Let ``mx.fast.scaled_dot_product_attention`` compute with numpy, if MLX runs on a CPU.

    The attention of mlx-lm's quantized cache goes the same way, over dequantized keys and values.
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
        shown = np.array(mask) if isinstance(mask, mx.array) and mask.dtype == mx.bool_ else mask
        if isinstance(shown, mx.array):
            shown = _float32(shown)
        vectors = (_float32(x) for x in (q, k, v))
        out = attended(*vectors, scale, shown, None if sinks is None else _float32(sinks))
        return mx.array(out).astype(mx.result_type(q, k, v))

    def attend_codes(
        queries: mx.array,
        q_keys: tuple[mx.array, ...],
        q_values: tuple[mx.array, ...],
        scale: float,
        mask: mx.array | str | None,
        group_size: int = 64,
        bits: int = 8,
    ) -> mx.array:
        if queries.shape[2] < FEWEST:
            return over_codes(queries, q_keys, q_values, scale, mask, group_size, bits)
        keys, values = (
            mx.dequantize(*codes, group_size=group_size, bits=bits) for codes in (q_keys, q_values)
        )
        return attend(queries, keys, values, scale=scale, mask=mask)

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
    """Attention of grouped queries in float32.

    Args:
        q: Queries ``[B, H, L, D]``.
        k: Keys ``[B, K, S, D]``.
        v: Values ``[B, K, S, Dv]``.
        scale: Factor of the scores.
        mask: ``"causal"``, booleans of what is visible, or numbers to add; None if all is visible.
        sinks: A score of each query head that takes its share and gives nothing, ``[H]``.

    Returns:
        ``[B, H, L, Dv]``.
    """
    batch, heads, length, _ = q.shape
    groups, tokens = k.shape[1:3]
    rows = (np.float32(scale) * q).reshape(batch, groups, -1, q.shape[-1])
    scores: Array = (rows @ k.swapaxes(-1, -2)).reshape(batch, heads, length, tokens)
    if isinstance(mask, str):
        mask = np.arange(tokens) <= np.arange(length)[:, None] + tokens - length
    if mask is not None and mask.dtype == np.bool_:
        scores = np.where(mask, scores, np.float32(-np.inf))
    elif mask is not None:
        scores += mask
    highest = scores.max(-1, keepdims=True)
    if sinks is not None:
        highest = np.maximum(highest, sinks[:, None, None])
    scores -= highest
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - highest)
    out: Array = (scores.reshape(batch, groups, -1, tokens) @ v).reshape(*q.shape[:3], -1)
    return out / total


def _float32(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), copy=None)
