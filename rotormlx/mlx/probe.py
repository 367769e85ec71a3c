"""The trial run that finds which caches of a model can be compressed, and how each is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from rotormlx.codec.counts import max_blocks
from rotormlx.config import RotorConfig
from rotormlx.mlx import hook, latent_probe
from rotormlx.mlx.cache import windows
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import (
    ARRAYS,
    CHUNKED,
    GROWING,
    ROTATING,
    is_a,
    is_exactly,
    leaves,
    replaced,
)
from rotormlx.mlx.ways import DECODED, DECODED_LATENT, FUSED, LATENT, WAYS, Way, named
from rotormlx.report import LayerReport, Report, brief, megabytes

# Prefill and decode, because some models take another path for a single token.
PROBE_TOKENS = (3, 1)
# Extra tokens that handles pretend to hold in a last step, because some models cut a window out of
# long keys themselves. This is longer than the windows of all models.
FAR_TOKENS = 1 << 20


def probe(
    model: Module, caches: list[Any], config: RotorConfig, *, sliding_windows: bool = True
) -> Report:
    """Run the model without computing, since MLX is lazy, and find the way that suits each cache.

    If a way fails for a cache, the run is repeated with the next way for this cache. A cache that
    no way suits is left alone. The host must be changed to read compressed caches.

    Args:
        model: The part of the model that takes tokens and caches; it stays unchanged.
        caches: The model's own caches, empty; they are copied and stay empty.
        config: The compression settings.
        sliding_windows: Whether sliding windows and chunked attention are to be compressed.

    Returns:
        A report on the caches that would be compressed.

    Raises:
        ValueError: If there is nothing to compress, or no way suits any cache.
    """
    model_type = str(getattr(model, "model_type", type(model).__name__))
    # A calibration changes neither shapes nor bits, and needs the shapes found here.
    run = _TrialRun(model, caches, config.uncalibrated, sliding_windows)
    if run.failures():
        run.find_latents()
    while failures := run.failures():
        # A run with handles ends at the first cache they do not suit, so find all such caches.
        failures = run.bypassing() or failures
        for trial, reason in failures:
            trial.reasons.append(reason)
        if all(trial.way is None for trial in run.trials.values()):
            first = next(iter(run.trials.values()))
            raise ValueError(
                f"[apply] {model_type} cannot be compressed: layer {first.index}: "
                f"{first.reasons[-1]}; use the model without rotormlx."
            )
    if not run.trials:
        raise ValueError(
            f"[apply] {model_type} cannot be compressed: it keeps {_all_it_keeps(run.caches)}; use "
            "the model without rotormlx."
        )
    reports = [
        _layer_report(*leaf, run.trials.get(place)) for place, leaf in enumerate(leaves(run.caches))
    ]
    return Report(config, model_type, tuple(reports))


def compress(
    caches: list[Any],
    make: Callable[[int], Any],
    report: Report | None = None,
    of_windows: windows.WindowMaker | None = None,
) -> list[Any]:
    """Replace growing caches by compressed ones, and windows as the report says.

    Args:
        caches: The caches that a model makes itself.
        make: Returns the compressed cache of a layer, given its index.
        report: The result of :func:`probe` for the model, which names the caches to replace and the
            way of each. If None, all plain growing caches are replaced, for the fused attention.
        of_windows: Returns the compressed cache of a sliding window or of chunked attention.
    """
    new = {}
    for place, (index, _, cache) in enumerate(leaves(caches)):
        if report is None:
            way = FUSED if _is_growing(cache) else None
        else:
            layer = report.layers[place]
            way = named(layer.way) if layer.compressed else None
        if way is not None and not _is_growing(cache):
            new[id(cache)] = cache if of_windows is None else of_windows(index, cache)
        elif way is not None:
            made = make(index)
            new[id(cache)] = made if way is FUSED else way.cache.of(made)
    return [replaced(cache, new) for cache in caches]


def _is_growing(cache: Any) -> bool:
    # Exactly this class, because a derived one may promise more than a compressed cache keeps.
    return is_exactly(cache, GROWING)


# ---- the trial run ------------------------------------------------------------------------------


class _Trial:
    """A cache of a model under trial.

    Args:
        index: Index of its layer.
        own: The model's own cache.
        ways: The ways to try, best first; None for the ways of its kind.
        why: The reason why the first of them is not the fused attention; empty if it is.
    """

    def __init__(
        self, index: int, own: Any, ways: Sequence[Way] | None = None, why: str = ""
    ) -> None:
        self.index = index
        self.own = own
        self.ways = ways or (WAYS if _is_growing(own) else (FUSED,))
        self.why = why
        # The reasons why the ways before this one failed.
        self.reasons: list[str] = []
        # The results returned in the latest run, and the reason of a refusal.
        self.handed_out: list[tuple[Any, Any]] = []
        self.refusal = ""
        # The number of extra tokens that handles pretend to hold.
        self.pretended = 0

    @property
    def way(self) -> Way | None:
        """The way being tried; None if all have failed."""
        tried = len(self.reasons)
        return self.ways[tried] if tried < len(self.ways) else None

    def cache(
        self, config: RotorConfig, asked: list[_Trial], kind: type[RotorKVCache] | None
    ) -> RotorKVCache | None:
        """Return a cache that records its results, and this trial in ``asked`` at each call.

        Args:
            config: The compression settings.
            asked: The list to which each call appends this trial.
            kind: A class that replaces that of the way; None to keep it.
        """
        self.handed_out, self.refusal, self.pretended = [], "", 0
        if self.way is None:
            return None
        way, cache = self.way, self._made(config, kind or self.way.cache)

        def watched(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arrays: mx.array) -> Any:
                try:
                    served = method(*arrays)
                except ValueError as error:
                    # Only what is required and what came; the caller says what to do.
                    self.refusal = str(error).partition("] ")[2].partition(";")[0].rstrip(".")
                    raise
                if self.pretended and kind is None and way.hands_out_handles:
                    served = tuple(replace(v, tokens=v.tokens + self.pretended) for v in served)
                if not way.hands_out_handles and len({id(array) for array in arrays}) == 1:
                    self.refusal = "the model selects tokens with this cache, so it must stay exact"
                self.handed_out.append(served)
                asked.append(self)
                return served

            return run

        for name in ("update_and_fetch", "keys_and_values"):
            setattr(cache, name, watched(getattr(cache, name)))
        return cache

    def _made(self, config: RotorConfig, kind: type[RotorKVCache]) -> Any:
        """Return an empty cache of this class; for a window, one that serves tokens like it."""
        cache = windows.maker(config)(self.index, self.own)
        if cache is None:
            return kind(config, self.index)
        if kind is not FUSED.cache:
            vars(cache)["_served"] = partial(kind._served, cast(Any, cache))
        return cache

    def is_astray(self, reached: set[tuple[int, int]], known: set[tuple[int, int]]) -> bool:
        """Whether some handle did not reach our attention unchanged, with its keys or values.

        Args:
            reached: Pairs of keys and values that reached our attention, by id.
            known: Pairs that any cache returned, by id.
        """
        if self.way is None or not self.way.hands_out_handles:
            return False
        own = {(id(keys), id(values)) for keys, values in self.handed_out}
        mixed = {part for pair in reached - known for part in pair}
        return not own & reached or any(part in mixed for pair in own for part in pair)


class _TrialRun:
    """Runs of a model, each with new caches.

    Args:
        model: The model.
        pattern: The model's own caches, empty.
        config: The compression settings.
        sliding_windows: Whether sliding windows are under trial too.
    """

    def __init__(
        self, model: Module, pattern: list[Any], config: RotorConfig, sliding_windows: bool
    ) -> None:
        self.model = model
        self.pattern = pattern
        self.config = config
        # By the position of the cache among the leaves.
        self.trials = {
            place: _Trial(index, cache)
            for place, (index, _, cache) in enumerate(leaves(pattern))
            if _is_growing(cache) or (sliding_windows and windows.is_compressible(cache))
        }
        # The caches of the latest run.
        self.caches: list[Any] = []

    def find_latents(self) -> None:
        """Find the caches that hold latents; for these only latent ways are tried."""
        with _unchanged(self.model):
            found = latent_probe.find(self.model, self.pattern, self.config)
        for place, probe in enumerate(found):
            if probe is not None:
                way, why = LATENT, "the model keeps latents"
                if not probe.hands_out_views:
                    way, why = DECODED_LATENT, f"{why} and selects tokens from them"
                own = self.trials[place]
                self.trials[place] = _Trial(own.index, own.own, (way,), why)

    def failures(self) -> list[tuple[_Trial, str]]:
        """Run the model; return the trials whose way failed, with the reasons."""
        asked = list[_Trial]()
        for reached, error in self._steps(asked):
            if failures := _failures(self._active, reached, error, asked):
                return failures
        return []

    def bypassing(self) -> list[tuple[_Trial, str]]:
        """Return the trials with handles for which arrays do not reach attention unchanged."""
        if any(trial.reasons for trial in self.trials.values()):
            return []
        found: dict[_Trial, str] = {}
        for reached, error in self._steps([], DECODED.cache):
            if error is not None:
                return []
            found |= dict(_astray(self._active, reached))
        return list(found.items())

    @property
    def _active(self) -> list[_Trial]:
        return [trial for trial in self.trials.values() if trial.way is not None]

    def _steps(
        self, asked: list[_Trial], kind: type[RotorKVCache] | None = None
    ) -> Iterator[tuple[set[tuple[int, int]], Exception | None]]:
        """Run the model for each of ``PROBE_TOKENS``, and far from the first token.

        Args:
            asked: The list to which each call of a cache appends its trial.
            kind: The class of all compressed caches; None for the class of each one's way.

        Yields:
            Pairs of keys and values that reached our attention, by id, and the error if any.
        """
        own = copy.deepcopy(self.pattern)
        new = {}
        for place, (_, _, cache) in enumerate(leaves(own)):
            trial = self.trials.get(place)
            made = None if trial is None else trial.cache(self.config, asked, kind)
            new[id(cache)] = cache if made is None else made
        self.caches = [replaced(cache, new) for cache in own]
        for tokens, pretended in (*((count, 0) for count in PROBE_TOKENS), (1, FAR_TOKENS)):
            for trial in self.trials.values():
                trial.pretended = pretended if windows.size(trial.own) is None else 0
            failed: Exception | None = None
            with hook.record_attention(pretend=True) as attended, _unchanged(self.model):
                try:
                    self.model(mx.zeros((1, tokens), dtype=mx.int32), cache=self.caches)
                except Exception as error:  # models may use handles in any way
                    failed = error
            yield {(id(keys), id(values)) for _, keys, values in attended}, failed


def _failures(
    active: Sequence[_Trial],
    reached: set[tuple[int, int]],
    error: Exception | None,
    asked: Sequence[_Trial],
) -> list[tuple[_Trial, str]]:
    """Return the trials whose way failed in a run, whether or not it raised an error.

    Args:
        active: The trials.
        reached: Pairs of keys and values that reached our attention, by id.
        error: The error that ended the run, if any.
        asked: The trials in the order in which the model called their caches.
    """
    if refused := [(trial, trial.refusal) for trial in active if trial.refusal]:
        return refused
    astray = _astray([trial for trial in active if trial.handed_out], reached)
    if error is None:
        unused = [trial for trial in active if not trial.handed_out]
        return astray or [(trial, "the model does not use this cache") for trial in unused]
    reason = _what_failed(error)
    # Either the model used a handle that went astray, or the cache called last has failed.
    if astray and reason == _TOUCHED:
        return astray
    return [(trial, reason) for trial in (asked[-1:] or active)]


def _astray(trials: Sequence[_Trial], reached: set[tuple[int, int]]) -> list[tuple[_Trial, str]]:
    """Return the trials whose handles did not reach the fused attention unchanged."""
    known = {(id(k), id(v)) for trial in trials for k, v in trial.handed_out}
    return [(trial, _TOUCHED) for trial in trials if trial.is_astray(reached, known)]


@contextmanager
def _unchanged(model: Module) -> Iterator[None]:
    """Undo changes that a run makes to parts of a model, such as prompt positions."""
    kept = [(d, dict(d)) for part in model.modules() for d in (part, vars(part))]
    try:
        yield
    finally:
        for now, before in kept:
            for name in now.keys() - before.keys():
                dict.pop(now, name)
            changed = {k: v for k, v in before.items() if k not in now or now[k] is not v}
            dict.update(now, changed)


_TOUCHED = "the model computes with keys and values itself"


def _what_failed(error: Exception) -> str:
    """Return the reason for a failure as text."""
    takes_no_handle = re.match(r"\w+\(\): incompatible function arguments", str(error))
    if takes_no_handle or str(error).startswith("[KVView]"):
        return _TOUCHED
    return f"the model fails with compressed caches ({brief(error)})"


# ---- the report ---------------------------------------------------------------------------------


def _layer_report(index: int, label: str, cache: Any, trial: _Trial | None) -> LayerReport:
    shape = dims(cache) or (0, 0, 0)
    if trial is not None and trial.way is not None:
        keys, values = cache.views()
        return LayerReport(
            index,
            label.replace(type(cache).__name__, type(trial.own).__name__),
            True,
            trial.reasons[0] if trial.reasons else trial.why,
            *shape,
            key_bits=keys.codec.bits_per_value,
            value_bits=values.codec.bits_per_value,
            exact_bytes=keys.dtype.size,
            max_tokens=windows.size(trial.own),
            max_blocks=max_blocks(cache.max_size, cache.config),
            way=trial.way.name,
            holds_latents=trial.way in (LATENT, DECODED_LATENT),
        )
    limit = windows.size(cache)
    if trial is not None:
        return LayerReport(index, label, False, trial.reasons[-1], *shape, max_tokens=limit)
    if limit is not None:
        reason = windows.reason_alone(cache)
        return LayerReport(index, label, False, reason, *shape, max_tokens=limit)
    if is_a(cache, ARRAYS):
        reason = "it holds a state of constant size instead of keys and values"
        return LayerReport(index, label, False, reason, state_bytes=cache.nbytes)
    return LayerReport(index, label, False, "rotormlx does not support this kind of cache", *shape)


def _all_it_keeps(caches: list[Any]) -> str:
    """Return the end of a sentence on what a model without growing caches keeps."""
    held = [cache for _, _, cache in leaves(caches)]
    states = [cache for cache in held if is_a(cache, ARRAYS)]
    limits = [limit for c in held if (limit := windows.size(c)) is not None]
    others = {type(c).__name__ for c in held if not is_a(c, ARRAYS, ROTATING, CHUNKED)}
    if others:
        return f"tokens in caches that rotormlx does not support ({', '.join(sorted(others))})"
    parts = []
    if states:
        size = megabytes(sum(cache.nbytes for cache in states))
        parts.append(f"a state of constant size ({size})")
    if limits:
        parts.append(f"no more than the last {max(limits)} tokens of sliding windows")
    return f"{' and '.join(parts) or 'no tokens'}, so there is nothing to compress"


def dims(cache: Any) -> tuple[int, int, int] | None:
    """Return KV heads, key and value dimension of a filled cache; None if it holds no keys."""
    if isinstance(cache, RotorKVCache):
        pair: tuple[Any, Any] = (None, None) if cache.empty() else cache.views()
    else:
        pair = getattr(cache, "keys", None), getattr(cache, "values", None)
    keys, values = pair
    if keys is None or values is None or len(keys.shape) != 4:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]
