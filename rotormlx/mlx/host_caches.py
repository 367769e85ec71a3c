"""The caches of hosts, recognized by the names of their classes.

The hosts have separate classes with the same names and attributes. So their caches can be examined
without importing a host, and two hosts can share one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

GROWING, ROTATING, CHUNKED = "KVCache", "RotatingKVCache", "ChunkedKVCache"
ARRAYS, LIST = "ArraysCache", "CacheList"

_MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")

# The attributes that hold the content of each class. Saved files have them in this order.
ATTRIBUTES = {
    GROWING: ("keys", "values", "offset"),
    ROTATING: ("keys", "values", "offset", "keep", "max_size", "_idx"),
    CHUNKED: ("keys", "values", "offset", "chunk_size", "start_position"),
    ARRAYS: ("cache", "left_padding", "lengths"),
}


def is_exactly(cache: Any, name: str) -> bool:
    """Whether the class of a cache is a host's class of that name, not one derived from it."""
    return type(cache).__name__ == name and type(cache).__module__ in _MODULES


def is_a(cache: Any, *names: str) -> bool:
    """Whether the class of a cache is, or derives from, a host's class of one of these names."""
    return any(c.__name__ in names and c.__module__ in _MODULES for c in type(cache).__mro__)


def parts(cache: Any) -> Sequence[Any] | None:
    """Return the caches in a list of caches; None if it is not a list."""
    if isinstance(cache, (tuple, list)):
        return cache
    inner: Sequence[Any] | None = cache.caches if is_exactly(cache, LIST) else None
    return inner


def list_of(like: Any, caches: Sequence[Any]) -> Any:
    """Return a list of caches of the same class as ``like``."""
    return type(like)(caches) if isinstance(like, (tuple, list)) else type(like)(*caches)


def leaves(caches: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield each cache that is not a list, as (index in the outer list, label, cache)."""
    for index, cache in enumerate(caches):
        inner = parts(cache)
        if inner is None:
            yield index, type(cache).__name__, cache
            continue
        for place, (_, label, leaf) in enumerate(leaves(inner)):
            yield index, f"{label} [{place}]", leaf


def replaced(cache: Any, new: dict[int, Any]) -> Any:
    """Return a cache with its leaves replaced by those in ``new``, whose keys are ids of leaves."""
    inner = parts(cache)
    if inner is None:
        return new.get(id(cache), cache)
    return list_of(cache, [replaced(part, new) for part in inner])


def held(cache: Any) -> list[Any]:
    """Return the content of a host's cache in the order of :data:`ATTRIBUTES`.

    Raises:
        ValueError: If its class is not in :data:`ATTRIBUTES`.
    """
    name = type(cache).__name__
    if name not in ATTRIBUTES or not is_exactly(cache, name):
        raise ValueError(
            f"[prompt cache] A cache must be one of {', '.join(ATTRIBUTES)} or compressed to be "
            f"saved, but one is a {name}; keep it in memory."
        )
    return [getattr(cache, attribute) for attribute in ATTRIBUTES[name]]


def refilled(kind: Any, values: Sequence[Any]) -> Any:
    """Return a host's cache of the class ``kind`` with the result of :func:`held`."""
    cache = kind.__new__(kind)
    for attribute, value in zip(ATTRIBUTES[kind.__name__], values, strict=True):
        setattr(cache, attribute, value)
    return cache
