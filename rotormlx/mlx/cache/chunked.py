"""The compressed cache of a layer with chunked attention: a token sees only its chunk.

Chunks begin at multiples of their size. The cache holds the latest chunk as a sequence of its own,
with a sink, packed blocks and a tail.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import mlx.core as mx

from rotormlx.codec import limits
from rotormlx.codec.counts import Counts
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.masks import growing_mask
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import Calibrated, Store
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage.cache_fields import CHUNKED


class _Absent:
    """A descriptor that hides a method of the base class."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.message = f"{owner.__name__} has no batches"

    def __get__(self, cache: Any, owner: type) -> NoReturn:
        raise AttributeError(self.message)


class ChunkedRotorKVCache(RotorKVCache):
    """The keys and values of a layer with chunked attention, compressed.

    Args:
        chunk_size: Tokens per chunk.
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: See :class:`RotorKVCache`.

    Attributes:
        start_position: The position of the first token held.
    """

    kind = CHUNKED
    own_entries = ("chunk_size", "start_position")

    def __init__(
        self,
        chunk_size: int,
        config: RotorConfig | None = None,
        layer: int = 0,
        calibrated: Calibrated | None = None,
    ) -> None:
        super().__init__(config, layer, None, calibrated)
        self.chunk_size = chunk_size
        self.start_position = 0

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.start_position + self.counts.tokens

    def maybe_trim_front(self) -> None:
        """Drop a full chunk, since the next token begins another; models call this first."""
        if self.counts.tokens and self.offset % self.chunk_size == 0:
            vars(self).update(vars(self._begun(self.offset)))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Append tokens; see :meth:`RotorKVCache.update_and_fetch`.

        The views also have tokens of earlier chunks if some of the new tokens see them.
        """
        limits.check_tokens("RotorKVCache", self.offset + keys.shape[2])
        whole = copy.copy(self)
        views = RotorKVCache.update_and_fetch(whole, keys, values)
        # A chunk that was just filled stays until the next token, because it may still be trimmed.
        latest = self.begun_for(whole.offset)
        if latest.start_position > self.start_position:
            # MLX is lazy: packed tokens of earlier chunks are never computed.
            new = whole.offset - latest.start_position
            latest.update_and_fetch(keys[:, :, -new:], values[:, :, -new:])
            whole = latest
            whole._latest = views
        vars(self).update(vars(whole))
        return views

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens; ``window_size`` is ignored.

        Raises:
            ValueError: If no model is compressed, so that the attention could not read this cache.
        """
        self._check_readable()
        mask = visible(self.start_position, self.offset + N, self.chunk_size, N)
        if mask is not None:
            return mask
        return growing_mask(N, self.counts.tokens, None, return_array)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be dropped: not after a chunk was dropped."""
        return not self.start_position

    # No batches, because models with chunks read one position for all rows.
    merge = to_batch = prefix_cache_merge = _Absent()

    def begun_for(self, stop: int) -> ChunkedRotorKVCache:
        """Return an empty cache like this for the chunk that ends before ``stop``."""
        return self._begun((max(stop, 1) - 1) // self.chunk_size * self.chunk_size)

    def _begun(self, start: int) -> ChunkedRotorKVCache:
        begun = copy.copy(self)
        empty = {"counts": Counts(), "_keys": None, "_values": None, "_latest": None}
        vars(begun).update(empty, start_position=start)
        return begun

    def _views(self, stores: tuple[Store, Store], counts: Counts) -> tuple[KVView, KVView]:
        keys, values = super()._views(stores, counts)
        stop = self.start_position + counts.tokens
        seen = partial(visible, self.start_position, stop, self.chunk_size)
        return replace(keys, visible=seen), values


def visible(start: int, stop: int, chunk_size: int, length: int) -> mx.array | None:
    """Return the mask of the last ``length`` of the tokens ``start`` to ``stop``.

    Returns:
        Booleans ``[length, stop - start]``; None if all tokens are in one chunk.
    """
    if not length or start // chunk_size == (stop - 1) // chunk_size:
        return None
    held, new = mx.arange(start, stop), mx.arange(stop - length, stop)[:, None]
    return (held <= new) & (held // chunk_size == new // chunk_size)
