"""What the tables of models have in common: docs/COVERAGE.md and those of the other hosts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import rotormlx
from rotormlx.report import Report

ROOT = Path(__file__).resolve().parents[1]
# Everything but the latest tokens of an unfinished block is packed: little is read exactly.
CONFIG = rotormlx.RotorConfig(8, 8, sink=0, window=0)
STEPS = (130, 70, 40, 1, 1, 1)
# Share of the logits' norm. At 8 bits a key or value is off by 1 %; layers of random weights
# amplify that up to fivefold.
LARGEST_ERROR = 0.05
VERDICTS = ("works", "nothing to compress", "refused", "not run")
# The end of every table's head.
COLUMNS = """{works} of {total} model types work. Nothing to compress: {nothing_to_compress}. \
Refused with the reason: {refused}. Not run: {not_run}.

| model type | | caches compressed | error | other experts | left alone, or why not |
|---|---|---|---|---|---|"""


@dataclass
class Result:
    """What became of one model type.

    Args:
        model_type: The library's name.
        verdict: One of ``VERDICTS``, ``differs`` or ``crashes``.
        note: Why, where there is something to say.
        compressed: Caches that are compressed.
        caches: Caches of the model.
        otherwise: How many of the compressed ones the fused attention does not read, and how they
            are read.
        left_alone: Kinds of caches left alone, with the reason.
        error: Largest error of a token's logits, relative to their norm, before routing differs.
        flips: Tokens whose experts differ from those of the float cache, and tokens.
    """

    model_type: str
    verdict: str
    note: str = ""
    compressed: int = 0
    caches: int = 0
    otherwise: str = ""
    left_alone: list[str] = field(default_factory=list)
    error: float = 0.0
    flips: tuple[int, int] | None = None


def begin(model_type: str, report: Report) -> Result:
    """A result that knows what the report promises."""
    result = Result(model_type, "works", caches=len(report.layers))
    result.compressed = sum(layer.compressed for layer in report.layers)
    others = Counter(layer.holds_latents for layer in report.layers if layer.way)
    words = {True: "latents", False: "decoded"}
    result.otherwise = ", ".join(f"{count} {words[kind]}" for kind, count in others.items())
    result.left_alone = sorted(
        {f"{layer.cache}: {layer.reason}" for layer in report.layers if not layer.compressed}
    )
    return result


def refused(model_type: str, error: ValueError) -> Result:
    """A result for a model that ``apply`` refuses."""
    reason = str(error).partition("cannot be compressed: ")[2].partition("; use the")[0]
    kept, nothing, _ = reason.partition(", so there is nothing to compress")
    if nothing:
        return Result(model_type, "nothing to compress", kept)
    message = str(error).removeprefix("[apply] ").removesuffix("; use the model without rotormlx.")
    return Result(model_type, "refused", reason or message)


def judge(
    result: Result,
    want: np.ndarray,
    got: np.ndarray,
    want_routes: Sequence[np.ndarray],
    routes: Sequence[np.ndarray],
) -> None:
    """Compare logits ``[tokens, V]``, up to the first token for which routers differ.

    Args:
        result: Gets the error, the flips, and another verdict if the logits are not close.
        want: Logits with the float cache.
        got: Logits with compressed caches.
        want_routes: For each router, its choice for each token.
        routes: The same with compressed caches.
    """
    # Some models give -inf to tokens that stand for nothing.
    hidden = np.isneginf(want)
    same_hidden = np.array_equal(hidden, np.isneginf(got))
    want, got = (np.where(hidden, 0.0, logits) for logits in (want, got))
    judged = slice(None)
    if want_routes:
        pairs = zip(want_routes, routes, strict=True)
        flipped = np.any([np.any(a != b, axis=1) for a, b in pairs], axis=0)
        result.flips = (int(flipped.sum()), len(flipped))
        # A token sees every token before it: after a flip in an early layer nothing can agree.
        first = int(np.argmax(flipped)) if flipped.any() else len(flipped)
        judged = slice(0, first)
    result.error = largest_error(want[judged], got[judged])
    if not (same_hidden and np.isfinite(got).all() and is_close(want[judged], got[judged])):
        result.verdict = "differs"


def largest_error(want: np.ndarray, got: np.ndarray) -> float:
    """The largest error of logits ``[tokens, V]``, relative to their norm."""
    size = np.linalg.norm(want, axis=1).clip(1e-9)
    return float((np.linalg.norm(got - want, axis=1) / size).max(initial=0.0))


def is_close(want: np.ndarray, got: np.ndarray) -> bool:
    """Whether the codec's error explains the difference of logits ``[tokens, V]``."""
    return largest_error(want, got) <= LARGEST_ERROR


def table(head: str, results: list[Result], version: str) -> str:
    """The text of a table.

    Args:
        head: What stands before it, with places for version, date, tokens and counts.
        results: One per line.
        version: Of the library.
    """
    counts = {
        verdict.replace(" ", "_"): sum(r.verdict == verdict for r in results)
        for verdict in VERDICTS
    }
    lines = [
        head.format(
            version=version,
            date=datetime.now(UTC).date(),
            tokens=sum(STEPS),
            chunks=", ".join(map(str, STEPS)),
            total=len(results),
            **counts,
        )
    ]
    for r in results:
        caches = f"{r.compressed} of {r.caches}" if r.caches else ""
        caches += f" ({r.otherwise})" if r.otherwise else ""
        error = f"{r.error:.4f}" if r.caches else ""
        flips = f"{r.flips[0]} of {r.flips[1]} tokens" if r.flips and r.caches else ""
        why = "; ".join([r.note] * bool(r.note) + r.left_alone).replace("|", "\\|")
        lines.append(f"| {r.model_type} | {r.verdict} | {caches} | {error} | {flips} | {why} |")
    return "\n".join(lines) + "\n"


def verdicts(path: Path) -> dict[str, str]:
    """The verdict of each model type in a table."""
    text = path.read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (\S+) \| ([a-z ]+) \|", text, re.MULTILINE))
