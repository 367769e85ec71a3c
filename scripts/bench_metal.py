"""Measure speed on a Mac: ``python scripts/bench_metal.py``.

It measures decode attention, encoding, prefill, the paper's quantizer comparison and, with
``--model``, tokens per second end to end. The contenders of a row run in turn in one process;
figures are medians. Byte counts are the least that must be read and written, and shares are of the
copy bandwidth, which is measured first. The script writes JSON and a plot. It runs on any device,
so a small run can be tried without a Mac.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx_lm
import typer
from bench_report import Row, add_rates, plot_cases, write_figures
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import track

import rotormlx
from rotormlx.cli.terminal import wide_console
from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.codec.rotation import rotation
from rotormlx.config import RotorConfig
from rotormlx.measure.attention_time import (
    EXACT,
    QUANTIZED,
    Shape,
    decode_steps,
    median_ms,
    prompt_steps,
)
from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.metal import rotor3_quantize_dequantize
from rotormlx.mlx.backends.mlx_ops import (
    KERNEL,
    LIBRARY,
    levels_of_codes,
    matrix,
    nearest_magnitude,
)

HEAD_DIM, KV_HEADS = 128, 8
PAPER_BITS = 3
# Settings of --short: little memory, and about two minutes on a slow Mac.
SHORT_CONTEXTS, SHORT_COUNTS, SHORT_RUNS, SHORT_COPY_MB = "1024,4096", "1024,16384", 5, 128


def copy_bandwidth(runs: int, size: int) -> float:
    """Return the bytes per second, read and written, of copying an array of ``size`` bytes."""
    x = mx.zeros((size // 4,), mx.float32)
    mx.eval(x)
    return 2e3 * size / median_ms({"copy": lambda: x + 1.0}, runs)["copy"]


def decode_attention(contexts: list[int], runs: int) -> list[Row]:
    """Time one query token over a history, for several groupings and batches."""
    rows = []
    cases = list(product((1, 4, 8), (1, 8), contexts))
    for repeats, batch, tokens in track(cases, "Decode attention"):
        heads = KV_HEADS * repeats
        steps = decode_steps(Shape(batch, heads, KV_HEADS, HEAD_DIM, mx.float16), tokens, [4, 3])
        values = 2 * batch * KV_HEADS * tokens * HEAD_DIM
        bits = {EXACT: 16, QUANTIZED: 4.5}
        for name, ms in median_ms(steps, runs).items():
            width = bits.get(name) or rotor_bits(name)
            case = {"gqa": repeats, "batch": batch, "tokens": tokens}
            rows.append({**case, "contender": name, "ms": ms, "bytes": values * width / 8})
    return rows


def rotor_bits(name: str) -> float:
    """Return the true bits per value of a contender such as ``rotormlx 4 bit``."""
    config = RotorConfig(*[int(name.split()[1])] * 2)
    codecs = [codec(config, HEAD_DIM, layer=0, role=role) for role in (KEY, VALUE)]
    return sum(c.bits_per_value for c in codecs) / 2


def encoding(runs: int) -> list[Row]:
    """Time the encoding of keys and values of a chunk to packed blocks."""
    rows = []
    for role, bits, tokens in product((KEY, VALUE), (4, 3), (64, 512, 4096)):
        chosen = codec(RotorConfig(bits, bits), HEAD_DIM, layer=0, role=role)
        x = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM)).astype(mx.float16)
        mx.eval(x)
        ms = median_ms({"encode": lambda x=x, c=chosen: backend().encode(x, c)}, runs)["encode"]
        size = x.nbytes + KV_HEADS * tokens // 64 * chosen.block_bytes
        name = f"{role}s, {bits} bit"
        rows.append({"tokens": tokens, "contender": name, "ms": ms, "bytes": size})
    return rows


def prefill(contexts: list[int], runs: int, length: int) -> list[Row]:
    """Time causal attention of a chunk of queries over a history."""
    rows = []
    shape = Shape(1, 4 * KV_HEADS, KV_HEADS, HEAD_DIM, mx.float16)
    for tokens in contexts:
        steps = prompt_steps(shape, tokens, length, [4], (LIBRARY, KERNEL))
        for name, ms in median_ms(steps, runs).items():
            rows.append({"tokens": tokens, "queries": length, "contender": name, "ms": ms})
    return rows


def paper_table(counts: list[int], runs: int) -> list[Row]:
    """Time fused rotor3 and a dense rotation by matrix product, as the paper compares them."""
    dense = matrix(rotation("dense", HEAD_DIM, role=VALUE))

    def dense_quantizer(x: mx.array) -> mx.array:
        rotated = x @ dense.T
        norm = mx.linalg.norm(rotated, axis=-1, keepdims=True)
        z = rotated * (HEAD_DIM**0.5 / norm)
        index = nearest_magnitude(mx.abs(z), PAPER_BITS)
        codes = index | ((z < 0).astype(mx.uint32) << (PAPER_BITS - 1))
        return (levels_of_codes(codes, PAPER_BITS) * (norm / HEAD_DIM**0.5)) @ dense

    rows = []
    for count in track(counts, "Paper's table"):
        x = mx.random.normal((count, HEAD_DIM))
        mx.eval(x)
        steps: dict[str, Callable[[], mx.array]] = {
            "dense matmul": lambda x=x: dense_quantizer(x),
            "fused rotor3": lambda x=x: rotor3_quantize_dequantize(x, PAPER_BITS),
        }
        if backend().name != "metal":
            del steps["fused rotor3"]
        for name, ms in median_ms(steps, runs).items():
            rows.append({"n": count, "contender": name, "ms": ms, "bytes": 2 * x.nbytes})
    return rows


def end_to_end(path: str, contexts: list[int]) -> list[Row]:
    """Measure tokens per second of generation after a prompt, with an exact and a packed cache."""
    model, tokenizer = mlx_lm.load(path)
    makers = {
        "exact": lambda: make_prompt_cache(model),
        "rotormlx 4 bit": lambda: rotormlx.make_prompt_cache(model),
    }
    rows = []
    for tokens in contexts:
        prompt = mx.random.randint(0, 1000, (tokens,))
        for name, make in makers.items():
            responses = mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=64, prompt_cache=make()
            )
            *_, last = responses
            rows.append(
                {
                    "tokens": tokens,
                    "contender": name,
                    "prompt tokens per second": last.prompt_tps,
                    "tokens per second": last.generation_tps,
                }
            )
    rotormlx.remove(model)
    return rows


def main(
    contexts: Annotated[
        str, typer.Option(help="History lengths, comma-separated.")
    ] = "1024,4096,16384,65536,131072",
    counts: Annotated[
        str, typer.Option(help="Numbers of vectors in the paper's table, comma-separated.")
    ] = "1024,4096,16384,65536",
    runs: Annotated[int, typer.Option(help="Timed runs of each contender.")] = 21,
    prefill_length: Annotated[int, typer.Option(help="Queries in a prefill chunk.")] = 512,
    copy_mb: Annotated[
        int, typer.Option(help="Size in MiB of the array copied to measure bandwidth.")
    ] = 512,
    model: Annotated[str | None, typer.Option(help="Also time this model end to end.")] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Take about two minutes: short histories, few runs.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("bench-metal"),
) -> None:
    """Measure and print every table."""
    if short:
        contexts, counts, runs, copy_mb = SHORT_CONTEXTS, SHORT_COUNTS, SHORT_RUNS, SHORT_COPY_MB
    console = wide_console()
    lengths = [int(c) for c in contexts.split(",")]
    bandwidth = copy_bandwidth(runs, copy_mb * 2**20)
    device = f"{mx.default_device()}, backend {backend().name}, MLX {mx.__version__}"
    console.print(f"{device}; copying moves {bandwidth / 1e9:.1f} GB/s")

    tables = {
        "Decode attention, float16, head_dim 128": decode_attention(lengths, runs),
        "Encoding, float16, head_dim 128": encoding(runs),
        f"Prefill of {prefill_length} queries, GQA 4": prefill(lengths, runs, prefill_length),
        "Quantize and dequantize, float32, d = 128, 3 bit": paper_table(
            [int(c) for c in counts.split(",")], runs
        ),
    }
    if model is not None:
        tables[f"End to end, {model}"] = end_to_end(model, lengths)
    for rows in tables.values():
        add_rates(rows, bandwidth)
    write_figures(console, tables, output, device=device, copy_bytes_a_second=bandwidth)
    plot_cases(next(iter(tables.values())), device, output / "decode.svg")
    console.print(f"Written: {output}/figures.json and {output}/decode.svg")


if __name__ == "__main__":
    typer.run(main)
