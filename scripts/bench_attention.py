"""Time attention on this machine's device: ``python scripts/bench_attention.py``.

One query token attends to a history in rotormlx's packed cache, in mlx-lm's own 4-bit quantized
cache, and in the exact cache with MLX's attention. With ``--queries``, a chunk of a prompt attends
to the history: exact; packed, with MLX's attention over decoded tokens (library); and packed, with
the backend's own attention (kernel). The memory of each is shown too. All run in turn in one
process, so that other work on the machine affects them alike; the table shows medians.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rotormlx.measure.attention_time import (
    EXACT,
    QUANTIZED,
    Shape,
    decode_steps,
    median_ms,
    peak_megabytes,
    prompt_steps,
)
from rotormlx.mlx.backends import backend
from rotormlx.mlx.backends.mlx_ops import KERNEL, LIBRARY

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def main(
    contexts: Annotated[str, typer.Option(help="History lengths, comma-separated.")] = "1024,8192",
    bits: Annotated[str, typer.Option(help="Code widths, comma-separated.")] = "4,3",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
    head_dim: int = 128,
    queries: Annotated[int, typer.Option(help="Tokens attended at once; 1 is a decode step.")] = 1,
    runs: Annotated[int, typer.Option(help="Timed runs of each contender.")] = 11,
    output: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Time attention against mlx-lm's own caches."""
    console, widths = Console(), [int(b) for b in bits.split(",")]
    shape = Shape(1, heads, kv_heads, head_dim, DTYPES[dtype])
    medians, megabytes = {}, {}
    for tokens in track([int(c) for c in contexts.split(",")], "Timing", console=console):
        if queries == 1:
            medians[tokens] = median_ms(decode_steps(shape, tokens, widths), runs)
            continue
        steps = prompt_steps(shape, tokens, queries, widths, (LIBRARY, KERNEL))
        medians[tokens] = median_ms(steps, runs)
        megabytes[tokens] = {name: peak_megabytes(step) for name, step in steps.items()}
    title = (
        f"Attention of {queries} tokens, ms: {heads} query and {kv_heads} KV heads, head_dim "
        f"{head_dim}, {dtype}, {mx.default_device()}, backend {backend().name}"
    )
    other = QUANTIZED if queries == 1 else EXACT
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
