"""Measures the effect of a cache on attention, layer by layer, as the paper does.

The keys and values of the exact run are stored in a cache of each scheme. The exact queries of the
end of the text then read both caches. So each layer's error is measured alone, without the errors
of earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from rotormlx.measure import cache_contents
from rotormlx.measure.scoring import CHUNK
from rotormlx.mlx import hook

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LayerError:
    """The errors of one layer.

    Args:
        layer: Index of the layer.
        key_error: Squared error of all keys, relative to the sum of their squares.
        value_error: Squared error of all values, relative to the sum of their squares.
        score_cosine: Cosine of the scores before the softmax with the exact ones; the mean over
            heads and queries.
        cosine: Cosine of the attention output with the exact one; the mean over heads and queries.
        top1: Share of queries whose most attended token stays the most attended.
        top5: Share of queries whose most attended token stays among the five most attended.
    """

    layer: int
    key_error: float
    value_error: float
    score_cosine: float
    cosine: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Attended:
    """The inputs of one layer's attention in the exact run, float32.

    Args:
        layer: Index of the layer.
        queries: The last queries, ``[H, L, D]``.
        keys: All keys, ``[K, S, D]``.
        values: All values, ``[K, S, Dv]``.
        scale: Factor of the scores.
    """

    layer: int
    queries: Array
    keys: Array
    values: Array
    scale: float


@contextmanager
def record_queries() -> Iterator[dict[int, tuple[mx.array, float]]]:
    """Record the latest queries and the score factor of each cache, by the id of the cache.

    The hook must be installed, so that all attention of mlx-lm passes through it.

    Yields:
        Queries and factor by the id of the cache.
    """
    latest: dict[int, tuple[mx.array, float]] = {}
    attend: Callable[..., mx.array] = hook.attend

    def recording(
        own: Any, queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, *rest: Any
    ) -> mx.array:
        latest[id(cache)] = queries, scale
        return attend(own, queries, keys, values, cache, scale, *rest)

    with patch.object(hook, "attend", recording):
        yield latest


def attended(
    caches: Sequence[Any], latest: dict[int, tuple[mx.array, float]]
) -> Iterator[Attended]:
    """Yield the content of each growing cache of the exact run, with its last queries."""
    for layer, cache in cache_contents.compressed(caches):
        queries, scale = latest[id(cache)]
        keys, values = cache_contents.decoded(cache)
        yield Attended(layer, _float32(queries[0]), _float32(keys[0]), _float32(values[0]), scale)


def layer_error(exact: Attended, cache: Any) -> LayerError:
    """Store a layer's keys and values in a cache, and compare attention with the exact one.

    Args:
        exact: The inputs of the layer's attention in the exact run.
        cache: An empty cache; it is filled in chunks of 64 tokens.
    """
    tokens = exact.keys.shape[1]
    for start in range(0, tokens, CHUNK):
        part = slice(start, start + CHUNK)
        cache.update_and_fetch(
            mx.array(exact.keys[None, :, part]), mx.array(exact.values[None, :, part])
        )
    keys, values = (_float32(x[0]) for x in cache_contents.decoded(cache))
    noise = cache_contents.score_noise(cache, exact.queries[None], exact.scale)[0]
    truth, scores = _scores(exact, exact.keys), _scores(exact, keys) - noise.astype(np.float32)
    visible = np.isfinite(truth)
    best = truth.argmax(-1)[..., None]
    # Number of tokens with a higher score than the token that should have the highest.
    above = (scores > np.take_along_axis(scores, best, -1)).sum(-1)
    return LayerError(
        exact.layer,
        key_error=_relative(exact.keys, keys),
        value_error=_relative(exact.values, values),
        score_cosine=_cosine(np.where(visible, truth, 0), np.where(visible, scores, 0)),
        cosine=_cosine(_output(truth, exact.values), _output(scores, values)),
        top1=float((above < 1).mean()),
        top5=float((above < 5).mean()),
    )


def _scores(exact: Attended, keys: Array) -> Array:
    """Return the masked scores ``[H, L, S]`` of the last L queries."""
    heads, length, _ = exact.queries.shape
    repeated = np.repeat(keys, heads // len(keys), axis=0)
    scores: Array = exact.scale * (exact.queries @ repeated.swapaxes(-1, -2))
    tokens = keys.shape[1]
    visible = np.arange(tokens) <= np.arange(length)[:, None] + tokens - length
    return np.where(visible, scores, np.float32(-np.inf))


def _cosine(a: Array, b: Array) -> float:
    """Return the mean cosine of rows ``[..., D]``."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / norms).mean())


def _output(scores: Array, values: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out: Array = weights @ np.repeat(values, len(scores) // len(values), axis=0)
    return out


def _relative(exact: Array, coded: Array) -> float:
    return float(
        np.square(coded - exact).sum(dtype=np.float64) / np.square(exact).sum(dtype=np.float64)
    )


def _float32(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32))
