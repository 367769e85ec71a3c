"""The compressed cache of one layer, with the interface that hosts expect.

A sequence is three parts, in order: the **sink** (first tokens, exact), **packed** blocks of 64
tokens, and the **tail** (exact). New tokens enter the tail; whenever it holds ``window + 64``, its
oldest 64 become a block. So recent tokens are exact, every block has its own centre, and the
packed bytes do not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import mlx.core as mx

from rotormlx.codec.counts import Counts
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.masks import growing_mask
from rotormlx.mlx.cache.saved import MLXReader
from rotormlx.mlx.cache.store import Calibrated, Store, check_growth, check_update
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage.cache_fields import SINGLE, SavedCache

# Tokens of a filled cache that are converted at once, which bounds the memory of a conversion.
CONVERSION_TOKENS = 2048


class RotorKVCache(StoredCache[Store]):
    """The keys and values of one layer, compressed.

    Args:
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        max_size: The most tokens to hold; None for no limit. Beyond it, the oldest packed block is
            dropped; the sink stays, and positions keep growing.
        calibrated: The arrays of a calibrated configuration, for keys and for values: channel
            scales, float32 ``[K, D]``, or rotations, float32 ``[K, D, D]``.

    Raises:
        ValueError: If ``max_size`` has no room for sink, window and a block.

    Source: docs/FORMAT.md, section 8.
    """

    kind = SINGLE
    _store = Store
    # Whether each trim drops at most as many tokens as the window always holds.
    rewinds = False
    # The class of batches of such caches, which rotormlx/mlx/__init__.py sets.
    batch: ClassVar[Any]

    def __init__(
        self,
        config: RotorConfig | None = None,
        layer: int = 0,
        max_size: int | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        super().__init__(config, layer, max_size, calibrated)
        self.counts = Counts()

    # ---- the hosts' contract ---------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.counts.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append tokens.

        After any exception, including an interrupt, the cache is unchanged.

        Args:
            keys: ``[B, K, S, D]``, float16, bfloat16 or float32.
            values: ``[B, K, S, Dv]``, likewise.

        Returns:
            :class:`KVView` of all keys and values, in which the tokens just appended are exact.

        Raises:
            ValueError: If a shape or dtype does not fit.
            MemoryError: If MLX's memory limit leaves no room for them.
        """
        check_update(keys, values, self._keys, self._values)
        counts = replace(self.counts)
        if self._keys is None or self._values is None:
            key_store, value_store = self._new_stores(keys, values)
        else:
            key_store, value_store = self._keys.twin(), self._values.twin()
        check_growth((key_store, value_store), [counts], keys.shape[2], self.config)
        key_store.append(keys, counts.exact)
        value_store.append(values, counts.exact)
        counts.tokens += keys.shape[2]
        views = self._views((key_store, value_store), counts)
        served = self._served(views, (keys, values))
        self._pack_tail((key_store, value_store), counts)
        # A single call, which no interrupt can split.
        latest = views if counts.evicted > self.counts.evicted else None
        vars(self).update(_keys=key_store, _values=value_store, counts=counts, _latest=latest)
        return served

    def keys_and_values(self) -> tuple[Any, Any]:
        """Return all keys and values, as :meth:`update_and_fetch` does."""
        return self._served(self.views())

    def views(self) -> tuple[KVView, KVView]:
        """Return views of all keys and values; until a step is computed, the views of that step."""
        return self._latest or self._views(self._filled(), self.counts)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens, as mlx-lm's growing cache does.

        Raises:
            ValueError: If no model is compressed, so that the attention could not read this cache.
        """
        self._check_readable()
        return attention_mask(self.counts, self.config, N, window_size, return_array)

    def size(self) -> int:
        """Return the number of tokens held, S."""
        return self.counts.tokens

    def is_trimmable(self) -> bool:
        """Whether :meth:`trim` may be called: while no token was evicted, or with ``rewinds``."""
        return self.rewinds or not self.counts.evicted

    def trim(self, n: int) -> int:
        """Drop the last n tokens.

        In the tail this is exact. A packed block that loses tokens keeps its centre and its rows,
        and counts fewer of them; later it is filled up from the tail, with the same centre. No row
        is ever quantized twice.

        Returns:
            The number of tokens dropped: n, or all there were; once tokens were evicted, at most
            as many as the tail holds.
        """
        self._latest = None
        packed = self.counts.packed
        n = self.counts.trim(n, self.config)
        if packed and not self.counts.packed:
            for store in self._filled():
                store.forget_packed()
        return n

    @classmethod
    def merge(cls, caches: Sequence[RotorKVCache]) -> Any:
        """Return a batch with one row per sequence of these caches, which are not changed.

        Raises:
            ValueError: If they do not share configuration, layer and ``max_size``.
        """
        return cls.batch.merge(caches)

    def to_batch(self, left_padding: Sequence[int]) -> Any:
        """Return an empty batch with this left padding; mlx-vlm calls this."""
        return type(self).batch(left_padding, *self._settings)

    def prefix_cache_merge(self, rows: Sequence[Any], prefix_lens: Sequence[int]) -> Any:
        """Return a batch of caches from mlx-vlm's prefix cache; None if their classes differ."""
        alike = all(type(row) is type(self) for row in rows)
        return type(self).merge(rows) if alike else None

    # ---- beyond the contract --------------------------------------------------------------------

    @classmethod
    def of(cls, cache: RotorKVCache) -> Self:
        """Make a cache of this class with the content of another one; the buffers are shared."""
        made = cls.__new__(cls)
        vars(made).update(vars(cache))
        return made

    @classmethod
    def from_kv_cache(
        cls,
        cache: Any,
        config: RotorConfig | None = None,
        layer: int = 0,
        calibrated: Calibrated | None = None,
    ) -> Self:
        """Compress a filled ``KVCache`` of a host; the source is not changed.

        Besides source and result, this takes the memory of ``CONVERSION_TOKENS`` tokens.
        """
        out = cls(config, layer, calibrated=calibrated)
        if cache.empty():
            return out
        out.append_all(cache.keys, cache.values, 0, cache.offset)
        return out

    def append_all(self, keys: mx.array, values: mx.array, start: int, stop: int) -> None:
        """Append and compute tokens of long arrays, ``CONVERSION_TOKENS`` at a time."""
        for first in range(start, stop, CONVERSION_TOKENS):
            part = slice(first, min(first + CONVERSION_TOKENS, stop))
            self.update_and_fetch(keys[:, :, part], values[:, :, part])
            mx.eval(self.state)

    @property
    def packed_tokens(self) -> int:
        """Tokens held in packed blocks."""
        return self.counts.packed

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held, without room for growth and without calibrated arrays."""
        shared = sum(array.nbytes for array in self.calibrated or ())
        return sum(a.nbytes for a in self.state if isinstance(a, mx.array)) - shared

    @property
    def bits_per_value(self) -> float:
        """True bits per value of the packed part, keys and values together."""
        codecs = [store.codec for store in self._filled()]
        bits = sum(c.bits_per_value * c.head_dim for c in codecs)
        return bits / sum(c.head_dim for c in codecs)

    # ---- inside ---------------------------------------------------------------------------------

    def _saved(self) -> tuple[Any, ...]:
        stores = tuple(store.saved(self.counts) for store in self._stores)
        return SavedCache(self.config, self.layer, self.max_size, self.counts, stores).state

    def _restore(self, state: Sequence[Any]) -> None:
        saved = SavedCache.read(state, MLXReader(self.kind))
        self._take(saved, counts=saved.counts)

    def _views(self, stores: tuple[Store, Store], counts: Counts) -> tuple[KVView, KVView]:
        sink = self.config.sink
        return stores[0].view(sink, counts), stores[1].view(sink, counts)

    def _pack_tail(self, stores: Sequence[Store], counts: Counts) -> None:
        """Pack the tokens of the tail beyond the window, block by block."""
        while count := counts.packable(self.config, self._max_blocks):
            for store in stores:
                store.pack(self.config.sink, count, counts)
            counts.add_packed(count, self._max_blocks)


def attention_mask(
    counts: Counts, config: RotorConfig, length: int, window_size: int | None, return_array: bool
) -> mx.array | str | None:
    """Return the attention mask for ``length`` new tokens, as mlx-lm makes it."""
    if window_size is None or not counts.evicted:
        return growing_mask(length, counts.tokens, window_size, return_array)
    new = mx.arange(counts.offset, counts.offset + length)
    held = mx.concatenate([mx.array(counts.positions(config)), new])
    return (held <= new[:, None]) & (held > new[:, None] - window_size)
