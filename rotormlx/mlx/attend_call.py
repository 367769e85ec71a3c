"""The arguments of attention over a compressed cache, and values derived from them.

Shapes: B batch, H query heads, K KV heads, L queries, S tokens, G = H / K * L query rows of a KV
head, D head_dim of keys and queries, Dv head_dim of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from rotormlx.kernels import mask_kinds
from rotormlx.mlx.cache.view import KVView


class AttendCall(NamedTuple):
    """A call of a backend's ``attend``, already checked by ``attention.check``.

    queries: ``[B, H, L, D]``, float16, bfloat16 or float32; head h reads KV head ``h * K // H``.
    keys: Shape ``[B, K, S, D]``.
    values: Shape ``[B, K, S, Dv]``.
    scale: Factor of the scores.
    mask: None, ``"causal"`` (the last query sees every token), boolean (True: visible) or additive,
        broadcastable to ``[B, H, L, S]``. If batch rows differ in length, columns count from the
        first token of a row.
    sink_logits: Attention-sink logits ``[H]``, scores in the softmax without a value; or None.
    """

    queries: mx.array
    keys: KVView
    values: KVView
    scale: float
    mask: mx.array | str | None = None
    sink_logits: mx.array | None = None

    @property
    def batch(self) -> int:
        """B, the number of batch rows."""
        return self.queries.shape[0]

    @property
    def heads(self) -> int:
        """H."""
        return self.queries.shape[1]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.keys.exact.shape[1]

    @property
    def length(self) -> int:
        """L."""
        return self.queries.shape[2]

    @property
    def key_dim(self) -> int:
        """D."""
        return self.keys.codec.head_dim

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.values.codec.head_dim

    @property
    def larger_dim(self) -> int:
        """The larger of the two head_dims, which decides whether kernels can hold a row."""
        return max(self.key_dim, self.value_dim)

    @property
    def group_rows(self) -> int:
        """G."""
        _, heads, length, _ = self.queries.shape
        return heads // self.kv_heads * length

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """``(B, H, L, S)``, the shape to which a mask is broadcast."""
        batch, heads, length, _ = self.queries.shape
        return batch, heads, length, self.keys.tokens

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """``(B, H, L, Dv)``."""
        batch, heads, length, _ = self.queries.shape
        return batch, heads, length, self.values.codec.head_dim

    @property
    def most_exact_tokens(self) -> int:
        """The most exact tokens of a batch row.

        A row with fewer packed tokens than ``packed_tokens`` of the views may have more exact
        tokens than they count, up to the whole buffer.
        """
        return min(self.keys.exact.shape[2], self.keys.tokens)

    @property
    def is_causal(self) -> bool:
        """Whether the mask is ``"causal"``."""
        return isinstance(self.mask, str)

    @property
    def mask_array(self) -> mx.array | None:
        """The mask if it is an array."""
        return None if isinstance(self.mask, str) else self.mask

    @property
    def mask_kind(self) -> int:
        """One of :mod:`rotormlx.kernels.mask_kinds`."""
        if self.mask is None:
            return mask_kinds.NONE
        if isinstance(self.mask, str):
            return mask_kinds.CAUSAL
        return mask_kinds.BOOLEAN if self.mask.dtype == mx.bool_ else mask_kinds.ADDITIVE

    @property
    def scaled_queries(self) -> mx.array:
        """The queries times the scale, grouped by KV head, float32 ``[B, K, G, D]``."""
        batch, _, _, head_dim = self.queries.shape
        scaled = self.queries.astype(mx.float32) * self.scale
        return scaled.reshape(batch, self.kv_heads, self.group_rows, head_dim)

    @property
    def rows_differ(self) -> bool:
        """Whether batch rows differ in length or have channel scales of their own."""
        return self.keys.rows_differ or self.values.rows_differ

    def rows(self) -> Iterator[AttendCall]:
        """Yield each batch row as a separate call."""
        for index, (_, tokens) in enumerate(self.keys.lengths):
            mask = self.mask
            if isinstance(mask, mx.array):
                mask = mask[index : index + 1] if mask.ndim == 4 and mask.shape[0] > 1 else mask
                mask = mask[..., :tokens] if mask.shape[-1] > 1 else mask
            queries = self.queries[index : index + 1]
            views = self.keys.row(index), self.values.row(index)
            yield AttendCall(queries, *views, self.scale, mask, self.sink_logits)
