"""Finds the caches of a model that hold latents (MLA), by a trial run.

A latent shows in a decode step: what its cache handed out reaches attention as keys and as values.
A prompt shows nothing, because there the model makes keys and values of it. The trial goes on with
a long text, since sparse attention picks tokens out of the latents only once there are many of
them; such a model gets decoded latents.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache

from rotormlx.config import RotorConfig
from rotormlx.mlx import hook
from rotormlx.mlx.cache.latent import Fetched, LatentKVCache
from rotormlx.mlx.cache.lists import leaves, with_leaves
from rotormlx.mlx.cache.view import KVView

# A prompt of a few tokens, and a long text that is all zeros and never computed.
PROMPT_TOKENS, LONG_TOKENS = 3, 2**16
# Nothing is packed in a trial.
_WINDOW = 2**20 - 1


class ProbeLatents(LatentKVCache):
    """Remembers the views it handed out, and takes what a model writes to it."""

    def __init__(self, config: RotorConfig, layer: int, *, hands_out_views: bool = True) -> None:
        super().__init__(replace(config, window=_WINDOW), layer)
        self.hands_out_views = hands_out_views  # type: ignore[misc]
        self.handed_out: list[KVView] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append tokens, and remember the view."""
        latents, rope = super().update_and_fetch(keys, values)
        if isinstance(latents, KVView):
            self.handed_out.append(latents)
        return latents, rope

    @property
    def values(self) -> mx.array | None:
        """As of any cache; a model that writes it keeps something else than latents."""
        return super().values

    @values.setter
    def values(self, values: mx.array) -> None:
        del values


def find(model: Module, caches: Sequence[Any], config: RotorConfig) -> list[ProbeLatents | None]:
    """Try which of a model's caches hold latents. The hook must be installed.

    Args:
        model: The model.
        caches: Its own caches, empty; they stay empty.
        config: How latents would be compressed.

    Returns:
        For each leaf of ``caches`` None, or, where it holds latents, a cache that has seen a few of
        them; its ``hands_out_views`` says whether views may be handed out.

    Raises:
        Exception: What the model raises where it needs arrays in a decode step of a short text.
    """
    all_leaves = [cache for _, _, cache in leaves(caches)]
    tried = _trial(caches, config, [type(cache) is KVCache for cache in all_leaves], views=True)
    found = _reaching(tried, _run(model, tried, long=False))
    if not any(found):
        return [None] * len(found)
    trial = _trial(caches, config, found, views=True)
    try:
        as_views = _reaching(trial, _run(model, trial, long=True)) == found
    except Exception:  # a model may use the view in any way, so anything may come
        as_views = False
    if not as_views:
        trial = _trial(caches, config, found, views=False)
        _run(model, trial, long=True)
    return [cache if isinstance(cache, ProbeLatents) else None for _, _, cache in leaves(trial)]


def _trial(
    caches: Sequence[Any], config: RotorConfig, chosen: Sequence[bool], *, views: bool
) -> list[Any]:
    """The caches with a probe in place of each chosen leaf."""
    own = copy.deepcopy(list(caches))
    new = [
        ProbeLatents(config, index, hands_out_views=views) if is_chosen else cache
        for (index, _, cache), is_chosen in zip(leaves(own), chosen, strict=True)
    ]
    return with_leaves(own, iter(new))


def _run(model: Module, caches: list[Any], *, long: bool) -> set[int]:
    """A prompt and a decode step; returns ids of the views that were keys and values at once."""
    reached = set()
    with hook.record_attention(pretend=True) as attended:
        model(mx.zeros((1, PROMPT_TOKENS), dtype=mx.int32), cache=caches)
        if long:
            for _, _, cache in leaves(caches):
                _lengthen(cache)
        model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        reached = {id(keys) for _, keys, values in attended if keys is values}
    return reached


def _lengthen(cache: Any) -> None:
    """Append zeros for a long text, lazily, to what grows with it."""
    if not isinstance(cache, (KVCache, ProbeLatents)) or cache.empty():
        return
    keys, values = cache.keys_and_values()
    like = [(*a.shape[:2], LONG_TOKENS, a.shape[3]) for a in (keys, values)]
    cache.update_and_fetch(*(mx.zeros(shape, keys.dtype) for shape in like))


def _reaching(caches: Sequence[Any], reached: set[int]) -> list[bool]:
    """Which leaves handed out a view that was keys and values at once."""
    return [
        isinstance(cache, ProbeLatents) and any(id(view) in reached for view in cache.handed_out)
        for _, _, cache in leaves(caches)
    ]
