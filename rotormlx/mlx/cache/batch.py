"""Compressed caches of one layer for several sequences of different lengths.

A row is stored as in :class:`RotorKVCache`: it has its own sink, packed blocks and tail, starts
with its first token, and has the same packed bytes as in a cache of its own. Buffers are as long as
the longest row needs. Padding never counts: left padding is not stored, and the next tokens
overwrite right padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import mlx.core as mx

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.batch_store import BatchStore
from rotormlx.mlx.cache.masks import causal_mask, growing_mask
from rotormlx.mlx.cache.saved import MLXReader
from rotormlx.mlx.cache.single import RotorKVCache, attention_mask
from rotormlx.mlx.cache.store import Calibrated, check_growth, check_update, same_calibrated
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage.cache_fields import BATCH, SavedBatch


@dataclass
class Row:
    """The counts of one sequence, and its padding.

    Args:
        counts: Tokens held, without padding.
        left: Padding still to come before the first token.
        expected: Tokens still to come before right padding; None for no limit.
        right: Right padding of the latest step. It follows the tokens and counts in attention until
            the next step, so that the last query of every row is the last one appended.
        rejected: Tokens at the end that are dropped when padding ends (rejected draft tokens).
    """

    counts: Counts = field(default_factory=Counts)
    left: int = 0
    expected: int | None = None
    right: int = 0
    rejected: int = 0

    def copy(self) -> Row:
        """Return an independent copy of this row."""
        return replace(self, counts=replace(self.counts))

    def append(self, length: int) -> int:
        """Count the next ``length`` tokens; return how many of them are left padding."""
        skipped = min(length, self.left)
        self.left -= skipped
        came = length - skipped
        real = came if self.expected is None else min(came, self.expected)
        if self.expected is not None:
            self.expected -= real
        self.right = came - real
        self.counts.tokens += real
        return skipped


class BatchRotorKVCache(StoredCache[BatchStore]):
    """The keys and values of one layer for B sequences, compressed.

    Args:
        left_padding: Padding before each sequence in the tokens to come, B numbers.
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        max_size: The most tokens a row holds; see :class:`RotorKVCache`.
        calibrated: See :class:`RotorKVCache`.
    """

    kind = BATCH
    _store = BatchStore
    # The class of the cache of a single row.
    _single: ClassVar[type[RotorKVCache]] = RotorKVCache

    def __init__(
        self,
        left_padding: Sequence[int],
        config: RotorConfig | None = None,
        layer: int = 0,
        max_size: int | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        super().__init__(config, layer, max_size, calibrated)
        self.rows = [Row(left=int(n)) for n in left_padding]

    # ---- the hosts' contract ---------------------------------------------------------------------

    @property
    def offset(self) -> mx.array:
        """The position of the next token of every row, int32 ``[B]``."""
        return mx.array([row.counts.offset + row.right - row.left for row in self.rows], mx.int32)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append tokens; see :meth:`RotorKVCache.update_and_fetch`.

        After any exception, including an interrupt, the cache is unchanged.

        Args:
            keys: ``[B, K, S, D]``, float16, bfloat16 or float32.
            values: ``[B, K, S, Dv]``, likewise.

        Returns:
            :class:`KVView` of all keys and values, with the lengths of each row.

        Raises:
            ValueError: If a shape or dtype does not fit.
            MemoryError: If MLX's memory limit leaves no room for them.
        """
        check_update(keys, values, self._keys, self._values)
        if keys.shape[0] != len(self.rows):
            raise ValueError(
                f"[BatchRotorKVCache] This cache has {len(self.rows)} rows, but keys of shape "
                f"{keys.shape} were appended; give one row of keys per row of the cache."
            )
        rows = [row.copy() for row in self.rows]
        if self._keys is None or self._values is None:
            stores = self._new_stores(keys, values)
        else:
            stores = self._keys.twin(), self._values.twin()
        if rows:
            check_growth(stores, [row.counts for row in rows], keys.shape[2], self.config)
        exact = [row.counts.exact for row in rows]
        skipped = [row.append(keys.shape[2]) for row in rows]
        for store, x in zip(stores, (keys, values), strict=True):
            store.append_rows(x, exact, skipped)
        views = self._views(stores, rows)
        served = self._served(views, (keys, values))
        self._pack_tails(stores, rows)
        # A single call, which no interrupt can split.
        pairs = zip(rows, self.rows, strict=True)
        has_dropped = any(new.counts.evicted > old.counts.evicted for new, old in pairs)
        latest = views if has_dropped else None
        vars(self).update(_keys=stores[0], _values=stores[1], rows=rows, _latest=latest)
        return served

    def keys_and_values(self) -> tuple[Any, Any]:
        """Return all keys and values, as :meth:`update_and_fetch` does."""
        return self._served(self.views())

    def views(self) -> tuple[KVView, KVView]:
        """Return views of all keys and values; until a step is computed, the views of that step."""
        return self._latest or self._views(self._filled(), self.rows)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens; columns count from the first token of a row.

        Raises:
            ValueError: If no model is compressed, so that the attention could not read this cache.
        """
        self._check_readable()
        if window_size is None and not return_array:
            return growing_mask(N, 0, window_size, return_array)
        singles = [self._mask_of(row, N, window_size) for row in self.rows]
        longest = max(mask.shape[-1] for mask in singles)
        masks = [mx.pad(mask, [(0, 0), (0, longest - mask.shape[-1])]) for mask in singles]
        return mx.stack(masks)[:, None]

    def size(self) -> int:
        """Return the number of tokens of the longest row."""
        return max((row.counts.tokens for row in self.rows), default=0)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be dropped: not after some were evicted."""
        return not any(row.counts.evicted for row in self.rows)

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row; see :meth:`RotorKVCache.trim`."""
        self._forget_padding()
        return max((row.counts.trim(n, self.config) for row in self.rows), default=0)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce which of the next tokens are padding.

        Args:
            left_padding: Padding before each row; only while the cache is empty.
            lengths: Tokens of each row before its right padding.
            right_padding: Padding after each row, until :meth:`finalize`. Without ``lengths``,
                :meth:`finalize` drops that many tokens at the end of each row.

        Raises:
            ValueError: If left padding is given for a filled cache.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "[BatchRotorKVCache] Left padding requires an empty cache, but this one holds "
                    f"{self.size()} tokens; use right padding."
                )
            for row, left in zip(self.rows, left_padding, strict=True):
                row.left += int(left)
        if right_padding is None or max(right_padding) <= 0:
            return
        if lengths is None:
            for row, count in zip(self.rows, right_padding, strict=True):
                row.rejected = int(count)
        else:
            for row, length in zip(self.rows, lengths, strict=True):
                row.expected = int(length)

    def finalize(self) -> None:
        """End the right padding."""
        self._forget_padding()
        for row in self.rows:
            row.expected = None
            row.counts.trim(row.rejected, self.config)
            row.rejected = 0

    @property
    def _idx(self) -> int:
        """The next column of prompts padded to a common length, which mlx-vlm reads."""
        return max((row.counts.offset + row.right - row.left for row in self.rows), default=0)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return len(self.rows)

    def is_single_row(self) -> bool:
        """Whether there is one sequence."""
        return len(self.rows) == 1

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows, in this order."""
        listed = isinstance(batch_indices, mx.array)
        indices: list[int] = list(batch_indices.tolist() if listed else batch_indices)
        rows = [self.rows[i].copy() for i in indices]
        blocks = _longest(rows).blocks
        stores = [store.twin() for store in self._stores]
        for store in stores:
            store.take(indices, blocks)
        key_store, value_store = stores or (None, None)
        vars(self).update(_keys=key_store, _values=value_store, rows=rows, _latest=None)

    def extend(self, other: BatchRotorKVCache) -> None:
        """Append the rows of another batch."""
        _check_same([self, other])
        sizes = len(self.rows), len(other.rows)
        key_store = BatchStore.join(zip((self._keys, other._keys), sizes, strict=True))
        value_store = BatchStore.join(zip((self._values, other._values), sizes, strict=True))
        rows = self.rows + [row.copy() for row in other.rows]
        vars(self).update(_keys=key_store, _values=value_store, rows=rows, _latest=None)

    def extract(self, idx: int) -> RotorKVCache:
        """Return one row as a cache that shares no buffer with the batch."""
        single = self._single(*self._settings)
        row = self.rows[idx]
        single.counts = replace(row.counts)
        if single.counts.tokens and self._keys is not None and self._values is not None:
            key_part, value_part = self.parts
            single._keys = self._keys.single(idx, single.counts, key_part.config)
            single._values = self._values.single(idx, single.counts, value_part.config)
            # Computed now: otherwise the copy keeps the buffers of the whole batch until its use.
            mx.eval(single._keys.arrays, single._values.arrays)
        return single

    @classmethod
    def merge(cls, caches: Sequence[RotorKVCache]) -> Self:
        """Return a batch with one row per sequence of these caches, which are not changed.

        Raises:
            ValueError: If they do not share configuration, layer and ``max_size``.
        """
        first = caches[0]
        _check_same(caches)
        batch = cls([], *first._settings)
        sizes = [1 if c._keys is None else c._keys.exact.shape[0] for c in caches]
        batch.rows = [
            Row(replace(cache.counts))
            for cache, n in zip(caches, sizes, strict=True)
            for _ in range(n)
        ]
        batch._keys = BatchStore.join(zip((c._keys for c in caches), sizes, strict=True))
        batch._values = BatchStore.join(zip((c._values for c in caches), sizes, strict=True))
        return batch

    # ---- inside ---------------------------------------------------------------------------------

    def _saved(self) -> tuple[Any, ...]:
        # Padding still to come is not saved.
        counts = [[r.counts.tokens, r.counts.packed, r.counts.evicted] for r in self.rows]
        table = mx.array(counts, mx.int32).reshape(-1, 3)
        longest = _longest(self.rows)
        stores = tuple(store.saved(longest) for store in self._stores)
        return SavedBatch(self.config, self.layer, self.max_size, table, stores).state

    def _restore(self, state: Sequence[Any]) -> None:
        saved = SavedBatch.read(state, MLXReader(self.kind))
        self._take(saved, rows=[Row(Counts(*counts)) for counts in saved.table.tolist()])

    def _forget_padding(self) -> None:
        self._latest = None
        for row in self.rows:
            row.right = 0

    def _mask_of(self, row: Row, length: int, window_size: int | None) -> mx.array:
        """Return the mask of the next queries of a row, ``[length, tokens]``."""
        if row.left:
            return causal_mask(length, window=window_size)[:, min(row.left, length) :]
        mask = attention_mask(row.counts, self.config, length, window_size, return_array=True)
        if not isinstance(mask, mx.array):  # a single query sees everything
            mask = mx.ones((length, row.counts.tokens + length), mx.bool_)
        return mask

    def _views(
        self, stores: tuple[BatchStore, BatchStore], rows: Sequence[Row]
    ) -> tuple[KVView, KVView]:
        lengths = [(row.counts.packed, row.counts.tokens + row.right) for row in rows]
        sink = self.config.sink
        return stores[0].view_rows(sink, lengths), stores[1].view_rows(sink, lengths)

    def _pack_tails(self, stores: Sequence[BatchStore], rows: Sequence[Row]) -> None:
        """Pack the tokens beyond the window; rows that are alike are encoded in one call."""
        while alike := self._packable(rows):
            for (count, *_), indices in alike.items():
                counts = [rows[i].counts for i in indices]
                for store in stores:
                    store.pack_rows(self.config.sink, count, indices, counts)
                for c in counts:
                    c.add_packed(count, self._max_blocks)
        longest = max(row.counts.exact + row.right for row in rows)
        for store in stores:
            store.shrink(longest)

    def _packable(self, rows: Sequence[Row]) -> dict[tuple[int, ...], list[int]]:
        """Group rows with tokens to pack by their number, and by all that one call must share."""
        alike = defaultdict(list)
        for index, row in enumerate(rows):
            if count := row.counts.packable(self.config, self._max_blocks):
                # With a channel scale of its own, a row is encoded alone.
                own = (index,) if self.config.scales_channels else ()
                alike[count, row.counts.packed % BLOCK, *own].append(index)
        return alike


def _longest(rows: Sequence[Row]) -> Counts:
    """Return counts with the most exact and the most packed tokens of any row."""
    exact = max((row.counts.exact for row in rows), default=0)
    packed = max((row.counts.packed for row in rows), default=0)
    return Counts(exact + packed, packed)


def _check_same(caches: Sequence[Any]) -> None:
    """Refuse caches that cannot be rows of one batch."""
    first, *others = caches
    for other in others:
        if not same_calibrated(first.calibrated, other.calibrated):
            raise ValueError(
                "[BatchRotorKVCache] Rows of a batch must share their calibration, but these have "
                "different ones; make all caches with one calibration."
            )
        differ = first.config.difference(other.config)
        for name, own, its in (
            ("layer", first.layer, other.layer),
            ("sliding window", *(getattr(c, "sliding_window", None) for c in (first, other))),
            ("max_kv_size", first.max_size, other.max_size),
        ):
            differ = differ or (None if own == its else (name, own, its))
        if differ is not None:
            name, own, its = differ
            raise ValueError(
                f"[BatchRotorKVCache] Rows of a batch must share their {name}, but it is {own} in "
                f"one and {its} in another; make all caches with the same settings."
            )
