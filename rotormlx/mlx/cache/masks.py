"""Attention masks equal to those of the hosts' growing caches."""

from __future__ import annotations

import mlx.core as mx


def causal_mask(length: int, held: int = 0, window: int | None = None) -> mx.array:
    """Return the causal mask of ``length`` new tokens after ``held`` older ones.

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
    """Return the mask of a cache that drops no token; None or ``"causal"`` where possible.

    Args:
        length: L, the new tokens.
        held: The tokens before them.
        window: As in :func:`causal_mask`.
        as_array: Whether to return an array in place of ``"causal"``.
    """
    if window is None and length == 1:
        return None
    if window is None and not as_array:
        return "causal"
    return causal_mask(length, held, window)
