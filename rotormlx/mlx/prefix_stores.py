"""Compressed caches in the prefix stores of servers that build caches from ``keys`` and ``values``.

vllm-mlx and rapid-mlx keep the caches of prompts, and take one that fits by making another cache
from its arrays. A compressed cache has no such arrays, so these functions stand in for theirs; they
are called with the function of the server, which does the caches of other kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from rotormlx.mlx.cache.base import StoredCache

Layers = list[Any]


def trimmed(own: Callable[..., Layers | None], caches: Layers, count: int) -> Layers | None:
    """Caches without their last tokens; those given stay as they are.

    Args:
        own: What the server does this with: a function of the other two.
        caches: One per layer.
        count: How many tokens are to go.

    Returns:
        One per layer, or None where ``own`` refuses.

    Raises:
        ValueError: If a compressed cache cannot be trimmed that far.
    """

    def trim(cache: Any) -> Any:
        twin = copy.deepcopy(cache)
        if not twin.is_trimmable() or (count > 0 and twin.trim(count) < count):
            raise ValueError(
                f"[prefix store] A cache that can be trimmed by {count} tokens is required, but "
                f"this one holds {cache.size()} and may have evicted some; do not reuse it."
            )
        return twin

    return _each(caches, trim, lambda others: own(others, count))


def copied(own: Callable[..., Layers], caches: Layers, **options: Any) -> Layers:
    """Copies of caches that share no buffer with those given.

    Args:
        own: What the server does this with: a function of the other arguments.
        caches: One per layer.
        **options: Others of ``own``.

    Returns:
        One per layer; compressed ones evaluated and without room for growth.
    """
    made = _each(caches, _compact, lambda others: own(others, **options))
    return made or []


def _compact(cache: StoredCache[Any]) -> StoredCache[Any]:
    twin = copy.copy(cache)
    # A buffer that is longer than what is used would be kept alive by a view of it.
    twin.state = tuple(mx.contiguous(a) if isinstance(a, mx.array) else a for a in cache.state)
    mx.eval(twin.state)
    return twin


def _each(
    caches: Layers, ours: Callable[[Any], Any], others: Callable[[Layers], Layers | None]
) -> Layers | None:
    """Compressed caches through one function each, all others together through another."""
    made = others([cache for cache in caches if not isinstance(cache, StoredCache)])
    if made is None:
        return None
    rest = iter(made)
    return [ours(cache) if isinstance(cache, StoredCache) else next(rest) for cache in caches]
