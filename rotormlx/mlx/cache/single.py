"""The compressed cache of one layer, in the shape that mlx-lm expects.

A sequence is three parts, in order: the **sink** (first tokens, exact), **packed** blocks of 64
tokens, and the **tail** (exact). New tokens enter the tail; whenever it holds ``window + 64``, its
oldest 64 become a block. So recent tokens are exact, every block has its own centre, and the
packed bytes do not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, _BaseCache, create_attention_mask

from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, ROLES, VALUE
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.store import (
    Calibrated,
    Counts,
    Store,
    calibrated_of,
    check_growth,
    check_update,
    damaged,
    max_blocks,
)
from rotormlx.mlx.cache.view import KVView

# Tokens of a filled cache that are converted at once: bounds the memory a conversion takes.
CONVERSION_TOKENS = 2048


class RotorKVCache(_BaseCache):
    """The keys and values of one layer, compressed.

    Args:
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.
        max_size: The most tokens to hold; None for no limit. Beyond it the oldest packed block
            goes; the sink stays, and positions keep growing.
        calibrated: Of a calibrated configuration, for keys and values: the channel scales, float32
            ``[K, D]``, or the rotations, float32 ``[K, D, D]``.

    Raises:
        ValueError: If ``max_size`` has no room for sink, window and a block.

    Source: docs/FORMAT.md, section 8.
    """

    def __init__(
        self,
        config: RotorConfig | None = None,
        layer: int = 0,
        max_size: int | None = None,
        calibrated: Calibrated | None = None,
    ) -> None:
        self.config = config or RotorConfig()
        self.layer = layer
        self.max_size = max_size
        self.calibrated = calibrated
        self.counts = Counts()
        self._max_blocks = max_blocks(max_size, self.config)
        self._keys: Store | None = None
        self._values: Store | None = None

    # ---- mlx-lm's contract ----------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.counts.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Append tokens.

        Args:
            keys: ``[B, K, S, D]``, float16, bfloat16 or float32.
            values: ``[B, K, S, Dv]``, likewise.

        Returns:
            Views of all keys and values, in which the tokens just appended are still exact.

        Raises:
            ValueError: If a shape or dtype does not fit.
            MemoryError: If MLX's memory limit leaves no room for them.

            Whatever is raised, an interrupt too: the cache is then unchanged.
        """
        check_update(keys, values, self._keys, self._values)
        counts = replace(self.counts)
        if self._keys is None or self._values is None:
            key_store, value_store = self._new_store(KEY, keys), self._new_store(VALUE, values)
        else:
            key_store, value_store = self._keys.twin(), self._values.twin()
        check_growth((key_store, value_store), [counts], keys.shape[2], self.config)
        key_store.append(keys, counts.exact)
        value_store.append(values, counts.exact)
        counts.tokens += keys.shape[2]
        sink = self.config.sink
        views = key_store.view(sink, counts), value_store.view(sink, counts)
        self._pack_tail((key_store, value_store), counts)
        # One step, between whose halves no interrupt comes.
        vars(self).update(_keys=key_store, _values=value_store, counts=counts)
        return views

    def keys_and_values(self) -> tuple[KVView, KVView]:
        """Views of all keys and values."""
        key_store, value_store = self._filled()
        sink = self.config.sink
        return key_store.view(sink, self.counts), value_store.view(sink, self.counts)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The attention mask for N new tokens, as mlx-lm's growing cache makes it."""
        if window_size is None or not self.counts.evicted:
            return create_attention_mask(N, self.counts.tokens, return_array, window_size)
        held = mx.concatenate([self._positions(), mx.arange(self.offset, self.offset + N)])
        new = held[-N:, None]
        return (held <= new) & (held > new - window_size)

    def size(self) -> int:
        """The tokens held, S."""
        return self.counts.tokens

    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self._keys is None

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be forgotten: not once some were evicted."""
        return not self.counts.evicted

    def trim(self, n: int) -> int:
        """Forget the last n tokens.

        In the tail that is exact. A packed block that loses tokens keeps its centre and its rows
        and counts fewer of them; it is filled up again from the tail, with the same centre. No row
        is ever quantized twice.

        Returns:
            How many tokens were forgotten: n, or all there were; once tokens were evicted, no more
            than the tail holds.
        """
        packed = self.counts.packed
        n = self.counts.trim(n, self.config)
        if packed and not self.counts.packed:
            for store in self._filled():
                store.forget_packed()
        return n

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> RotorKVCache:
        """What mlx-lm calls when ``kv_bits`` is given: a warning, and the cache as it is."""
        warnings.warn(
            f"kv_bits={bits} asks for mlx-lm's own cache quantization, but this cache is already "
            f"compressed by rotormlx, at {self.bits_per_value:g} bits a value; leave kv_bits out, "
            "or call rotormlx.remove(model) first.",
            stacklevel=2,
        )
        return self

    @classmethod
    def merge(cls, caches: Sequence[RotorKVCache]) -> Any:
        """One :class:`BatchRotorKVCache` with a row for each cache; see there."""
        from rotormlx.mlx.cache.batch import BatchRotorKVCache  # noqa: PLC0415 - each makes the other

        return BatchRotorKVCache.merge(caches)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(store.nbytes for store in self._stores)

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything, as mlx-lm saves it: numbers, one string, and arrays or None.

        Source: docs/FORMAT.md, section 8.
        """
        counts = self.counts
        header = (
            FORMAT_VERSION,
            self.config.to_json(),
            self.layer,
            counts.tokens,
            counts.packed,
        )
        arrays = (array for store in self._stores for array in store.state(counts))
        limit = () if self.max_size is None else (self.max_size, counts.evicted)
        return header + tuple(arrays) + limit

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        """Take what was saved.

        Raises:
            ValueError: If it is not the state of such a cache, or of another format version.
        """
        self.config, self.layer, self.max_size, self.counts = _read_header(state)
        self._max_blocks = max_blocks(self.max_size, self.config)
        self._keys = self._values = self.calibrated = None
        if len(state) >= _HEADER + 2 * _STORE:
            known = (self.config, self.layer, self.counts)
            first, second = _HEADER + _STORE, _HEADER + 2 * _STORE
            self._keys = Store.from_state(KEY, state[_HEADER:first], *known)
            self._values = Store.from_state(VALUE, state[first:second], *known)
            self._keys.max_blocks = self._values.max_blocks = self._max_blocks
            if self._keys.exact.shape[:2] != self._values.exact.shape[:2]:
                raise damaged("keys and values that agree in batch and KV heads", "others")
            self.calibrated = calibrated_of(self._keys, self._values)

    @property
    def keys(self) -> mx.array | None:
        """An empty array that stands for the keys.

        Pipeline-parallel models assign ``cache.keys = mx.depends(cache.keys, sent)``, so that what
        they sent is computed along with the cache.
        """
        return None if self._keys is None else self._keys.exact[:, :, :0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        store, _ = self._filled()
        store.exact = mx.depends(store.exact, keys)

    @property
    def values(self) -> mx.array | None:
        """An empty array that stands for the values, as :attr:`keys` does."""
        return None if self._values is None else self._values.exact[:, :, :0]

    # ---- beyond the contract --------------------------------------------------------------------

    @classmethod
    def from_kv_cache(
        cls,
        cache: KVCache,
        config: RotorConfig | None = None,
        layer: int = 0,
        calibrated: Calibrated | None = None,
    ) -> RotorKVCache:
        """Compress a filled cache of mlx-lm; the source is left as it is.

        The memory taken besides source and result is that of ``CONVERSION_TOKENS`` tokens.
        """
        out = cls(config, layer, calibrated=calibrated)
        if cache.empty():
            return out
        keys, values = cache.keys_and_values()
        for start in range(0, cache.offset, CONVERSION_TOKENS):
            part = slice(start, start + CONVERSION_TOKENS)
            out.update_and_fetch(keys[:, :, part], values[:, :, part])
            mx.eval(out.state)
        return out

    @property
    def packed_tokens(self) -> int:
        """Tokens held in packed blocks."""
        return self.counts.packed

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held, without room for growth, and without what is calibrated."""
        shared = sum(array.nbytes for array in self.calibrated or ())
        return sum(a.nbytes for a in self.state if isinstance(a, mx.array)) - shared

    @property
    def bits_per_value(self) -> float:
        """True bits a value of the packed part, keys and values together."""
        codecs = [store.codec for store in self._filled()]
        bits = sum(c.bits_per_value * c.head_dim for c in codecs)
        return bits / sum(c.head_dim for c in codecs)

    # ---- inside ---------------------------------------------------------------------------------

    @property
    def _stores(self) -> list[Store]:
        return [store for store in (self._keys, self._values) if store is not None]

    def _filled(self) -> tuple[Store, Store]:
        if self._keys is None or self._values is None:
            raise ValueError("[RotorKVCache] The cache is empty; append keys and values first.")
        return self._keys, self._values

    def _new_store(self, role: str, like: mx.array) -> Store:
        calibrated = None if self.calibrated is None else self.calibrated[ROLES.index(role)]
        like = like[:, :, :0]
        return Store(self.config, self.layer, role, like, calibrated, self._max_blocks)

    def _pack_tail(self, stores: Sequence[Store], counts: Counts) -> None:
        """Pack what the tail holds beyond the window, a block's worth at a time."""
        while count := counts.packable(self.config):
            if self._max_blocks is not None:
                # Not beyond the end of the ring in one go.
                slot = counts.next_block % self._max_blocks
                count = min(count, (self._max_blocks - slot) * BLOCK)
            for store in stores:
                store.pack(self.config.sink, count, counts)
            counts.add_packed(count, self._max_blocks)

    def _positions(self) -> mx.array:
        """The position of every token held, in the order in which attention reads them."""
        counts, slots = self.counts, self.counts.packed // BLOCK
        slot = mx.arange(slots)
        # Block n lies at n mod slots; the youngest has the number next_block - 1.
        number = counts.next_block - 1 - (counts.next_block - 1 - slot) % slots
        packed = number[:, None] * BLOCK + mx.arange(BLOCK) + self.config.sink
        tail = mx.arange(counts.offset - (counts.exact - self.config.sink), counts.offset)
        return mx.concatenate([mx.arange(self.config.sink), packed.reshape(-1), tail])


_HEADER = 5  # format version, configuration, layer, tokens, packed tokens
_STORE = 5  # exact, words, scales, centres, channel scale
_LIMIT = 2  # max_size and evicted tokens, where there is a limit


def _read_header(state: Sequence[Any]) -> tuple[RotorConfig, int, int | None, Counts]:
    if len(state) not in [n + m for n in (_HEADER, _HEADER + 2 * _STORE) for m in (0, _LIMIT)]:
        raise damaged(f"{_HEADER} or {_HEADER + 2 * _STORE} entries", len(state))
    version, config, layer, tokens, packed = state[:_HEADER]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"[RotorKVCache] This rotormlx reads format version {FORMAT_VERSION}, but the saved "
            f"cache has version {version}; make it again, or use the rotormlx that wrote it."
        )
    if not isinstance(config, str):
        raise damaged("a configuration in JSON", config)
    chosen = RotorConfig.from_json(config)
    limited = len(state) % 5 == _LIMIT
    max_size, evicted = state[-_LIMIT:] if limited else (None, 0)
    numbers = (layer, tokens, packed, evicted, *((max_size,) if limited else ()))
    if any(type(n) is not int or n < 0 for n in numbers):
        raise damaged("layer, tokens and packed tokens as integers from 0", numbers)
    blocks = max_blocks(max_size, chosen)
    sink = chosen.sink if packed else 0
    full = blocks is not None and packed == blocks * BLOCK
    if (
        packed + sink > tokens
        or (len(state) < 2 * _STORE and tokens)
        or (blocks is not None and packed > blocks * BLOCK)
        or (evicted and (not full or evicted % BLOCK))
    ):
        raise damaged("counts that add up", numbers)
    return chosen, layer, max_size, Counts(tokens, packed, evicted)
