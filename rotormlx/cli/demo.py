"""Compares four caches with one model and one text: memory, accuracy and answers.

A passage and a question about it are read through each cache in chunks of 64 tokens. This fills the
cache and scores it: each next-token distribution is compared with that of the exact cache. Then the
model answers from the same cache.

MLX multiplies matrices slowly on a CPU, so numpy does it there, as in ``rotormlx quality``.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from rotormlx.cli import demo_model
from rotormlx.config import RotorConfig
from rotormlx.measure import cache_contents, scoring
from rotormlx.measure.cpu_attention import numpy_attention
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.scoring import CHUNK
from rotormlx.measure.text import default_text
from rotormlx.mlx import integration
from rotormlx.mlx.host_caches import leaves

DEFAULT_PROMPT = "What does this text say about objects? Answer in two sentences."
# A rotormlx cache keeps the first 132 tokens exact; only the predictions after them are compared.
LEAST_SCORE_TOKENS = 256
ROTOR_BITS = (4, 3)
FLOAT16_BITS = 16
EXACT = "exact"
# A context so long that the exact tokens, 132 at most, take a negligible share.
LONG_CONTEXT = 8192

BAR_WIDTH = 40  # characters of the longest bar

Caches = list[Any]


@dataclass(frozen=True)
class Row:
    """The results of one cache.

    Args:
        name: The name of the cache, as printed.
        text: The answer.
        context_tokens: Tokens in the cache at the end.
        packed_tokens: Number of packed tokens, in the layer with the fewest.
        packed_share: Share of earlier tokens that a prediction reads from packed bytes: the mean
            over the compared predictions.
        cache_bytes: Bytes of the cache at the end, without room for growth.
        long_context_ratio: How many times smaller the cache is than the exact one at 8,192 tokens.
        bits_per_value: Bits per packed value, scales and centres included; for the exact cache,
            bits per value.
        quality: Distance from the exact cache; None for the exact cache itself.
        tokens_per_second: Speed of the answer.
    """

    name: str
    text: str
    context_tokens: int
    packed_tokens: int
    packed_share: float
    cache_bytes: int
    long_context_ratio: float
    bits_per_value: float
    quality: scoring.Quality | None
    tokens_per_second: float


@dataclass(frozen=True)
class _Run:
    caches: Caches
    scores: scoring.Scores
    text: str
    tokens_per_second: float


def run(
    *,
    model: str | None = None,
    prompt: str = DEFAULT_PROMPT,
    max_tokens: int = 32,
    score_tokens: int = 512,
    console: Console | None = None,
) -> list[Row]:
    """Compare the exact cache, mlx-lm's 4-bit cache and rotormlx at 4 and 3 bits.

    Args:
        model: A model that ``mlx_lm.load`` can load; None for SmolLM2-135M-Instruct, downloaded
            once.
        prompt: The question about the passage.
        max_tokens: Maximum length of the answer, in tokens.
        score_tokens: Length of the passage, in tokens.
        console: The console to print on; standard output if None.

    Returns:
        One row per cache, the exact one first.

    Raises:
        ValueError: If the passage is too short for anything to be packed, or the model cannot be
            compressed.
        RuntimeError: If the model cannot be downloaded, or nothing was read from packed bytes.
    """
    if score_tokens < LEAST_SCORE_TOKENS or max_tokens < 1:
        raise ValueError(
            f"[demo] A passage of at least {LEAST_SCORE_TOKENS} tokens and an answer of at least 1 "
            f"are required, so that packed tokens are read, but {score_tokens} and {max_tokens} "
            "were given; ask for more."
        )
    console = console or Console()
    with progress_bar(console) as progress, fast_on_a_cpu(console):
        path = model or str(demo_model.fetch(progress))
        loaded: tuple[Any, ...] = load(path)
        network, tokenizer = loaded[:2]
        tokens = _prompt_tokens(tokenizer, prompt, score_tokens)
        ratios = _long_context_ratios(network)
        makers = _cache_makers(network)
        task = progress.add_task("", total=len(makers) * (len(tokens) + max_tokens))
        runs: dict[str, _Run] = {}
        try:
            for count, (name, make) in enumerate(makers.items(), start=1):
                through = f"{len(tokens)} tokens through the {name} cache"
                progress.update(task, description=f"reading {through}")
                runs[name] = _run_one(
                    loaded,
                    tokens,
                    make(),
                    max_tokens,
                    lambda n: progress.advance(task, n),
                    partial(progress.update, task, description=f"answering from the {name} cache"),
                )
                progress.update(task, completed=count * (len(tokens) + max_tokens))
                if name != EXACT:
                    scoring.assert_packed(runs[name].caches, CHUNK)
        except KeyboardInterrupt:
            progress.stop()
            if len(runs) > 1:
                _show(console, runs, ratios)
            raise
        finally:
            integration.remove(network)
    rows = _show(console, runs, ratios)
    talk = "chat" if tokenizer.has_chat_template else "generate"
    long = "rotormlx demo --long" + (f" --model {as_typed(model)}" if model else "")
    _print_next(
        console,
        {
            long: "asks for numbers hidden in 4,096 tokens",
            f"rotormlx info {as_typed(path)}": "shows the memory of longer contexts",
            f"rotormlx {talk} --model {as_typed(path)}": "writes text with a compressed cache",
        },
    )
    return rows


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with the current step and the remaining time."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=14))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


@contextmanager
def fast_on_a_cpu(console: Console) -> Iterator[None]:
    """Let numpy multiply if MLX runs on a CPU, and print a line about it."""
    if runs_on_a_cpu():
        console.print(
            "MLX runs on a CPU here, so numpy multiplies, which is faster; speeds are not mlx-lm's."
        )
    with numpy_linear(), numpy_attention():
        yield


def runs_on_a_cpu() -> bool:
    """Return whether MLX computes on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _show(console: Console, runs: dict[str, _Run], ratios: dict[str, float]) -> list[Row]:
    """Print the results of the caches that were read, and return one row per cache."""
    start = _first_packed(runs)
    rows = [_row(name, run, runs[EXACT], start, ratios) for name, run in runs.items()]
    _print(console, rows, runs[EXACT].scores, start)
    return rows


