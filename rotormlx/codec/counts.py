"""Counts the tokens of a sequence: in the sink, in packed blocks, in the tail.

Everything that stores a sequence counts with this: one cache or a batch, on MLX or on torch.

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

# The narrowest sliding window, and the shortest chunk of chunked attention, that is compressed:
# sink and tail alone take a quarter of it.
LEAST_SLIDING_WINDOW = 512


@dataclass
class Counts:
    """The counts of one sequence.

    Where a method takes ``max_blocks``, it is the most packed blocks that are held: block n then
    lies in slot n mod ``max_blocks`` and evicts what was there. None is for no limit.

    Args:
        tokens: Tokens that are held: sink, packed and tail.
        packed: Packed tokens of them; the last block may be partly filled.
        evicted: Tokens that were packed once and are no longer held; whole blocks.
    """

    tokens: int = 0
    packed: int = 0
    evicted: int = 0

    @property
    def exact(self) -> int:
        """Tokens of the sink and the tail."""
        return self.tokens - self.packed

    @property
    def blocks(self) -> int:
        """Packed blocks that are held, a partly filled one included."""
        return -(-self.packed // BLOCK)

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self.tokens + self.evicted

    @property
    def next_block(self) -> int:
        """The number, from the start of the sequence, of the block that is filled next."""
        return (self.packed + self.evicted) // BLOCK

    def next_slot(self, max_blocks: int | None = None) -> int:
        """The slot of the block that is filled next."""
        return self.next_block if max_blocks is None else self.next_block % max_blocks

    def tail(self, config: RotorConfig) -> int:
        """Exact tokens behind the sink."""
        return max(0, self.exact - config.sink)

    def packable(self, config: RotorConfig, max_blocks: int | None = None) -> int:
        """How many tokens of the tail to pack next, 0 for none.

        These are the rest of a begun block, or whole blocks: as many as one call may encode, and
        none beyond the last slot.
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
        """``count`` tokens of the tail are packed; what has no room is evicted."""
        self.packed += count
        if max_blocks is not None and (beyond := self.packed - max_blocks * BLOCK) > 0:
            self.packed -= beyond
            self.tokens -= beyond
            self.evicted += beyond

    def blocks_after(self, new_tokens: int, config: RotorConfig) -> int:
        """Full blocks once ``new_tokens`` more are appended and packed, where none is evicted."""
        spare = self.exact + new_tokens - config.sink - config.window
        return (self.packed + max(0, spare)) // BLOCK

    def trim(self, n: int, config: RotorConfig) -> int:
        """Forget the last n tokens: of the tail, then of the packed part, then of the sink.

        Returns:
            How many were forgotten: once tokens were evicted, no more than the tail holds.
        """
        tail = self.tail(config)
        n = max(0, min(n, tail if self.evicted else self.tokens))
        self.packed -= min(max(n - tail, 0), self.packed)
        self.tokens -= n
        return n

    def tokens_to_reread(self, config: RotorConfig) -> int:
        """How many of the last tokens to forget and read again after a trim.

        Then none of them is packed that would be exact, had no others come.

        Returns:
            0 where none is, else ``window`` to ``window + 63``, or all behind the sink.
        """
        behind_sink = self.tokens - config.sink
        never_trimmed = max(0, behind_sink - config.window) // BLOCK * BLOCK
        return behind_sink - never_trimmed if self.packed > never_trimmed else 0

    def positions(self, config: RotorConfig) -> npt.NDArray[np.int32]:
        """The position of every token held, in the order in which attention reads them."""
        if not self.evicted:
            return np.arange(self.tokens, dtype=np.int32)
        slots, youngest = self.packed // BLOCK, self.next_block - 1
        numbers = youngest - (youngest - np.arange(slots)) % slots
        packed = config.sink + numbers[:, None] * BLOCK + np.arange(BLOCK)
        tail = np.arange(self.offset - self.tail(config), self.offset)
        return np.concatenate([np.arange(config.sink), packed.ravel(), tail]).astype(np.int32)


def least_size(config: RotorConfig) -> int:
    """The fewest tokens that a cache may be limited to: sink, fullest tail and one block."""
    return config.sink + config.window + 2 * BLOCK - 1


def max_blocks(max_size: int | None, config: RotorConfig) -> int | None:
    """Packed blocks that fit into a cache of ``max_size`` tokens, beside sink and fullest tail.

    Raises:
        ValueError: If not one fits.
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
    """The limit of a cache whose tokens see the ``sliding_window`` newest of them, themselves too.

    Its packed blocks alone are as long as the window, so that nothing visible is missing, however
    much of the tail is trimmed.
    """
    blocks = -(-sliding_window // BLOCK)
    return least_size(config) + (blocks - 1) * BLOCK


def are_possible(
    table: npt.NDArray[Any], config: RotorConfig, max_blocks: int | None
) -> npt.NDArray[np.bool_]:
    """Which counts a sequence can have.

    Args:
        table: Integers ``[N, 3]``: tokens, packed and evicted tokens.
        config: Gives the sink.
        max_blocks: The most packed blocks, or None.

    Returns:
        Booleans ``[N]``.
    """
    tokens, packed, evicted = table.T.astype(np.int64)
    possible = (table >= 0).all(1) & (packed + np.where(packed > 0, config.sink, 0) <= tokens)
    if max_blocks is None:
        return possible & (evicted == 0)
    full = (packed == max_blocks * BLOCK) & (evicted % BLOCK == 0)
    return possible & (packed <= max_blocks * BLOCK) & ((evicted == 0) | full)
