"""Trims caches so that the tokens before the cut are as exact as if no others had come.

A packed block that loses its last tokens is not unpacked: what was exact when the cut was passed
the first time is gone. It comes back when the last tokens before the cut are read again.
"""

from __future__ import annotations

from typing import Any

from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import leaves


def trim_prompt_cache(caches: list[Any], num_tokens: int) -> int:
    """Forget the last tokens, and those before them that must be read again to be exact.

    mlx-lm's function of that name forgets ``num_tokens`` only; what it leaves of the last
    ``window`` tokens in packed blocks stays packed.

    Args:
        caches: The caches of a model.
        num_tokens: How many tokens are to go.

    Returns:
        How many were forgotten: 0 if a cache cannot be trimmed, else ``num_tokens``, or all there
        were, and 0 to ``window + 63`` more. Give the model the tokens from there on.
    """
    if not caches or not all(cache.is_trimmable() for cache in caches):
        return 0
    count = _trim(caches, max(0, num_tokens))
    return count + _trim(caches, tokens_to_reread(caches))


def _trim(caches: list[Any], count: int) -> int:
    """Forget tokens of every cache; returns how many."""
    counts = [int(cache.trim(count)) for cache in caches]
    return counts[0]


def tokens_to_reread(caches: list[Any]) -> int:
    """How many of the last tokens to read again so that every window is exact."""
    compressed = (cache for _, _, cache in leaves(caches) if isinstance(cache, RotorKVCache))
    return max((cache.counts.tokens_to_reread(cache.config) for cache in compressed), default=0)
