"""Everything a CUDA GPU can tell about speed: ``python scripts/bench_cuda.py``.

Decode attention against torch's flash attention over an exact bfloat16 cache; encoding against a
dense rotation, nearest levels and packing in torch operations; and copying, the floor of both.
Contenders of a row run in one process, in turn, each as a CUDA graph that goes over several
buffers, together larger than the L2 cache three times; times are of CUDA events, medians. Bytes are
those that must be read and written at least. Writes JSON and a plot.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_report import Row, add_rates, plot_cases, write_figures
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rotormlx.cli.terminal import wide_console
from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, VALUE, Packed, codec
from rotormlx.codec.rotation import rotation
from rotormlx.config import RotorConfig
from rotormlx.torch import ops
from rotormlx.torch.torch_ops import KVView

HEAD_DIM, KV_HEADS, SINK, TAIL = 128, 8, 4, 96
DEVICE = "cuda"
# Calls of one graph: enough that starting it counts for nothing.
CALLS = 20
L2_TIMES = 3


def copies_needed(size: int) -> int:
    """Buffers of so many bytes that are together larger than the L2 cache ``L2_TIMES`` times."""
    return max(2, -(-L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size // size))


def graph_of(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of at least ``CALLS`` calls, each in turn; and their number."""
    number = max(CALLS, len(calls))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is made once must not be captured
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), number):
            call()
    return graph, number


def median_ms(contenders: dict[str, Sequence[Callable[[], object]]], runs: int) -> dict[str, float]:
    """Time of one call of each, on the device; the calls of a contender differ in their buffers."""
    graphs = {name: graph_of(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 3):
        for name, (graph, number) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if run >= 3:  # clocks and caches are warm
                times[name].append(start.elapsed_time(stop) / number)
    return {name: statistics.median(values) for name, values in times.items()}


def copies(number: int, shape: Sequence[int]) -> list[Callable[[], Tensor]]:
    """Copies of bfloat16 arrays, each to a place of its own: one would stay in the cache."""
    arrays = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(number)]
    return [partial(torch.empty_like(x).copy_, x) for x in arrays]


