"""Decode attention on the device at hand: ``python scripts/bench_attention.py``.

One query token over a history, through rotormlx's packed cache, mlx-lm's own 4-bit quantized cache
and MLX's attention on the exact cache. All run in this process, in turn, so that they share
whatever else the machine is doing; the table gives medians.
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

from rotormlx.measure.attention_time import QUANTIZED, Shape, decode_steps, median_ms
from rotormlx.mlx.backends import backend

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def main(
    contexts: Annotated[str, typer.Option(help="History lengths, comma-separated.")] = "1024,8192",
    bits: Annotated[str, typer.Option(help="Code widths, comma-separated.")] = "4,3",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
    head_dim: int = 128,
    runs: Annotated[int, typer.Option(help="Counted runs of each.")] = 11,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Time one decode step of attention against mlx-lm's own caches."""
    console = Console()
    shape = Shape(1, heads, kv_heads, head_dim, DTYPES[dtype])
    widths = [int(b) for b in bits.split(",")]
    medians = {
        tokens: median_ms(decode_steps(shape, tokens, widths), runs)
        for tokens in track([int(c) for c in contexts.split(",")], "Timing", console=console)
    }
    title = (
        f"Decode attention, ms: {heads} query and {kv_heads} KV heads, head_dim {head_dim}, "
        f"{dtype}, {mx.default_device()}, backend {backend().name}"
    )
    table = Table("tokens", *next(iter(medians.values())), title=title)
    for tokens, row in medians.items():
        reference = row[QUANTIZED]
        table.add_row(f"{tokens:,}", *(f"{ms:.2f} ({ms / reference:.2f}x)" for ms in row.values()))
    console.print(table)
    console.print("In brackets: time relative to mlx-lm's 4-bit attention.")
    if output is not None:
        facts = {"title": title, "runs": runs, "median_ms": medians}
        output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
