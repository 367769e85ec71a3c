"""Compressed caches for a whole mlx-lm model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
)

from rotormlx import hook
from rotormlx.cache import RotorKVCache
from rotormlx.config import RotorConfig
from rotormlx.report import LayerReport, Report, leaves
from rotormlx.view import KVView

CacheMaker = Callable[[], list[Any]]

# Prefill and decode: some models take another path for a single token.
PROBE_TOKENS = (3, 1)

_users: dict[int, weakref.ref[Module]] = {}


class CompressedCaches:
    """Stands in for ``model.make_cache`` and makes compressed caches.

    Args:
        model: Its own caches are the pattern.
        own: What ``make_cache`` the instance had, if it did not have its class's.
        config: How keys and values are compressed.
        report: What the model's caches become.
    """

    def __init__(
        self,
        model: Module,
        own: CacheMaker | None,
        config: RotorConfig,
        report: Report,
    ) -> None:
        # Not the model itself: a cycle would keep its weights after the last use of the model.
        self.model = weakref.ref(model)
        self.own = own
        self.config = config
        self.report = report

    def __call__(self) -> list[Any]:
        """Make caches for one sequence."""
        # A copy of a model outlives remove() of the model it was copied from.
        hook.install()
        return _compress(_own_caches(self.model(), self.own), self.config, RotorKVCache)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCaches:
        """A copy for the copy of the model that is being made."""
        model: Any = self.model()
        return CompressedCaches(memo.get(id(model), model), self.own, self.config, self.report)


def apply(model: Module, config: RotorConfig | None = None) -> Report:
    """Make a model use compressed caches from now on.

    ``generate``, ``stream_generate`` and everything else of mlx-lm that asks the model for its
    caches gets them. Applying again replaces the configuration; caches made before keep theirs.

    Args:
        model: What ``mlx_lm.load`` returned first.
        config: How keys and values are compressed; the default configuration if None.

    Returns:
        What is compressed, layer by layer, and what is left alone and why.

    Raises:
        ValueError: If nothing in the model can be compressed, or its attention does not go
            through mlx-lm's; nothing is changed then.
        RuntimeError: If the installed mlx-lm is not one that rotormlx can extend.
    """
    config = config or RotorConfig()
    own = _own_attribute(model)
    report = _probe(model, own, config)
    model.make_cache = CompressedCaches(model, own, config, report)
    return report


def remove(model: Module) -> None:
    """Give a model its own caches back; without effect on one that has them.

    mlx-lm itself is restored when no compressed model remains.

    Args:
        model: A model that :func:`apply`, :func:`load` or :func:`make_prompt_cache` was given.
    """
    maker = _maker(model)
    if maker is not None:
        del model.make_cache
        if maker.own is not None:
            model.make_cache = maker.own
    _users.pop(id(model), None)
    if all(user() is None for user in _users.values()):
        hook.remove()


def load(path_or_repo: str, config: RotorConfig | None = None, **kwargs: Any) -> tuple[Any, ...]:
    """Load a model and its tokenizer, with compressed caches.

    Args:
        path_or_repo: A directory, or the name of a repository, as in ``mlx_lm.load``.
        config: How keys and values are compressed; the default configuration if None.
        **kwargs: Everything else that ``mlx_lm.load`` takes.

    Returns:
        What ``mlx_lm.load`` returns: ``(model, tokenizer)``.

    Raises:
        ValueError: As :func:`apply`, before any weight is read.
    """
    lazy = kwargs.pop("lazy", False)
    loaded: tuple[Any, ...] = mlx_lm.load(path_or_repo, lazy=True, **kwargs)
    apply(loaded[0], config)
    if not lazy:
        mx.eval(loaded[0].parameters())
    return loaded


def make_prompt_cache(model: Module, config: RotorConfig | None = None) -> list[Any]:
    """Make compressed caches for one conversation, to be passed as ``prompt_cache=``.

    The model's own setting stays what it is, so a model may run with and without.

    Args:
        model: What ``mlx_lm.load`` returned first.
        config: How keys and values are compressed; the model's configuration if None, and the
            default one if the model has none.

    Returns:
        One cache a layer, compressed where it can be.

    Raises:
        ValueError: As :func:`apply`.
    """
    maker = _maker(model)
    if maker is not None and config in (None, maker.config):
        return maker()
    config = config or RotorConfig()
    own = _own_attribute(model)
    _probe(model, own, config)
    return _compress(_own_caches(model, own), config, RotorKVCache)


def model_report(model: Module) -> Report:
    """The report of the latest :func:`apply`.

    Raises:
        ValueError: If the model does not use compressed caches.
    """
    maker = _maker(model)
    if maker is None:
        raise ValueError(
            "[model_report] A model with compressed caches is required, but this one has its own; "
            "call rotormlx.apply(model) first."
        )
    return maker.report


def read_prompt_cache(path: str) -> tuple[list[Any], dict[str, str]]:
    """Read a file of ``save_prompt_cache``, compressed caches or not.

    Args:
        path: A ``.safetensors`` file.

    Returns:
        The caches and the metadata.

    Raises:
        ValueError: If the file is missing, incomplete, no prompt cache, or of another version.
    """
    _check_complete(path)
    hook.install()
    try:
        caches, metadata = load_prompt_cache(path, return_metadata=True)
    except Exception as error:  # whatever a foreign or damaged file trips over
        raise ValueError(
            f"[prompt cache] {path} must be a prompt cache that the installed mlx-lm and rotormlx "
            f"can read, but {_brief(error)}; make it again."
        ) from error
    return caches, metadata


def adopt_prompt_cache(model: Module, caches: list[Any]) -> int:
    """Check that caches from a file fit a compressed model, and compress plain ones in place.

    Args:
        model: A model that :func:`apply` was given.
        caches: What :func:`read_prompt_cache` returned.

    Returns:
        How many plain caches were compressed.

    Raises:
        ValueError: If they belong to another model or another configuration; ``caches`` is
            unchanged then.
    """
    report = model_report(model)
    expected = list(leaves(model.make_cache()))
    given = list(leaves(caches))
    if len(given) != len(expected):
        raise _mismatch(report, f"{len(expected)} caches", f"{len(given)}")
    for layer, (index, _, want), (_, _, cache) in zip(report.layers, expected, given, strict=True):
        _check_fits(report, layer, index, want, cache)
    return _convert(caches, report.config)


def _convert(caches: list[Any], config: RotorConfig, layer: int | None = None) -> int:
    count = 0
    for index, cache in enumerate(caches):
        place = index if layer is None else layer
        if type(cache) is KVCache:
            # Layer by layer, so that a plain layer is freed before the next one is packed.
            caches[index] = RotorKVCache.from_kv_cache(cache, config, place)
            mx.eval(caches[index].state)
            count += 1
        elif isinstance(cache, CacheList):
            parts = list(cache.caches)
            count += _convert(parts, config, place)
            cache.caches = tuple(parts)
    return count


def _check_fits(report: Report, layer: LayerReport, index: int, want: Any, cache: Any) -> None:
    if isinstance(cache, RotorKVCache) and isinstance(want, RotorKVCache):
        if cache.config != report.config:
            raise _mismatch(
                report, report.config.to_json(), cache.config.to_json(), "the configuration"
            )
        if cache.layer != index:
            raise _mismatch(report, f"layer {index} at position {index}", f"layer {cache.layer}")
    elif type(cache) is not (KVCache if layer.compressed else type(want)):
        raise _mismatch(report, f"{layer.cache} in layer {index}", type(cache).__name__)
    elif isinstance(cache, RotatingKVCache) and cache.max_size != want.max_size:
        raise _mismatch(
            report, f"a window of {want.max_size} tokens in layer {index}", str(cache.max_size)
        )
    dims = _dims(cache)
    if dims is not None and dims != (layer.kv_heads, layer.head_dim_k, layer.head_dim_v):
        raise _mismatch(
            report,
            f"{layer.kv_heads} KV heads of {layer.head_dim_k} and {layer.head_dim_v} dimensions "
            f"in layer {index}",
            f"{dims[0]} of {dims[1]} and {dims[2]}",
        )


def _mismatch(report: Report, wanted: str, came: str, what: str = "the model") -> ValueError:
    return ValueError(
        f"[prompt cache] {what.capitalize()} {report.model_type} requires {wanted}, but the prompt "
        f"cache has {came}; use it with {what} that it was made with, or make it again."
    )


def _dims(cache: Any) -> tuple[int, int, int] | None:
    """KV heads, key dimension and value dimension of a filled cache that has them."""
    if isinstance(cache, RotorKVCache):
        pair: tuple[Any, Any] = (None, None) if cache.empty() else cache.keys_and_values()
    else:
        pair = getattr(cache, "keys", None), getattr(cache, "values", None)
    keys, values = pair
    if keys is None or values is None or len(keys.shape) != 4:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]


def _check_complete(path: str) -> None:
    """Raise unless a file is a whole safetensors file with the metadata of a prompt cache."""
    if not Path(path).is_file():
        raise ValueError(
            f"[prompt cache] An existing file is required, but {path} is none; check the path."
        )
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"[prompt cache] A safetensors file is required, but {path} has no readable header; "
            "it is damaged or something else: make it again."
        ) from error
    if size != 8 + length + end:
        raise ValueError(
            f"[prompt cache] {path} must have {8 + length + end} bytes, but it has {size}; "
            "it is damaged: make it again."
        )
    if "1.0" not in metadata:  # where mlx-lm writes the class of the first cache
        raise ValueError(
            f"[prompt cache] A file of mlx_lm's save_prompt_cache is required, but {path} is "
            "another safetensors file; check the path."
        )


def _maker(model: Module) -> CompressedCaches | None:
    if not isinstance(model, Module):
        raise ValueError(
            f"[rotormlx] A model from mlx_lm.load is required, but a {type(model).__name__} was "
            "given; mlx_lm.load returns (model, tokenizer), pass the first."
        )
    maker = vars(model).get("make_cache")
    return maker if isinstance(maker, CompressedCaches) else None


def _own_attribute(model: Module) -> CacheMaker | None:
    """The ``make_cache`` of the instance, without rotormlx, if it has another than its class."""
    maker = _maker(model)
    return maker.own if maker else vars(model).get("make_cache")


def _own_caches(model: Any, own: CacheMaker | None) -> list[Any]:
    """The caches that a model uses by itself, whether it is compressed now or not."""
    if own is not None:
        return list(own())
    make = getattr(type(model), "make_cache", None)
    return [KVCache() for _ in model.layers] if make is None else list(make(model))


def _compress(caches: list[Any], config: RotorConfig, kind: type[RotorKVCache]) -> list[Any]:
    return [_replace(cache, config, layer, kind) for layer, cache in enumerate(caches)]


def _replace(cache: Any, config: RotorConfig, layer: int, kind: type[RotorKVCache]) -> Any:
    # Exactly this class: what derives from it may promise more than a compressed cache keeps.
    if type(cache) is KVCache:
        return kind(config, layer)
    if type(cache) is CacheList:
        return CacheList(*(_replace(part, config, layer, kind) for part in cache.caches))
    return cache


class _ProbeCache(RotorKVCache):
    """Remembers what it handed out, to see whether it reaches the attention."""

    def __init__(self, config: RotorConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.handed_out: list[tuple[KVView, KVView]] = []
        self.refusal = ""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        try:
            views = super().update_and_fetch(keys, values)
        except ValueError as error:
            # What is required and what came; what to do is said by the one who asks.
            self.refusal = str(error).partition("] ")[2].partition(";")[0].rstrip(".")
            raise
        self.handed_out.append(views)
        return views

    def keys_and_values(self) -> tuple[KVView, KVView]:
        views = super().keys_and_values()
        self.handed_out.append(views)
        return views


def _probe(model: Module, own: CacheMaker | None, config: RotorConfig) -> Report:
    """Run the model once without computing, since MLX is lazy, and see who meets whom.

    Leaves the hook installed, with the model as its user, unless the model is refused.
    """
    was_installed = hook.installed()
    model_type = str(getattr(model, "model_type", type(model).__name__))
    hook.install()
    try:
        caches = _compress(_own_caches(model, own), config, _ProbeCache)
        if not any(isinstance(cache, RotorKVCache) for _, _, cache in leaves(caches)):
            has = ", ".join(sorted({label for _, label, _ in leaves(caches)})) or "nothing"
            reason = f"it must have at least one KVCache, but all it has is {has}"
            raise _refusal(model_type, reason)
        for tokens in PROBE_TOKENS:
            _probe_step(model, model_type, caches, tokens)
        report = Report(config, model_type, tuple(_layer_reports(caches)))
    except BaseException:
        if not was_installed:
            hook.remove()
        raise
    _users[id(model)] = weakref.ref(model)
    return report


def _probe_step(model: Module, model_type: str, caches: list[Any], tokens: int) -> None:
    probes = [(i, cache) for i, _, cache in leaves(caches) if isinstance(cache, _ProbeCache)]
    try:
        with hook.record_attention() as attended:
            model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    except Exception as error:  # a model may use the handle in any way, so anything may come
        refused = next((f"layer {i}: {p.refusal}" for i, p in probes if p.refusal), "")
        touched = f"mlx-lm's attention must get its keys and values untouched, but {_brief(error)}"
        raise _refusal(model_type, refused or touched) from error
    handed_out = {(id(k), id(v)) for _, probe in probes for k, v in probe.handed_out}
    if any((id(keys), id(values)) not in handed_out for keys, values in attended):
        raise _refusal(model_type, "its attention must take keys with their values, but mixes them")
    reached = {(id(keys), id(values)) for keys, values in attended}
    for index, probe in probes:
        if not any((id(keys), id(values)) in reached for keys, values in probe.handed_out):
            raise _refusal(model_type, f"layer {index} must use mlx-lm's attention, but does not")


def _refusal(model_type: str, reason: str) -> ValueError:
    return ValueError(
        f"[apply] {model_type} cannot be compressed: {reason}; use the model without rotormlx."
    )


def _brief(error: Exception) -> str:
    # Only the first sentence: a wrong argument to mx makes it list all signatures.
    first = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"


def _layer_reports(caches: list[Any]) -> list[LayerReport]:
    reports = []
    for index, label, cache in leaves(caches):
        shape = _dims(cache) or (0, 0, 0)
        if isinstance(cache, RotorKVCache):
            keys, values = cache.keys_and_values()
            name = label.replace(type(cache).__name__, KVCache.__name__)
            reports.append(
                LayerReport(
                    index,
                    name,
                    True,
                    "",
                    *shape,
                    key_bits=keys.codec.bits_per_value,
                    value_bits=values.codec.bits_per_value,
                    exact_bytes=keys.dtype.size,
                )
            )
        elif isinstance(cache, (RotatingKVCache, ChunkedKVCache)):
            limit = cache.max_size if isinstance(cache, RotatingKVCache) else cache.chunk_size
            reason = f"it never keeps more than {limit} tokens"
            reports.append(LayerReport(index, label, False, reason, *shape, max_tokens=limit))
        elif isinstance(cache, ArraysCache):
            reason = "a state of constant size, no keys and values"
            reports.append(LayerReport(index, label, False, reason, state_bytes=cache.nbytes))
        else:
            reason = "a kind of cache that rotormlx does not know"
            reports.append(LayerReport(index, label, False, reason, *shape))
    return reports
