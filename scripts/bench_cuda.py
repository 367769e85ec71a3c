"""Measure speed on a CUDA GPU: ``python scripts/bench_cuda.py``.

It compares:

- decode attention and prefill with torch's flash attention over an exact bfloat16 cache, and with
  FlashInfer and FlashAttention where they are installed;
- encoding with a dense rotation, nearest levels and packing in torch operations;
- all of them with copying, the lower bound.

The contenders of a case run in turn in one process. Each is a CUDA graph over several buffers that
together are three times as large as the L2 cache. Times are medians of CUDA events. Byte counts are
the least that must be read and written. ``cases.json`` keeps each case as soon as it is measured;
running the same command again measures only the missing cases. The script writes all tables as JSON
and a plot.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice, product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_report import KeptCases, Row, add_rates, plot_cases, write_figures
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from rotormlx.cli.terminal import wide_console
from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, VALUE, Packed, codec
from rotormlx.codec.rotation import rotation
from rotormlx.config import BITS, RotorConfig
from rotormlx.torch import ops, prefill
from rotormlx.torch.torch_ops import AttendCall, KVView

HEAD_DIM, KV_HEADS, SINK, TAIL = 128, 8, 4, 96
DEVICE = "cuda"
REPEATS = 4  # query heads per KV head
# Calls per graph: enough to make the time of launching it negligible. Prefill needs fewer.
CALLS, PREFILL_CALLS = 20, 2
L2_TIMES = 3
FLASH, DENSE, SDPA = "flash, bfloat16", "dense rotation, torch", "sdpa, bfloat16"
# The share of free memory that a case may use.
MEMORY_SHARE = 0.9

Calls = Sequence[Callable[[], object]]


def copies_needed(size: int) -> int:
    """Return how many buffers of ``size`` bytes exceed ``L2_TIMES`` times the L2 cache."""
    return max(2, -(-L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size // size))


def graph_of(calls: Calls, least: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph of at least ``least`` calls, taken in turn, and their number."""
    number = max(least, len(calls))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # one-time setup must not be captured
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), number):
            call()
    return graph, number


def median_ms(contenders: dict[str, Calls], runs: int, least: int = CALLS) -> dict[str, float]:
    """Return the device time of one call per contender; its calls differ in their buffers."""
    graphs = {name: graph_of(calls, least) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 3):
        for name, (graph, number) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if run >= 3:  # clocks and caches are warm by now
                times[name].append(start.elapsed_time(stop) / number)
    return {name: statistics.median(values) for name, values in times.items()}


def copies(number: int, shape: Sequence[int]) -> list[Callable[[], Tensor]]:
    """Return calls that copy bfloat16 arrays, each to its own buffer to defeat the cache."""
    arrays = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(number)]
    return [partial(torch.empty_like(x).copy_, x) for x in arrays]


