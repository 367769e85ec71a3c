"""What attention reads of a cache: the keys or the values of one layer, partly packed."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from rotormlx.format import Codec, Packed


@dataclass(frozen=True, eq=False)
class KVView:
    """The keys or the values of one layer as they are stored.

    A sequence is ``sink`` exact tokens, ``packed_tokens`` packed ones, and exact ones again (the
    tail). Sink and tail lie in one buffer, the sink first. Buffers are whole, with room at their
    end: lengths say how much counts, so nothing is sliced or copied to make a view.

    Args:
        codec: How the packed tokens are coded; fixes head_dim.
        exact: ``[B, K, capacity, D]``, float16, bfloat16 or float32.
        packed: Whole blocks with room at the end; None while nothing is packed.
        channel_scale: float32 ``[K, D]``; None for 1.
        sink: Exact tokens before the packed ones.
        packed_tokens: Packed tokens that count; the last block may be partly filled.
        tokens: All tokens, S.
    """

    codec: Codec
    exact: mx.array
    packed: Packed | None
    channel_scale: mx.array | None
    sink: int
    packed_tokens: int
    tokens: int

    @property
    def exact_tokens(self) -> int:
        """Tokens of the sink and the tail."""
        return self.tokens - self.packed_tokens

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, K, S, D)``, what an uncompressed array would say."""
        batch, heads, _, head_dim = self.exact.shape
        return batch, heads, self.tokens, head_dim

    @property
    def ndim(self) -> int:
        """Dimensions of :attr:`shape`."""
        return 4

    @property
    def dtype(self) -> mx.Dtype:
        """Of the exact tokens."""
        return self.exact.dtype
