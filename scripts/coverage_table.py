"""Shared parts of the tables of models: docs/COVERAGE.md and the tables of the other hosts."""

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
# Everything is packed except the tokens of an unfinished block, so few tokens are read exactly.
CONFIG = rotormlx.RotorConfig(8, 8, sink=0, window=0)
STEPS = (130, 70, 40, 1, 1, 1)
# Relative to the norm of the logits. At 8 bits, a key or value has an error of 1 %; layers with
# random weights amplify it up to fivefold.
LARGEST_ERROR = 0.05
VERDICTS = ("works", "nothing to compress", "refused", "not run")
# The end of every table's head.
COLUMNS = """{works} of {total} model types work. Nothing to compress: {nothing_to_compress}. \
Refused with the reason: {refused}. Not run: {not_run}.

| model type | | caches compressed | error | other experts | left alone, or why not |
|---|---|---|---|---|---|"""


@dataclass
class Result:
    """The result of one model type.

    Args:
        model_type: Name of the model type in the library.
        verdict: One of ``VERDICTS``, ``differs`` or ``crashes``.
        note: Reason for the verdict, if there is one.
        compressed: Number of compressed caches.
        caches: Number of caches of the model.
        otherwise: Number of compressed caches that the fused attention does not read, and how they
            are read.
        left_alone: Kinds of caches left alone, with the reason.
        error: Largest error of a token's logits, relative to their norm, before routing differs.
        flips: Number of tokens whose experts differ from those with the float cache, and number of
            all tokens.
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
    """Return a result filled with what the report promises."""
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
    """Return the result for a model that ``apply`` refuses."""
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
    """Compare logits ``[tokens, V]`` up to the first token for which routers differ.

    Args:
        result: Receives the error, the flips and, if logits are not close, another verdict.
        want: Logits with the float cache.
        got: Logits with compressed caches.
        want_routes: For each router, its choice for each token.
        routes: Choices of each router with compressed caches.
    """
    # Some models give -inf to unused tokens of the vocabulary.
    hidden = np.isneginf(want)
    same_hidden = np.array_equal(hidden, np.isneginf(got))
    want, got = (np.where(hidden, 0.0, logits) for logits in (want, got))
    judged = slice(None)
    if want_routes:
        pairs = zip(want_routes, routes, strict=True)
        flipped = np.any([np.any(a != b, axis=1) for a, b in pairs], axis=0)
        result.flips = (int(flipped.sum()), len(flipped))
        # A token attends to all earlier ones, so no later token can agree after a flip.
        first = int(np.argmax(flipped)) if flipped.any() else len(flipped)
        judged = slice(0, first)
    result.error = largest_error(want[judged], got[judged])
    if not (same_hidden and np.isfinite(got).all() and is_close(want[judged], got[judged])):
        result.verdict = "differs"


def largest_error(want: np.ndarray, got: np.ndarray) -> float:
    """Return the largest error of logits ``[tokens, V]``, relative to their norm."""
    size = np.linalg.norm(want, axis=1).clip(1e-9)
    return float((np.linalg.norm(got - want, axis=1) / size).max(initial=0.0))


def is_close(want: np.ndarray, got: np.ndarray) -> bool:
    """Return whether the codec's error explains the difference of logits ``[tokens, V]``."""
    return largest_error(want, got) <= LARGEST_ERROR


def table(head: str, results: list[Result], version: str) -> str:
    """Return the text of a page with its table.

    Args:
        head: Text before the rows, with fields for version, date, tokens and counts.
        results: Results, one per row.
        version: Version of the library.
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
    """Return the verdict of each model type in a table."""
    text = path.read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (\S+) \| ([a-z ]+) \|", text, re.MULTILINE))
