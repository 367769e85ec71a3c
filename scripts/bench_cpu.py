"""Measure attention on the CPU: ``python scripts/bench_cpu.py --model PATH``.

It measures:

- decode attention, compared with MLX's own attention, mlx-lm's quantized attention and torch;
- encoding, compared with numpy and MLX operations;
- a chunk of a prompt;
- with ``--model``, tokens per second of mlx_lm after a long history.

The contenders of a row run in turn in one process, so that other work on the machine affects them
alike. A turn is two steps. A step calls one layer after the other, each with its own data, so that
little is in the processor's caches. The first step wakes the cores; the second is timed. Each
figure is the time of the fastest step, which other work disturbs least. The script writes JSON and
a plot.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx_lm
import numpy as np
import typer
from bench_report import Row, write_figures
from matplotlib import pyplot as plt
from mlx_lm.generate import generate_step
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from rich.progress import track

import rotormlx
from rotormlx.cli.terminal import wide_console
from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, ROLES, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.single import RotorKVCache

try:
    import torch
except ImportError:  # the rows of torch are left out
    torch = None

Call = Callable[[], object]
HEAD_DIM, KV_HEADS, HEADS = 128, 2, 8
SCALE = HEAD_DIM**-0.5
FILL_TOKENS = 2048
# Layers per step; fewer if their histories would have more than MOST_TOKENS tokens together.
LAYERS, MOST_TOKENS = 10, 2**18
OURS = {f"rotormlx {bits} bit": bits for bits in (4, 3, 2, 8)}
# Groups of the other contenders, by the beginning of their names.
RIVALS = {"MLX and mlx-lm": ("MLX", "mlx-lm"), "torch": "torch", "folded torch": "folded"}
TORCH_DTYPES = ("float32", "bfloat16")
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def timed(layers: list[dict[str, Call]], runs: int) -> dict[str, float]:
    """Return the milliseconds per layer of each contender's fastest step; they take turns."""

    def step(name: str) -> float:
        start = time.perf_counter()
        for layer in layers:
            made = layer[name]()
            if isinstance(made, (mx.array, tuple)):
                mx.eval(made)
        return 1e3 * (time.perf_counter() - start) / len(layers)

    fastest = dict.fromkeys(layers[0], float("inf"))
    for _ in range(runs):
        for name, ms in fastest.items():
            step(name)
            fastest[name] = min(ms, step(name))
    return fastest


def read_bandwidth(runs: int) -> float:
    """Return the bytes per second of reading memory with the threads of the library."""
    threads = cpu_library.thread_count()
    parts = np.array_split(np.ones(2**27, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        ms = timed([{"read": lambda: list(pool.map(np.max, parts))}], runs)["read"]
    return 1e3 * sum(part.nbytes for part in parts) / ms


def rotor_views(keys: mx.array, values: mx.array, bits: int) -> Any:
    """Return views of a compressed cache with these keys and values."""
    cache = RotorKVCache(RotorConfig(bits, bits))
    for start in range(0, keys.shape[2], FILL_TOKENS):
        part = slice(start, start + FILL_TOKENS)
        views = cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        mx.eval(cache.state)
    # These views precede the packing of the last chunk; a decode step reads the views after it.
    return cache.keys_and_values() if views else None


def decode_step(tokens: int, heads: int, *contenders: str) -> list[dict[str, Call]]:
    """Return calls of decode attention by layer, of the named contenders or of all."""
    layers = min(LAYERS, max(1, MOST_TOKENS // tokens))
    return [_decode_layer(tokens, heads, contenders) for _ in range(layers)]


def _decode_layer(tokens: int, heads: int, contenders: Collection[str]) -> dict[str, Call]:
    """Return the calls of one layer, all contenders over the same random tokens."""
    keys, values = (mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM)) for _ in "kv")
    query = mx.random.normal((1, heads, 1, HEAD_DIM))
    mx.eval(keys, values, query)

    def exact(dtype: mx.Dtype) -> Call:
        q, k, v = (a.astype(dtype) for a in (query, keys, values))
        mx.eval(q, k, v)
        return lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE)

    def quantized(bits: int) -> Call:
        k, v = QuantizedKVCache(group_size=64, bits=bits).update_and_fetch(keys, values)
        mx.eval(k, v)
        # mlx-lm's function scales its queries in place, so it gets a copy.
        return lambda: quantized_scaled_dot_product_attention(
            query * 1, k, v, SCALE, None, group_size=64, bits=bits
        )

    def of_torch(name: str, *, folded: bool) -> Call:
        q, k, v = (
            torch.tensor(np.array(a)).to(getattr(torch, name)) for a in (query, keys, values)
        )
        if folded:  # queries of a KV head become rows, so torch reads each KV head once
            q = q.view(1, KV_HEADS, -1, HEAD_DIM)
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, scale=SCALE, enable_gqa=not folded)

    def rotor(bits: int) -> Call:
        views = rotor_views(keys, values, bits)
        return lambda: attend_view(query, *views, scale=SCALE)

    makers: dict[str, Callable[[], Call]] = {
        **{f"torch {n}": lambda n=n: of_torch(n, folded=False) for n in TORCH_DTYPES},
        **{f"folded torch {n}": lambda n=n: of_torch(n, folded=True) for n in TORCH_DTYPES},
        **{f"MLX {n}": lambda d=d: exact(d) for n, d in DTYPES.items()},
        **{f"mlx-lm {n} bit": lambda n=n: quantized(n) for n in (4, 8)},
        **{name: lambda n=n: rotor(n) for name, n in OURS.items()},
    }
    if torch is None:
        makers = {name: make for name, make in makers.items() if "torch" not in name}
    return {name: make() for name, make in makers.items() if name in contenders or not contenders}


