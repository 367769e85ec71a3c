"""The one place that changes mlx-lm.

About 105 model files bind ``scaled_dot_product_attention`` by name when they are imported, so
replacing the attribute of ``mlx_lm.models.base`` would reach none of them. The function object is
the same everywhere: its ``__code__`` is exchanged for a call of :func:`attend`, which looks at the
type of the keys. Keys that are arrays run the code that was there before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from rotormlx.attention import attend_view
from rotormlx.cache import RotorKVCache
from rotormlx.view import KVView

TESTED_VERSIONS = ("0.32.2",)
PARAMETERS = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")
DEFAULTS = (None,)
_VARARGS = 0x04 | 0x08  # CO_VARARGS, CO_VARKEYWORDS

# What mlx-lm came with; empty while nothing is changed.
_original: list[FunctionType] = []
_attended: ContextVar[list[tuple[Any, Any]] | None] = ContextVar("attended", default=None)


def install() -> None:
    """Teach mlx-lm's attention and its prompt cache files about compressed caches.

    Calling it again changes nothing.

    Raises:
        RuntimeError: If the installed mlx-lm is older than tested, or its attention has another
            signature; nothing is changed then.
    """
    if _original:
        return
    function: Any = base.scaled_dot_product_attention
    _check_version(mlx_lm.__version__)
    _check_signature(function)
    _original.append(
        FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
    )
    function.__code__ = _replacement.__code__
    # load_prompt_cache and CacheList look a class up by its name in the globals of their module.
    vars(mlx_lm_cache)[RotorKVCache.__name__] = RotorKVCache


def remove() -> None:
    """Give mlx-lm back the code object it came with; calling it again changes nothing."""
    if not _original:
        return
    base.scaled_dot_product_attention.__code__ = _original.pop().__code__
    vars(mlx_lm_cache).pop(RotorKVCache.__name__, None)


def installed() -> bool:
    """Whether mlx-lm's attention handles compressed keys now."""
    return bool(_original)


@contextmanager
def record_attention() -> Iterator[list[tuple[Any, Any]]]:
    """Collect the ``(keys, values)`` handles that reach :func:`attend` in this context."""
    seen: list[tuple[Any, Any]] = []
    token = _attended.set(seen)
    try:
        yield seen
    finally:
        _attended.reset(token)


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    *,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
) -> mx.array:
    """Run attention by the type of the keys.

    Args:
        queries: ``[B, H, L, D]``.
        keys: A :class:`KVView`, or whatever mlx-lm's own attention takes.
        values: As ``keys``.
        cache: Only handed on: layers that reuse the keys of another layer pass None.
        scale: Factor on the scores.
        mask: None, ``"causal"``, or an array.
        sinks: Sink logits, one a query head, or None.

    Returns:
        ``[B, H, L, D]``.
    """
    if not isinstance(keys, KVView):
        # Empty if another thread called remove() just now: then mlx-lm's function is its own again.
        function: Any = _original[0] if _original else base.scaled_dot_product_attention
        out: mx.array = function(queries, keys, values, cache, scale, mask, sinks)
        return out
    seen = _attended.get()
    if seen is not None:
        seen.append((keys, values))
    return attend_view(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _replacement(  # type: ignore[no-untyped-def]
    queries, keys, values, cache, scale, mask, sinks=None
):
    # This code runs with the globals of mlx_lm.models.base, hence the import.
    from rotormlx.hook import attend  # noqa: PLC0415

    return attend(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def _check_version(version: str) -> None:
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]]
    oldest = [int(n) for n in TESTED_VERSIONS[0].split(".")]
    if numbers < oldest:
        raise RuntimeError(_incompatible(f"at least version {TESTED_VERSIONS[0]}", version))


def _check_signature(function: FunctionType) -> None:
    code: CodeType = function.__code__
    same = (
        code.co_varnames[: code.co_argcount] == PARAMETERS
        and function.__defaults__ == DEFAULTS
        and code.co_kwonlyargcount == 0
        and code.co_posonlyargcount == 0
        and not code.co_flags & _VARARGS
        and not code.co_freevars
    )
    if not same:
        wanted = f"scaled_dot_product_attention({', '.join(PARAMETERS[:-1])}, sinks=None)"
        raise RuntimeError(_incompatible(wanted, mlx_lm.__version__))


def _incompatible(wanted: str, version: str) -> str:
    return (
        f"[hook] rotormlx needs mlx-lm with {wanted}, but mlx-lm {version} is installed; "
        f"install a tested version: pip install 'mlx-lm=={TESTED_VERSIONS[-1]}'."
    )
