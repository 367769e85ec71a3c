"""The largest numbers that kernels count in 32 bits, and the checks that refuse larger ones.

Offsets into buffers have 64 bits everywhere. Positions and the sizes of a grid have 32.
"""

from __future__ import annotations

# Positions; the margin below 2^31 allows for rounding when a sequence is cut into parts.
MOST_TOKENS = 2**31 - 2**22
# Tokens encoded in one call: a Metal grid counts threads in 32 bits, and a block takes 256 threads.
MOST_ENCODED = 2**26
# The largest size of a CUDA grid along its second and third axis.
MOST_GRID_HEADS = 2**16 - 1


def check_tokens(where: str, tokens: int) -> None:
    """Refuse a sequence whose positions do not fit into 32-bit integers.

    Raises:
        ValueError: If it has more than ``MOST_TOKENS`` tokens.
    """
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"[{where}] A sequence must have at most {MOST_TOKENS:,} tokens, but it would have "
            f"{tokens:,}; begin a new cache."
        )


def check_grid(where: str, batch: int, kv_heads: int) -> None:
    """Refuse a batch that is too large for a CUDA grid.

    Raises:
        ValueError: If batch rows times KV heads are more than ``MOST_GRID_HEADS``.
    """
    if batch * kv_heads > MOST_GRID_HEADS:
        raise ValueError(
            f"[{where}] Batch rows times KV heads must be at most {MOST_GRID_HEADS:,} on CUDA, but "
            f"{batch:,} rows of {kv_heads:,} KV heads were given; split the batch."
        )
