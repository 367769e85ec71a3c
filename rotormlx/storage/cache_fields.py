"""The state of a saved compressed cache: position, dtype and shape of every entry.

A state is a flat list, as mlx-lm saves it. This module names its entries and derives the dtypes and
shapes of the arrays from the numbers. All code that reads or writes states uses this module: for
MLX, for torch and for the header of a file.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from rotormlx.codec.counts import Counts, are_possible, least_size, max_blocks, sliding_size
from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, words_shape
from rotormlx.codec.parts import Part, keys_and_values, latent_and_rope
from rotormlx.config import RotorConfig

# The classes in a file that this module describes.
SINGLE, BATCH = "RotorKVCache", "BatchRotorKVCache"
# Caches of latents: for attention that reads them packed, and for models that need them as arrays.
LATENT, LATENT_BATCH = "LatentKVCache", "BatchLatentKVCache"
DECODED_LATENT, DECODED_LATENT_BATCH = "DecodedLatentKVCache", "BatchDecodedLatentKVCache"
SLIDING, BATCH_SLIDING = "SlidingRotorKVCache", "BatchSlidingRotorKVCache"
CHUNKED = "ChunkedRotorKVCache"
# The classes that a file may name, each with the class whose layout of the state it uses.
LAYOUTS = {
    **{SINGLE: SINGLE, "DecodedRotorKVCache": SINGLE},
    **{BATCH: BATCH, "BatchDecodedRotorKVCache": BATCH},
    **{LATENT: LATENT, DECODED_LATENT: LATENT},
    **{LATENT_BATCH: LATENT_BATCH, DECODED_LATENT_BATCH: LATENT_BATCH},
    **{SLIDING: SLIDING, BATCH_SLIDING: BATCH_SLIDING, CHUNKED: CHUNKED},
}
# The dtypes of exact tokens, as files name them.
FLOATS = ("F16", "BF16", "F32")


class Field(NamedTuple):
    """The dtype of an array, as files name it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class SavedStore(NamedTuple):
    """The arrays of a cache's keys or values, or the :class:`Field` of each.

    An array that the cache does not have is None.

    exact: Sink, then tail: float16, bfloat16 or float32 ``[B, K, E, D]``.
    words: uint32 ``[B, K, N, rows, lanes]``.
    scales: float16 ``[B, K, N, 64]``.
    centres: float16 ``[B, K, N, D]``, for keys only.
    channel_scale: float32 ``[K, D]``, or ``[B, K, D]`` in a batch. In a calibrated cache, the array
        of the calibration: ``[K, D]``, or ``[K, D, D]`` for rotations.
    """

    exact: Any
    words: Any
    scales: Any
    centres: Any
    channel_scale: Any


_HEADER = 5  # entries before the arrays, in single caches and batches
_STORE = len(SavedStore._fields)
_LIMIT = 2  # entries after the arrays of a single cache with a limit
# Number of additional entries at the end: the sliding window; or chunk size and first position.
_OWN = {SLIDING: 1, BATCH_SLIDING: 1, CHUNKED: 2}


class SavedCache(NamedTuple):
    """The state of a ``RotorKVCache``, or of a ``LatentKVCache``, whose values are RoPE parts.

    The entries are: format version, configuration, layer, tokens, packed tokens; the arrays of keys
    and values, if the cache ever held any; limit and evicted tokens, if it has a limit.
    """

    config: RotorConfig
    layer: int
    max_size: int | None
    counts: Counts
    stores: tuple[SavedStore, ...]

    @property
    def calibrated(self) -> tuple[Any, Any] | None:
        """The calibrated arrays of keys and values; None without calibration or arrays."""
        return _calibrated(self.config, self.stores)

    @property
    def state(self) -> tuple[Any, ...]:
        """The entries of the state in their order."""
        counts = self.counts
        header = (FORMAT_VERSION, self.config.to_json(), self.layer, counts.tokens, counts.packed)
        limit = () if self.max_size is None else (self.max_size, counts.evicted)
        return (*header, *chain(*self.stores), *limit)

    @classmethod
    def named(cls, state: Sequence[Any], config: RotorConfig) -> Self:
        """Name the entries; the caller must have checked their number and the configuration."""
        layer, tokens, packed = state[2:_HEADER]
        max_size, evicted = state[-_LIMIT:] if len(state) % _STORE == _LIMIT else (None, 0)
        return cls(config, layer, max_size, Counts(tokens, packed, evicted), _stores(state))

    @classmethod
    def read(cls, state: Sequence[Any], reader: StateReader) -> Self:
        """Name the entries after a check of each.

        Raises:
            ValueError: If an entry is not as required, or the format version differs.
        """
        state, own = _without_own(state, reader)
        limited = len(state) % _STORE == _LIMIT
        reader.entries(len(state) - _LIMIT * limited, _HEADER, _HEADER + 2 * _STORE)
        saved = cls.named(state, _config(state, reader))
        counts, limit = saved.counts, () if saved.max_size is None else (saved.max_size,)
        reader.integers(saved.layer, counts.tokens, counts.packed, counts.evicted, *limit)
        table = np.array([[counts.tokens, counts.packed, counts.evicted]])
        _check_counts(saved, table, reader)
        _check_own(own, saved, counts.tokens, reader)
        if saved.stores:
            _check_stores(saved, counts, reader, rows=None)
        return saved


