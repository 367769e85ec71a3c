"""Attention masks as the hosts' growing caches make them."""

from __future__ import annotations

import mlx.core as mx


def causal_mask(length: int, held: int = 0, window: int | None = None) -> mx.array:
    """Return what each of ``length`` new tokens sees, behind ``held`` older ones.

    Args:
        length: L, the new tokens.
        held: The tokens before them.
        window: The most recent tokens that a query sees, itself included; None for all.

    Returns:
        Booleans ``[L, held + L]``, True where visible.
    """
    keys = mx.arange(held + length)
    queries = mx.arange(held, held + length)[:, None]
    mask = queries >= keys
    return mask if window is None else mask & (queries < keys + window)


def growing_mask(
    length: int, held: int, window: int | None, as_array: bool
) -> mx.array | str | None:
    """Return the mask of a cache that forgets nothing; None or ``"causal"`` where possible.

    Args:
        length: L, the new tokens.
        held: The tokens before them.
        window: As in :func:`causal_mask`.
        as_array: Whether ``"causal"`` must be an array.
    """
    if window is None and length == 1:
        return None
    if window is None and not as_array:
        return "causal"
    return causal_mask(length, held, window)
