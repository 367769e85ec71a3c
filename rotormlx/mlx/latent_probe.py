"""The trial run that finds the caches of a model that hold latents (MLA).

A latent is recognized in a decode step: what its cache returned reaches attention both as keys and
as values. A prompt shows nothing, because there the model computes keys and values from the latent.
The trial continues with a long text, since sparse attention selects tokens from the latents only
if there are many; such a model gets decoded latents.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from rotormlx.config import RotorConfig
from rotormlx.mlx import hook
from rotormlx.mlx.cache.latent import LatentKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.host_caches import GROWING, is_exactly, leaves, replaced

# Tokens of the prompt, and of a long text of zeros that is never computed.
PROMPT_TOKENS, LONG_TOKENS = 3, 2**16
# A window so long that nothing is packed in a trial.
_WINDOW = 2**20 - 1


class ProbeLatents(LatentKVCache):
    """A cache that records the views it returned, and accepts values that a model assigns."""

    def __init__(self, config: RotorConfig, layer: int, *, hands_out_views: bool = True) -> None:
        super().__init__(replace(config, window=_WINDOW), layer)
        self.hands_out_views = hands_out_views  # type: ignore[misc]
        self.handed_out: list[KVView] = []
        # Whether keys and values came that cannot be compressed.
        self.has_refused = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append tokens, and record if they cannot be compressed."""
        try:
            return super().update_and_fetch(keys, values)
        except ValueError:
            self.has_refused = True
            raise

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, mx.array]:
        latents, rope = super()._served(views, new)
        if isinstance(latents, KVView):
            self.handed_out.append(latents)
        return latents, rope

    @property
    def values(self) -> Any:
        """An empty array, on which sparse attention lets other arrays depend."""
        return None if self._values is None else self._values.exact[:, :, :0]

    @values.setter
    def values(self, values: mx.array) -> None:
        del values


def find(model: Module, caches: Sequence[Any], config: RotorConfig) -> list[ProbeLatents | None]:
    """Find the caches of a model that hold latents. The hook must be installed.

    Args:
        model: The model.
        caches: Its own caches, empty; they stay empty.
        config: The compression settings.

    Returns:
        For each leaf of ``caches``, a cache that holds a few latents, or None if the leaf holds no
        latents. Its ``hands_out_views`` says whether the model can use views.
    """
    growing = [is_exactly(cache, GROWING) for _, _, cache in leaves(caches)]
    nothing: list[ProbeLatents | None] = [None] * len(growing)
    trial = _trial(caches, config, growing, views=True)
    while (reached := _run(model, trial, long=False)) is None:
        refused = [getattr(cache, "has_refused", False) for _, _, cache in leaves(trial)]
        if not any(refused):
            return nothing
        growing = [g and not r for g, r in zip(growing, refused, strict=True)]
        trial = _trial(caches, config, growing, views=True)
    if not any(found := _reaching(trial, reached)):
        return nothing
    trial = _trial(caches, config, found, views=True)
    reached = _run(model, trial, long=True)
    if reached is None or _reaching(trial, reached) != found:
        trial = _trial(caches, config, found, views=False)
        if _run(model, trial, long=True) is None:
            return nothing
    return [cache if isinstance(cache, ProbeLatents) else None for _, _, cache in leaves(trial)]


def _trial(
    caches: Sequence[Any], config: RotorConfig, chosen: Sequence[bool], *, views: bool
) -> list[Any]:
    """Return the caches with a probe in place of each chosen leaf."""
    own = copy.deepcopy(list(caches))
    new = {
        id(cache): ProbeLatents(config, index, hands_out_views=views)
        for (index, _, cache), is_chosen in zip(leaves(own), chosen, strict=True)
        if is_chosen
    }
    return [replaced(cache, new) for cache in own]


def _run(model: Module, caches: list[Any], *, long: bool) -> set[int] | None:
    """Run a prompt and a decode step.

    Returns:
        Ids of the views that were both keys and values; None if the model failed.
    """
    with hook.record_attention(pretend=True) as attended:
        try:
            model(mx.zeros((1, PROMPT_TOKENS), dtype=mx.int32), cache=caches)
            if long:
                for _, _, cache in leaves(caches):
                    _lengthen(cache)
            model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        except Exception:  # a model may use a view in any way, so any error may occur
            return None
        return {id(keys) for _, keys, values in attended if keys is values}


def _lengthen(cache: Any) -> None:
    """Append the zeros of a long text, lazily, to a cache that grows with the text."""
    if isinstance(cache, ProbeLatents) and not cache.empty():
        keys, values = cache.views()
    elif is_exactly(cache, GROWING) and cache.keys is not None:
        keys, values = cache.keys, cache.values
    else:
        return
    like = [(*a.shape[:2], LONG_TOKENS, a.shape[3]) for a in (keys, values)]
    cache.update_and_fetch(*(mx.zeros(shape, keys.dtype) for shape in like))


def _reaching(caches: Sequence[Any], reached: set[int]) -> list[bool]:
    """Return for each leaf whether it returned a view that was both keys and values."""
    return [
        isinstance(cache, ProbeLatents) and any(id(view) in reached for view in cache.handed_out)
        for _, _, cache in leaves(caches)
    ]