def copy_bandwidth(runs: int) -> float:
    """Return the highest copy bandwidth over several sizes, bytes read and written per second."""
    sizes = [2**27, 2**28, 2**29, 2**30]
    times = median_ms({str(size): copies(2, (size // 2,)) for size in sizes}, runs)
    return max(2e3 * size / times[str(size)] for size in sizes)


# ---- decode attention ---------------------------------------------------------------------------


def packed_view(
    config: RotorConfig, role: str, batch: int, tokens: int, exact_tokens: int = SINK + TAIL
) -> tuple[KVView, int]:
    """Return random packed keys or values, and their bytes; their contents do not affect time."""
    chosen = codec(config, HEAD_DIM, layer=0, role=role)
    blocks = (batch, KV_HEADS, tokens // BLOCK)
    words = torch.randint(
        -(2**31), 2**31, (*blocks, *chosen.words_shape), dtype=torch.int32, device=DEVICE
    )
    scales = torch.rand((*blocks, BLOCK), device=DEVICE).half() + 0.5
    centres = torch.randn((*blocks, HEAD_DIM), device=DEVICE).half() if role == KEY else None
    shape = (batch, KV_HEADS, exact_tokens, HEAD_DIM)
    exact = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    size = batch * KV_HEADS * blocks[2] * chosen.block_bytes + exact.nbytes
    return KVView(chosen, exact, Packed(words, scales, centres) if tokens else None, None), size


def packed_pairs(
    config: RotorConfig, number: int, batch: int, tokens: int, exact_tokens: int = SINK + TAIL
) -> list[tuple[KVView, KVView]]:
    """Return ``number`` pairs of packed keys and values."""

    def view(role: str) -> KVView:
        return packed_view(config, role, batch, tokens, exact_tokens)[0]

    return [(view(KEY), view(VALUE)) for _ in range(number)]


def packed_bytes(config: RotorConfig, batch: int, tokens: int) -> int:
    """Return the bytes of a packed history of keys and values, with its exact tokens."""
    blocks = sum(codec(config, HEAD_DIM, layer=0, role=role).block_bytes for role in (KEY, VALUE))
    exact = 2 * (SINK + TAIL) * HEAD_DIM * 2
    return batch * KV_HEADS * (tokens // BLOCK * blocks + exact)


def packed_steps(config: RotorConfig, query: Tensor, tokens: int, number: int) -> Calls:
    """Return calls of one decode step, each over its own packed cache."""
    batch = query.shape[0]
    lengths = torch.tensor([[tokens, SINK + tokens + TAIL]] * batch, dtype=torch.int32).to(DEVICE)
    return [
        partial(
            ops.attend,
            *(query, lengths, keys, values, config),
            **{"layer": 0, "scale": HEAD_DIM**-0.5, "causal": True},
        )
        for keys, values in packed_pairs(config, number, batch, tokens)
    ]


def exact_pairs(number: int, batch: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return ``number`` pairs of exact bfloat16 keys and values, ``[B, K, S, D]``."""
    shape = (batch, KV_HEADS, tokens, HEAD_DIM)

    def random() -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    return [(random(), random()) for _ in range(number)]


def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run one decode step over an exact cache with torch's flash attention."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


# ---- rivals that may be installed ---------------------------------------------------------------


def flash_attention_steps(module: Any, query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Calls:
    """Return calls of FlashAttention 2 or 3 over the same buffers, as ``[B, S, K, D]``."""
    turned = query.transpose(1, 2).contiguous()
    return [
        partial(
            module.flash_attn_with_kvcache, turned, keys.transpose(1, 2), values.transpose(1, 2)
        )
        for keys, values in pairs
    ]


def flashinfer_steps(module: Any, query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Calls:
    """Return calls of FlashInfer over pages of 64 tokens, in separate buffers of whole pages."""
    batch, heads = query.shape[:2]
    tokens = pairs[0][0].shape[2]
    pages, last = -(-tokens // BLOCK), (tokens - 1) % BLOCK + 1
    counts = {"dtype": torch.int32, "device": DEVICE}
    work = torch.empty(2**27, dtype=torch.uint8, device=DEVICE)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, **counts) * pages,
        torch.arange(batch * pages, **counts),
        torch.full((batch,), last, **counts),
        *(heads, KV_HEADS, HEAD_DIM, BLOCK),
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    shape = (batch * pages, KV_HEADS, BLOCK, HEAD_DIM)

    def paged() -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=query.dtype)

    return [partial(wrapper.run, query[:, :, 0], (paged(), paged())) for _ in pairs]


# By name: the module to import, and the function that makes its calls.
RIVALS: dict[str, tuple[str, Callable[[Any, Tensor, Any], Calls]]] = {
    "FlashInfer": ("flashinfer", flashinfer_steps),
    "FlashAttention 2": ("flash_attn", flash_attention_steps),
    "FlashAttention 3": ("flash_attn_interface", flash_attention_steps),
}


def rivals() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the importable rivals by name, and why the others are not measured."""
    found, missing = {}, {}
    for name, (module, _) in RIVALS.items():
        if find_spec(module) is None:
            missing[name] = f"not measured, {module} is not installed"
            continue
        try:
            found[name] = __import__(module)
        except Exception as error:  # a build for another torch can raise any error
            missing[name] = f"not measured, {module} does not load: {error}"
    return found, missing


def rival_steps(
    found: dict[str, Any], query: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, Calls]:
    """Return the calls of the rivals that support this case."""
    steps = {}
    for name, module in found.items():
        try:
            calls = RIVALS[name][1](module, query, pairs)
            calls[0]()
        except Exception as error:  # their interfaces change, and not every case is supported
            print(f"{name}: not measured here, {type(error).__name__}: {error}")
            continue
        steps[name] = calls
    return steps


# ---- cases --------------------------------------------------------------------------------------


def decode_cases(contexts: list[int], batches: list[int]) -> list[Row]:
    """Return the cases of one query token over a history."""
    return [{"batch": batch, "tokens": n} for batch, n in product(batches, contexts)]


def prefill_cases(lengths: list[int], histories: list[int], chunk: int) -> list[Row]:
    """Return the cases of first chunks, and of a later chunk over packed histories."""
    first = [{"history": 0, "queries": length} for length in lengths]
    return first + [{"history": history, "queries": chunk} for history in histories]


def encode_cases(bits: list[int]) -> list[Row]:
    """Return the cases of encoding keys and values of 8 sequences."""
    cases = product(bits, (KEY, VALUE), (64, 1024, 16384))
    return [{"bits": width, "role": role, "tokens": 8 * n} for width, role, n in cases]


def fitting(sizes: dict[str, int], free: int) -> list[str]:
    """Return the contenders, in order, whose buffers fit into memory together."""
    chosen, used = [], 0
    for name, size in sizes.items():
        if used + size <= MEMORY_SHARE * free:
            chosen.append(name)
            used += size
    return chosen


def measure_decode(case: Row, bits: list[int], runs: int) -> list[Row]:
    """Measure flash attention, the rivals, and rotormlx at each bit width."""
    batch, tokens = case["batch"], case["tokens"]
    query = torch.randn(
        (batch, KV_HEADS * REPEATS, 1, HEAD_DIM), device=DEVICE, dtype=torch.bfloat16
    )
    all_tokens = SINK + tokens + TAIL
    exact = 2 * batch * KV_HEADS * all_tokens * HEAD_DIM * 2
    found, _ = rivals()
    own = {f"rotormlx {width} bit": RotorConfig(width, width) for width in bits}
    sizes = {FLASH: exact} | dict.fromkeys(found, exact)
    sizes |= {name: packed_bytes(config, batch, tokens) for name, config in own.items()}
    # FlashAttention reads the same buffers as torch.
    buffers = {
        name: 0 if name.startswith("FlashAttention") else size * copies_needed(size)
        for name, size in sizes.items()
    }
    chosen = fitting(buffers, torch.cuda.mem_get_info()[0])
    steps: dict[str, Calls] = {}
    if FLASH in chosen:
        pairs = exact_pairs(copies_needed(exact), batch, all_tokens)
        steps[FLASH] = [partial(flash, query, *pair) for pair in pairs]
        steps |= rival_steps({n: m for n, m in found.items() if n in chosen}, query, pairs)
    for name, config in own.items():
        if name in chosen:
            steps[name] = packed_steps(config, query, tokens, copies_needed(sizes[name]))
    if not steps:
        return []
    times = median_ms(steps, runs)
    rows = [{**case, "contender": n, "ms": ms, "bytes": sizes[n]} for n, ms in times.items()]
    return compared(rows, FLASH, "flash / this")


def chunk_calls(case: Row, bits: list[int]) -> dict[str, Calls]:
    """Return calls for a chunk: torch over exact tokens, rotormlx over a packed history."""
    history, length = case["history"], case["queries"]
    before = SINK + TAIL if history else 0
    exact, tokens = before + length, before + history + length
    query = torch.randn(
        (1, KV_HEADS * REPEATS, length, HEAD_DIM), device=DEVICE, dtype=torch.bfloat16
    )
    ((keys, values),) = exact_pairs(1, 1, tokens)
    causal = {"attn_mask": causal_lower_right(length, tokens)} if history else {"is_causal": True}
    steps: dict[str, Calls] = {
        SDPA: [
            partial(scaled_dot_product_attention, *(query, keys, values), **causal, enable_gqa=True)
        ]
    }
    counts = torch.tensor([[history, tokens]], dtype=torch.int32).to(DEVICE)
    for width in bits if history else bits[:1]:  # without a history, nothing is packed
        config = RotorConfig(width, width)
        ((packed_keys, packed_values),) = packed_pairs(config, 1, 1, history, exact)
        call = AttendCall(
            *(query, counts, packed_keys, packed_values, SINK, HEAD_DIM**-0.5, True, None, None)
        )
        name = f"rotormlx {width} bit" if history else "rotormlx"
        steps[name] = [partial(prefill.attend, call, [(history, tokens)])]
    return steps


def measure_prefill(case: Row, bits: list[int], runs: int) -> list[Row]:
    """Measure attention of a first or later chunk of a prompt, one layer."""
    times = median_ms(chunk_calls(case, bits), runs, PREFILL_CALLS)
    rows = [{**case, "contender": name, "ms": ms} for name, ms in times.items()]
    return compared(rows, SDPA, "sdpa / this")


def compared(rows: list[Row], against: str, title: str) -> list[Row]:
    """Return the rows with their speed relative to ``against``; None if that did not fit."""
    base = {row["contender"]: row["ms"] for row in rows}.get(against)
    return [{**row, title: base and base / row["ms"]} for row in rows]


# ---- encoding -----------------------------------------------------------------------------------


def dense_quantizer(role: str, bits: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return TurboQuant in torch operations: dense rotation, nearest levels, packed words."""
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


def measure_encode(case: Row, bits: list[int], runs: int) -> list[Row]:
    """Measure encoding the keys or values of a chunk to packed blocks."""
    width, role, tokens = case["bits"], case["role"], case["tokens"] // 8
    config = RotorConfig(width, width)
    chosen = codec(config, HEAD_DIM, layer=0, role=role)
    shape = (8, KV_HEADS, tokens, HEAD_DIM)
    number = copies_needed(2 * torch.Size(shape).numel())
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(number)]
    dense = dense_quantizer(role, width)
    steps: dict[str, Calls] = {
        DENSE: [partial(dense, x) for x in inputs],
        "rotormlx encode": [partial(ops.encode, x, config, layer=0, role=role) for x in inputs],
        "copy": copies(number, shape),
    }
    written = 8 * KV_HEADS * tokens // BLOCK * chosen.block_bytes
    sizes = dict.fromkeys(steps, inputs[0].nbytes + written) | {"copy": 2 * inputs[0].nbytes}
    times = median_ms(steps, runs)
    rows = [{**case, "contender": n, "ms": ms, "bytes": sizes[n]} for n, ms in times.items()]
    return compared(rows, DENSE, "dense / this")


# ---- the run ------------------------------------------------------------------------------------

MEASURES = {"encode": measure_encode, "decode": measure_decode, "prefill": measure_prefill}
TITLES = {
    "encode": "Encoding, bfloat16, head_dim 128",
    "decode": "Decode attention, bfloat16, head_dim 128, 8 KV heads, GQA 4",
    "prefill": "Attention of a chunk of a prompt, one layer, bfloat16, head_dim 128, 8 KV heads, "
    "GQA 4",
}


def driver() -> str:
    """Return the version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def numbers(text: str) -> list[int]:
    """Return the numbers of a comma-separated option."""
    return [int(part) for part in text.split(",")]


def measure_missing(
    kept: KeptCases, cases: dict[str, list[Row]], bits: list[int], runs: int
) -> None:
    """Measure the cases that are not kept yet, and keep each as soon as it is measured."""
    for table, asked in cases.items():
        left = [case for case in asked if kept.rows(table, case) is None]
        for case in track(left, f"{table}, {len(asked) - len(left)} of {len(asked)} were kept"):
            kept.keep(table, case, MEASURES[table](case, bits, runs))
            torch.cuda.empty_cache()


def main(
    tables: Annotated[
        str, typer.Option(help="Tables to measure, comma-separated.")
    ] = "encode,decode,prefill",
    contexts: Annotated[
        str, typer.Option(help="History lengths, comma-separated multiples of 64.")
    ] = "1024,4096,16384,32768,65536,131072",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,2,4,8,16,32",
    bits: Annotated[str, typer.Option(help="Bit widths of rotormlx, comma-separated.")] = "2,3,4,8",
    prompts: Annotated[
        str, typer.Option(help="Lengths of first chunks in tokens, comma-separated.")
    ] = "512,2048,8192,32768",
    chunk: Annotated[int, typer.Option(help="Length of a later chunk in tokens.")] = 2048,
    runs: Annotated[int, typer.Option(help="Timed runs of each contender.")] = 15,
    output: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("bench-cuda"),
) -> None:
    """Measure the cases that are not kept yet, and print every table."""
    console = wide_console()
    asked, widths = tables.split(","), numbers(bits)
    if not set(asked) <= set(MEASURES) or not set(widths) <= set(BITS):
        console.print(
            f"--tables must list some of {', '.join(MEASURES)} and --bits some of {BITS}, but got "
            f"{tables} and {bits}."
        )
        raise typer.Exit(2)
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
    for name, why in rivals()[1].items():
        console.print(f"{name}: {why}")
    cases = {
        "encode": encode_cases(widths),
        "decode": decode_cases(numbers(contexts), numbers(batches)),
        "prefill": prefill_cases(numbers(prompts), numbers(contexts), chunk),
    }
    kept = KeptCases(output / "cases.json", {"device": device, "runs": runs, "bits": widths})
    measure_missing(kept, {name: cases[name] for name in asked}, widths, runs)
    found = {TITLES[name]: rows for name in MEASURES if (rows := kept.table(name))}
    for rows in found.values():
        add_rates(rows, bandwidth)
    write_figures(console, found, output, device=device, copy_bytes_a_second=bandwidth)
    if rows := found.get(TITLES["decode"]):
        plot_cases(
            [{"gqa": REPEATS, **row} for row in rows],
            torch.cuda.get_device_name(),
            output / "decode.svg",
        )
    console.print(f"Written to {output}")


if __name__ == "__main__":
    typer.run(main)
