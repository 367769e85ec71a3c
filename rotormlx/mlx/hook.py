"""The replacement of a host's attention, which depends on the type of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx

from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view, check
from rotormlx.mlx.cache.view import KVView


class Attended(NamedTuple):
    """A recorded call of :func:`attend`: queries ``[B, H, L, D]``, keys and values."""

    queries: mx.array
    keys: Any
    values: Any


_attended: ContextVar[list[Attended] | None] = ContextVar("attended", default=None)
_pretend: ContextVar[bool] = ContextVar("pretend", default=False)


@contextmanager
def record_attention(*, pretend: bool = False) -> Iterator[list[Attended]]:
    """Collect the queries and handles that reach :func:`attend` in this context.

    Args:
        pretend: Whether attention over handles only checks its arguments and returns zeros. Calls
            with arrays are then collected too.
    """
    seen: list[Attended] = []
    tokens = _attended.set(seen), _pretend.set(pretend)
    try:
        yield seen
    finally:
        _attended.reset(tokens[0])
        _pretend.reset(tokens[1])


def attend(
    own: Callable[..., mx.array],
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
) -> mx.array:
    """Run the host's attention for arrays, and the compressed attention for views.

    Args:
        own: The host's attention, which takes the other arguments.
        queries: ``[B, H, L, D]``.
        keys: A :class:`KVView`, or whatever the host's own attention takes.
        values: As ``keys``.
        cache: Passed on unchanged; layers that reuse the keys of another layer pass None.
        scale: Factor on the scores.
        mask: None, ``"causal"``, or an array.
        sinks: Sink logits, one per query head, or None.

    Returns:
        ``[B, H, L, D]``.
    """
    seen, is_view = _attended.get(), isinstance(keys, KVView)
    if seen is not None and (is_view or _pretend.get()):
        seen.append(Attended(queries, keys, values))
    if not is_view:
        return own(queries, keys, values, cache, scale, mask, sinks)
    if _pretend.get():
        check(AttendCall(queries, keys, values, scale, mask, sinks))
        return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
    return attend_view(queries, keys, values, scale=scale, mask=mask, sink_logits=sinks)
