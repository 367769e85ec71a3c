"""Times attention over packed caches in turn with MLX's own attention over an exact cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache

from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.mlx_ops import Prompts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView

# Names of the contenders that are not rotormlx.
EXACT, QUANTIZED = "exact (mx.fast)", "mlx-lm 4 bit"
# Tokens appended to a cache at once.
FILL_TOKENS = 2048

Steps = dict[str, Callable[[], mx.array]]


class Shape(NamedTuple):
    """The sizes B, H, K and D of a call, and the dtype of keys, values and queries."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    def random(self, heads: int, tokens: int) -> mx.array:
        """Return normal random numbers ``[B, heads, tokens, D]``."""
        made = mx.random.normal((self.batch, heads, tokens, self.head_dim)).astype(self.dtype)
        mx.eval(made)
        return made

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)


def rotor_name(bits: int) -> str:
    """Return the name of a rotormlx contender."""
    return f"rotormlx {bits} bit"


def decode_steps(shape: Shape, tokens: int, bits: Sequence[int]) -> Steps:
    """Return steps of one query token over a history of random tokens, one per kind of cache.

    Args:
        shape: Sizes and dtype of the call.
        tokens: Tokens of the history.
        bits: Bits of the rotormlx caches.
    """
    keys, values = (shape.random(shape.kv_heads, tokens) for _ in "kv")
    query = shape.random(shape.heads, 1)
    quantized = QuantizedKVCache(group_size=64, bits=4)
    quantized_keys, quantized_values = quantized.update_and_fetch(keys, values)
    mx.eval(quantized.state)
    # mlx-lm's function scales its queries in place, so it gets a copy of them.
    steps: Steps = {
        EXACT: lambda: mx.fast.scaled_dot_product_attention(query, keys, values, scale=shape.scale),
        QUANTIZED: lambda: quantized_scaled_dot_product_attention(
            query * 1, quantized_keys, quantized_values, shape.scale, None, group_size=64, bits=4
        ),
    }
    for width in bits:
        views = _views(keys, values, width, last=1)
        steps[rotor_name(width)] = partial(attend_view, query, *views, scale=shape.scale)
    return steps


def prompt_steps(
    shape: Shape, tokens: int, length: int, bits: Sequence[int], ways: Sequence[str] = ()
) -> Steps:
    """Return steps of a causal chunk of a prompt after a history, for exact and packed caches.

    Args:
        shape: Sizes and dtype of the call.
        tokens: Tokens of the history.
        length: Tokens of the chunk.
        bits: Bits of the rotormlx caches.
        ways: The kinds of attention to time, ``"library"`` or ``"kernel"`` (see
            :func:`rotormlx.mlx.prefill.choice`); by default, the one that rotormlx chooses.
    """
    keys, values = (shape.random(shape.kv_heads, tokens + length) for _ in "kv")
    query = shape.random(shape.heads, length)
    steps: Steps = {
        EXACT: lambda: mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=shape.scale, mask="causal"
        )
    }
    for width in bits:
        views = _views(keys, values, width, last=length)
        step = partial(attend_view, query, *views, scale=shape.scale, mask="causal")
        for way in ways:
            steps[f"{rotor_name(width)}, {way}"] = partial(_in_way, way, step)
        if not ways:
            steps[rotor_name(width)] = step
    return steps


def _in_way(way: str, step: Callable[[], mx.array]) -> mx.array:
    chosen = backend()
    before, chosen.timed_prompts = chosen.timed_prompts, Prompts(way, way)
    try:
        return step()
    finally:
        chosen.timed_prompts = before


def _views(keys: mx.array, values: mx.array, bits: int, *, last: int) -> tuple[KVView, KVView]:
    """Return the views of the step that appends the ``last`` tokens."""
    cache = RotorKVCache(RotorConfig(bits, bits))
    history = keys.shape[2] - last
    for start in range(0, history, FILL_TOKENS):
        part = slice(start, min(start + FILL_TOKENS, history))
        cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        mx.eval(cache.state)
    views = cache.update_and_fetch(keys[:, :, history:], values[:, :, history:])
    mx.eval(cache.state)
    return views


def peak_megabytes(step: Callable[[], mx.array]) -> float:
    """Return the peak memory of a step in megabytes, beyond the memory in use before it."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return (mx.get_peak_memory() - before) / 1e6


def median_ms(steps: Steps, runs: int) -> dict[str, float]:
    """Return the median time of each step in milliseconds; the steps run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            mx.eval(step())
            if run:  # the first run is a warm-up
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}
