"""The buffers of one layer's keys or values.

The cache tracks how many tokens of them count (:class:`Counts`) and passes this to the methods of a
:class:`Store`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import mlx.core as mx
import numpy as np

from rotormlx.codec import limits, rotation, trellis
from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK, KEY, VALUE, Codec, Packed, codec
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.dtypes import FLOATS
from rotormlx.storage.cache_fields import SavedStore

# The calibrated arrays for the keys and for the values of a layer.
Calibrated = tuple[mx.array, mx.array]


def check_update(
    keys: mx.array, values: mx.array, key_store: Store | None, value_store: Store | None
) -> None:
    """Refuse tokens whose shape or dtype does not fit each other or the cache."""
    for role, x in ((KEY, keys), (VALUE, values)):
        if x.ndim != 4 or x.dtype not in FLOATS or x.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"[RotorKVCache] Keys and values must have shape [B, K, S, head_dim], equal up "
                f"to head_dim, and be float16, bfloat16 or float32, but the {role}s have shape "
                f"{x.shape} and dtype {x.dtype}, with keys of shape {keys.shape}."
            )
    for store, x in ((key_store, keys), (value_store, values)):
        if store is not None:
            store.check_like(x)


def check_growth(
    stores: Sequence[Store], rows: Sequence[Counts], tokens: int, config: RotorConfig
) -> None:
    """Refuse to append tokens beyond the last position, or beyond MLX's memory limit.

    Args:
        stores: The stores of keys and of values.
        rows: The counts of each batch row.
        tokens: The number of tokens appended to each row.
        config: The configuration, which gives sink and window.

    Raises:
        ValueError: If the sequence would have more tokens than kernels can count.
        MemoryError: If MLX's memory limit leaves no room for the buffers.
    """
    limits.check_tokens("RotorKVCache", max(counts.offset for counts in rows) + tokens)
    exact = max(counts.exact for counts in rows) + tokens
    blocks = max(counts.blocks_after(tokens, config) for counts in rows)
    needed = sum(store.new_bytes(exact, blocks) for store in stores)
    limit, used = mx.get_memory_limit(), mx.get_active_memory() if needed else 0
    if used + needed > limit:
        raise MemoryError(
            f"[RotorKVCache] Appending {tokens:,} tokens needs {needed:,} bytes, but MLX has "
            f"{used:,} of its limit of {limit:,} in use; give max_kv_size, free models and caches, "
            "or raise mx.set_memory_limit."
        )


class Store:
    """The keys or the values of one layer: exact tokens in one buffer, packed blocks in others.

    Args:
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotation.
        role: ``"key"`` or ``"value"``.
        exact: The first exact tokens, ``[B, K, E, D]``.
        calibrated: The channel scale, float32 ``[K, D]``, or the rotations, float32 ``[K, D, D]``,
            of a calibrated configuration; else None.
        max_blocks: The most packed blocks; see :class:`Counts`.

    Raises:
        ValueError: If the calibrated array is missing or does not fit.
    """

    def __init__(
        self,
        config: RotorConfig,
        layer: int,
        role: str,
        exact: mx.array,
        calibrated: mx.array | None = None,
        max_blocks: int | None = None,
    ) -> None:
        self.layer = layer
        self.capacity = config.sink + config.window + BLOCK
        self.scales_channels = config.scales_channels
        self.calibrated = calibrated
        self.codec = _codec(config, layer, role, exact, calibrated)
        self.max_blocks = max_blocks
        self.exact = with_room(exact, self.capacity - exact.shape[2])
        self.packed: Packed | None = None
        # [K, D], for attention and encoding; [B, K, D] if batch rows have their own.
        self.channel_scale = None if config.rotation == CALIBRATED else calibrated

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Both are immutable, and arrays derived from a codec are cached per codec object.
        memo |= {id(same): same for same in (self.codec, self.calibrated)}
        twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def twin(self) -> Self:
        """Return a store with the same buffers; writes to one do not change the other."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def new_bytes(self, exact_tokens: int, blocks: int) -> int:
        """Return the bytes of the new buffers that so many exact tokens and blocks need."""
        batch, heads, room, head_dim = self.exact.shape
        made = 0
        if exact_tokens > room:
            made += batch * heads * exact_tokens * head_dim * self.exact.itemsize
        if self.max_blocks is not None:
            blocks = min(blocks, self.max_blocks)
        if blocks > (0 if self.packed is None else self.packed.scales.shape[2]):
            made += batch * heads * (blocks + self.room(blocks)) * self.codec.block_bytes
        return made

    def check_like(self, x: mx.array) -> None:
        """Refuse tokens of another batch, number of heads or head_dim."""
        batch, heads, _, head_dim = self.exact.shape
        if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
            raise ValueError(
                f"[RotorKVCache] This cache holds {self.codec.role}s of shape "
                f"[{batch}, {heads}, S, {head_dim}], but shape {x.shape} was appended; "
                "use another cache for them."
            )

    def append(self, x: mx.array, exact_tokens: int) -> None:
        """Write tokens after the exact ones; a chunk beyond the capacity widens the buffer."""
        x = x.astype(self.exact.dtype)
        stop = exact_tokens + x.shape[2]
        if stop <= self.exact.shape[2]:
            self.exact = written(self.exact, slice(exact_tokens, stop), x)
        else:
            self.exact = mx.concatenate([self.exact[:, :, :exact_tokens], x], axis=2)

    def view(self, sink: int, counts: Counts) -> KVView:
        """Return a view of all tokens for attention."""
        return KVView(*self.handles(), sink, counts.packed, counts.tokens)

    def handles(self) -> tuple[Codec, mx.array, Packed | None, mx.array | None]:
        """Return the handles for a view; nothing is ever written through them."""
        return self.codec, self.exact, self.packed, self.channel_scale

    def pack(self, sink: int, count: int, counts: Counts) -> None:
        """Move the ``count`` exact tokens after the sink into packed blocks."""
        x = self.exact[:, :, sink : sink + count]
        slot, filled = counts.next_slot(self.max_blocks), counts.packed % BLOCK
        if self.scales_channels and counts.packed == 0 and not counts.evicted:
            self.channel_scale = backend().prefill_scale(x[:, :, :BLOCK], self.codec)
        last = sliced(self.packed, slot, slot + 1) if filled and self.packed else None
        self._write(encode(self.codec, x, self.channel_scale, last, filled), slot)

        rest = self.exact[:, :, sink + count : counts.exact]
        kept = mx.concatenate([self.exact[:, :, :sink], rest], axis=2)
        self.exact = with_room(kept, self.capacity - kept.shape[2])

    def room(self, blocks: int) -> int:
        """Return how many blocks to allocate in advance, so that a long cache is rarely copied."""
        room = max(4, blocks // 32)
        return room if self.max_blocks is None else min(room, self.max_blocks - blocks)

    def _write(self, new: Packed, slot: int) -> None:
        """Write blocks at ``slot`` and the slots after it."""
        stop = slot + new.scales.shape[2]
        if self.packed is not None and stop <= self.packed.scales.shape[2]:
            place = slice(slot, stop)
            self.packed = by_part(lambda a, b: written(a, place, b), self.packed, new)
            return
        if self.packed is not None:
            before = sliced(self.packed, 0, slot)
            new = by_part(lambda a, b: mx.concatenate([a, b], axis=2), before, new)
        room = self.room(stop)
        self.packed = by_part(lambda a: with_room(a, room), new)

    def forget_packed(self) -> None:
        """Drop the packed blocks and the channel scale derived from the first of them."""
        self.packed = None
        if self.scales_channels:
            self.channel_scale = None

    def saved(self, counts: Counts) -> SavedStore:
        """Return the arrays to save."""
        packed, scale = Packed(None, None, None), None
        if self.packed is not None and counts.blocks:
            packed, scale = sliced(self.packed, 0, counts.blocks), self.channel_scale
        if self.calibrated is not None:
            scale = self.calibrated
        return SavedStore(self.exact[:, :, : counts.exact], *packed, scale)

    @classmethod
    def from_saved(
        cls, config: RotorConfig, layer: int, role: str, saved: SavedStore, max_blocks: int | None
    ) -> Self:
        """Make a store from checked arrays of :meth:`saved`."""
        calibrated = saved.channel_scale if config.is_calibrated else None
        store = cls(config, layer, role, saved.exact, calibrated, max_blocks)
        if saved.words is not None:
            store.packed = Packed(saved.words, saved.scales, saved.centres)
        if not config.is_calibrated:
            store.channel_scale = saved.channel_scale
        return store

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers of this store."""
        # Calibrated arrays do not count, because all caches of a model share them.
        own_scale = self.channel_scale if self.calibrated is None else None
        return [a for a in (self.exact, own_scale, *(self.packed or ())) if a is not None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including room for growth."""
        return sum(a.nbytes for a in self.arrays)


def same_calibrated(a: Calibrated | None, b: Calibrated | None) -> bool:
    """Whether two caches have the same channel scales or rotations from a calibration, or none."""
    if a is None or b is None:
        return a is b
    return all(x is y or mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


def _codec(
    config: RotorConfig, layer: int, role: str, exact: mx.array, calibrated: mx.array | None
) -> Codec:
    _, heads, _, head_dim = exact.shape
    if config.is_calibrated:
        wanted = config.calibrated_shape(heads, head_dim)
        if calibrated is None or calibrated.shape != wanted:
            have = "none" if calibrated is None else f"{calibrated.shape}"
            raise ValueError(
                f"[RotorKVCache] A calibrated cache needs an array {wanted} for the {role}s of "
                f"layer {layer}, but got {have}; make caches with rotormlx.make_prompt_cache, or "
                "calibrate this model: rotormlx calibrate MODEL."
            )
    if config.rotation != CALIBRATED:
        return codec(config, head_dim, layer=layer, role=role)
    return Codec(role, config.code_bits(role), rotation.calibrated(np.array(calibrated)))


def encode(
    codec: Codec, x: mx.array, channel_scale: mx.array | None, last: Packed | None, filled: int
) -> Packed:
    """Pack tokens into new blocks, or into block ``last``, which already has ``filled`` tokens."""
    if last is None:
        return backend().encode(x, codec, channel_scale=channel_scale)
    rows = mx.pad(x, [(0, 0), (0, 0), (filled, 0), (0, 0)])
    new = backend().encode(
        rows,
        codec,
        channel_scale=channel_scale,
        centres=last.centres,
        start=filled,
        state=trellis.state_after(last.words, filled) if codec.has_state else None,
    )
    kept = mx.array(codec.kept_bits(filled))
    words = (last.words & kept) | (new.words & ~kept)
    scales = mx.where(mx.arange(BLOCK) < filled, last.scales, new.scales)
    return Packed(words, scales, last.centres)


# ---- buffers ------------------------------------------------------------------------------------


def by_part(change: Callable[..., mx.array], *packed: Packed) -> Packed:
    """Apply ``change`` to the words, the scales and, if there are any, the centres."""
    parts = zip(*packed, strict=True)
    return Packed(*(None if part[0] is None else change(*part) for part in parts))


def sliced(packed: Packed, start: int, stop: int) -> Packed:
    """Return blocks ``start`` to ``stop``."""
    return by_part(lambda a: a[:, :, start:stop], packed)


def written(buffer: mx.array, place: slice, new: mx.array) -> mx.array:
    """Return the buffer with new content along its third axis; the given handle is unchanged."""
    own = buffer[:]  # a new handle, without a copy
    own[:, :, place] = new
    return own


def with_room(a: mx.array, room: int) -> mx.array:
    """Return a copy padded with zeros along the third axis; it keeps no larger buffer alive."""
    shape = (*a.shape[:2], max(0, room), *a.shape[3:])
    return mx.concatenate([a, mx.zeros(shape, a.dtype)], axis=2)
