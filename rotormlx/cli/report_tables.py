"""The tables that ``rotormlx info`` prints about a model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rotormlx.report import Report, megabytes


def layer_table(report: Report) -> Table:
    """Return a table with one row per layer."""
    table = Table(title=report.summary)
    table.add_column("layer", justify="right")
    table.add_column("cache", no_wrap=True)
    for name in ("KV heads", "head_dim", "bits per value"):
        table.add_column(name, justify="right")
    table.add_column("how it is read, or why it is left alone")
    for layer in report.layers:
        table.add_row(
            str(layer.index),
            layer.cache,
            str(layer.kv_heads) if layer.kv_heads else "",
            layer.head_dims if layer.kv_heads else "",
            f"{layer.bits_per_value:.3f}" if layer.compressed else "",
            layer.way_and_why.removeprefix(", ") if layer.way else layer.reason,
        )
    return table


def memory_table(report: Report, lengths: Sequence[int] = (4096, 32768, 131072)) -> Table:
    """Return a table of cache memory against float16, one row per context length."""
    table = Table(title="cache memory")
    for name in ("tokens", "float16", "rotormlx", "ratio"):
        table.add_column(name, justify="right")
    for tokens in lengths:
        before, after = report.float_bytes(tokens), report.compressed_bytes(tokens)
        ratio = f"{before / after:.2f}x" if after else ""
        table.add_row(f"{tokens:,}", megabytes(before), megabytes(after), ratio)
    return table
