"""The compressed cache of one layer, in the shape that mlx-lm expects.

A sequence is three parts, in order: the **sink** (first tokens, exact), **packed** blocks of 64
tokens, and the **tail** (exact). New tokens enter the tail; whenever it holds ``window + 64``, its
oldest 64 become a block. So recent tokens are exact, every block has its own centre, and the
packed bytes do not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, _BaseCache, create_attention_mask

from rotormlx.backends import backend
from rotormlx.config import RotorConfig
from rotormlx.format import BLOCK, FORMAT_VERSION, KEY, VALUE, Codec, Packed, codec
from rotormlx.view import KVView

# Tokens of a filled cache that are converted at once: bounds the memory a conversion takes.
CONVERSION_TOKENS = 2048

_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


class RotorKVCache(_BaseCache):
    """The keys and values of one layer, compressed.

    Args:
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.

    Source: docs/FORMAT.md, section 8.
    """

    def __init__(self, config: RotorConfig | None = None, layer: int = 0) -> None:
        self.config = config or RotorConfig()
        self.layer = layer
        self.offset = 0
        self.packed_tokens = 0
        self._keys: _Store | None = None
        self._values: _Store | None = None

    # ---- mlx-lm's contract ----------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Append tokens.

        Args:
            keys: ``[B, K, S, D]``, float16, bfloat16 or float32.
            values: ``[B, K, S, Dv]``, likewise.

        Returns:
            Views of all keys and values, in which the tokens just appended are still exact.

        Raises:
            ValueError: If a shape or dtype does not fit; the cache is then unchanged.
        """
        key_store, value_store = self._stores_for(keys, values)
        exact = self._exact_tokens
        key_store.append(keys, exact)
        value_store.append(values, exact)
        self._keys, self._values = key_store, value_store
        self.offset += keys.shape[2]
        views = self.keys_and_values()
        self._pack_tail()
        return views

    def keys_and_values(self) -> tuple[KVView, KVView]:
        """Views of all keys and values."""
        key_store, value_store = self._filled()
        counts = (self.config.sink, self.packed_tokens, self.offset)
        return key_store.view(*counts), value_store.view(*counts)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The attention mask for N new tokens, as mlx-lm's growing cache makes it."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    def size(self) -> int:
        """All tokens, S."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self._keys is None

    def is_trimmable(self) -> bool:
        """Always: see :meth:`trim`."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens.

        In the tail that is exact. A packed block that loses tokens keeps its centre and its rows
        and counts fewer of them; it is filled up again from the tail, with the same centre. No row
        is ever quantized twice.

        Returns:
            How many tokens were forgotten: n, or all there were.
        """
        n = max(0, min(n, self.offset))
        tail = self._exact_tokens - min(self.config.sink, self._exact_tokens)
        from_packed = min(max(n - tail, 0), self.packed_tokens)
        self.packed_tokens -= from_packed
        self.offset -= n
        if from_packed and self.packed_tokens == 0:
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

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(store.nbytes for store in self._stores)

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything, as mlx-lm saves it: numbers, one string, and arrays or None.

        Source: docs/FORMAT.md, section 8.
        """
        header = (
            FORMAT_VERSION,
            self.config.to_json(),
            self.layer,
            self.offset,
            self.packed_tokens,
        )
        return header + tuple(
            array
            for store in self._stores
            for array in store.state(self.offset, self.packed_tokens)
        )

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        """Take what was saved.

        Raises:
            ValueError: If it is not the state of such a cache, or of another format version.
        """
        self.config, self.layer, self.offset, self.packed_tokens = _read_header(state)
        self._keys = self._values = None
        if len(state) > _HEADER:
            keys, values = state[_HEADER : _HEADER + _STORE], state[_HEADER + _STORE :]
            self._keys = _Store.from_state(KEY, keys, self)
            self._values = _Store.from_state(VALUE, values, self)
            if self._keys.exact.shape[:2] != self._values.exact.shape[:2]:
                raise _damaged("keys and values that agree in batch and KV heads", "others")

    # ---- beyond the contract --------------------------------------------------------------------

    @classmethod
    def from_kv_cache(
        cls, cache: KVCache, config: RotorConfig | None = None, layer: int = 0
    ) -> RotorKVCache:
        """Compress a filled cache of mlx-lm; the source is left as it is.

        The memory taken besides source and result is that of ``CONVERSION_TOKENS`` tokens.
        """
        out = cls(config, layer)
        if cache.empty():
            return out
        keys, values = cache.keys_and_values()
        for start in range(0, cache.offset, CONVERSION_TOKENS):
            part = slice(start, start + CONVERSION_TOKENS)
            out.update_and_fetch(keys[:, :, part], values[:, :, part])
            mx.eval(out.state)
        return out

    @property
    def bits_per_value(self) -> float:
        """True bits a value of the packed part, keys and values together."""
        codecs = [store.codec for store in self._filled()]
        bits = sum(c.bits_per_value * c.head_dim for c in codecs)
        return bits / sum(c.head_dim for c in codecs)

    # ---- inside ---------------------------------------------------------------------------------

    @property
    def _exact_tokens(self) -> int:
        return self.offset - self.packed_tokens

    @property
    def _stores(self) -> list[_Store]:
        return [store for store in (self._keys, self._values) if store is not None]

    def _filled(self) -> tuple[_Store, _Store]:
        if self._keys is None or self._values is None:
            raise ValueError("[RotorKVCache] The cache is empty; append keys and values first.")
        return self._keys, self._values

    def _stores_for(self, keys: mx.array, values: mx.array) -> tuple[_Store, _Store]:
        """The stores that these tokens go to, made anew for the first; checks all before."""
        for role, x in ((KEY, keys), (VALUE, values)):
            if x.ndim != 4 or x.dtype not in _FLOATS or x.shape[:3] != keys.shape[:3]:
                raise ValueError(
                    f"[RotorKVCache] Keys and values must have shape [B, K, S, head_dim], equal up "
                    f"to head_dim, and be float16, bfloat16 or float32, but the {role}s have shape "
                    f"{x.shape} and dtype {x.dtype} beside keys of shape {keys.shape}."
                )
        if self._keys is None or self._values is None:
            return self._new_store(KEY, keys), self._new_store(VALUE, values)
        for store, x in ((self._keys, keys), (self._values, values)):
            store.check_like(x)
        return self._keys, self._values

    def _new_store(self, role: str, like: mx.array) -> _Store:
        chosen = codec(self.config, like.shape[-1], layer=self.layer, role=role)
        return _Store(chosen, self.config, like[:, :, :0])

    def _pack_tail(self) -> None:
        """Pack what the tail holds beyond the window, a block's worth at a time."""
        sink, window = self.config.sink, self.config.window
        while True:
            spare = max(0, self._exact_tokens - sink - window)
            count = -self.packed_tokens % BLOCK or spare // BLOCK * BLOCK
            if count == 0 or count > spare:
                break
            for store in self._stores:
                store.pack(sink, count, self.packed_tokens, self._exact_tokens)
            self.packed_tokens += count


