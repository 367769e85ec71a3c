"""The caches that hosts bring, told apart by the names that they share.

Every host has classes of its own, of one design: the same names, the same attributes. So nobody
has to import a host to look at its caches, and two hosts may be in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

GROWING, ROTATING, CHUNKED = "KVCache", "RotatingKVCache", "ChunkedKVCache"
ARRAYS, LIST = "ArraysCache", "CacheList"

_MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")

# What a cache holds: the attributes that make one of its kind. Saved files have them in this order.
ATTRIBUTES = {
    GROWING: ("keys", "values", "offset"),
    ROTATING: ("keys", "values", "offset", "keep", "max_size", "_idx"),
    CHUNKED: ("keys", "values", "offset", "chunk_size", "start_position"),
    ARRAYS: ("cache", "left_padding", "lengths"),
}


def is_exactly(cache: Any, name: str) -> bool:
    """Whether a cache is of a host's class of that name, and not of one derived from it."""
    return type(cache).__name__ == name and type(cache).__module__ in _MODULES


def is_a(cache: Any, *names: str) -> bool:
    """Whether a cache is of a host's class of one of these names, or of one derived from it."""
    return any(c.__name__ in names and c.__module__ in _MODULES for c in type(cache).__mro__)


def parts(cache: Any) -> Sequence[Any] | None:
    """The caches that a list of caches holds; None if it is no list."""
    if isinstance(cache, (tuple, list)):
        return cache
    inner: Sequence[Any] | None = cache.caches if is_exactly(cache, LIST) else None
    return inner


def list_of(like: Any, caches: Sequence[Any]) -> Any:
    """A list of caches of the same class as another."""
    return type(like)(caches) if isinstance(like, (tuple, list)) else type(like)(*caches)


def leaves(caches: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """Each cache that holds something itself: index in the list, label, cache."""
    for index, cache in enumerate(caches):
        inner = parts(cache)
        if inner is None:
            yield index, type(cache).__name__, cache
            continue
        for place, (_, label, leaf) in enumerate(leaves(inner)):
            yield index, f"{label} [{place}]", leaf


def replaced(cache: Any, new: dict[int, Any]) -> Any:
    """A cache with the leaves that ``new`` has by the id of what was there."""
    inner = parts(cache)
    if inner is None:
        return new.get(id(cache), cache)
    return list_of(cache, [replaced(part, new) for part in inner])


def held(cache: Any) -> list[Any]:
    """Return the content of a host's cache by :data:`ATTRIBUTES`, equal for all versions.

    Raises:
        ValueError: If it is none of these kinds.
    """
    name = type(cache).__name__
    if name not in ATTRIBUTES or not is_exactly(cache, name):
        raise ValueError(
            f"[prompt cache] A cache must be one of {', '.join(ATTRIBUTES)} or compressed to be "
            f"saved, but one is a {name}; keep it in memory."
        )
    return [getattr(cache, attribute) for attribute in ATTRIBUTES[name]]


def refilled(kind: Any, values: Sequence[Any]) -> Any:
    """A host's cache that holds what :func:`held` gave."""
    cache = kind.__new__(kind)
    for attribute, value in zip(ATTRIBUTES[kind.__name__], values, strict=True):
        setattr(cache, attribute, value)
    return cache
