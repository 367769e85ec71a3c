"""Host requests that concern compressed caches: a token limit, quantization, draft models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rotormlx.codec.counts import max_blocks
from rotormlx.codec.format import BLOCK
from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import leaves


def make_caches(own: Callable[..., list[Any]], model: Any, max_kv_size: int | None) -> list[Any]:
    """Make the caches of a model, and apply ``max_kv_size`` to compressed ones too.

    Args:
        own: The host's function that makes caches.
        model: The model whose caches are made.
        max_kv_size: The most tokens that a cache holds, or None.
    """
    limited = getattr(vars(model).get("make_cache"), "limited", None)
    if limited is not None and max_kv_size is not None:
        made: list[Any] = limited(max_kv_size)
        return made
    return own(model, max_kv_size)


def quantize(
    own: Callable[..., None], caches: list[Any], start: int, group_size: int, bits: int | None
) -> None:
    """Quantize caches to ``kv_bits``; if one is compressed already, only warn."""
    if bits is None:
        return
    for _, _, cache in leaves(caches):
        if isinstance(cache, StoredCache):
            cache.to_quantized(group_size, bits)
            return
    own(caches, start, group_size, bits)


def speculated(
    options: Mapping[str, Any], make: Callable[[Any], list[Any]]
) -> tuple[list[Any], list[RotorKVCache]]:
    """Return the caches for generation with a draft model, if all of them suit it.

    All of them must be able to drop rejected tokens until generation ends. A compressed cache
    always can if its window holds the tokens of a draft.

    Args:
        options: The arguments of a host's ``speculative_generate_step``, by name.
        make: Makes the caches of a model.

    Returns:
        The caches of both models, and those of them whose ``rewinds`` must be set meanwhile.

    Raises:
        ValueError: If a cache would reach its limit, after which it cannot drop tokens.
    """
    caches = options["prompt_cache"]
    if caches is None:
        models = (options["model"], options["draft_model"])
        caches = [cache for model in models for cache in make(model)]
    drafted, tokens = options["num_draft_tokens"], options["max_tokens"]
    rewinding = [cache for _, _, cache in leaves(caches) if _rewinds(cache, drafted)]
    limits = [
        limit
        for _, _, cache in leaves(caches)
        if not _rewinds(cache, drafted) and (limit := _room(cache)) is not None
    ]
    needed = len(options["prompt"]) + tokens + drafted
    if limits and (tokens < 0 or needed > min(limits)):
        wanted = "any number of" if tokens < 0 else needed
        raise ValueError(
            f"[speculation] Every cache must be able to drop rejected draft tokens, but one with a "
            f"limit or a sliding window can do so only for {max(0, min(limits))} more tokens, and "
            f"this call may add {wanted} tokens; use caches without a limit, or no draft model."
        )
    return caches, rewinding


def _rewinds(cache: Any, drafted: int) -> bool:
    """Whether a cache has a limit and its window always holds all tokens of a draft."""
    return (
        isinstance(cache, RotorKVCache)
        and cache.max_size is not None
        and cache.config.window >= drafted
    )


def _room(cache: Any) -> int | None:
    """Return how many tokens fit before a cache cannot be trimmed; None for no limit."""
    if isinstance(cache, ChunkedRotorKVCache):
        return cache.chunk_size - cache.offset if cache.is_trimmable() else 0
    size = getattr(cache, "max_size", None)
    if size is None:
        return None
    if isinstance(cache, RotorKVCache):
        if not cache.is_trimmable():
            return 0
        config = cache.config
        blocks = max_blocks(size, config) or 0
        size = config.sink + blocks * BLOCK + config.window + BLOCK - 1
    return int(size) - int(cache.offset)