class SavedBatch(NamedTuple):
    """The state of a ``BatchRotorKVCache``, or of a ``BatchLatentKVCache``.

    The entries are: format version, configuration, layer, limit or None, the table of counts (int32
    ``[B, 3]``: tokens, packed tokens and evicted tokens of each row); the arrays of keys and
    values, if the cache ever held any, with the length that the longest row needs.
    """

    config: RotorConfig
    layer: int
    max_size: int | None
    table: Any
    stores: tuple[SavedStore, ...]

    @property
    def calibrated(self) -> tuple[Any, Any] | None:
        """The calibrated arrays of keys and values; None without calibration or arrays."""
        return _calibrated(self.config, self.stores)

    @property
    def state(self) -> tuple[Any, ...]:
        """The entries of the state in their order."""
        header = (FORMAT_VERSION, self.config.to_json(), self.layer, self.max_size, self.table)
        return (*header, *chain(*self.stores))

    @classmethod
    def named(cls, state: Sequence[Any], config: RotorConfig) -> Self:
        """Name the entries; the caller must have checked their number and the configuration."""
        layer, max_size, table = state[2:_HEADER]
        return cls(config, layer, max_size, table, _stores(state))

    @classmethod
    def read(cls, state: Sequence[Any], reader: StateReader) -> Self:
        """Name the entries after a check of each.

        Raises:
            ValueError: If an entry is not as required, or the format version differs.
        """
        state, own = _without_own(state, reader)
        reader.entries(len(state), _HEADER, _HEADER + 2 * _STORE)
        saved = cls.named(state, _config(state, reader))
        layer, max_size, table = saved.layer, saved.max_size, saved.table
        reader.integers(layer, *(() if max_size is None else (max_size,)))
        field = reader.field(table)
        has_counts = isinstance(field, Field) and field.dtype == "I32" and len(field.shape) == 2
        reader.require(has_counts and field.shape[1] == 3, "three counts per row", field)
        counts = reader.numbers(table).astype(np.int64)
        _check_counts(saved, counts, reader)
        _check_own(own, saved, 0, reader)
        if saved.stores:
            exact = int((counts[:, 0] - counts[:, 1]).max(initial=0))
            packed = int(counts[:, 1].max(initial=0))
            _check_stores(saved, Counts(exact + packed, packed), reader, rows=len(counts))
        return saved


class StateReader(ABC):
    """The base of classes that check a state: access to its arrays, and the errors of a misfit.

    Attributes:
        name: The class of the cache.
    """

    name: str

    @abstractmethod
    def field(self, entry: Any) -> Any:
        """Return the :class:`Field` of an array; other values unchanged."""

    @abstractmethod
    def numbers(self, entry: Any) -> npt.NDArray[Any]:
        """Return the content of an array of integers."""

    @abstractmethod
    def refuse(self, required: str, came: object) -> ValueError:
        """Return the error for a state that is not as required."""

    @abstractmethod
    def refuse_version(self, version: object) -> ValueError:
        """Return the error for another format version."""

    def config(self, text: str) -> RotorConfig:
        """Parse a configuration."""
        return RotorConfig.from_json(text)

    def parts(self, config: RotorConfig) -> tuple[Part, Part]:
        """Return the two parts of a cache of this class and configuration."""
        return parts(self.name, config)

    def require(self, holds: bool, required: str, came: object) -> None:
        """Refuse the state unless ``holds`` is true."""
        if not holds:
            raise self.refuse(required, came)

    def entries(self, count: int, *allowed: int) -> None:
        """Require that the number of entries is one of those allowed."""
        self.require(count in allowed, f"{' or '.join(map(str, allowed))} entries", count)

    def integers(self, *values: Any) -> None:
        """Require integers from 0 to 2**31 - 1."""
        are_right = all(type(n) is int and 0 <= n < 2**31 for n in values)
        self.require(are_right, "integers from 0", values)

    def floating(self, what: str, entry: Any) -> Field:
        """Require a floating array of 4 dimensions."""
        field = self.field(entry)
        is_array = isinstance(field, Field) and len(field.shape) == 4 and field.dtype in FLOATS
        self.require(is_array, f"{what} as a floating array of 4 dimensions", field)
        return field

    def array(self, what: str, entry: Any, wanted: Field | None) -> None:
        """Require an array of the dtype and shape ``wanted``, or None if ``wanted`` is None."""
        came = self.field(entry)
        shown = None if wanted is None else tuple(wanted)
        self.require(came == wanted, f"{what} of dtype and shape {shown}", came)


