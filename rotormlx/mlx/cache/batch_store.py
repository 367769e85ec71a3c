"""The buffers of one layer's keys or values for several sequences of different lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK, Packed
from rotormlx.config import RotorConfig
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.store import Store, by_part, encode, with_room
from rotormlx.mlx.cache.view import KVView


class BatchStore(Store):
    """The keys or the values of several sequences; each row is stored as in a :class:`Store`.

    A channel scale derived from the first packed block is float32 ``[B, K, D]``.
    """

    def append_rows(self, x: mx.array, exact: Sequence[int], skipped: Sequence[int]) -> None:
        """Write tokens after the exact ones of each row.

        Args:
            x: ``[B, K, L, D]``.
            exact: Exact tokens of each row before this call.
            skipped: How many of the L tokens of each row are left padding.
        """
        if len(set(exact)) == 1 and not any(skipped):
            self.append(x, exact[0])
            return
        length = x.shape[2]
        if any(skipped):
            # Left padding is rotated behind the tokens of a row, where it does not count.
            source = (mx.arange(length) + mx.array([*skipped])[:, None]) % length
            x = mx.take_along_axis(x, source[:, None, :, None], axis=2)
        if max(exact) + length > self.exact.shape[2]:
            self.exact = with_room(self.exact, max(exact) + length - self.exact.shape[2])
        place = mx.array([*exact])[:, None] + mx.arange(length)
        self.exact = mx.put_along_axis(
            self.exact, place[:, None, :, None], x.astype(self.exact.dtype), axis=2
        )

    def view_rows(self, sink: int, lengths: Sequence[tuple[int, int]]) -> KVView:
        """Return a view of all tokens; ``lengths`` are the packed and all tokens of each row."""
        packed, tokens = (max(column) for column in zip(*lengths, strict=True))
        rows = tuple(lengths) if len(set(lengths)) > 1 else None
        return KVView(*self.handles(), sink, packed, tokens, rows)

    def pack_rows(
        self, sink: int, count: int, rows: Sequence[int], counts: Sequence[Counts]
    ) -> None:
        """Move the ``count`` exact tokens after the sink of these rows into packed blocks.

        All rows must have the same number of tokens in their last block. A row with a channel scale
        of its own must be packed alone.
        """
        x = self.exact[:, :, sink : sink + count]
        if len(rows) < x.shape[0]:
            x = mx.concatenate([x[row : row + 1] for row in rows])
        scale = self.channel_scale
        if self.scales_channels:
            is_first = counts[0].packed == counts[0].evicted == 0
            scale = self._row_scale(rows[0], x if is_first else None)
        slots = [c.next_slot(self.max_blocks) for c in counts]
        filled = counts[0].packed % BLOCK
        last = self._blocks(rows, slots) if filled else None
        self._write_rows(encode(self.codec, x, scale, last, filled), rows, slots)
        self._close_gap(sink, count, rows)

    def _row_scale(self, row: int, first: mx.array | None) -> mx.array:
        """Return the channel scale of a row, ``[K, D]``, derived from ``first`` if it is given."""
        if self.channel_scale is None:
            batch, heads, _, head_dim = self.exact.shape
            self.channel_scale = mx.ones((batch, heads, head_dim), mx.float32)
        if first is not None:
            self.channel_scale = self.channel_scale[:]  # a new handle: a view may hold the old one
            self.channel_scale[row] = backend().prefill_scale(first[:, :, :BLOCK], self.codec)
        return self.channel_scale[row]

    def _blocks(self, rows: Sequence[int], slots: Sequence[int]) -> Packed | None:
        """Return one block of each of these rows."""
        if self.packed is None:
            return None
        places = [*zip(rows, slots, strict=True)]
        return by_part(
            lambda a: mx.concatenate([a[i : i + 1, :, s : s + 1] for i, s in places]), self.packed
        )

    def _write_rows(self, new: Packed, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Write blocks of these rows, from the slot of each row on."""
        blocks = new.scales.shape[2]
        # New handles, because views may hold the old ones.
        packed = by_part(lambda a: a[:], self._with_room(new, max(slots) + blocks))
        for place, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            for buffer, array in zip(packed, new, strict=True):
                if buffer is not None:
                    buffer[row : row + 1, :, slot : slot + blocks] = array[place : place + 1]
        self.packed = packed

    def _with_room(self, like: Packed, blocks: int) -> Packed:
        """Return packed buffers with room for ``blocks`` blocks and the content of the store."""
        packed = self.packed
        if packed is None:
            batch = self.exact.shape[0]
            packed = by_part(
                lambda a: mx.zeros((batch, a.shape[1], 0, *a.shape[3:]), a.dtype), like
            )
        have = packed.scales.shape[2]
        if blocks <= have:
            return packed
        room = blocks + self.room(blocks) - have
        return by_part(lambda a: with_room(a, room), packed)

    def _close_gap(self, sink: int, count: int, rows: Sequence[int]) -> None:
        """Move the tokens and padding after the ``count`` packed tokens up to the sink."""
        self.exact = self.exact[:]  # a new handle, as above
        for row in rows:
            rest = self.exact[row : row + 1, :, sink + count :]
            self.exact[row : row + 1, :, sink : sink + rest.shape[2]] = rest

    def shrink(self, exact_tokens: int) -> None:
        """Free the part of the buffer beyond the capacity that a long chunk needed."""
        if self.exact.shape[2] > max(self.capacity, exact_tokens):
            kept = self.exact[:, :, :exact_tokens]
            self.exact = with_room(kept, self.capacity - exact_tokens)

    def take(self, rows: list[int], blocks: int) -> None:
        """Keep these rows, with ``blocks`` blocks each."""
        index = mx.array(rows, mx.int32)
        self.exact = self.exact[index]
        if self.scales_channels and self.channel_scale is not None:
            self.channel_scale = self.channel_scale[index]
        if self.packed is not None:
            kept = by_part(lambda a: a[index, :, :blocks], self.packed)
            self.packed = kept if blocks else None

    def single(self, row: int, counts: Counts, config: RotorConfig) -> Store:
        """Return a copy of one row."""
        part, blocks = slice(row, row + 1), counts.blocks
        exact = self.exact[part, :, : counts.exact]
        role = self.codec.role
        store = Store(config, self.layer, role, exact, self.calibrated, self.max_blocks)
        if blocks and self.packed is not None:
            store.packed = by_part(lambda a: with_room(a[part, :, :blocks], 0), self.packed)
            if self.scales_channels and self.channel_scale is not None:
                store.channel_scale = mx.contiguous(self.channel_scale[row])
        return store

    @classmethod
    def join(cls, sources: Iterable[tuple[Store | None, int]]) -> BatchStore | None:
        """Join the rows of several stores.

        Args:
            sources: Stores, each with its number of rows; None for rows that hold nothing.

        Raises:
            ValueError: If they differ in KV heads or head_dim.
        """
        given = list(sources)
        filled = [store for store, _ in given if store is not None]
        if not filled:
            return None
        _check_dims(filled)
        joined = cls.__new__(cls)
        vars(joined).update(vars(filled[0]))
        exact = _stacked([(None if s is None else s.exact, n) for s, n in given])
        packed = [(None if s is None else s.packed, n) for s, n in given]
        parts = (
            _stacked([(None if p is None else p[place], n) for p, n in packed])
            for place in range(len(Packed._fields))
        )
        has_packed = any(p is not None for p, _ in packed)
        vars(joined).update(exact=exact, packed=Packed(*parts) if has_packed else None)
        if joined.scales_channels and any(store.channel_scale is not None for store in filled):
            _, heads, _, head_dim = filled[0].exact.shape
            scales = [_scale_rows(store, (n, heads, head_dim)) for store, n in given]
            joined.channel_scale = mx.concatenate(scales)
        return joined


