"""Measures speed and memory of a model with each cache.

The schemes run in turn in one process, so that a slowdown of the machine affects all of them. The
reported numbers are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
from rich.progress import Progress
from rich.table import Table

from rotormlx.measure import cache_contents, scoring
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.machine import machine, versions
from rotormlx.measure.schemes import Scheme, scheme
from rotormlx.measure.text import default_text
from rotormlx.mlx import hosts
from rotormlx.report import megabytes

PROMPT_CHUNK = 512  # tokens of a prompt read at once


@dataclass(frozen=True)
class Timing:
    """The times of one run, or the medians of several.

    Args:
        scheme: Name of the scheme.
        context: Tokens of the prompt.
        prefill_tokens_per_second: Speed of reading the prompt.
        first_token_seconds: Time from the start until the first token is known.
        decode_tokens_per_second: Speed of the tokens after the first.
        peak_bytes: Peak memory of MLX, weights included.
        cache_bytes: Bytes of the cache at the end, without room for growth.
    """

    scheme: str
    context: int
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    peak_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Result:
    """The medians and the settings; the other fields are as in ``quality_run.Result``.

    Args:
        repeats: Number of turns of each scheme and context.
        decode_tokens: Number of tokens generated in each turn.
        medians: One timing per scheme and context.
    """

    model: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    repeats: int
    decode_tokens: int
    medians: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as a dictionary for JSON."""
        return asdict(self)


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    model_name: str,
    command: str,
    contexts: Sequence[int] = (1024, 4096),
    repeats: int = 3,
    decode_tokens: int = 32,
    numpy: bool = False,
    dtype: str | None = None,
    progress: Progress | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Time schemes in turn.

    Args:
        model: An mlx-lm model with its own caches.
        tokenizer: Its tokenizer.
        names: Names of schemes, see :func:`rotormlx.measure.schemes.scheme`.
        model_name: Name of the model for the report.
        command: The command line for the report.
        contexts: Lengths of the prompts in tokens.
        repeats: Number of turns of each scheme and context, after a warm-up with a short prompt.
        decode_tokens: Number of tokens to generate in each turn.
        numpy: Whether linear layers multiply with numpy on a CPU, which mlx-lm does not do.
        dtype: The dtype to compute in, one of ``scoring.DTYPES``; the model's own if None.
        progress: Shows the turns, if given.
        keep: Called with the medians so far, after each turn.

    Raises:
        ValueError: If a number is not positive, or a scheme or the dtype is unknown.
    """
    if min(*contexts, repeats, decode_tokens) < 1:
        raise ValueError(
            f"[bench] Contexts, repeats and decode tokens must be at least 1, but "
            f"{', '.join(map(str, contexts))}, {repeats} and {decode_tokens} were given."
        )
    schemes = [scheme(name).bound(model) for name in dict.fromkeys(names)]
    if not schemes:
        raise ValueError("[bench] At least one scheme must be given; add one, such as k4v4.")
    progress = progress or Progress(disable=True)
    ids = tokenizer.encode(default_text()[: 8 * max(contexts)])
    ids = np.resize(ids, max(contexts)).tolist()  # a long prompt repeats the text
    task = progress.add_task("", total=repeats * len(schemes) * sum(contexts))
    turns: dict[tuple[str, int], list[Timing]] = {}

    def result() -> Result:
        return Result(
            model_name,
            command,
            datetime.now(UTC).date().isoformat(),
            machine(),
            versions(),
            min(map(len, turns.values())),
            decode_tokens,
            tuple(median(timings) for timings in turns.values()),
        )

    with (
        hosts.MLX_LM.in_place(),
        numpy_linear() if numpy else nullcontext(),
        scoring.computing_in(model, dtype),
    ):
        for chosen in schemes:
            turn(model, ids[:64], chosen, 2)
        for _, context, chosen in product(range(repeats), contexts, schemes):
            progress.update(task, description=f"{context} tokens: {chosen.name}")
            timing = turn(model, ids[:context], chosen, decode_tokens)
            turns.setdefault((chosen.name, context), []).append(timing)
            progress.advance(task, context)
            if keep is not None:
                keep(result())
    return result()


def turn(model: Any, prompt: Sequence[int], chosen: Scheme, decode_tokens: int) -> Timing:
    """Read a prompt, and generate ``decode_tokens`` tokens after the first, greedily."""
    mx.clear_cache()
    mx.reset_peak_memory()
    caches = chosen.caches(model)
    start = time.perf_counter()
    logits = mx.array(0.0)
    for first in range(0, len(prompt), PROMPT_CHUNK):
        logits = model(mx.array([prompt[first : first + PROMPT_CHUNK]]), cache=caches)[:, -1]
        mx.eval(logits, [cache.state for cache in caches])
    token = mx.argmax(logits, axis=-1)
    mx.eval(token)
    read = time.perf_counter()
    for _ in range(decode_tokens):
        token = mx.argmax(model(token[:, None], cache=caches)[:, -1], axis=-1)
        mx.eval(token)
    written = time.perf_counter()
    return Timing(
        scheme=chosen.name,
        context=len(prompt),
        prefill_tokens_per_second=len(prompt) / (read - start),
        first_token_seconds=read - start,
        decode_tokens_per_second=decode_tokens / (written - read),
        peak_bytes=mx.get_peak_memory(),
        cache_bytes=cache_contents.used_bytes(caches),
    )


def median(timings: Sequence[Timing]) -> Timing:
    """Return the median of each number over several turns of one scheme and context."""
    rows = [asdict(timing) for timing in timings]
    numbers = {
        name: statistics.median(row[name] for row in rows)
        for name in rows[0]
        if name not in ("scheme", "context")
    }
    whole = {name: round(numbers[name]) for name in ("peak_bytes", "cache_bytes")}
    return Timing(timings[0].scheme, timings[0].context, **(numbers | whole))


# ---- tables -------------------------------------------------------------------------------------

HEADER = (
    "tokens", "scheme", "prefill, tokens/s", "first token, s", "decode, tokens/s", "peak memory",
    "cache",
)  # fmt: skip


def cells(result: Result) -> list[list[str]]:
    """Return the rows of the table, sorted by context."""
    return [
        [
            f"{timing.context:,}",
            timing.scheme,
            f"{timing.prefill_tokens_per_second:.1f}",
            f"{timing.first_token_seconds:.2f}",
            f"{timing.decode_tokens_per_second:.2f}",
            megabytes(timing.peak_bytes),
            megabytes(timing.cache_bytes),
        ]
        for timing in sorted(result.medians, key=lambda t: t.context)
    ]


def table(result: Result) -> Table:
    """Return the results as a table for a terminal."""
    out = Table(title=f"{result.model}: medians of {result.repeats} turns")
    for name in HEADER:
        out.add_column(name, justify="left" if name == "scheme" else "right")
    for row in cells(result):
        out.add_row(*row)
    return out


def markdown(result: Result) -> str:
    """Return the results as Markdown."""
    lines = [list(HEADER), ["---"] * len(HEADER), *cells(result)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    packages = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return (
        f"{result.model}: medians of {result.repeats} turns with {result.decode_tokens} generated "
        f"tokens.\n\n{body}\n\n`{result.command}`; {result.machine}; {packages}; {result.date}.\n"
    )