def _cache_makers(network: Any) -> dict[str, Callable[[], Caches]]:
    def mlx_lm_4_bit() -> Caches:
        # The caches that mlx-lm makes with kv_bits=4 and quantized_kv_start=0.
        return [
            QuantizedKVCache(group_size=64, bits=4) if type(cache) is KVCache else cache
            for cache in make_prompt_cache(network)
        ]

    def rotormlx(bits: int) -> Callable[[], Caches]:
        config = RotorConfig(key_bits=bits, value_bits=bits)
        return lambda: integration.make_prompt_cache(network, config)

    return {
        EXACT: lambda: list(make_prompt_cache(network)),
        "mlx-lm 4 bit": mlx_lm_4_bit,
        **{_rotor_name(bits): rotormlx(bits) for bits in ROTOR_BITS},
    }


def _long_context_ratios(network: Any) -> dict[str, float]:
    """Return how many times smaller each cache is than float16 in a long context."""
    ratios = {}
    for bits in ROTOR_BITS:
        report = integration.apply(network, RotorConfig(key_bits=bits, value_bits=bits))
        ratios[_rotor_name(bits)] = report.float_bytes(LONG_CONTEXT) / report.compressed_bytes(
            LONG_CONTEXT
        )
    integration.remove(network)
    return ratios


def _rotor_name(bits: int) -> str:
    return f"rotormlx {bits} bit"


def _prompt_tokens(tokenizer: Any, prompt: str, score_tokens: int) -> list[int]:
    # An English token has 4 or 5 characters; the whole text would exceed some models' context.
    text = default_text()[: 8 * score_tokens]
    passage = tokenizer.encode(text, add_special_tokens=False)[:score_tokens]
    if len(passage) < score_tokens:
        raise ValueError(
            f"[demo] The passage has {len(passage)} tokens, but {score_tokens} are required; "
            "lower --score-tokens."
        )
    text = f"{tokenizer.decode(passage)}\n\n{prompt}"
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def _run_one(
    loaded: tuple[Any, ...],
    tokens: list[int],
    caches: Caches,
    max_tokens: int,
    advance: Callable[[int], None],
    answering: Callable[[], object],
) -> _Run:
    network, tokenizer = loaded[:2]
    scores = scoring.score(network, tokens, caches, chunk=CHUNK, progress=advance)
    answering()
    text = ""
    count = 0
    start = time.perf_counter()
    # score() does not read the last token, so that token is the prompt here.
    for response in stream_generate(
        network, tokenizer, tokens[-1:], max_tokens=max_tokens, prompt_cache=caches
    ):
        text += response.text
        count = response.generation_tokens
        advance(1)
    return _Run(caches, scores, text.strip(), count / (time.perf_counter() - start))


def _first_packed(runs: dict[str, _Run]) -> int:
    """Return the first prediction for which every compressed cache read packed tokens."""
    packed = [run.scores.packed_tokens for name, run in runs.items() if name != EXACT]
    return int(np.argmax(np.min(packed, axis=0) > 0))