def _check_dims(stores: Sequence[Store]) -> None:
    """Refuse rows that differ in KV heads or head_dim."""
    _, heads, _, head_dim = stores[0].exact.shape
    for store in stores:
        if (store.exact.shape[1], store.exact.shape[3]) != (heads, head_dim):
            raise ValueError(
                f"[BatchRotorKVCache] Rows of a batch must have {heads} KV heads and head_dim "
                f"{head_dim}, but one has shape {store.exact.shape}; use caches of the same model."
            )


def _stacked(parts: Sequence[tuple[mx.array | None, int]]) -> mx.array | None:
    """Join arrays ``[n, K, S, ...]`` to one ``[B, K, longest S, ...]``, padded with zeros.

    Args:
        parts: Arrays, each with its n; None for n rows of zeros.

    Returns:
        The joined array; None if all parts are None.
    """
    arrays = [a for a, _ in parts if a is not None]
    if not arrays:
        return None
    like, longest = arrays[0], max(a.shape[2] for a in arrays)
    rows = []
    for given, n in parts:
        a = mx.zeros((n, like.shape[1], 0, *like.shape[3:])) if given is None else given
        rows.append(with_room(a.astype(like.dtype), longest - a.shape[2]))
    return mx.concatenate(rows)


def _scale_rows(store: Store | None, shape: tuple[int, int, int]) -> mx.array:
    """Return the channel scale of each row of a store, ``[n, K, D]``; 1 if it has none yet."""
    if store is None or store.channel_scale is None:
        return mx.ones(shape, mx.float32)
    return mx.broadcast_to(store.channel_scale, shape)
