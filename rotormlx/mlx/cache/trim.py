"""Trims caches so that the tokens before the cut are as exact as if no others had come.

A packed block that loses its last tokens is not unpacked: what was exact when the cut was passed
the first time is gone. It comes back when the last tokens before the cut are read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from rotormlx.mlx.cache.lists import leaves
from rotormlx.mlx.cache.single import RotorKVCache


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
    if not mlx_lm_cache.can_trim_prompt_cache(caches):
        return 0
    trim: Callable[..., Any] = mlx_lm_cache.trim_prompt_cache
    count: int = trim(caches, max(0, num_tokens))
    again = tokens_to_reread(caches)
    if again:
        trim(caches, again)
    return count + again


def tokens_to_reread(caches: list[Any]) -> int:
    """How many of the last tokens to read again so that every window is exact."""
    compressed = (cache for _, _, cache in leaves(caches) if isinstance(cache, RotorKVCache))
    return max((cache.counts.tokens_to_reread(cache.config) for cache in compressed), default=0)
