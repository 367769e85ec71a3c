"""The compressed caches of one layer for several sequences at once, each of its own length.

A row is stored as :class:`RotorKVCache` stores it: its first token is first, its sink, packed
blocks and tail are its own, and its packed bytes are those of a run by itself. Buffers are as long
as the longest row needs. Padding never counts: what was put in front of a row (left padding) is not
stored, what was put behind (right padding) is overwritten by the tokens that come next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, ROLES, VALUE, Packed
from rotormlx.config import RotorConfig
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import (
    Calibrated,
    Counts,
    Store,
    check_growth,
    check_update,
    damaged,
    encode,
    max_blocks,
    with_room,
)
from rotormlx.mlx.cache.view import KVView


@dataclass
class Row:
    """The counts of one sequence, and what of the tokens to come or just appended is padding.

    Args:
        counts: Tokens held, without padding.
        left: Padding that will still come before the first token.
        expected: Tokens that will still come before right padding; None for no limit.
        right: Right padding just appended: it lies behind the tokens and counts in attention, so
            that the last query of every row is the last appended, until the next step.
    """

    counts: Counts = field(default_factory=Counts)
    left: int = 0
    expected: int | None = None
    right: int = 0

    def copy(self) -> Row:
        """A row of the same counts that is counted by itself."""
        return replace(self, counts=replace(self.counts))

    def append(self, length: int) -> int:
        """Count the next ``length`` tokens; returns how many of them are left padding."""
        skipped = min(length, self.left)
        self.left -= skipped
        came = length - skipped
        real = came if self.expected is None else min(came, self.expected)
        if self.expected is not None:
            self.expected -= real
        self.right = came - real
        self.counts.tokens += real
        return skipped


class BatchRotorKVCache(_BaseCache):
    """The keys and values of one layer for B sequences, compressed.

    Args:
        left_padding: What stands before each sequence in the tokens to come; its length is B.
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.
        max_size: The most tokens a row holds; see :class:`RotorKVCache`.
        calibrated: See :class:`RotorKVCache`.
    """

    def __init__(
        self,
        left_padding: Sequence[int],
        config: RotorConfig | None = None,
        layer: int = 0,
        max_size: int | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        self.config = config or RotorConfig()
        self.layer = layer
        self.max_size = max_size
        self.calibrated = calibrated
        self.rows = [Row(left=int(n)) for n in left_padding]
        self._max_blocks = max_blocks(max_size, self.config)
        self._keys: BatchStore | None = None
        self._values: BatchStore | None = None

    # ---- mlx-lm's contract ----------------------------------------------------------------------

    @property
    def offset(self) -> mx.array:
        """The position of the next token of every row, int32 ``[B]``."""
        return mx.array([row.counts.offset + row.right - row.left for row in self.rows], mx.int32)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Append tokens; see :meth:`RotorKVCache.update_and_fetch`.

        Args:
            keys: ``[B, K, S, D]``, float16, bfloat16 or float32.
            values: ``[B, K, S, Dv]``, likewise.

        Returns:
            Views of all keys and values, with the lengths of each row.

        Raises:
            ValueError: If a shape or dtype does not fit.
            MemoryError: If MLX's memory limit leaves no room for them.

            Whatever is raised, an interrupt too: the cache is then unchanged.
        """
        check_update(keys, values, self._keys, self._values)
        if keys.shape[0] != len(self.rows):
            raise ValueError(
                f"[BatchRotorKVCache] This cache has {len(self.rows)} rows, but keys of shape "
                f"{keys.shape} were appended; give one row of keys for each."
            )
        rows = [row.copy() for row in self.rows]
        if self._keys is None or self._values is None:
            stores = self._new_store(KEY, keys), self._new_store(VALUE, values)
        else:
            stores = self._keys.twin(), self._values.twin()
        if rows:
            check_growth(stores, [row.counts for row in rows], keys.shape[2], self.config)
        exact = [row.counts.exact for row in rows]
        skipped = [row.append(keys.shape[2]) for row in rows]
        for store, x in zip(stores, (keys, values), strict=True):
            store.append_rows(x, exact, skipped)
        views = self._views(stores, rows)
        self._pack_tails(stores, rows)
        # One step, between whose halves no interrupt comes.
        vars(self).update(_keys=stores[0], _values=stores[1], rows=rows)
        return views

    def keys_and_values(self) -> tuple[KVView, KVView]:
        """Views of all keys and values."""
        return self._views(self._filled(), self.rows)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The attention mask for N new tokens; the tokens of a row count from its first."""
        if window_size is None and not return_array:
            return create_attention_mask(N, 0, return_array, window_size)
        singles = [self._mask_of(row, N, window_size) for row in self.rows]
        longest = max(mask.shape[-1] for mask in singles)
        masks = [mx.pad(mask, [(0, 0), (0, longest - mask.shape[-1])]) for mask in singles]
        return mx.stack(masks)[:, None]

    def size(self) -> int:
        """The tokens held of the longest row."""
        return max((row.counts.tokens for row in self.rows), default=0)

    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self._keys is None

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be forgotten: not once some were evicted."""
        return not any(row.counts.evicted for row in self.rows)

    def trim(self, n: int) -> int:
        """Forget the last n tokens of every row; see :meth:`RotorKVCache.trim`."""
        self._forget_padding()
        return max((row.counts.trim(n, self.config) for row in self.rows), default=0)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say what of the tokens to come is padding.

        Args:
            left_padding: Tokens before each row; only while the cache is empty.
            lengths: Tokens of each row before its right padding.
            right_padding: Tokens behind each row, until :meth:`finalize`.

        Raises:
            ValueError: If left padding meets a filled cache.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "[BatchRotorKVCache] Left padding requires an empty cache, but this one holds "
                    f"{self.size()} tokens; pad on the right."
                )
            for row, left in zip(self.rows, left_padding, strict=True):
                row.left += int(left)
        if right_padding is not None and lengths is not None and max(right_padding) > 0:
            for row, length in zip(self.rows, lengths, strict=True):
                row.expected = int(length)

    def finalize(self) -> None:
        """The right padding is over."""
        self._forget_padding()
        for row in self.rows:
            row.expected = None

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows, in this order."""
        listed = isinstance(batch_indices, mx.array)
        indices: list[int] = list(batch_indices.tolist() if listed else batch_indices)
        rows = [self.rows[i].copy() for i in indices]
        blocks = max((-(-row.counts.packed // BLOCK) for row in rows), default=0)
        stores = [store.twin() for store in self._stores]
        for store in stores:
            store.take(indices, blocks)
        key_store, value_store = stores or (None, None)
        vars(self).update(_keys=key_store, _values=value_store, rows=rows)

    def extend(self, other: BatchRotorKVCache) -> None:
        """Append the rows of another batch."""
        _check_same([self, other])
        sources = [(self._keys, len(self.rows)), (other._keys, len(other.rows))]
        key_store = BatchStore.join(sources)
        sources = [(self._values, len(self.rows)), (other._values, len(other.rows))]
        value_store = BatchStore.join(sources)
        rows = self.rows + [row.copy() for row in other.rows]
        vars(self).update(_keys=key_store, _values=value_store, rows=rows)

    def extract(self, idx: int) -> RotorKVCache:
        """A row as a cache by itself; it shares no buffer with the batch."""
        single = RotorKVCache(self.config, self.layer, self.max_size, self.calibrated)
        row = self.rows[idx]
        single.counts = replace(row.counts)
        if single.counts.tokens and self._keys is not None and self._values is not None:
            single._keys = self._keys.single(idx, single.counts, self.config)
            single._values = self._values.single(idx, single.counts, self.config)
            # Now, or the copy would keep the buffers of the whole batch until it is used.
            mx.eval(single._keys.arrays, single._values.arrays)
        return single

    @classmethod
    def merge(cls, caches: Sequence[RotorKVCache]) -> BatchRotorKVCache:
        """A batch with a row for each sequence of these caches, which stay as they are.

        Raises:
            ValueError: If they do not share configuration, layer and ``max_size``.
        """
        first = caches[0]
        _check_same(caches)
        batch = cls([], first.config, first.layer, first.max_size, first.calibrated)
        sizes = [1 if c._keys is None else c._keys.exact.shape[0] for c in caches]
        batch.rows = [
            Row(replace(cache.counts))
            for cache, n in zip(caches, sizes, strict=True)
            for _ in range(n)
        ]
        batch._keys = BatchStore.join(zip((c._keys for c in caches), sizes, strict=True))
        batch._values = BatchStore.join(zip((c._values for c in caches), sizes, strict=True))
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(store.nbytes for store in self._stores)

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything but pending padding: numbers, one string, and arrays or None.

        The counts are int32 ``[B, 3]``: tokens, packed and evicted tokens of each row.
        """
        counts = [[r.counts.tokens, r.counts.packed, r.counts.evicted] for r in self.rows]
        table = mx.array(counts, mx.int32).reshape(-1, 3)
        header = (FORMAT_VERSION, self.config.to_json(), self.layer, self.max_size, table)
        longest = max((row.counts.exact for row in self.rows), default=0)
        blocks = self._most_blocks()
        return header + tuple(
            array for store in self._stores for array in store.state_rows(longest, blocks)
        )

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        """Take what was saved.

        Raises:
            ValueError: If it is not the state of such a cache, or of another format version.
        """
        if len(state) not in (5, 15):
            raise damaged("5 or 15 entries", len(state))
        version, config, self.layer, self.max_size, table = state[:5]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"[BatchRotorKVCache] This rotormlx reads format version {FORMAT_VERSION}, but the "
                f"saved cache has version {version}; make it again."
            )
        self.config = RotorConfig.from_json(config)
        self._max_blocks = max_blocks(self.max_size, self.config)
        self.rows = [Row(Counts(*counts)) for counts in table.tolist()]
        self._keys = self._values = self.calibrated = None
        if len(state) > 5:
            if self.config.is_calibrated:
                self.calibrated = state[9], state[14]
            self._keys = self._saved_store(KEY, state[5:10])
            self._values = self._saved_store(VALUE, state[10:])

    @property
    def keys(self) -> mx.array | None:
        """As :attr:`RotorKVCache.keys`."""
        return None if self._keys is None else self._keys.exact[:, :, :0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        store, _ = self._filled()
        store.exact = mx.depends(store.exact, keys)

    @property
    def values(self) -> mx.array | None:
        """As :attr:`RotorKVCache.values`."""
        return None if self._values is None else self._values.exact[:, :, :0]

    # ---- inside ---------------------------------------------------------------------------------

    @property
    def _stores(self) -> list[BatchStore]:
        return [store for store in (self._keys, self._values) if store is not None]

    def _filled(self) -> tuple[BatchStore, BatchStore]:
        if self._keys is None or self._values is None:
            raise ValueError(
                "[BatchRotorKVCache] The cache is empty; append keys and values first."
            )
        return self._keys, self._values

    def _new_store(self, role: str, like: mx.array) -> BatchStore:
        calibrated = None if self.calibrated is None else self.calibrated[ROLES.index(role)]
        like = like[:, :, :0]
        return BatchStore(self.config, self.layer, role, like, calibrated, self._max_blocks)

    def _saved_store(self, role: str, arrays: Sequence[Any]) -> BatchStore:
        exact, words, scales, centres, channel_scale = arrays
        store = self._new_store(role, exact)
        store.exact = with_room(exact, store.capacity - exact.shape[2])
        store.packed = None if words is None else Packed(words, scales, centres)
        if store.calibrated is None:
            store.channel_scale = channel_scale
        return store

    def _most_blocks(self) -> int:
        return max((-(-row.counts.packed // BLOCK) for row in self.rows), default=0)

    def _forget_padding(self) -> None:
        for row in self.rows:
            row.right = 0

    def _mask_of(self, row: Row, length: int, window_size: int | None) -> mx.array:
        """``[length, tokens]``: what the next queries of a row see."""
        counts = row.counts
        if row.left:
            mask = create_causal_mask(length, window_size=window_size)
            return mask[:, min(row.left, length) :]
        single = RotorKVCache(self.config, self.layer, self.max_size)
        single.counts = counts
        mask = single.make_mask(length, window_size, return_array=True)
        if not isinstance(mask, mx.array):  # a single query sees everything
            mask = mx.ones((length, counts.tokens + length), mx.bool_)
        return mask

    def _views(
        self, stores: tuple[BatchStore, BatchStore], rows: Sequence[Row]
    ) -> tuple[KVView, KVView]:
        lengths = [(row.counts.packed, row.counts.tokens + row.right) for row in rows]
        sink = self.config.sink
        return stores[0].view_rows(sink, lengths), stores[1].view_rows(sink, lengths)

    def _pack_tails(self, stores: Sequence[BatchStore], rows: Sequence[Row]) -> None:
        """Pack what the tails hold beyond the window; rows alike are encoded in one call."""
        while True:
            alike: dict[tuple[int, ...], list[int]] = {}
            for index, row in enumerate(rows):
                count = row.counts.packable(self.config)
                if count and self._max_blocks is not None:
                    slot = row.counts.next_block % self._max_blocks
                    count = min(count, (self._max_blocks - slot) * BLOCK)
                if count:
                    # A channel scale is the row's own, so it is encoded by itself.
                    own = (index,) if self.config.scales_channels else ()
                    alike.setdefault((count, row.counts.packed % BLOCK, *own), []).append(index)
            if not alike:
                break
            for (count, *_), indices in alike.items():
                counts = [rows[i].counts for i in indices]
                for store in stores:
                    store.pack_rows(self.config.sink, count, indices, counts)
                for c in counts:
                    c.add_packed(count, self._max_blocks)
        longest = max(row.counts.exact + row.right for row in rows)
        for store in stores:
            store.shrink(longest)


class BatchStore(Store):
    """The keys or the values of several sequences; a row lies in it as by itself.

    A channel scale that is taken from the first packed block is float32 ``[B, K, D]``.
    """

    def append_rows(self, x: mx.array, exact: Sequence[int], skipped: Sequence[int]) -> None:
        """Write tokens behind the exact ones of each row.

        Args:
            x: ``[B, K, L, D]``.
            exact: Exact tokens of each row before.
            skipped: How many of the L tokens of each row are left padding.
        """
        if len(set(exact)) == 1 and not any(skipped):
            self.append(x, exact[0])
            return
        length = x.shape[2]
        if any(skipped):
            # What comes behind the tokens of a row does not count.
            source = (mx.arange(length) + mx.array([*skipped])[:, None]) % length
            x = mx.take_along_axis(x, source[:, None, :, None], axis=2)
        if max(exact) + length > self.exact.shape[2]:
            self.exact = with_room(self.exact, max(exact) + length - self.exact.shape[2])
        place = mx.array([*exact])[:, None] + mx.arange(length)
        self.exact = mx.put_along_axis(
            self.exact, place[:, None, :, None], x.astype(self.exact.dtype), axis=2
        )

    def view_rows(self, sink: int, lengths: Sequence[tuple[int, int]]) -> KVView:
        """All tokens, as attention reads them; ``lengths`` are packed and all tokens of a row."""
        packed, tokens = (max(column) for column in zip(*lengths, strict=True))
        rows = tuple(lengths) if len(set(lengths)) > 1 else None
        return KVView(*self.handles(), sink, packed, tokens, rows)

    def pack_rows(
        self, sink: int, count: int, rows: Sequence[int], counts: Sequence[Counts]
    ) -> None:
        """Move the ``count`` exact tokens behind the sink of these rows into packed blocks.

        They have equally many tokens in their last block.
        """
        x = self._rows(self.exact[:, :, sink : sink + count], rows)
        filled = counts[0].packed % BLOCK
        scale = self.channel_scale
        if self.scales_channels:
            scale = self._channel_scale(
                x, rows[0], is_first=counts[0].packed == counts[0].evicted == 0
            )
        slots = [self.slot(c.next_block) for c in counts]
        last = None
        if filled and self.packed is not None:
            parts = [
                [a if a is None else a[i : i + 1, :, s : s + 1] for a in self.packed]
                for i, s in zip(rows, slots, strict=True)
            ]
            last = Packed(
                *(a[0] if a[0] is None else mx.concatenate(a) for a in zip(*parts, strict=True))
            )
        new = encode(self.codec, x, scale, last, filled)
        self._make_room(new, max(slots) + new.scales.shape[2])
        # Handles of their own: others may hold those there were.
        self.exact = self.exact[:]
        packed = Packed(*(a if a is None else a[:] for a in self.packed or (None,) * 3))
        self.packed = packed
        for place, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            stop = slot + new.scales.shape[2]
            for buffer, array in zip(packed, new, strict=True):
                if buffer is not None:
                    buffer[row : row + 1, :, slot:stop] = array[place : place + 1]
            # All behind: right padding, if any, moves with the tail.
            rest = self.exact[row : row + 1, :, sink + count :]
            self.exact[row : row + 1, :, sink : sink + rest.shape[2]] = rest

    def _channel_scale(self, x: mx.array, row: int, is_first: bool) -> mx.array:
        """The scale of a row, ``[K, D]``; taken from the first block that it packs."""
        if self.channel_scale is None:
            batch, heads, _, head_dim = self.exact.shape
            self.channel_scale = mx.ones((batch, heads, head_dim), mx.float32)
        if is_first:
            self.channel_scale = self.channel_scale[:]  # not what a view holds
            self.channel_scale[row] = backend().prefill_scale(x[:, :, :BLOCK], self.codec)
        return self.channel_scale[row]

    def _rows(self, a: mx.array, rows: Sequence[int]) -> mx.array:
        if len(rows) == a.shape[0]:
            return a
        return mx.concatenate([a[i : i + 1] for i in rows])

    def _make_room(self, like: Packed, blocks: int) -> None:
        """Let the packed buffers have at least so many blocks."""
        have = 0 if self.packed is None else self.packed.scales.shape[2]
        if blocks <= have:
            return
        room = blocks + self.room(blocks) - have
        batch = self.exact.shape[0]
        before: Iterable[mx.array | None] = self.packed or Packed(None, None, None)
        self.packed = Packed(
            *(
                n
                if n is None
                else with_room(mx.zeros((batch, n.shape[1], 0, *n.shape[3:]), n.dtype), room)
                if a is None
                else with_room(a, room)
                for a, n in zip(before, like, strict=True)
            )
        )

    def shrink(self, exact_tokens: int) -> None:
        """Give back what a long chunk needed beyond the capacity."""
        if self.exact.shape[2] > max(self.capacity, exact_tokens):
            kept = self.exact[:, :, :exact_tokens]
            self.exact = with_room(kept, self.capacity - exact_tokens)

    def take(self, rows: list[int], blocks: int) -> None:
        """Keep these rows, and so many blocks of them."""
        index = mx.array(rows, mx.int32)
        self.exact = self.exact[index]
        if self.scales_channels and self.channel_scale is not None:
            self.channel_scale = self.channel_scale[index]
        if self.packed is not None:
            kept = (a if a is None else a[index, :, :blocks] for a in self.packed)
            self.packed = Packed(*kept) if blocks else None

    def state_rows(self, exact_tokens: int, blocks: int) -> tuple[mx.array | None, ...]:
        """As :meth:`state`, up to the longest row."""
        packed = Packed(None, None, None)
        if self.packed is not None and blocks:
            packed = Packed(*(a if a is None else a[:, :, :blocks] for a in self.packed))
        return self.exact[:, :, :exact_tokens], *packed, self.saved_scale

    def single(self, row: int, counts: Counts, config: RotorConfig) -> Store:
        """A copy of one row."""
        part = slice(row, row + 1)
        exact = self.exact[part, :, : counts.exact]
        place = self.layer, self.codec.role
        store = Store(config, *place, exact, self.calibrated, self.max_blocks)
        if counts.packed:
            blocks = -(-counts.packed // BLOCK)
            packed = self.packed or Packed(None, None, None)
            store.packed = Packed(
                *(a if a is None else with_room(a[part, :, :blocks], 0) for a in packed)
            )
            if self.scales_channels and self.channel_scale is not None:
                store.channel_scale = mx.contiguous(self.channel_scale[row])
        return store

    @classmethod
    def join(cls, sources: Iterable[tuple[Store | None, int]]) -> BatchStore | None:
        """One store with the rows of several; None stands for rows that hold nothing.

        Raises:
            ValueError: If they differ in KV heads or head_dim.
        """
        given = list(sources)
        filled = [store for store, _ in given if store is not None]
        if not filled:
            return None
        first = filled[0]
        _, heads, _, head_dim = first.exact.shape
        for store in filled:
            if (store.exact.shape[1], store.exact.shape[3]) != (heads, head_dim):
                raise ValueError(
                    f"[BatchRotorKVCache] Rows of a batch must have {heads} KV heads and head_dim "
                    f"{head_dim}, but {store.exact.shape} came; they are of another model."
                )
        out = cls.__new__(cls)
        vars(out).update(vars(first))
        length = max(store.exact.shape[2] for store in filled)
        blocks = max(0 if s.packed is None else s.packed.scales.shape[2] for s in filled)
        pattern = next((s.packed for s in filled if s.packed is not None), None)
        out.exact = mx.concatenate(
            [
                _grown(store and store.exact, (n, heads, length, head_dim), first.exact.dtype)
                for store, n in given
            ]
        )
        out.packed = None
        if pattern is not None:
            out.packed = Packed(
                *(
                    p
                    if p is None
                    else mx.concatenate(
                        [
                            _grown(
                                store and store.packed and store.packed[place],
                                (n, heads, blocks, *p.shape[3:]),
                                p.dtype,
                            )
                            for store, n in given
                        ]
                    )
                    for place, p in enumerate(pattern)
                )
            )
        if first.scales_channels and any(store.channel_scale is not None for store in filled):
            out.channel_scale = mx.concatenate(
                [_scale_rows(store, n, heads, head_dim) for store, n in given]
            )
        return out


def _grown(a: Any, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array filled up with zeros along its third axis; all zeros for none."""
    if a is None:
        return mx.zeros(shape, dtype)
    return with_room(a.astype(dtype), shape[2] - a.shape[2])


def _scale_rows(store: Store | None, rows: int, heads: int, head_dim: int) -> mx.array:
    """The channel scale of each row; 1 where a row has none yet."""
    shape = (rows, heads, head_dim)
    if store is None or store.channel_scale is None:
        return mx.ones(shape, mx.float32)
    return mx.broadcast_to(store.channel_scale, shape)


def _check_same(caches: Sequence[Any]) -> None:
    """Refuse caches that cannot be rows of one batch."""
    kinds = {(cache.config.to_json(), cache.layer, cache.max_size) for cache in caches}
    if not all(same_calibrated(caches[0], other) for other in caches):
        raise ValueError(
            "[BatchRotorKVCache] Rows of a batch must share their calibration, but two came; make "
            "their caches anew."
        )
    if len(kinds) > 1:
        raise ValueError(
            "[BatchRotorKVCache] Rows of a batch must share configuration, layer and max_kv_size, "
            f"but they have {sorted(map(str, kinds))}; make them alike."
        )


def same_calibrated(one: Any, other: Any) -> bool:
    """Whether two caches have the same channel scales or rotations from a calibration, or none."""
    a, b = one.calibrated, other.calibrated
    if a is None or b is None:
        return a is b
    return all(x is y or mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))
