"""The one place that changes mlx-lm.

About 105 model files bind ``scaled_dot_product_attention`` by name when they are imported, so
replacing the attribute of ``mlx_lm.models.base`` would reach none of them. The function object is
the same everywhere: its ``__code__`` is exchanged for a call of :func:`attend`, which looks at the
type of the keys. Keys that are arrays run the code that was there before. ``make_prompt_cache`` is
bound by name likewise, and drops ``max_kv_size`` where a model makes its caches itself: the same is
done to it; to ``speculative_generate_step``, which forgets no rejected token once a cache has
reached its limit, and says nothing; and to ``maybe_quantize_kv_cache``, which raises in the middle
of a prompt where a model has sliding windows besides.
"""

from __future__ import annotations

import importlib
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from rotormlx.codec.counts import max_blocks
from rotormlx.codec.format import BLOCK
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view, check
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.lists import leaves
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import BatchSlidingRotorKVCache, SlidingRotorKVCache
from rotormlx.mlx.cache.view import KVView

# The attribute of mlx_lm is the function of that name.
generate = importlib.import_module("mlx_lm.generate")

TESTED_VERSIONS = ("0.32.2",)
_VARARGS = 0x04 | 0x08  # CO_VARARGS, CO_VARKEYWORDS

# load_prompt_cache and CacheList look a class up by its name in the globals of their module.
_CLASSES = (
    *(RotorKVCache, BatchRotorKVCache),
    *(SlidingRotorKVCache, BatchSlidingRotorKVCache, ChunkedRotorKVCache),
)


class Attended(NamedTuple):
    """What reached :func:`attend` with compressed keys: queries ``[B, H, L, D]`` and handles."""

    queries: mx.array
    keys: KVView
    values: KVView


_attended: ContextVar[list[Attended] | None] = ContextVar("attended", default=None)
_pretend: ContextVar[bool] = ContextVar("pretend", default=False)


def _attention(  # type: ignore[no-untyped-def]
    queries, keys, values, cache, scale, mask, sinks=None
):
    # This code runs with the globals of mlx_lm.models.base, hence the import.
    from rotormlx.mlx.hook import attend  # noqa: PLC0415

    return attend(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def _make_caches(model, max_kv_size=None):  # type: ignore[no-untyped-def]
    from rotormlx.mlx.hook import make_caches  # noqa: PLC0415

    return make_caches(model, max_kv_size)


def _speculate(  # type: ignore[no-untyped-def]
    prompt,
    model,
    draft_model,
    stream=generate.generation_stream,
    *,
    num_draft_tokens=2,
    max_tokens=256,
    sampler=None,
    logits_processors=None,
    prompt_cache=None,
    prefill_step_size=512,
    kv_bits=None,
    kv_group_size=64,
    quantized_kv_start=5000,
):
    options = dict(locals())
    from rotormlx.mlx.hook import speculate  # noqa: PLC0415

    return speculate(**options)


def _quantize(  # type: ignore[no-untyped-def]
    prompt_cache, quantized_kv_start, kv_group_size, kv_bits
):
    from rotormlx.mlx.hook import quantize  # noqa: PLC0415

    quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


class Exchange(NamedTuple):
    """A function of mlx-lm whose code is exchanged."""

    module: ModuleType
    name: str
    replacement: Any

    @property
    def function(self) -> Any:
        """The function object, the same wherever it was bound."""
        return vars(self.module)[self.name]


EXCHANGES = (
    Exchange(base, "scaled_dot_product_attention", _attention),
    Exchange(mlx_lm_cache, "make_prompt_cache", _make_caches),
    Exchange(generate, "speculative_generate_step", _speculate),
    Exchange(generate, "maybe_quantize_kv_cache", _quantize),
)
# By name, a function with the code that mlx-lm came with; empty while nothing is changed.
_original: dict[str, FunctionType] = {}
# What uses the change, by id: models, and runs that :func:`in_place` stands for.
_users: dict[int, weakref.ref[Any]] = {}
# Held while mlx-lm is changed, and while who uses the change is counted.
_lock = threading.RLock()


class _Run:
    """A user of the change that is no model."""


def install() -> None:
    """Teach mlx-lm's attention, its caches and its prompt cache files about compressed caches.

    Calling it again changes nothing. It lasts until :func:`remove`, or until the last user is
    released.

    Raises:
        RuntimeError: If the installed mlx-lm is older than tested, or one of the functions has
            another signature; nothing is changed then.
    """
    with _lock:
        if _original:
            return
        _check_version(mlx_lm.__version__)
        for exchange in EXCHANGES:
            _check_signature(exchange)
        for exchange in EXCHANGES:
            function = exchange.function
            own = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__
            )
            own.__kwdefaults__ = function.__kwdefaults__
            _original[exchange.name] = own
            function.__code__ = exchange.replacement.__code__
        vars(mlx_lm_cache).update({kind.__name__: kind for kind in _CLASSES})


def remove() -> None:
    """Give mlx-lm back the code objects it came with, whoever uses the change.

    Calling it again changes nothing.
    """
    with _lock:
        _users.clear()
        if not _original:
            return
        for exchange in EXCHANGES:
            exchange.function.__code__ = _original.pop(exchange.name).__code__
        for kind in _CLASSES:
            vars(mlx_lm_cache).pop(kind.__name__, None)


def installed() -> bool:
    """Whether mlx-lm's attention handles compressed keys now."""
    return bool(_original)


def use(user: Any) -> None:
    """Install for a user, a model say, until :func:`release` or its end.

    Raises:
        RuntimeError: As :func:`install`.
    """
    with _lock:
        install()
        _users[id(user)] = weakref.ref(user)


