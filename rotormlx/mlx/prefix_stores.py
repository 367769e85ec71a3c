"""Compressed caches in the prefix stores of servers that build caches from ``keys`` and ``values``.

vllm-mlx and rapid-mlx store the caches of prompts, and reuse one by making another cache from its
arrays. A compressed cache has no such arrays, so the functions here replace those of the servers.
Each gets the replaced function as ``own`` and calls it for other kinds of caches. Other functions
limit compressed caches, because the servers limit only caches of mlx-lm's class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from rotormlx.codec.counts import max_blocks
from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import leaves

Layers = list[Any]


def trimmed(own: Callable[..., Layers | None], caches: Layers, count: int) -> Layers | None:
    """Return copies of caches without their last tokens.

    Args:
        own: The server's function, which takes the other two arguments.
        caches: One cache per layer.
        count: The number of tokens to drop.

    Returns:
        One cache per layer, or None if ``own`` returns None.

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
    """Return copies of caches that share no buffer with the originals.

    Args:
        own: The server's function, which takes the other arguments.
        caches: One cache per layer.
        **options: Further arguments of ``own``.

    Returns:
        One cache per layer; compressed ones are evaluated.
    """
    made = _each(caches, _compact, lambda others: own(others, **options))
    return made or []


def limited(own: Callable[..., Layers], caches: Layers, max_kv_size: int) -> Layers:
    """Return empty caches with a limit of tokens.

    Args:
        own: The server's function, which takes the other two arguments.
        caches: One empty cache per layer.
        max_kv_size: The most tokens of a cache.

    Returns:
        One cache per layer.

    Raises:
        ValueError: If a compressed cache needs more for its sink, its window and a block.
    """
    made = own(caches, max_kv_size)
    for _, _, cache in leaves(made):
        # A sliding window has its own limit. In an empty cache, a limit changes only these two.
        if isinstance(cache, RotorKVCache) and cache.max_size is None:
            blocks = max_blocks(max_kv_size, cache.config)
            vars(cache).update(max_size=max_kv_size, _max_blocks=blocks)
    return made


def made_anew(own: Callable[..., Layers], generator: Any) -> Layers:
    """Make the caches of a new sequence, with the limit of the ``BatchGenerator`` of mlx-lm 0.31.

    Args:
        own: mlx-lm's function, which limits only caches of its own class.
        generator: The ``BatchGenerator``.

    Returns:
        One cache per layer.

    Raises:
        ValueError: As :func:`limited`.
    """
    made = own(generator)
    size = generator.max_kv_size
    return made if size is None else limited(lambda caches, _: caches, made, size)


def paged(own: Callable[..., None], store: Any, model: Any, *args: Any, **options: Any) -> None:
    """Make a store that splits caches into blocks, for a model with exact caches.

    Args:
        own: The ``__init__`` of the store.
        store: The store that is made.
        model: The model whose caches it stores.
        *args: Further arguments of ``own``.
        **options: Further named arguments of ``own``.

    Raises:
        ValueError: If the model has compressed caches.
    """
    make = getattr(model, "make_cache", None)
    if make and any(isinstance(cache, StoredCache) for _, _, cache in leaves(make())):
        raise ValueError(
            "[prefix store] A paged cache requires exact keys and values to cut into blocks, but "
            "ROTORMLX has compressed the caches of this model; leave --use-paged-cache out."
        )
    own(store, model, *args, **options)


def _compact(cache: Any) -> Any:
    twin = copy.copy(cache)
    # Contiguous, because a view would keep the whole buffer alive, including unused room.
    twin.state = tuple(mx.contiguous(a) if isinstance(a, mx.array) else a for a in cache.state)
    mx.eval(twin.state)
    return twin


def _each(
    caches: Layers, ours: Callable[[Any], Any], others: Callable[[Layers], Layers | None]
) -> Layers | None:
    """Apply ``ours`` to each compressed cache, and ``others`` to all other caches together."""
    made = others([cache for cache in caches if not isinstance(cache, StoredCache)])
    if made is None:
        return None
    rest = iter(made)
    return [ours(cache) if isinstance(cache, StoredCache) else next(rest) for cache in caches]
