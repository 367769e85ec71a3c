"""Attention over a compressed cache: checks, then MLX's own attention or the backend."""

from __future__ import annotations

import mlx.core as mx

from rotormlx.mlx import latent_attention, prefill
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.dtypes import FLOATS


def attend_view(
    queries: mx.array,
    keys: KVView,
    values: KVView,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sink_logits: mx.array | None = None,
) -> mx.array:
    """Compute scaled dot-product attention of queries over a compressed cache.

    Args:
        queries: ``[B, H, L, D]``, float16, bfloat16 or float32.
        keys: View of the keys, ``[B, K, S, D]``; H must be a multiple of K.
        values: View of the values, ``[B, K, S, Dv]``; for latents, which are both keys and values,
            the same object as ``keys``.
        scale: Factor of the scores.
        mask: None, ``"causal"``, or an array, boolean (True: visible) or additive, broadcastable
            to ``[B, H, L, S]``. If batch rows differ in length, columns count from the first token
            of a row, and the last query of a row is its last token. Unless it is an array,
            ``keys.visible`` hides further tokens.
        sink_logits: Attention-sink logits ``[H]``.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of the queries.

    Raises:
        ValueError: If shapes, dtypes or the mask do not fit together.
    """
    if keys.visible is not None and not isinstance(mask, mx.array):
        own = keys.visible(queries.shape[2])
        mask = mask if own is None else own
    call = AttendCall(queries, keys, values, scale, mask, sink_logits)
    check(call)
    if keys is values:
        return latent_attention.attend(call, backend())
    return prefill.attend(call, backend())


def check(call: AttendCall) -> None:
    """Refuse arguments that :func:`attend_view` does not support.

    Raises:
        ValueError: If shapes, dtypes or the mask do not fit together.
    """
    _check_queries(call.queries, call.keys, call.values)
    if call.mask is not None:
        _check_mask(call.mask, call.scores_shape)
    if call.sink_logits is not None and call.sink_logits.shape != (call.heads,):
        raise ValueError(
            f"[attend] Attention-sink logits must have shape ({call.heads},), one per "
            f"query head, but they have shape {call.sink_logits.shape}."
        )


def _check_queries(queries: mx.array, keys: KVView, values: KVView) -> None:
    shape, asked = keys.shape, queries.shape
    batch, kv_heads, tokens, head_dim = shape
    if values.shape[:3] != shape[:3]:
        raise ValueError(
            f"[attend] Keys and values must agree in batch, KV heads and tokens, but the keys have "
            f"shape {keys.shape} and the values {values.shape}."
        )
    if len(asked) != 4 or asked[0] != batch or asked[1] % max(kv_heads, 1) or asked[3] != head_dim:
        raise ValueError(
            f"[attend] Queries must have shape [{batch}, a multiple of {kv_heads}, L, {head_dim}] "
            f"to read keys of shape {keys.shape}, but they have shape {queries.shape}."
        )
    if queries.dtype not in FLOATS:
        raise ValueError(
            f"[attend] Queries must be float16, bfloat16 or float32, but they are "
            f"{queries.dtype}; cast them."
        )
    if asked[2] > tokens:
        raise ValueError(
            f"[attend] There must be at least as many tokens as queries, but {queries.shape[2]} "
            f"queries were given for {tokens} tokens; append the keys first."
        )


def _check_mask(mask: mx.array | str, scores: tuple[int, ...]) -> None:
    if isinstance(mask, str):
        if mask == "causal":
            return
        raise ValueError(
            f"[attend] A mask must be None, 'causal' or an array, but {mask!r} was given."
        )
    fits = mask.ndim <= 4 and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"[attend] A mask must be broadcastable to {scores} (batch, query heads, queries, "
            f"tokens), but it has shape {mask.shape}."
        )
