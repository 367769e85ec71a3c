"""Generated tasks that test whether a model still uses distant text through a compressed cache.

The kinds of task are those of :mod:`rotormlx.measure.haystack`. A question counts as solved if
every token of the answer is the most likely one, as in greedy decoding. A text is read once, and
each of its questions is asked with a fresh copy of the caches. The run stops if a needle is not in
packed bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import mlx.core as mx
import numpy as np
from rich.progress import Progress
from rich.table import Table
from scipy.stats import binomtest

from rotormlx.measure import cache_contents, scoring
from rotormlx.measure.cpu_attention import numpy_attention
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.haystack import KINDS, PLACES, Haystack, Question, texts_for
from rotormlx.measure.intervals import Interval, wilson
from rotormlx.measure.machine import machine, versions
from rotormlx.measure.schemes import EXACT, Scheme, scheme
from rotormlx.mlx import hosts

DEPTHS = 5  # equal parts of a text, for the tables
PROMPT_CHUNK = 256  # tokens read at once, so that even a text of 512 is read in several chunks


@dataclass(frozen=True)
class Trial:
    """One question about a needle through one scheme.

    Args:
        scheme: Name of the scheme.
        kind: Kind of needle.
        length: Tokens of the text.
        depth: Position of the needle, from 0 (start) to 1 (end).
        found: Whether the needle was found.
    """

    scheme: str
    kind: str
    length: int
    depth: float
    found: bool


@dataclass(frozen=True)
class Share:
    """The number of trials that found their needle, with a Wilson interval at 95 %."""

    found: int
    trials: int

    @property
    def interval(self) -> Interval:
        """Wilson interval of the share."""
        return wilson(self.found, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.found / self.trials:.1%} ({low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class Pairs:
    """The needles that a scheme lost and gained against a reference."""

    lost: int
    gained: int

    @property
    def p(self) -> float:
        """The p value of McNemar's exact test, with the null hypothesis that neither is better."""
        differing = self.lost + self.gained
        return float(binomtest(self.lost, differing).pvalue) if differing else 1.0

    def __str__(self) -> str:
        return f"-{self.lost} +{self.gained}, p = {self.p:.2g}"