class _Store:
    """The keys or the values of one layer: exact tokens in one buffer, packed blocks in others.

    Lengths are the cache's to know; every method is told them.
    """

    def __init__(self, codec: Codec, config: RotorConfig, exact: mx.array) -> None:
        self.codec = codec
        self.capacity = config.sink + config.window + BLOCK
        self.scales_channels = config.scales_channels
        self.exact = _with_room(exact, self.capacity - exact.shape[2])
        self.packed: Packed | None = None
        self.channel_scale: mx.array | None = None

    def check_like(self, x: mx.array) -> None:
        batch, heads, _, head_dim = self.exact.shape
        if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
            raise ValueError(
                f"[RotorKVCache] This cache holds {self.codec.role}s of shape "
                f"[{batch}, {heads}, S, {head_dim}], but shape {x.shape} was appended; "
                "use a cache of its own."
            )

    def append(self, x: mx.array, exact_tokens: int) -> None:
        """Write tokens behind the exact ones; a chunk beyond the capacity widens the buffer."""
        x = x.astype(self.exact.dtype)
        stop = exact_tokens + x.shape[2]
        if stop <= self.exact.shape[2]:
            self.exact[:, :, exact_tokens:stop] = x
        else:
            self.exact = mx.concatenate([self.exact[:, :, :exact_tokens], x], axis=2)

    def view(self, sink: int, packed_tokens: int, tokens: int) -> KVView:
        # A slice is a handle of its own: what is written into a buffer later does not show in it.
        packed = None if self.packed is None else _slice(self.packed, 0, None)
        exact = self.exact[:, :, :]
        return KVView(self.codec, exact, packed, self.channel_scale, sink, packed_tokens, tokens)

    def pack(self, sink: int, count: int, packed_tokens: int, exact_tokens: int) -> None:
        """Move the ``count`` exact tokens behind the sink into packed blocks."""
        x = self.exact[:, :, sink : sink + count]
        if filled := packed_tokens % BLOCK:
            self._fill_up(x, packed_tokens // BLOCK, filled)
        else:
            if self.scales_channels and self.channel_scale is None:
                self.channel_scale = backend().prefill_scale(x[:, :, :BLOCK], self.codec)
            new = backend().encode(x, self.codec, channel_scale=self.channel_scale)
            self._write(new, packed_tokens // BLOCK)

        rest = self.exact[:, :, sink + count : exact_tokens]
        kept = mx.concatenate([self.exact[:, :, :sink], rest], axis=2)
        self.exact = _with_room(kept, self.capacity - kept.shape[2])

    def _fill_up(self, x: mx.array, block: int, filled: int) -> None:
        """Complete the last block, which counts ``filled`` tokens, with its own centre."""
        if self.packed is None:
            raise ValueError("[RotorKVCache] There is no packed block to fill up.")
        last = _slice(self.packed, block, block + 1)
        rows = mx.pad(x, [(0, 0), (0, 0), (filled, 0), (0, 0)])
        new = backend().encode(
            rows, self.codec, channel_scale=self.channel_scale, centres=last.centres
        )
        kept = mx.array(self.codec.kept_bits(filled))
        words = (last.words & kept) | (new.words & ~kept)
        scales = mx.where(mx.arange(BLOCK) < filled, last.scales, new.scales)
        self._write(Packed(words, scales, last.centres), block)

    def _write(self, new: Packed, block: int) -> None:
        """Put blocks at position ``block``; what stood there and behind it counts no longer."""
        stop = block + new.scales.shape[2]
        if self.packed is not None and stop <= self.packed.scales.shape[2]:
            for buffer, array in zip(self.packed, new, strict=True):
                if buffer is not None:
                    buffer[:, :, block:stop] = array
            return
        # Room for a thirty-second more than needed, so that a long cache is seldom copied.
        before = (None,) * 3 if self.packed is None else _slice(self.packed, 0, block)
        self.packed = Packed(
            *(_joined(a, b, max(4, stop // 32)) for a, b in zip(before, new, strict=True))
        )

    def forget_packed(self) -> None:
        self.packed = self.channel_scale = None

    def state(self, tokens: int, packed_tokens: int) -> tuple[mx.array | None, ...]:
        """The arrays that count: exact, words, scales, centres, channel scale."""
        blocks = -(-packed_tokens // BLOCK)
        packed = Packed(None, None, None) if self.packed is None else _slice(self.packed, 0, blocks)
        return self.exact[:, :, : tokens - packed_tokens], *packed, self.channel_scale

    @classmethod
    def from_state(cls, role: str, arrays: Sequence[Any], cache: RotorKVCache) -> _Store:
        """The store whose :meth:`state` was saved; ``cache`` knows the counts.

        Raises:
            ValueError: If a shape or dtype is not what the counts ask for.
        """
        exact, words, scales, centres, channel_scale = arrays
        if not isinstance(exact, mx.array) or exact.ndim != 4 or exact.dtype not in _FLOATS:
            raise _damaged(f"exact {role}s as a floating array of 4 dimensions", exact)
        batch, heads, _, head_dim = exact.shape
        chosen = codec(cache.config, head_dim, layer=cache.layer, role=role)
        blocks = -(-cache.packed_tokens // BLOCK)
        front = (batch, heads, blocks)
        is_key = role == KEY and blocks > 0
        scales_channels = cache.config.scales_channels and blocks > 0
        _require(
            f"exact {role}s", exact, (batch, heads, cache._exact_tokens, head_dim), exact.dtype
        )
        _require(
            f"{role} words", words, (*front, *chosen.words_shape) if blocks else None, mx.uint32
        )
        _require(f"{role} scales", scales, (*front, BLOCK) if blocks else None, mx.float16)
        _require(f"{role} centres", centres, (*front, head_dim) if is_key else None, mx.float16)
        _require(
            f"{role} channel scale",
            channel_scale,
            (heads, head_dim) if scales_channels else None,
            mx.float32,
        )
        store = cls(chosen, cache.config, exact)
        store.packed = Packed(words, scales, centres) if blocks else None
        store.channel_scale = channel_scale
        return store

    @property
    def nbytes(self) -> int:
        arrays = [self.exact, self.channel_scale, *(self.packed or ())]
        return sum(a.nbytes for a in arrays if a is not None)


# ---- buffers ------------------------------------------------------------------------------------


def _slice(packed: Packed, start: int, stop: int | None) -> Packed:
    return Packed(*(a if a is None else a[:, :, start:stop] for a in packed))


def _with_room(a: mx.array, room: int) -> mx.array:
    """A copy with zeros behind the third axis; no larger buffer stays alive through it."""
    shape = (*a.shape[:2], max(0, room), *a.shape[3:])
    return mx.concatenate([a, mx.zeros(shape, a.dtype)], axis=2)


def _joined(before: mx.array | None, new: mx.array | None, room: int) -> mx.array | None:
    if new is None:
        return None
    return _with_room(new if before is None else mx.concatenate([before, new], axis=2), room)


# ---- what was saved -----------------------------------------------------------------------------

_HEADER = 5  # format version, configuration, layer, offset, packed tokens
_STORE = 5  # exact, words, scales, centres, channel scale


def _read_header(state: Sequence[Any]) -> tuple[RotorConfig, int, int, int]:
    if len(state) not in (_HEADER, _HEADER + 2 * _STORE):
        raise _damaged(f"{_HEADER} or {_HEADER + 2 * _STORE} entries", len(state))
    version, config, layer, offset, packed_tokens = state[:_HEADER]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"[RotorKVCache] This rotormlx reads format version {FORMAT_VERSION}, but the saved "
            f"cache has version {version}; make it again, or use the rotormlx that wrote it."
        )
    if not isinstance(config, str):
        raise _damaged("a configuration in JSON", config)
    chosen = RotorConfig.from_json(config)
    counts = (layer, offset, packed_tokens)
    if any(type(n) is not int or n < 0 for n in counts):
        raise _damaged("layer, offset and packed tokens as integers from 0", counts)
    sink = chosen.sink if packed_tokens else 0
    if packed_tokens + sink > offset or (len(state) == _HEADER and offset):
        raise _damaged("counts that add up", counts)
    return chosen, layer, offset, packed_tokens


def _require(name: str, array: Any, shape: tuple[int, ...] | None, dtype: mx.Dtype) -> None:
    have = (array.shape, array.dtype) if isinstance(array, mx.array) else array
    want = None if shape is None else (shape, dtype)
    if have != want:
        raise _damaged(f"{name} of shape and dtype {want}", have)


def _damaged(required: str, came: object) -> ValueError:
    return ValueError(
        f"[RotorKVCache] A saved cache must hold {required}, but it holds {came!r}; "
        "the file is damaged: make it again."
    )
