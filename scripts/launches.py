"""Count operations and kernel launches of one layer in a decode step, for every backend of MLX.

    python scripts/launches.py

A step does what the hook does: the cache takes a token, then its query attends. The script builds
MLX's graph of both on any machine and never runs it; it measures no time. Nodes are MLX's
operations, each of which costs time on the host; views among them launch nothing. The backend
``cpu`` is left out, because it works outside MLX's graph, in one call.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from rotormlx.config import RotorConfig
from rotormlx.mlx import attention
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import constants, cuda, cuda_text, metal, metal_attend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache import store
from rotormlx.mlx.cache.single import RotorKVCache

BACKENDS: dict[str, type[MLXBackend]] = {
    "mlx": MLXBackend,
    "metal": metal.MetalBackend,
    "mlx_cuda": cuda.MLXCUDABackend,
}
KV_HEADS, REPEATS, HEAD_DIM = 8, 4, 128
# Operations that only view contiguous memory, such as that of caches, in another layout.
VIEWS = frozenset(
    {
        *("Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten"),
        *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten"),
        *("AsStrided", "View"),
    }
)

Arrays = list[mx.array]


class Counted(NamedTuple):
    """Numbers of nodes in a graph and of kernels that they launch."""

    nodes: int
    launches: int


class Step(NamedTuple):
    """A decode step after ``tokens`` tokens.

    dtype: Dtype of queries, keys and values.
    mask, sink_logits: Arguments of :func:`attend_view`.
    """

    tokens: int
    batch: int = 1
    dtype: mx.Dtype = mx.float16
    rotation: str = "cascade"
    mask: mx.array | str | None = None
    sink_logits: mx.array | None = None


def count(function: Callable[[mx.array], Arrays], array: mx.array) -> Counted:
    """Count the nodes and launches of a function's graph."""
    drawn = io.StringIO()

    def draw(given: mx.array) -> mx.array:
        mx.export_to_dot(drawn, *function(given))
        return given

    # The export itself is not used, but only inside it does MLX build kernels of missing devices.
    mx.export_function(lambda event: None, draw, array)
    names = dict(re.findall(r"\{ (\d+) \[label =\"(\w+)\"", drawn.getvalue()))
    inputs = re.findall(r"-> (\d+)$", drawn.getvalue(), re.MULTILINE)
    return Counted(len(names), sum(_launches(name, inputs.count(n)) for n, name in names.items()))


def _launches(name: str, inputs: int) -> int:
    if name in VIEWS:
        return 0
    # Padding launches a fill and a copy; concatenation launches one copy per array.
    return {"Pad": 2, "Concatenate": inputs}.get(name, 1)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use the backend of this name to build graphs that are never run."""
    backend = BACKENDS[name]()
    with (
        mock.patch.object(attention, "backend", return_value=backend),
        mock.patch.object(store, "backend", return_value=backend),
        mock.patch.object(mx.fast, "cuda_kernel", _drawn_cuda_kernel),
    ):
        _forget_kernels()
        yield
    _forget_kernels()


def _drawn_cuda_kernel(*, shared_memory: int, **options: Any) -> Callable[..., Arrays]:
    """Return a kernel that can be in a graph even if MLX is built without CUDA."""
    return mx.fast.metal_kernel(**options)


def _forget_kernels() -> None:
    for module in (metal, metal_attend, cuda_text, constants):
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def counted(name: str, step: Step) -> tuple[Counted, Counted]:
    """Return the counts of the cache's update and of attention with a backend."""
    config = RotorConfig(rotation=step.rotation)
    random = mx.random.normal((step.batch, KV_HEADS, step.tokens, HEAD_DIM)).astype(step.dtype)
    cache = RotorKVCache(config)
    with mock.patch.object(store, "backend", MLXBackend):
        cache.update_and_fetch(random, random)
    mx.eval(cache.state)
    token = mx.contiguous(random[:, :, :1])
    query = mx.repeat(token, REPEATS, axis=1)
    given = [a for a in (step.mask, step.sink_logits) if isinstance(a, mx.array)]
    mx.eval(token, query, given)
    with using(name):
        twin = copy.deepcopy(cache)
        updated = count(lambda x: [view.exact for view in twin.update_and_fetch(x, x)], token)
        views = cache.update_and_fetch(token, token)
        mx.eval([view.exact for view in views])
        options = {"scale": HEAD_DIM**-0.5, "mask": step.mask, "sink_logits": step.sink_logits}
        return updated, count(lambda q: [attend_view(q, *views, **options)], query)


def main() -> None:
    """Print the table."""
    table = Table(title="One layer of a decode step")
    for column in ("backend", "tokens", "rotation"):
        table.add_column(column)
    for column in ("nodes: update", "attention", "launches: update", "attention"):
        table.add_column(column, justify="right")
    for name in BACKENDS:
        for step in (Step(100), Step(300), Step(4000), Step(4000, rotation="dense")):
            updated, attended = counted(name, step)
            numbers = (updated.nodes, attended.nodes, updated.launches, attended.launches)
            table.add_row(name, str(step.tokens), step.rotation, *map(str, numbers))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
