"""Trimming of caches so that the window before the cut is exact again.

A packed block that loses its last tokens is not unpacked, so tokens before the cut that were exact
once may stay packed. They become exact again when the model reads them again.
"""

from __future__ import annotations

from typing import Any

from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import leaves


def trim_prompt_cache(caches: list[Any], num_tokens: int) -> int:
    """Drop the last tokens, and those before them that must be read again to be exact.

    mlx-lm's function of that name drops ``num_tokens`` only. Tokens of the remaining window that
    are in packed blocks then stay packed.

    Args:
        caches: The caches of a model.
        num_tokens: The number of tokens to drop.

    Returns:
        The number of tokens dropped: 0 if a cache cannot be trimmed, else ``num_tokens`` (or all
        there were) and 0 to ``window + 63`` more. Give the model the tokens from there on.
    """
    if not caches or not all(cache.is_trimmable() for cache in caches):
        return 0
    count = _trim(caches, max(0, num_tokens))
    return count + _trim(caches, tokens_to_reread(caches))


def _trim(caches: list[Any], count: int) -> int:
    """Drop tokens of every cache; return how many."""
    counts = [int(cache.trim(count)) for cache in caches]
    return counts[0]


def tokens_to_reread(caches: list[Any]) -> int:
    """Return how many of the last tokens must be read again to make every window exact."""
    compressed = (cache for _, _, cache in leaves(caches) if isinstance(cache, RotorKVCache))
    return max((cache.counts.tokens_to_reread(cache.config) for cache in compressed), default=0)
