"""Caches that decode tokens for models whose own code reads keys and values.

They hold the same bytes as :class:`RotorKVCache` and its batch. A model gets arrays in the dtype
of its keys: all tokens of one layer, decoded on request and freed once the layer has used them.
Such a cache needs no change of mlx-lm, and suits any attention.

The fused attention subtracts a term from the score of each packed token (docs/FORMAT.md,
section 7). A softmax over decoded keys lacks this term; docs/MLX_LM.md gives its effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.mlx_ops import after
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.in_place import in_place


class DecodedRotorKVCache(RotorKVCache):
    """A :class:`RotorKVCache` whose keys and values are arrays, ``[B, K, S, D]``."""

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, Any]:
        keys, values = (begun_after(new, view) for view in views)
        return in_place(keys, backend(), keys.dtype), in_place(values, backend(), values.dtype)

    def _check_readable(self) -> None:
        """Accept any attention, since every attention reads arrays."""


class BatchDecodedRotorKVCache(BatchRotorKVCache):
    """A :class:`BatchRotorKVCache` whose keys and values are arrays, ``[B, K, S, D]``.

    The last token of every row is in the last column. A shorter row begins with zeros, where
    mlx-lm's own batch has left padding.
    """

    _single = DecodedRotorKVCache

    # Columns before the longest row in the arrays returned last: left padding of all rows.
    _front = 0

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """Return the attention mask for N new tokens, boolean ``[B, 1, N, S]``."""
        masks = [self._mask_of(row, N, window_size) for row in self.rows]
        columns = max([N, *(mask.shape[-1] for mask in masks)])
        return mx.stack([_behind(columns - m.shape[-1], m, axis=1) for m in masks])[:, None]

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, Any]:
        keys, values = views
        if new:
            self._front = max(0, new[0].shape[2] - keys.tokens)
        columns = self._front + keys.tokens
        return _rows(begun_after(new, keys), columns), _rows(begun_after(new, values), columns)

    def _check_readable(self) -> None:
        """Accept any attention, since every attention reads arrays."""


def _rows(view: KVView, columns: int) -> mx.array:
    """Decode all tokens of every row to ``[B, K, columns, D]``, aligned at the last column."""
    rows = [view.row(i) for i in range(len(view.lengths))] if view.rows_differ else [view]
    decoded = [in_place(row, backend(), view.dtype) for row in rows]
    return mx.concatenate([_behind(columns - a.shape[2], a, axis=2) for a in decoded])


def _behind(count: int, a: mx.array, axis: int) -> mx.array:
    """Return the array with ``count`` zeros in front of it along ``axis``."""
    return mx.pad(a, [(count if i == axis else 0, 0) for i in range(a.ndim)]) if count else a


def begun_after(new: Sequence[mx.array], view: KVView) -> KVView:
    """Return a view that is decoded only after the new tokens, so only one layer is in memory."""
    if not new or view.packed is None:
        return view
    packed = view.packed._replace(words=after(new[0], view.packed.words))
    return replace(view, packed=packed)
