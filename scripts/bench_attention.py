"""Attention on the device at hand: ``python scripts/bench_attention.py``.

One query token over a history, through rotormlx's packed cache, mlx-lm's own 4-bit quantized cache
and MLX's attention on the exact cache. With ``--queries``, a chunk of a prompt behind the history:
exact, and packed by MLX's attention over decoded tokens (library) and by the backend's (kernel),
with the memory that each takes. All run in this process, in turn, so that they share whatever else
the machine is doing; the table gives medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.mlx_ops import KERNEL, LIBRARY, Prompts
from rotormlx.mlx.cache.single import RotorKVCache

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FILL_TOKENS = 2048


def contenders(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: mx.Dtype,
    bits: list[int],
    *,
    batch: int = 1,
) -> dict[str, Callable[[], mx.array]]:
    """One step of decode attention for each cache, filled with the same random tokens."""
    shape = (batch, kv_heads, tokens, head_dim)
    keys, values = (mx.random.normal(shape).astype(dtype) for _ in "kv")
    query = mx.random.normal((batch, heads, 1, head_dim)).astype(dtype)
    scale = head_dim**-0.5
    quantized = QuantizedKVCache(group_size=64, bits=4)
    quantized_keys, quantized_values = quantized.update_and_fetch(keys, values)
    mx.eval(keys, values, query, quantized.state)

    def rotor(width: int) -> Callable[[], mx.array]:
        cache = RotorKVCache(RotorConfig(width, width))
        for start in range(0, tokens, FILL_TOKENS):
            part = slice(start, start + FILL_TOKENS)
            cache.update_and_fetch(keys[:, :, part], values[:, :, part])
            mx.eval(cache.state)
        views = cache.keys_and_values()
        return lambda: attend_view(query, *views, scale=scale)

    # mlx-lm's function scales its queries in place, so it gets a product of its own.
    return {
        "exact (mx.fast)": lambda: mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=scale
        ),
        "mlx-lm 4 bit": lambda: quantized_scaled_dot_product_attention(
            query * 1, quantized_keys, quantized_values, scale, None, group_size=64, bits=4
        ),
        **{f"rotormlx {width} bit": rotor(width) for width in bits},
    }


def chunk_contenders(
    tokens: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: mx.Dtype,
    bits: list[int],
) -> dict[str, Callable[[], mx.array]]:
    """A chunk of ``queries`` tokens behind ``tokens`` others, by each cache and each attention."""
    shape = (1, kv_heads, tokens + queries, head_dim)
    keys, values = (mx.random.normal(shape).astype(dtype) for _ in "kv")
    query = mx.random.normal((1, heads, queries, head_dim)).astype(dtype)
    mx.eval(keys, values, query)
    attention = {"scale": head_dim**-0.5, "mask": "causal"}

    def rotor(width: int, way: str) -> Callable[[], mx.array]:
        cache = RotorKVCache(RotorConfig(width, width))
        for start in range(0, tokens, FILL_TOKENS):
            part = slice(start, min(start + FILL_TOKENS, tokens))
            cache.update_and_fetch(keys[:, :, part], values[:, :, part])
            mx.eval(cache.state)
        views = cache.update_and_fetch(keys[:, :, tokens:], values[:, :, tokens:])
        mx.eval(*((view.exact, view.packed) for view in views))

        def step() -> mx.array:
            backend().timed_prompts = Prompts(way, way)
            return attend_view(query, *views, **attention)

        return step

    return {
        "exact (mx.fast)": lambda: mx.fast.scaled_dot_product_attention(
            query, keys, values, **attention
        ),
        **{
            f"rotormlx {width} bit, {way}": rotor(width, way)
            for width in bits
            for way in (LIBRARY, KERNEL)
        },
    }


def peak_megabytes(step: Callable[[], mx.array]) -> float:
    """Memory that a step takes beside what there is before it."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return (mx.get_peak_memory() - before) / 1e6


def median_ms(steps: dict[str, Callable[[], mx.array]], runs: int) -> dict[str, float]:
    """Median time of each step in milliseconds, the steps taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            mx.eval(step())
            if run:  # the first is a warm-up
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def main(
    contexts: Annotated[str, typer.Option(help="History lengths, comma-separated.")] = "1024,8192",
    bits: Annotated[str, typer.Option(help="Code widths, comma-separated.")] = "4,3",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
    head_dim: int = 128,
    queries: Annotated[int, typer.Option(help="Tokens attended at once; 1 is a decode step.")] = 1,
    runs: Annotated[int, typer.Option(help="Counted runs of each.")] = 11,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Time attention against mlx-lm's own caches."""
    console, widths = Console(), [int(b) for b in bits.split(",")]
    shape = (heads, kv_heads, head_dim, DTYPES[dtype], widths)
    medians, megabytes = {}, {}
    for tokens in track([int(c) for c in contexts.split(",")], "Timing", console=console):
        if queries == 1:
            medians[tokens] = median_ms(contenders(tokens, *shape), runs)
            continue
        steps = chunk_contenders(tokens, queries, *shape)
        medians[tokens] = median_ms(steps, runs)
        megabytes[tokens] = {name: peak_megabytes(step) for name, step in steps.items()}
    title = (
        f"Attention of {queries} tokens, ms: {heads} query and {kv_heads} KV heads, head_dim "
        f"{head_dim}, {dtype}, {mx.default_device()}, backend {backend().name}"
    )
    other = "mlx-lm 4 bit" if queries == 1 else "exact (mx.fast)"
    table = Table("history", *next(iter(medians.values())), title=title)
    for tokens, row in medians.items():
        cells = [f"{ms:.2f} ({ms / row[other]:.2f}x)" for ms in row.values()]
        if queries > 1:
            taken = megabytes[tokens].values()
            cells = [f"{cell}, {mb:.0f} MB" for cell, mb in zip(cells, taken, strict=True)]
        table.add_row(f"{tokens:,}", *cells)
    console.print(table)
    console.print(f"In brackets: time relative to {other}.")
    if output is not None:
        facts = {"title": title, "runs": runs, "median_ms": medians, "peak_mb": megabytes}
        output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
