"""Decoding of packed tokens to their place between the exact tokens of a sequence."""

from __future__ import annotations

import mlx.core as mx

from rotormlx.codec.format import BLOCK, Packed
from rotormlx.mlx.backends import Backend
from rotormlx.mlx.cache.view import KVView


def in_place(view: KVView, backend: Backend, dtype: mx.Dtype) -> mx.array:
    """Return all tokens of a view with equal rows, ``[B, K, S, D]``: sink, packed, tail."""
    if not view.packed_tokens:
        return view.exact[:, :, : view.tokens].astype(dtype)
    decoded = backend.decode(
        counted(view), view.codec, channel_scale=view.channel_scale, dtype=dtype
    )
    return joined(view, view.exact.astype(dtype), decoded[:, :, : view.packed_tokens])


def counted(view: KVView) -> Packed:
    """Return the blocks that hold tokens."""
    if view.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    blocks = -(-view.packed_tokens // BLOCK)
    return Packed(*(None if a is None else a[:, :, :blocks] for a in view.packed))


def joined(view: KVView, of_exact: mx.array, of_packed: mx.array) -> mx.array:
    """Join rows of exact tokens (or one row for all of them) and packed ones in token order."""
    sink, exact = min(view.sink, view.exact_tokens), view.exact_tokens
    if of_exact.shape[2] == 1:
        of_exact = mx.broadcast_to(of_exact, (*of_packed.shape[:2], exact, of_packed.shape[3]))
    ends = of_exact[:, :, :sink], of_exact[:, :, sink:exact]
    shape = (*ends[0].shape[:2], view.packed_tokens, ends[0].shape[3])
    return mx.concatenate([ends[0], mx.broadcast_to(of_packed, shape), ends[1]], axis=2)
