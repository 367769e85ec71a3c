"""The memory of filled caches, compared with float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rotormlx.codec.format import BLOCK
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import leaves
from rotormlx.report import Report, megabytes


@dataclass(frozen=True)
class Usage:
    """Sizes of filled caches, without the room that they keep for growth.

    Args:
        tokens: Tokens held by the longest cache.
        packed_tokens: Number of these tokens that are packed.
        cache_bytes: Bytes used by the caches.
        float16_bytes: Bytes with keys and values in float16; layers left alone keep their size.
    """

    tokens: int = 0
    packed_tokens: int = 0
    cache_bytes: int = 0
    float16_bytes: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens + other.tokens,
            self.packed_tokens + other.packed_tokens,
            self.cache_bytes + other.cache_bytes,
            self.float16_bytes + other.float16_bytes,
        )

    def describe(self, sequences: int) -> str:
        """Return one line about the caches of several sequences."""
        size, plain = megabytes(self.cache_bytes), megabytes(self.float16_bytes)
        return (
            f"{sequences} sequences, {self.packed_tokens:,} of {self.tokens:,} tokens packed; "
            f"caches {size} against {plain} in float16"
        )


def measure(report: Report, caches: Sequence[Any]) -> Usage:
    """Measure the caches of one sequence.

    Args:
        report: The report on their model.
        caches: The filled list that ``model.make_cache()`` returned.
    """
    tokens = packed = size = float16_size = 0
    for layer, (_, _, cache) in zip(report.layers, leaves(caches), strict=True):
        if isinstance(cache, RotorKVCache):
            tokens, packed = max((tokens, packed), (cache.size(), cache.packed_tokens))
            size += cache.used_bytes
            rows = 1 if cache.keys is None else cache.keys.shape[0]
            float16_size += rows * layer.float_bytes(cache.size())
        else:
            size += cache.nbytes
            float16_size += cache.nbytes
    return Usage(tokens, packed, size, float16_size)


def describe(report: Report, caches: Sequence[Any]) -> str:
    """Return two lines: which layers were compressed, and the size of the cache."""
    usage = measure(report, caches)
    size, float16_size = usage.cache_bytes, usage.float16_bytes
    smaller = usage.packed_tokens and size < float16_size
    ratio = f", {float16_size / size:.2f}x smaller" if smaller else ""
    limit = report.config.sink + report.config.window + BLOCK
    why = "" if usage.packed_tokens else f" (all exact: packing starts at {limit} tokens)"
    return (
        f"{report.summary}\n{usage.packed_tokens:,} of {usage.tokens:,} tokens packed{why}; cache "
        f"{megabytes(size)} against {megabytes(float16_size)} in float16{ratio}"
    )


def describe_peak(usage: Usage, peak_bytes: int) -> str:
    """Return the peak memory, weights included, and an estimate for a float16 cache."""
    float16_peak = peak_bytes + usage.float16_bytes - usage.cache_bytes
    return (
        f"peak memory {megabytes(peak_bytes)}, about {megabytes(float16_peak)} with a float16 cache"
    )