def release(user: Any) -> None:
    """End a use, if it is one; mlx-lm gets its code objects back when no user is left."""
    with _lock:
        _users.pop(id(user), None)
        if all(other() is None for other in _users.values()):
            remove()


@contextmanager
def in_place() -> Iterator[None]:
    """Use the change for a while.

    Raises:
        RuntimeError: As :func:`install`.
    """
    run = _Run()
    use(run)
    try:
        yield
    finally:
        release(run)


@contextmanager
def record_attention(*, pretend: bool = False) -> Iterator[list[Attended]]:
    """Collect the queries and handles that reach :func:`attend` in this context.

    Args:
        pretend: Whether attention over handles only checks its arguments and gives zeros.
    """
    seen: list[Attended] = []
    tokens = _attended.set(seen), _pretend.set(pretend)
    try:
        yield seen
    finally:
        _attended.reset(tokens[0])
        _pretend.reset(tokens[1])


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
        arguments = (queries, keys, values, cache, scale, mask, sinks)
        out: mx.array = _run("scaled_dot_product_attention", *arguments)
        return out
    seen = _attended.get()
    if seen is not None:
        seen.append(Attended(queries, keys, values))
    if _pretend.get():
        check(AttendCall(queries, keys, values, scale, mask, sinks))
        return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
    return attend_view(queries, keys, values, scale=scale, mask=mask, sink_logits=sinks)


def make_caches(model: Any, max_kv_size: int | None) -> list[Any]:
    """Make the caches of a model; ``max_kv_size`` reaches what makes compressed ones."""
    limited = getattr(vars(model).get("make_cache"), "limited", None)
    if limited is not None and max_kv_size is not None:
        made: list[Any] = limited(max_kv_size)
    else:
        made = _run("make_prompt_cache", model, max_kv_size)
    return made


def quantize(caches: list[Any], start: int, group_size: int, bits: int | None) -> None:
    """Do what ``kv_bits`` asks for: a warning, once there is a compressed cache among them."""
    if bits is None:
        return
    for _, _, cache in leaves(caches):
        if isinstance(cache, _CLASSES):
            cache.to_quantized(group_size, bits)
            return
    _run("maybe_quantize_kv_cache", caches, start, group_size, bits)


def speculate(**options: Any) -> Any:
    """Generate with a draft model, if every cache can forget tokens until the end.

    Args:
        **options: Those of mlx-lm's ``speculative_generate_step``.

    Raises:
        ValueError: If a cache would reach its limit: it could forget no rejected token then.
    """
    caches = options["prompt_cache"]
    if caches is None:
        models = (options["model"], options["draft_model"])
        caches = [cache for model in models for cache in make_caches(model, None)]
    limits = [limit for _, _, cache in leaves(caches) if (limit := _room(cache)) is not None]
    tokens = options["max_tokens"]
    needed = len(options["prompt"]) + tokens + options["num_draft_tokens"]
    if limits and (tokens < 0 or needed > min(limits)):
        wanted = "any number of" if tokens < 0 else needed
        raise ValueError(
            f"[speculation] Rejected tokens of a draft must be forgotten, but a cache with a limit "
            f"or a sliding window has room for {max(0, min(limits))} tokens until it cannot, and "
            f"{wanted} tokens may come; use caches without a limit, or no draft model."
        )
    return _run("speculative_generate_step", **options)


def _room(cache: Any) -> int | None:
    """How many tokens a cache takes until it cannot be trimmed; None if it always can."""
    size = getattr(cache, "max_size", None)
    if isinstance(cache, ChunkedRotorKVCache):
        size = cache.chunk_size
        return size - cache.offset if cache.is_trimmable() else 0
    if size is None:
        return None
    if isinstance(cache, RotorKVCache):
        if not cache.is_trimmable():
            return 0
        config = cache.config
        blocks = max_blocks(size, config) or 0
        size = config.sink + blocks * BLOCK + config.window + BLOCK - 1
    return int(size) - int(cache.offset)


def _run(name: str, *args: Any, **options: Any) -> Any:
    """Call a function of mlx-lm with the code that it came with."""
    # Not among them if another thread called remove() just now: then it has that code again.
    own = next(exchange.function for exchange in EXCHANGES if exchange.name == name)
    function: Any = _original.get(name, own)
    return function(*args, **options)


def _check_version(version: str) -> None:
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]]
    oldest = [int(n) for n in TESTED_VERSIONS[0].split(".")]
    if numbers < oldest:
        raise RuntimeError(_incompatible(f"at least version {TESTED_VERSIONS[0]}", version))


def _check_signature(exchange: Exchange) -> None:
    function, replacement = exchange.function, exchange.replacement
    code: CodeType = function.__code__
    parameters = _parameters(replacement)
    same = (
        _parameters(function) == parameters
        and function.__defaults__ == replacement.__defaults__
        and function.__kwdefaults__ == replacement.__kwdefaults__
        and code.co_kwonlyargcount == replacement.__code__.co_kwonlyargcount
        and code.co_posonlyargcount == 0
        and not code.co_flags & _VARARGS
        and not code.co_freevars
    )
    if not same:
        wanted = f"{exchange.name}({', '.join(parameters)})"
        raise RuntimeError(_incompatible(wanted, mlx_lm.__version__))


def _parameters(function: FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _incompatible(wanted: str, version: str) -> str:
    return (
        f"[hook] rotormlx needs mlx-lm with {wanted}, but mlx-lm {version} is installed; "
        f"install a tested version: pip install 'mlx-lm=={TESTED_VERSIONS[-1]}'."
    )
