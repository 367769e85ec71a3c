"""The compressed cache of a layer whose tokens see a sliding window of the latest tokens.

It is a :class:`RotorKVCache` with a limit, in which a new block replaces the oldest one. Besides
sink and tail, it holds packed tokens for the whole window. A mask hides tokens beyond the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from rotormlx.codec.counts import Counts, sliding_size
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.batch import BatchRotorKVCache, Row
from rotormlx.mlx.cache.batch_store import BatchStore
from rotormlx.mlx.cache.masks import growing_mask
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import Calibrated, Store
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage.cache_fields import BATCH_SLIDING, SLIDING


class SlidingRotorKVCache(RotorKVCache):
    """The keys and values of a layer with a sliding window, compressed.

    Args:
        sliding_window: The tokens that a token sees, itself included.
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: See :class:`RotorKVCache`.
    """

    kind = SLIDING
    own_entries = ("sliding_window",)

    def __init__(
        self,
        sliding_window: int,
        config: RotorConfig | None = None,
        layer: int = 0,
        calibrated: Calibrated | None = None,
    ) -> None:
        config = config or RotorConfig()
        super().__init__(config, layer, sliding_size(sliding_window, config), calibrated)
        self.sliding_window = sliding_window

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens; ``window_size`` may be below the window.

        Raises:
            ValueError: If no model is compressed, so that the attention could not read this cache.
        """
        self._check_readable()
        window = _asked(N, window_size, self.sliding_window)
        after = replace(self.counts, tokens=self.counts.tokens + N)
        mask = visible([after], self.config, window, N)
        if mask is not None:
            return mask[0, 0]
        return growing_mask(N, self.counts.tokens, None, return_array)

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.sliding_window, self.config, self.layer, self.calibrated

    def _views(self, stores: tuple[Store, Store], counts: Counts) -> tuple[KVView, KVView]:
        keys, values = super()._views(stores, counts)
        seen = partial(visible, [replace(counts)], self.config, self.sliding_window)
        return replace(keys, visible=seen), values


class BatchSlidingRotorKVCache(BatchRotorKVCache):
    """The keys and values of a layer with a sliding window for B sequences, compressed.

    Args:
        left_padding: See :class:`BatchRotorKVCache`.
        sliding_window: See :class:`SlidingRotorKVCache`.
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: See :class:`RotorKVCache`.
    """

    _single = SlidingRotorKVCache
    kind = BATCH_SLIDING
    own_entries = ("sliding_window",)

    def __init__(
        self,
        left_padding: Sequence[int],
        sliding_window: int,
        config: RotorConfig | None = None,
        layer: int = 0,
        calibrated: Calibrated | None = None,
    ) -> None:
        config = config or RotorConfig()
        size = sliding_size(sliding_window, config)
        super().__init__(left_padding, config, layer, size, calibrated)
        self.sliding_window = sliding_window

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens; see :class:`SlidingRotorKVCache`.

        Raises:
            ValueError: If no model is compressed, so that the attention could not read this cache.
        """
        self._check_readable()
        window = _asked(N, window_size, self.sliding_window)
        rows = [row.copy() for row in self.rows]
        for row in rows:
            row.append(N)
        mask = visible(list(map(_with_padding, rows)), self.config, window, N)
        return super().make_mask(N, None, return_array) if mask is None else mask

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.sliding_window, self.config, self.layer, self.calibrated

    def _views(
        self, stores: tuple[BatchStore, BatchStore], rows: Sequence[Row]
    ) -> tuple[KVView, KVView]:
        keys, values = super()._views(stores, rows)
        counts = list(map(_with_padding, rows))
        seen = partial(visible, counts, self.config, self.sliding_window)
        return replace(keys, visible=seen), values


def _asked(length: int, window_size: int | None, sliding_window: int) -> int:
    """Return how many tokens a token sees, limited as in ``RotatingKVCache``."""
    if window_size is None:
        return sliding_window
    return min(window_size, sliding_window) if length == 1 else window_size


def _with_padding(row: Row) -> Counts:
    """Return the counts of a row with its right padding, which attention counts as tokens."""
    return replace(row.counts, tokens=row.counts.tokens + row.right)


def visible(
    rows: Sequence[Counts], config: RotorConfig, sliding_window: int, length: int
) -> mx.array | None:
    """Return the mask of the last ``length`` tokens of some sequences.

    Args:
        rows: The counts of each sequence, B of them.
        config: The configuration, which gives the sink.
        sliding_window: The tokens that a token sees, itself included.
        length: L.

    Returns:
        Booleans ``[B, 1, L, S]``, where S is the most tokens of a sequence; None if the window
        reaches all tokens.
    """
    if all(counts.offset <= sliding_window for counts in rows):
        return None
    if length == 1:
        return _of_one(tuple((c.tokens, c.packed, c.evicted) for c in rows), config, sliding_window)
    longest = max(counts.tokens for counts in rows)
    masks = []
    for counts in rows:
        held = mx.array(counts.positions(config))
        new = mx.arange(counts.offset - length, counts.offset)[:, None]
        mask = (held <= new) & (held > new - sliding_window)
        masks.append(mx.pad(mask, [(0, 0), (0, longest - counts.tokens)]))
    return mx.stack(masks)[:, None]


@lru_cache(maxsize=4)
def _of_one(
    rows: tuple[tuple[int, int, int], ...], config: RotorConfig, sliding_window: int
) -> mx.array:
    """Return the mask of one token per sequence; all layers of a step share it."""
    mask = np.zeros((len(rows), 1, 1, max(tokens for tokens, *_ in rows)), np.bool_)
    for row, numbers in zip(mask, rows, strict=True):
        counts = Counts(*numbers)
        held = counts.positions(config)
        row[0, 0, : held.size] = held >= counts.offset - sliding_window
    return mx.array(mask)
