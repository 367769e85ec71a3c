"""Counts the tokens of a sequence: in the sink, in packed blocks and in the tail.

All caches count with this module: single caches and batches, on MLX and on torch.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rotormlx.codec import limits
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig

# The smallest sliding window, and the smallest chunk of chunked attention, that is compressed: sink
# and tail alone take a quarter of it.
LEAST_SLIDING_WINDOW = 512


@dataclass
class Counts:
    """The counts of one sequence.

    ``max_blocks``, an argument of several methods, is the largest number of packed blocks that the
    cache holds, or None for no limit. With a limit, block n is stored in slot n mod ``max_blocks``
    and evicts the block that was there.

    Args:
        tokens: Number of tokens held: sink, packed and tail.
        packed: Number of packed tokens among them; the last block may be partly filled.
        evicted: Number of tokens that were packed once and are no longer held; whole blocks.
    """

    tokens: int = 0
    packed: int = 0
    evicted: int = 0

    @property
    def exact(self) -> int:
        """Number of tokens in the sink and the tail."""
        return self.tokens - self.packed

    @property
    def blocks(self) -> int:
        """Number of packed blocks held, a partly filled one included."""
        return -(-self.packed // BLOCK)

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.tokens + self.evicted

    @property
    def next_block(self) -> int:
        """The index, counted from the start of the sequence, of the block that is filled next."""
        return (self.packed + self.evicted) // BLOCK

    def next_slot(self, max_blocks: int | None = None) -> int:
        """Return the slot of the block that is filled next."""
        return self.next_block if max_blocks is None else self.next_block % max_blocks

    def tail(self, config: RotorConfig) -> int:
        """Return the number of exact tokens after the sink."""
        return max(0, self.exact - config.sink)

    def packable(self, config: RotorConfig, max_blocks: int | None = None) -> int:
        """Return the number of tokens of the tail to pack next; 0 for none.

        They either complete a partly filled block or fill whole blocks: at most as many as one call
        may encode, and none beyond the last slot.
        """
        spare = self.exact - config.sink - config.window
        if begun := self.packed % BLOCK:
            return BLOCK - begun if BLOCK - begun <= spare else 0
        if spare < BLOCK:
            return 0
        count = min(spare // BLOCK * BLOCK, limits.MOST_ENCODED)
        if max_blocks is not None:
            count = min(count, (max_blocks - self.next_slot(max_blocks)) * BLOCK)
        return count

    def add_packed(self, count: int, max_blocks: int | None = None) -> None:
        """Count ``count`` tokens of the tail as packed, and evict tokens that exceed the limit."""
        self.packed += count
        if max_blocks is not None and (beyond := self.packed - max_blocks * BLOCK) > 0:
            self.packed -= beyond
            self.tokens -= beyond
            self.evicted += beyond

    def blocks_after(self, new_tokens: int, config: RotorConfig) -> int:
        """Return the number of full blocks after ``new_tokens`` more, if none is evicted."""
        spare = self.exact + new_tokens - config.sink - config.window
        return (self.packed + max(0, spare)) // BLOCK

    def trim(self, n: int, config: RotorConfig) -> int:
        """Forget the last n tokens: of the tail, then of the packed part, then of the sink.

        Returns:
            The number of tokens forgotten; at most the length of the tail if tokens were evicted.
        """
        tail = self.tail(config)
        n = max(0, min(n, tail if self.evicted else self.tokens))
        self.packed -= min(max(n - tail, 0), self.packed)
        self.tokens -= n
        return n

    def tokens_to_reread(self, config: RotorConfig) -> int:
        """Return the number of last tokens to forget and read again after a trim.

        After that, no token is packed that would be exact in a cache that was never trimmed.

        Returns:
            0 if there is no such token; else ``window`` to ``window + 63``, or all tokens after the
            sink.
        """
        behind_sink = self.tokens - config.sink
        never_trimmed = max(0, behind_sink - config.window) // BLOCK * BLOCK
        return behind_sink - never_trimmed if self.packed > never_trimmed else 0

    def positions(self, config: RotorConfig) -> npt.NDArray[np.int32]:
        """Return the position of every token held, in the order in which attention reads them."""
        if not self.evicted:
            return np.arange(self.tokens, dtype=np.int32)
        slots, youngest = self.packed // BLOCK, self.next_block - 1
        numbers = youngest - (youngest - np.arange(slots)) % slots
        packed = config.sink + numbers[:, None] * BLOCK + np.arange(BLOCK)
        tail = np.arange(self.offset - self.tail(config), self.offset)
        return np.concatenate([np.arange(config.sink), packed.ravel(), tail]).astype(np.int32)


def least_size(config: RotorConfig) -> int:
    """Return the smallest limit of a cache in tokens: sink, longest tail and one block."""
    return config.sink + config.window + 2 * BLOCK - 1


def max_blocks(max_size: int | None, config: RotorConfig) -> int | None:
    """Return the number of packed blocks that fit into a cache of ``max_size`` tokens.

    Sink and longest tail are subtracted first. The result is None if ``max_size`` is None.

    Raises:
        ValueError: If no block fits.
    """
    if max_size is None:
        return None
    least = least_size(config)
    if max_size < least:
        raise ValueError(
            f"[RotorKVCache] max_kv_size must be at least {least} with sink {config.sink} "
            f"and window {config.window}, but {max_size} was given; raise it, or lower the window."
        )
    return (max_size - least) // BLOCK + 1


def sliding_size(sliding_window: int, config: RotorConfig) -> int:
    """Return the limit in tokens of a cache for a sliding window.

    A token sees the ``sliding_window`` newest tokens, itself included. The packed blocks alone are
    at least as long as the window, so no visible token is missing after a trim of any length.
    """
    blocks = -(-sliding_window // BLOCK)
    return least_size(config) + (blocks - 1) * BLOCK


def are_possible(
    table: npt.NDArray[Any], config: RotorConfig, max_blocks: int | None
) -> npt.NDArray[np.bool_]:
    """Return which rows of a table are counts that a sequence can have.

    Args:
        table: Integers ``[N, 3]``: tokens, packed tokens and evicted tokens.
        config: Gives the sink.
        max_blocks: The largest number of packed blocks, or None.

    Returns:
        Booleans ``[N]``.
    """
    tokens, packed, evicted = table.T.astype(np.int64)
    possible = (table >= 0).all(1) & (packed + np.where(packed > 0, config.sink, 0) <= tokens)
    if max_blocks is None:
        return possible & (evicted == 0)
    full = (packed == max_blocks * BLOCK) & (evicted % BLOCK == 0)
    return possible & (packed <= max_blocks * BLOCK) & ((evicted == 0) | full)