def parts(name: str, config: RotorConfig) -> tuple[Part, Part]:
    """Return the parts of a cache of the class ``name``: keys and values, or latent and RoPE."""
    is_latent = LAYOUTS.get(name) in (LATENT, LATENT_BATCH)
    return latent_and_rope(config) if is_latent else keys_and_values(config)


def _stores(state: Sequence[Any]) -> tuple[SavedStore, ...]:
    """Return the arrays of keys and values; empty for a cache that never held any."""
    arrays = state[_HEADER : _HEADER + 2 * _STORE]
    if len(arrays) < 2 * _STORE:
        return ()
    return SavedStore(*arrays[:_STORE]), SavedStore(*arrays[_STORE:])


def _calibrated(config: RotorConfig, stores: Sequence[SavedStore]) -> tuple[Any, Any] | None:
    """Return the calibrated arrays of keys and values; None without calibration or arrays."""
    if not config.is_calibrated or not stores:
        return None
    return stores[0].channel_scale, stores[1].channel_scale


def kv_dims(stores: Sequence[SavedStore]) -> tuple[int, int, int] | None:
    """Return KV heads, key dimension and value dimension; None if a cache holds no arrays."""
    if not stores:
        return None
    _, heads, _, key_dim = stores[0].exact.shape
    return heads, key_dim, stores[1].exact.shape[3]


def _config(state: Sequence[Any], reader: StateReader) -> RotorConfig:
    version, text = state[:2]
    if version != FORMAT_VERSION or type(version) is not int:
        raise reader.refuse_version(version)
    reader.require(type(text) is str, "a configuration in JSON", text)
    return reader.config(text)


def _without_own(state: Sequence[Any], reader: StateReader) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split entries into the entries that all classes have and the entries of this class only."""
    stop = len(state) - _OWN.get(reader.name, 0)
    return state[:stop], state[stop:]


def _check_own(
    own: Sequence[Any], saved: SavedCache | SavedBatch, tokens: int, reader: StateReader
) -> None:
    """Require that the entries of this class only are consistent with the other entries."""
    reader.integers(*own)
    if reader.name in (SLIDING, BATCH_SLIDING):
        (window,) = own
        limit = sliding_size(window, saved.config) if window else None
        is_right = window > 0 and saved.max_size == limit
        reader.require(is_right, f"a window, and its limit {limit}", (window, saved.max_size))
    elif own:
        size, start = own
        is_right = size > 0 and start % size == 0 and tokens <= size and saved.max_size is None
        reader.require(is_right, "a chunk that begins at a multiple of its size", (*own, tokens))


def _check_counts(
    saved: SavedCache | SavedBatch, table: npt.NDArray[Any], reader: StateReader
) -> None:
    """Require counts that a sequence can have, and no tokens without arrays."""
    config, limit = saved.config, saved.max_size
    fits = limit is None or limit >= least_size(config)
    reader.require(fits, "a limit with room for a block", limit)
    right = are_possible(table, config, max_blocks(limit, config))
    if not saved.stores:
        right &= table[:, 0] == 0
    reader.require(bool(right.all()), "counts that add up", table[~right][:3].tolist())


def _check_stores(
    saved: SavedCache | SavedBatch, longest: Counts, reader: StateReader, rows: int | None
) -> None:
    """Require the arrays that follow from the longest row; ``rows`` is B if known, else None."""
    fronts = set()
    for part, store in zip(reader.parts(saved.config), saved.stores, strict=True):
        exact = reader.floating(f"exact {part.name}", store.exact)
        wanted = _fields(part.config, part.role, exact, longest, rows)
        for name, array, field in zip(SavedStore._fields, store, wanted, strict=True):
            of = part.name.removesuffix("s")
            what = f"exact {part.name}" if name == "exact" else f"{of} {name.replace('_', ' ')}"
            reader.array(what, array, field)
        fronts.add(exact.shape[:2])
    reader.require(len(fronts) == 1, "keys and values that agree in batch and KV heads", fronts)


def _fields(
    config: RotorConfig, role: str, exact: Field, longest: Counts, rows: int | None
) -> SavedStore:
    """Return the required field of each array of a role.

    dtype, batch, KV heads and head_dim follow from ``exact``.
    """
    batch, heads, _, head_dim = exact.shape
    if rows is not None:
        batch = rows
    words = scales = centres = channel_scale = None
    if blocks := longest.blocks:
        front = (batch, heads, blocks)
        bits = config.code_bits(role)
        words = Field("U32", (*front, *words_shape(role, bits, head_dim)))
        scales = Field("F16", (*front, BLOCK))
        centres = Field("F16", (*front, head_dim)) if role == KEY else None
    if config.is_calibrated:
        channel_scale = Field("F32", config.calibrated_shape(heads, head_dim))
    elif config.scales_channels and blocks:
        by_row = () if rows is None else (rows,)
        channel_scale = Field("F32", (*by_row, heads, head_dim))
    held = Field(exact.dtype, (batch, heads, longest.exact, head_dim))
    return SavedStore(held, words, scales, centres, channel_scale)