def _row(name: str, run: _Run, exact: _Run, start: int, ratios: dict[str, float]) -> Row:
    caches = [cache for _, _, cache in leaves(run.caches)]
    bits, exact_bits = (
        cache_contents.bits_per_value(run.caches),
        cache_contents.bits_per_value(exact.caches),
    )
    return Row(
        name=name,
        text=run.text,
        context_tokens=max(getattr(cache, "offset", 0) for cache in caches),
        packed_tokens=scoring.packed_of(caches),
        packed_share=_packed_share(run.scores, start),
        cache_bytes=cache_contents.used_bytes(run.caches),
        long_context_ratio=ratios.get(name, FLOAT16_BITS / bits) * exact_bits / FLOAT16_BITS,
        bits_per_value=bits,
        quality=None if run is exact else scoring.compare(exact.scores, run.scores, start=start),
        tokens_per_second=run.tokens_per_second,
    )


def _packed_share(scores: scoring.Scores, start: int) -> float:
    earlier = np.arange(start, len(scores.targets)) + 1
    return float(np.mean(scores.packed_tokens[start:] / earlier))


def _print(console: Console, rows: list[Row], exact: scoring.Scores, start: int) -> None:
    first = rows[0]
    table = Table(title="One text, four caches")
    table.add_column("")
    for row in rows:
        table.add_column(row.name, justify="right")
    # One column per cache, so that the table fits a terminal of 80 characters.
    lines: dict[str, Callable[[Row], str]] = {
        "memory": lambda row: f"{row.cache_bytes / 1e6:.2f} MB",
        "smaller": lambda row: f"{first.cache_bytes / row.cache_bytes:.2f}x",
        "at 8,192 tokens": lambda row: f"{row.long_context_ratio:.2f}x",
        "bits per value": lambda row: f"{row.bits_per_value:.3f}",
        "tokens packed": lambda row: f"{row.packed_tokens} of {row.context_tokens}",
        "read packed": lambda row: f"{row.packed_share:.0%}",
        "KL": lambda row: f"{row.quality.kl_mean:.4f}" if row.quality else "",
        "top-1": lambda row: f"{row.quality.top1:.1%}" if row.quality else "",
        "words as exact": lambda row: f"{_common(row, first)} of {len(row.text.split())}",
        "tokens/s": lambda row: f"{row.tokens_per_second:.1f}",
    }
    for label, cell in lines.items():
        table.add_row(label, *(cell(row) for row in rows))
    console.print(table)
    predictions = len(exact.targets) - start
    console.print(
        "memory: size of the cache after the answer. smaller: ratio to the exact cache, now and "
        "with 8,192 tokens. bits per value: bits of a packed value, including scales and centres. "
        "read packed: mean share of earlier tokens that a prediction reads from packed bytes; the "
        f"others are exact. KL (in nats) and top-1 compare {predictions} next-token predictions "
        f"with those of the exact cache, whose perplexity is {exact.perplexity(start):.2f}. The "
        f"first {start} are left out, because nothing is packed yet. words as exact: words of the "
        "answer before the first that differs. tokens/s: speed of the answer.",
        highlight=False,
    )
    console.print(_plot(rows))
    for row in rows:
        console.print(f"\n[bold]{escape(row.name)}:[/bold] {escape(row.text)}", highlight=False)


def _common(row: Row, exact: Row) -> int:
    """Return how many words at the start of two answers are equal."""
    pairs = zip(row.text.split(), exact.text.split(), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _plot(rows: list[Row]) -> Table:
    """Return bars for the memory of each cache and for its distance from the exact cache."""
    plot = Table.grid(padding=(0, 1))
    plot.add_column()
    plot.add_column(width=BAR_WIDTH)
    plot.add_column(justify="right")
    kl = {row.name: row.quality.kl_mean if row.quality else 0.0 for row in rows}
    memory = {row.name: row.cache_bytes / 1e6 for row in rows}
    for title, form, values in (("\nmemory, MB", ".2f", memory), ("\nKL, nats", ".4f", kl)):
        plot.add_row(f"[bold]{title}[/bold]")
        longest = max(values.values()) or 1
        for name, value in values.items():
            plot.add_row(name, Bar(longest, 0, value, color="cyan"), f"{value:{form}}")
    return plot


def _print_next(console: Console, commands: dict[str, str]) -> None:
    """Print commands to try, with a line on each."""
    console.print("\n[bold]Try next:[/bold]")
    for command, does in commands.items():
        # One line per command, so that it can be copied.
        console.print(f"  {escape(command)}", highlight=False, soft_wrap=True)
        console.print(f"    [dim]{does}[/dim]", highlight=False)


def as_typed(path: str) -> str:
    """Return a path or name quoted for a shell, with ~ for the home directory."""
    home = Path.home()
    if not Path(path).is_relative_to(home):
        return shlex.quote(path)
    return f"~/{shlex.quote(str(Path(path).relative_to(home)))}"