def decode_attention(contexts: list[int], runs: int) -> list[Row]:
    """Time one query token over a history, 8 query and 2 KV heads; one row per contender."""
    rows: dict[str, Row] = {}
    for tokens in track(contexts, "Decode attention"):
        times = timed(decode_step(tokens, HEADS), runs if tokens <= 2**13 else max(1, runs // 2))
        for title, starts in RIVALS.items():
            others = [ms for name, ms in times.items() if name.startswith(starts)]
            if others:
                ratio = min(others) / times["rotormlx 4 bit"]
                times[f"fastest of {title} / rotormlx 4 bit"] = ratio
        for name, ms in times.items():
            rows.setdefault(name, {"contender": name})[f"{tokens:,}"] = ms
    return list(rows.values())


def grouping(tokens: int, bandwidth: float, runs: int) -> list[Row]:
    """Time decode attention at several query heads per KV head, with bytes read per second."""
    rows = []
    for repeats in (1, 4, 8):
        for name, ms in timed(decode_step(tokens, KV_HEADS * repeats, *OURS), runs).items():
            codecs = [
                codec(RotorConfig(OURS[name], OURS[name]), HEAD_DIM, layer=0, role=r) for r in ROLES
            ]
            size = KV_HEADS * tokens // BLOCK * sum(c.block_bytes for c in codecs)
            rate = 1e3 * size / ms
            row = {"GQA": repeats, "contender": name, "ms": ms, "GB/s": rate / 1e9}
            rows.append({**row, "share of read bandwidth": rate / bandwidth})
    return rows


def encoding(runs: int) -> list[Row]:
    """Time the encoding of one block of 64 tokens of keys or values, 2 KV heads."""
    rows = []
    name = "rotormlx 4 bit"
    decode_ms = timed(decode_step(8192, HEADS, name), runs)[name]
    for role in ROLES:
        for bits in OURS.values():
            chosen = codec(RotorConfig(bits, bits), HEAD_DIM, layer=0, role=role)
            layers: list[dict[str, Call]] = []
            for _ in range(LAYERS):
                x = mx.random.normal((1, KV_HEADS, BLOCK, HEAD_DIM)).astype(mx.float16)
                mx.eval(x)
                layers.append(
                    {
                        "numpy": lambda x=x, c=chosen: reference.encode(np.array(x), c),
                        "MLX operations": lambda x=x, c=chosen: MLXBackend().encode(x, c)[:2],
                        "cpu": lambda x=x, c=chosen: backend().encode(x, c)[:2],
                    }
                )
            times = timed(layers, runs)
            rows.append(
                {
                    "what": f"{role}s, {bits} bit",
                    **times,
                    "numpy / cpu": times["numpy"] / times["cpu"],
                    # A block is encoded once every 64 steps.
                    "a step / attention at 8k": times["cpu"] / BLOCK / decode_ms,
                }
            )
    return rows


def prompt_chunk(tokens: int, length: int, runs: int) -> list[Row]:
    """Time causal attention of a chunk of queries after a history."""
    shape = (1, KV_HEADS, tokens + length, HEAD_DIM)
    keys, values = (mx.random.normal(shape) for _ in "kv")
    query = mx.random.normal((1, HEADS, length, HEAD_DIM))
    cache = RotorKVCache()
    cache.update_and_fetch(keys[:, :, :tokens], values[:, :, :tokens])
    views = cache.update_and_fetch(keys[:, :, tokens:], values[:, :, tokens:])
    mx.eval(keys, values, query, cache.state)
    exact = mx.fast.scaled_dot_product_attention
    calls: dict[str, Call] = {
        "MLX float32": lambda: exact(query, keys, values, scale=SCALE, mask="causal"),
        "rotormlx 4 bit": lambda: attend_view(query, *views, scale=SCALE, mask="causal"),
    }
    return [{"tokens": tokens, "queries": length, **timed([calls], runs)}]


def tokens_a_second(path: str, contexts: list[int], steps: int) -> list[Row]:
    """Time generation with mlx_lm after a history of random keys, which needs no prefill."""
    model, _ = mlx_lm.load(path)
    makers = {
        "exact": lambda: make_prompt_cache(model),
        "rotormlx 4 bit": lambda: rotormlx.make_prompt_cache(model),
    }
    heads, kv_heads = model.args.num_attention_heads, model.args.num_key_value_heads
    shape = (1, kv_heads, FILL_TOKENS, model.args.hidden_size // heads)
    dtype = model.model.embed_tokens.weight.dtype

    def filled(make: Callable[[], list[Any]], tokens: int) -> list[Any]:
        caches = make()
        for cache in caches:
            for _ in range(tokens // FILL_TOKENS):
                cache.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in "kv"))
                mx.eval(cache.state)
        return caches

    rows = []
    for tokens in contexts:
        caches = {name: filled(make, tokens) for name, make in makers.items()}
        caches["empty cache"] = make_prompt_cache(model)
        fastest = dict.fromkeys(caches, float("inf"))
        for _ in range(3):
            for name, cache in caches.items():
                generated = generate_step(
                    mx.array([1, 2]), model, max_tokens=steps, prompt_cache=cache
                )
                stamps = [time.perf_counter() for _ in generated]
                median = statistics.median(b - a for a, b in pairwise(stamps))
                fastest[name] = min(fastest[name], median)
        rates = {name: 1 / seconds for name, seconds in fastest.items()}
        ratio = rates["rotormlx 4 bit"] / rates["exact"]
        rows.append({"tokens": tokens, **rates, "rotormlx / exact": ratio})
    rotormlx.remove(model)
    return rows


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Plot the time of decode attention over the length of the history."""
    plt.rcParams["svg.hashsalt"] = "rotormlx"  # equal figures give an equal file
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    labels = [name for name in rows[0] if name != "contender"]
    tokens = [int(label.replace(",", "")) for label in labels]
    for row in rows:
        name = row["contender"]
        if "/" in name:
            continue
        style = {"linewidth": 2.5} if name in OURS else {"linestyle": "--", "linewidth": 1.2}
        times = [row[label] for label in labels]
        axes.loglog(tokens, times, marker="o", markersize=4, label=name, **style)
    axes.set_xticks(tokens, labels)
    axes.minorticks_off()
    axes.set_xlabel("tokens of history")
    axes.set_ylabel("ms per layer")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(
    contexts: Annotated[
        str, typer.Option(help="History lengths, comma-separated.")
    ] = "1024,4096,8192,16384,32768,65536,131072",
    model: Annotated[str | None, typer.Option(help="Also time this model end to end.")] = None,
    model_contexts: Annotated[
        str, typer.Option(help="History lengths of the model, comma-separated.")
    ] = "4096,8192",
    runs: Annotated[int, typer.Option(help="Timed runs of each contender.")] = 15,
    output: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("bench-cpu"),
) -> None:
    """Measure and print every table."""
    console = wide_console()
    threads = cpu_library.thread_count()
    if torch is not None:
        torch.set_num_threads(threads)
    bandwidth = read_bandwidth(runs)
    device = (
        f"{platform.machine()} {'/'.join(cpu_library.variants())}, {threads} threads, backend "
        f"{backend().name}, MLX {mx.__version__}"
    )
    console.print(f"{device}; reading moves {bandwidth / 1e9:.1f} GB/s")
    lengths = [int(c) for c in contexts.split(",")]
    tables = {
        "Decode attention, ms per layer": decode_attention(lengths, runs),
        "Bytes of the packed cache, 32,768 tokens": grouping(2**15, bandwidth, runs),
        "Encoding a block of 64 tokens, ms": encoding(runs),
        "A chunk of a prompt, ms": prompt_chunk(4096, 512, 3),
    }
    if model is not None:
        lengths = [int(c) for c in model_contexts.split(",")]
        tables["Tokens per second"] = tokens_a_second(model, lengths, 12)
    write_figures(console, tables, output, device=device, read_bytes_a_second=bandwidth)
    title = f"Decode attention, {HEADS} query and {KV_HEADS} KV heads, head_dim {HEAD_DIM}, "
    plot(next(iter(tables.values())), f"{title}{threads} threads", output / "decode.svg")
    console.print(f"Written: {output}/figures.json and {output}/decode.svg")


if __name__ == "__main__":
    typer.run(main)
