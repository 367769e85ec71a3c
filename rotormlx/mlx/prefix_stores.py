"""Compressed caches in the prefix stores of servers that build caches from ``keys`` and ``values``.

vllm-mlx and rapid-mlx keep the caches of prompts, and take one that fits by making another cache
from its arrays. A compressed cache has no such arrays, so these functions stand in for theirs; they
are called with the function of the server, which does the caches of other kinds. So do those that
limit a cache, where a server limits caches of mlx-lm's class only.
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
        One per layer; compressed ones are evaluated.
    """
    made = _each(caches, _compact, lambda others: own(others, **options))
    return made or []


def limited(own: Callable[..., Layers], caches: Layers, max_kv_size: int) -> Layers:
    """Return empty caches with a limit of tokens.

    Args:
        own: What the server does this with: a function of the other two.
        caches: One per layer, empty.
        max_kv_size: The most tokens of a cache.

    Returns:
        One per layer.

    Raises:
        ValueError: If a compressed cache needs more for its sink, its window and a block.
    """
    made = own(caches, max_kv_size)
    for _, _, cache in leaves(made):
        # A sliding window has its own limit. Of a cache that is empty a limit is all that differs.
        if isinstance(cache, RotorKVCache) and cache.max_size is None:
            blocks = max_blocks(max_kv_size, cache.config)
            vars(cache).update(max_size=max_kv_size, _max_blocks=blocks)
    return made


def made_anew(own: Callable[..., Layers], generator: Any) -> Layers:
    """The caches of one more sequence, limited as the ``BatchGenerator`` of mlx-lm 0.31 is.

    Args:
        own: What mlx-lm does this with: it limits caches of its own class only.
        generator: The ``BatchGenerator``.

    Returns:
        One per layer.

    Raises:
        ValueError: As :func:`limited`.
    """
    made = own(generator)
    size = generator.max_kv_size
    return made if size is None else limited(lambda caches, _: caches, made, size)


def paged(own: Callable[..., None], store: Any, model: Any, *args: Any, **options: Any) -> None:
    """Make a store that splits caches into blocks, for a model with exact caches.

    Args:
        own: Its ``__init__``.
        store: What is made.
        model: The model whose caches it is for.
        *args: Other arguments.
        **options: Likewise.

    Raises:
        ValueError: If the model has compressed caches.
    """
    make = getattr(model, "make_cache", None)
    if make and any(isinstance(cache, StoredCache) for _, _, cache in leaves(make())):
        raise ValueError(
            "[prefix store] A paged cache needs exact keys and values to cut into blocks, but "
            "ROTORMLX has compressed the caches of this model; leave --use-paged-cache out."
        )
    own(store, model, *args, **options)


def _compact(cache: Any) -> Any:
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