def copy_bandwidth(runs: int) -> float:
    """Bytes a second, read and written, of copying: the most that arrays of some sizes give."""
    sizes = [2**27, 2**28, 2**29, 2**30]
    times = median_ms({str(size): copies(2, (size // 2,)) for size in sizes}, runs)
    return max(2e3 * size / times[str(size)] for size in sizes)


# ---- decode attention ---------------------------------------------------------------------------


def packed_view(config: RotorConfig, role: str, batch: int, tokens: int) -> tuple[KVView, int]:
    """Random packed keys or values, and their bytes; the numbers do not matter to the time."""
    chosen = codec(config, HEAD_DIM, layer=0, role=role)
    blocks = (batch, KV_HEADS, tokens // BLOCK)
    words = torch.randint(
        -(2**31), 2**31, (*blocks, *chosen.words_shape), dtype=torch.int32, device=DEVICE
    )
    scales = torch.rand((*blocks, BLOCK), device=DEVICE).half() + 0.5
    centres = torch.randn((*blocks, HEAD_DIM), device=DEVICE).half() if role == KEY else None
    shape = (batch, KV_HEADS, SINK + TAIL, HEAD_DIM)
    exact = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    size = batch * KV_HEADS * blocks[2] * chosen.block_bytes + exact.nbytes
    return KVView(chosen, exact, Packed(words, scales, centres), None), size


def packed_steps(
    config: RotorConfig, query: Tensor, tokens: int
) -> tuple[list[Callable[[], Tensor]], int]:
    """Calls of one step over packed caches, and the bytes that one reads."""
    batch = query.shape[0]
    lengths = torch.tensor([[tokens, SINK + tokens + TAIL]] * batch, dtype=torch.int32).to(DEVICE)
    views = [packed_view(config, role, batch, tokens) for role in (KEY, VALUE)]
    size = views[0][1] + views[1][1]
    pairs = [(views[0][0], views[1][0])]
    for _ in range(copies_needed(size) - 1):
        pairs.append(tuple(packed_view(config, r, batch, tokens)[0] for r in (KEY, VALUE)))

    def step(keys: KVView, values: KVView) -> Callable[[], Tensor]:
        return lambda: ops.attend(
            query, lengths, keys, values, config, layer=0, scale=HEAD_DIM**-0.5, causal=True
        )

    return [step(*pair) for pair in pairs], size


def flash_steps(query: Tensor, tokens: int) -> tuple[list[Callable[[], Tensor]], int]:
    """The same over exact bfloat16 caches, by torch's flash attention."""
    shape = (query.shape[0], KV_HEADS, SINK + tokens + TAIL, HEAD_DIM)
    size = 2 * torch.Size(shape).numel() * 2
    pairs = [
        tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
        for _ in range(copies_needed(size))
    ]

    def step(keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return call

    return [step(*pair) for pair in pairs], size


def decode_attention(contexts: list[int], batches: list[int], runs: int) -> list[Row]:
    """One query token over a history, for several groupings and batches."""
    rows = []
    cases = list(product((4, 8), batches, contexts))
    for repeats, batch, tokens in track(cases, "Decode attention"):
        shape = (batch, KV_HEADS * repeats, 1, HEAD_DIM)
        query = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        steps = {"flash, bfloat16": flash_steps(query, tokens)}
        for bits in (4, 3):
            steps[f"rotormlx {bits} bit"] = packed_steps(RotorConfig(bits, bits), query, tokens)
        times = median_ms({name: calls for name, (calls, _) in steps.items()}, runs)
        flash = times["flash, bfloat16"]
        for name, ms in times.items():
            case = {"gqa": repeats, "batch": batch, "tokens": tokens, "contender": name}
            rows.append({**case, "ms": ms, "bytes": steps[name][1], "flash / this": flash / ms})
        del steps
        torch.cuda.empty_cache()
    return rows


# ---- encoding -----------------------------------------------------------------------------------


def dense_quantizer(role: str, bits: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """TurboQuant in torch operations: a dense rotation, nearest levels, words of values or keys."""
    matrix = torch.tensor(rotation("dense", HEAD_DIM, role=role).matrix.T.copy()).float().to(DEVICE)
    limits = torch.tensor(codebook.boundaries(bits)).to(DEVICE)
    codes_a_word = 32 // bits
    shifts = bits * torch.arange(codes_a_word, dtype=torch.int32, device=DEVICE)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        rotated = x.float() @ matrix
        norm = rotated.norm(dim=-1, keepdim=True)
        z = rotated * (HEAD_DIM**0.5 / norm)
        index = torch.bucketize(z.abs(), limits, right=True, out_int32=True)
        codes = index | ((z < 0).int() << (bits - 1))
        words = (codes.unflatten(-1, (-1, codes_a_word)) << shifts).sum(-1, dtype=torch.int32)
        return words, norm.half()

    return quantize


def encoding(runs: int) -> list[Row]:
    """Keys and values of a chunk to packed blocks."""
    rows = []
    bits = 4
    config = RotorConfig(bits, bits)
    for role, tokens in track(list(product((KEY, VALUE), (64, 1024, 16384))), "Encoding"):
        chosen = codec(config, HEAD_DIM, layer=0, role=role)
        shape = (8, KV_HEADS, tokens, HEAD_DIM)
        number = copies_needed(2 * torch.Size(shape).numel())
        inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(number)]
        dense = dense_quantizer(role, bits)
        steps = {
            "dense rotation, torch": [lambda x=x, d=dense: d(x) for x in inputs],
            "rotormlx encode": [
                lambda x=x, r=role: ops.encode(x, config, layer=0, role=r) for x in inputs
            ],
            "copy": copies(number, shape),
        }
        size = inputs[0].nbytes + 8 * KV_HEADS * tokens // BLOCK * chosen.block_bytes
        times = median_ms(steps, runs)
        for name, ms in times.items():
            rows.append(
                {
                    **{"role": role, "tokens": 8 * tokens, "contender": name, "ms": ms},
                    "bytes": 2 * inputs[0].nbytes if name == "copy" else size,
                    "dense / this": times["dense rotation, torch"] / ms,
                }
            )
        del inputs, steps
        torch.cuda.empty_cache()
    return rows


# ---- the run ------------------------------------------------------------------------------------


def driver() -> str:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def main(
    contexts: Annotated[
        str, typer.Option(help="History lengths, comma-separated multiples of 64.")
    ] = "4096,16384,32768,131072",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    runs: Annotated[int, typer.Option(help="Counted runs of each.")] = 15,
    output: Annotated[Path, typer.Option(help="Where JSON and plot go.")] = Path("bench-cuda"),
) -> None:
    """Measure and print every table."""
    console = wide_console()
    if not torch.cuda.is_available():
        console.print("torch finds no CUDA GPU on this machine, so nothing was measured.")
        raise typer.Exit(1)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(runs)
    device = (
        f"{torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}"
    )
    console.print(f"{device}; copying moves {bandwidth / 1e9:.0f} GB/s")
    lengths, sizes = ([int(n) for n in text.split(",")] for text in (contexts, batches))
    tables = {
        "Encoding, bfloat16, head_dim 128, 4 bit": encoding(runs),
        "Decode attention, bfloat16, head_dim 128, 8 KV heads": decode_attention(
            lengths, sizes, runs
        ),
    }
    for rows in tables.values():
        add_rates(rows, bandwidth)
    write_figures(console, tables, output, device=device, copy_bytes_a_second=bandwidth)
    attention = list(tables.values())[-1]
    plot_cases(attention, torch.cuda.get_device_name(), output / "decode.svg")
    console.print(f"Written: {output}/figures.json and {output}/decode.svg")


if __name__ == "__main__":
    typer.run(main)
