"""Checks and times the kernels on this machine, for ``rotormlx doctor``.

Every operation runs on every file of the shared test vectors. Decode steps and chunks of a prompt
are timed in turn with MLX's own attention over an exact cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import mlx.core as mx

from rotormlx.config import BITS
from rotormlx.measure.attention_time import (
    EXACT,
    QUANTIZED,
    Shape,
    decode_steps,
    median_ms,
    prompt_steps,
    rotor_name,
)
from rotormlx.measure.machine import machine, versions
from rotormlx.mlx import backends
from rotormlx.mlx.backends.vectors import NAMES, RIGHT, Operation, check, names, operations

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CONTEXTS = (4096, 32768)
# Tokens of a chunk of a prompt.
CHUNK = 256
# The number of bits that the verdict is about, which is the default of the package.
WIDTH = 4
WIDTHS = tuple(sorted(BITS, reverse=True))

Said = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of attention with each kind of cache.

    Args:
        what: ``"decode step"`` or ``"prompt chunk"``.
        tokens: Tokens of the history.
        queries: Tokens of the step.
        ms: Milliseconds by contender, see :mod:`rotormlx.measure.attention_time`.
    """

    what: str
    tokens: int
    queries: int
    ms: dict[str, float]

    @property
    def ratio(self) -> float:
        """Return the time at the default width, relative to MLX's own attention."""
        return self.ms[rotor_name(WIDTH)] / self.ms[EXACT]


@dataclass(frozen=True)
class Findings:
    """The results of all checks.

    Args:
        date: Day of the check, UTC.
        machine: Processor, device and backend.
        versions: Versions of Python and the packages.
        backend: The backend, and why it was chosen.
        files: Names of the files of test vectors.
        wrong: Operations with wrong results, with the second part of a sentence on each.
        timings: The timings; empty if none were requested.
        ways: The fastest way of each operation that has several ways, by operation.
    """

    date: str
    machine: str
    versions: dict[str, str]
    backend: str
    files: tuple[str, ...]
    wrong: dict[Operation, str]
    timings: tuple[Timing, ...]
    ways: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as a dictionary for JSON."""
        return {
            **asdict(self),
            "wrong": {str(operation): found for operation, found in self.wrong.items()},
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """Advice on whether to use rotormlx on this machine, in one line."""
        if self.wrong:
            return (
                f"Use rotormlx here only to save memory: {len(self.wrong)} of {len(operations())} "
                "operations are not right in its kernels, so MLX's slower operations replace them."
            )
        steps = [timing for timing in self.timings if timing.what == "decode step"]
        if not steps:
            return "Every kernel is right here; speed was not measured."
        last = steps[-1]
        ours, exact = readable(last.ms[rotor_name(WIDTH)]), readable(last.ms[EXACT])
        found = (
            f"at {WIDTH} bits, attention of a decode step after {last.tokens:,} tokens takes "
            f"{ours} ms; with MLX's exact cache it takes {exact} ms."
        )
        if last.ratio <= 1:
            return f"Use rotormlx here: every kernel is right, and {found}"
        return f"Use rotormlx here to save memory: every kernel is right, but {found}"


def find_out(*, timed: bool = True, runs: int = 5, say: Said = lambda _: None) -> Findings:
    """Check every operation, and time attention.

    Args:
        timed: Whether to time attention.
        runs: Number of timed runs of each contender.
        say: Called with a phrase about the next step.
    """
    chosen, files = backends.fused(), names()
    wrong: dict[Operation, str] = {}
    for operation in operations():
        say(f"checking: {operation}")
        found = next((f for name in files if (f := check(chosen, operation, name)) != RIGHT), RIGHT)
        backends.keep(operation, found)
        if found != RIGHT:
            wrong[operation] = found
    timings = tuple(_timings(runs, say)) if timed else ()
    return Findings(
        datetime.now(UTC).date().isoformat(),
        machine(),
        versions(),
        backends.describe(),
        tuple(files),
        wrong,
        timings,
        backends.ways(),
    )


def _timings(runs: int, say: Said) -> list[Timing]:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    # MLX multiplies 16-bit numbers slowly on a CPU.
    shape = Shape(1, HEADS, KV_HEADS, HEAD_DIM, mx.float32 if on_cpu else mx.float16)
    found = []
    for tokens in CONTEXTS:
        say(f"timing: a decode step after {tokens:,} tokens")
        ms = median_ms(decode_steps(shape, tokens, WIDTHS), runs)
        found.append(Timing("decode step", tokens, 1, ms))
        say(f"timing: {CHUNK} tokens of a prompt after {tokens:,}")
        ms = median_ms(prompt_steps(shape, tokens, CHUNK, WIDTHS), max(1, runs // 2))
        found.append(Timing("prompt chunk", tokens, CHUNK, ms))
    return found


def readable(ms: float) -> str:
    """Format milliseconds with about three digits."""
    return f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


def rows(findings: Findings) -> list[list[str]]:
    """Return the table: rows are operations and timings, columns are numbers of bits.

    If MLX's own caches were timed, they have the last columns. The first row names the columns.
    """
    others = (EXACT, QUANTIZED) if findings.timings else ()
    table = [["", *(f"{bits} bits" for bits in WIDTHS), *others]]
    for name in NAMES:
        cells = ("wrong" if Operation(name, bits) in findings.wrong else RIGHT for bits in WIDTHS)
        table.append([name, *cells, *("" for _ in others)])
    for timing in findings.timings:
        named = f"{timing.what}, {timing.tokens:,} tokens, ms"
        contenders = (*map(rotor_name, WIDTHS), *others)
        cells = (readable(timing.ms[c]) if c in timing.ms else "" for c in contenders)
        table.append([named, *cells])
    return table