@dataclass(frozen=True)
class Result:
    """All trials of a run, and its settings.

    The other fields are as in :class:`rotormlx.measure.quality_run.Result`.
    """

    model: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    trials: tuple[Trial, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as a dictionary for JSON."""
        return asdict(self)

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes, in the order of the run."""
        return list(dict.fromkeys(trial.scheme for trial in self.trials))

    def share(self, **wanted: object) -> Share:
        """Return the share of trials with the given fields; ``part`` of the text is 0 to 4."""
        chosen = self._found(**wanted)
        return Share(sum(chosen), len(chosen))

    def pairs(self, reference: str, scheme: str, **wanted: object) -> Pairs:
        """Compare a scheme with a reference on the same needles, over trials with given fields."""
        # The trials of every scheme are in the same order.
        both = list(
            zip(
                self._found(scheme=reference, **wanted),
                self._found(scheme=scheme, **wanted),
                strict=True,
            )
        )
        return Pairs(both.count((True, False)), both.count((False, True)))

    def _found(self, *, part: object = None, **wanted: object) -> list[bool]:
        return [
            trial.found
            for trial in self.trials
            if all(getattr(trial, name) == value for name, value in wanted.items())
            and part in (None, min(int(trial.depth * DEPTHS), DEPTHS - 1))
        ]


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    model_name: str,
    command: str,
    lengths: Sequence[int] = (512, 1024),
    trials: int = 200,
    needles: int = 20,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Hide needles in texts, and ask for them through the exact cache and then each scheme.

    Args:
        model: An mlx-lm model with its own caches.
        tokenizer: Its tokenizer.
        names: Names of schemes, see :func:`rotormlx.measure.schemes.scheme`.
        model_name: Name of the model for the report.
        command: The command line for the report.
        lengths: Lengths of the texts in tokens.
        trials: Minimum number of trials of each kind and scheme, over all lengths.
        needles: Maximum number of needles per text; a short text has room for fewer.
        kinds: Kinds of needle.
        seed: Seed of the texts.
        progress: Shows the progress, if given.
        keep: Called with the trials so far, after each text.

    Raises:
        ValueError: If a scheme or kind is unknown, or a text is too short for its needles.
        RuntimeError: If a needle is not in packed bytes.
    """
    if set(kinds) - set(KINDS) or trials < 1 or not 1 <= needles <= len(PLACES):
        raise ValueError(
            f"[needle] Kinds from {', '.join(KINDS)}, at least 1 trial and 1 to {len(PLACES)} "
            f"needles per text are required, but {', '.join(kinds)}, {trials} and {needles} were "
            "given."
        )
    schemes = [scheme(name).bound(model) for name in dict.fromkeys((EXACT, *names))]
    progress = progress or Progress(disable=True)
    stacks = texts_for(tokenizer, kinds, lengths, trials, needles, seed=seed)
    task = progress.add_task("", total=len(schemes) * sum(len(stack.questions) for stack in stacks))
    done: list[Trial] = []

    def result() -> Result:
        day = datetime.now(UTC).date().isoformat()
        return Result(model_name, command, day, machine(), versions(), tuple(done))

    # MLX is slow in 16 bits on a CPU.
    dtype = "float32" if mx.default_device() == mx.Device(mx.cpu) else None
    with (
        hosts.MLX_LM.in_place(),
        numpy_linear(),
        numpy_attention(),
        scoring.computing_in(model, dtype),
    ):
        for stack in stacks:
            for chosen in schemes:
                progress.update(task, description=f"{stack.kind}: {chosen.name}")
                done += search(model, stack, chosen, lambda: progress.advance(task))
            if keep is not None:
                keep(result())
    return result()


def search(
    model: Any, stack: Haystack, chosen: Scheme, advance: Callable[[], None] | None = None
) -> Iterator[Trial]:
    """Read a text through a scheme's caches, and ask for each of its needles.

    Raises:
        RuntimeError: If a needle is not in packed bytes.
    """
    caches = read(model, stack, chosen)
    length = len(stack.tokens)
    for question in stack.questions:
        found = answered(model, question, caches) == question.answer
        yield Trial(chosen.name, stack.kind, length, question.first / length, found)
        if advance is not None:
            advance()


def read(
    model: Any, stack: Haystack, chosen: Scheme, advance: Callable[[int], object] | None = None
) -> list[Any]:
    """Read a text through a scheme's caches.

    Args:
        model: An mlx-lm model.
        stack: The text.
        chosen: The scheme.
        advance: Called after each chunk with its number of tokens.

    Returns:
        The caches, which hold the text.

    Raises:
        RuntimeError: If a needle is not in packed bytes.
    """
    caches = chosen.caches(model)
    for start in range(0, len(stack.tokens), PROMPT_CHUNK):
        part = stack.tokens[start : start + PROMPT_CHUNK]
        mx.eval(model(mx.array([part]), cache=caches))
        if advance is not None:
            advance(len(part))
    if chosen.name != EXACT:
        _check_packed(stack, chosen, caches)
    return caches


def answered(model: Any, question: Question, caches: Sequence[Any]) -> tuple[int, ...]:
    """Return the most likely token at each place of an answer, given the right ones before it.

    The caches are copied and do not change.
    """
    logits = model(mx.array([question.tokens]), cache=copy.deepcopy(caches))
    best = np.array(mx.argmax(logits[0, -len(question.answer) :], axis=-1))
    return tuple(map(int, best))


def _check_packed(stack: Haystack, chosen: Scheme, caches: Sequence[Any]) -> None:
    packed = scoring.packed_of(caches)
    held = next(cache for _, cache in cache_contents.compressed(caches))
    sink = getattr(getattr(held, "config", held), "sink", 0)
    for question in stack.questions:
        if question.first < sink or question.end > sink + packed:
            raise RuntimeError(
                f"[needle] Every needle must be in packed bytes, but one is tokens "
                f"{question.first} to {question.end}, and {chosen.name} packed {sink} to "
                f"{sink + packed}; use longer texts."
            )


# ---- tables -------------------------------------------------------------------------------------


def cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, one row per scheme.

    The columns are kinds and lengths, then kinds and parts of the text. The last columns compare
    with the exact cache and with the first scheme.
    """
    kinds = dict.fromkeys(trial.kind for trial in result.trials)
    columns: dict[str, dict[str, object]] = {}
    for kind in kinds:
        columns[f"{kind}, all"] = {"kind": kind}
        for length in dict.fromkeys(trial.length for trial in result.trials):
            columns[f"{kind}, {length} tokens"] = {"kind": kind, "length": length}
    for kind in kinds:
        parts = [p for p in range(DEPTHS) if result.share(kind=kind, part=p).trials]
        for part in parts if len(parts) > 1 else ():
            label = f"{kind}, depth {100 * part // DEPTHS}-{100 * (part + 1) // DEPTHS} %"
            columns[label] = {"kind": kind, "part": part}
    rows = [
        [name, *(str(result.share(scheme=name, **wanted)) for wanted in columns.values())]
        for name in result.schemes
    ]
    for reference in result.schemes[:2]:
        for kind in kinds:
            columns[f"{kind}, against {reference}"] = {}
            for row in rows:
                pairs = result.pairs(reference, row[0], kind=kind)
                row.append("" if row[0] == reference else str(pairs))
    return ["scheme", *columns], rows


def table(result: Result) -> Table:
    """Return a table for a terminal, with one column per scheme."""
    header, rows = cells(result)
    out = Table(title=f"{result.model}: needles found")
    for name in ("", *(row[0] for row in rows)):
        out.add_column(name)
    for index, label in enumerate(header[1:], start=1):
        out.add_row(label, *(row[index] for row in rows))
    return out


def markdown(result: Result) -> str:
    """Return a table in Markdown, with one column per scheme."""
    header, rows = cells(result)
    lines = [["found", *(f"`{row[0]}`" for row in rows)], ["---"] * (1 + len(rows))]
    lines += [
        [label, *(row[index] for row in rows)] for index, label in enumerate(header[1:], start=1)
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    trials = result.share(scheme=EXACT).trials
    packages = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return (
        f"{result.model}: share of needles found, {trials} per scheme, with Wilson intervals at "
        f"95 %. Against: needles that a scheme lost and gained, with the p of McNemar's exact "
        f"test.\n\n{body}\n\n`{result.command}`; {result.machine}; {packages}; {result.date}.\n"
    )
