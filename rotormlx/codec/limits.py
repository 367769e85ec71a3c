"""The largest numbers that kernels count in 32 bits, and what refuses larger ones.

Offsets into buffers are 64 bits everywhere. Positions, and the sizes of a grid, are not.
"""

from __future__ import annotations

# Positions; room is left for what the cut into parts rounds up.
MOST_TOKENS = 2**31 - 2**22
# Tokens encoded in one call: a Metal grid counts threads in 32 bits, and a block takes 256.
MOST_ENCODED = 2**26
# What a CUDA grid takes along its second and third axis.
MOST_GRID_HEADS = 2**16 - 1


def check_tokens(where: str, tokens: int) -> None:
    """Refuse a sequence whose positions are no 32-bit integers.

    Raises:
        ValueError: If it has more than ``MOST_TOKENS`` tokens.
    """
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"[{where}] A sequence must have at most {MOST_TOKENS:,} tokens, but it would have "
            f"{tokens:,}; begin a new cache."
        )


def check_grid(where: str, batch: int, kv_heads: int) -> None:
    """Refuse a batch that no CUDA grid holds.

    Raises:
        ValueError: If batch rows times KV heads are more than ``MOST_GRID_HEADS``.
    """
    if batch * kv_heads > MOST_GRID_HEADS:
        raise ValueError(
            f"[{where}] Batch rows times KV heads must be at most {MOST_GRID_HEADS:,} on CUDA, but "
            f"{batch:,} rows of {kv_heads:,} KV heads came; split the batch."
        )
