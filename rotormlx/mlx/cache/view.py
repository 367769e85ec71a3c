"""Views of a cache for attention: the keys or the values of one layer, partly packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx

from rotormlx.codec.format import Codec, Packed


@dataclass(frozen=True, eq=False)
class KVView:
    """The keys or the values of one layer as they are stored.

    A sequence is ``sink`` exact tokens, ``packed_tokens`` packed ones, and exact ones again (the
    tail). Sink and tail share one buffer, the sink first. A view holds whole buffers, with room at
    their end, and the lengths in use, so making it slices and copies nothing. The rows of one KV
    head are contiguous in a buffer, which kernels rely on.

    Args:
        codec: The coding of the packed tokens, which fixes head_dim.
        exact: ``[B, K, capacity, D]``, float16, bfloat16 or float32.
        packed: Whole blocks with room at the end; None while nothing is packed.
        channel_scale: float32 ``[K, D]``, or ``[B, K, D]`` if batch rows have their own; None means
            1.
        sink: Exact tokens before the packed ones.
        packed_tokens: Packed tokens in use; the last block may be partly filled.
        tokens: All tokens, S.
        rows: (packed tokens, all tokens) of each batch row if rows differ; ``packed_tokens`` and
            ``tokens`` are then the largest. A row with fewer tokens than ``sink`` has no others.
        visible: For keys of which later tokens do not see all (a window or a chunk): a function
            that takes the number of last tokens, L, and returns their boolean mask, broadcastable
            to ``[B, H, L, S]``, or None while causality hides enough. It is used if attention is
            called without a mask array.
    """

    codec: Codec
    exact: mx.array
    packed: Packed | None
    channel_scale: mx.array | None
    sink: int
    packed_tokens: int
    tokens: int
    rows: tuple[tuple[int, int], ...] | None = None
    visible: Callable[[int], mx.array | None] | None = None

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """``(packed tokens, all tokens)`` of every batch row."""
        return self.rows or ((self.packed_tokens, self.tokens),) * self.exact.shape[0]

    @property
    def rows_differ(self) -> bool:
        """Whether batch rows differ in length or have channel scales of their own."""
        has_scales = self.channel_scale is not None and self.channel_scale.ndim == 3
        return self.rows is not None or has_scales

    @property
    def exact_tokens(self) -> int:
        """Tokens of the sink and the tail."""
        return self.tokens - self.packed_tokens

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, K, S, D)``, the shape of the uncompressed array."""
        batch, heads, _, head_dim = self.exact.shape
        return batch, heads, self.tokens, head_dim

    @property
    def ndim(self) -> int:
        """Number of dimensions of :attr:`shape`."""
        return 4

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the exact tokens."""
        return self.exact.dtype

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse other attributes of an array, which a model would use to process keys itself."""
        raise AttributeError(_refusal(name))

    def row(self, index: int) -> KVView:
        """Return a view of one batch row."""
        packed_tokens, tokens = self.lengths[index]
        part = slice(index, index + 1)
        packed = None
        if self.packed is not None and packed_tokens:
            packed = Packed(*(a if a is None else a[part] for a in self.packed))
        channel_scale = self.channel_scale
        if channel_scale is not None and channel_scale.ndim == 3:
            channel_scale = channel_scale[index]
        exact = self.exact[part]
        return KVView(self.codec, exact, packed, channel_scale, self.sink, packed_tokens, tokens)


def _refusal(name: str) -> str:
    return (
        "[KVView] Keys and values of a compressed cache must reach mlx-lm's attention unchanged, "
        f"but the model uses their {name}; call rotormlx.apply(model) first, which reports whether "
        "the model can be compressed."
    )


def _refusing(name: str) -> Any:
    def method(self: KVView, *args: Any) -> NoReturn:
        raise TypeError(_refusal(name))

    return method


# Python looks these methods up on the class.
for _name in ("getitem", "matmul", "add", "sub", "mul", "truediv", "neg"):
    setattr(KVView, f"__{_name}__", _refusing(f"__{_name}__"))
