"""One run of ``rotormlx quality``: a text read through the exact cache and through every scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from rotormlx.measure import attention_error, intervals, reading, scoring, tasks, unfinished
from rotormlx.measure.cpu_attention import numpy_attention
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.free_running import Settings
from rotormlx.measure.haystack import Haystack
from rotormlx.measure.intervals import Interval
from rotormlx.measure.machine import machine, versions
from rotormlx.measure.quality_plan import (
    encoded,
    first_packed,
    setting_of,
    stacks_for,
    try_out,
)
from rotormlx.measure.reading import Coded, Exact, Text
from rotormlx.measure.schemes import EXACT, Scheme, scheme
from rotormlx.measure.scoring import CHUNK, Differences
from rotormlx.measure.text import default_text
from rotormlx.mlx import hosts


@dataclass(frozen=True)
class Row:
    """The results of one scheme.

    All intervals are at 95 %.

    Args:
        scheme: Name of the scheme.
        bits_per_value: Bits per compressed value, scales and centres included.
        sink: Number of first tokens that are never packed.
        window: Number of latest tokens that are never packed.
        cache_bytes: Bytes of the cache after the last text, without room for growth.
        packed_tokens: Tokens packed in this cache, in the layer with the fewest.
        ppl: Perplexity of the compared predictions.
        kl: Mean KL divergence from the exact cache, in nats.
        kl_interval: Bootstrap interval of the mean.
        kl_median: Median of the KL divergence.
        kl_median_interval: Bootstrap interval of the median.
        kl_p99: 99th percentile of the KL divergence.
        kl_p99_interval: Bootstrap interval of the 99th percentile.
        kl_p999: 99.9th percentile of the KL divergence.
        kl_p999_interval: Bootstrap interval of the 99.9th percentile. One that ends at ``kl_max``
            has no upper bound.
        kl_max: Largest KL divergence.
        kl_difference: Bootstrap interval of the mean difference in KL divergence from the first
            scheme, prediction by prediction.
        top1: Share of equal most likely tokens.
        top1_interval: Bootstrap interval of this share.
        greedy_tokens: Number of greedy tokens after the text before the first that differs from
            the exact cache's; the mean over texts.
        sampled_tokens: This number for each sampled continuation, seed by seed, text by text.
        sampled_median: Median of these numbers; None if nothing was sampled.
        sampled_interval: Interval of the median, from ranks; None for fewer than 6 numbers.
        sampled_never: Share of sampled continuations that never differ.
        sampled_never_interval: Wilson interval of this share.
        tasks: Scores of the generated tasks; empty if none were given.
        cosine: Cosine of attention outputs with the exact ones; the mean over layers.
        attention_top1: Share of queries whose most attended token stays the most attended.
        attention_top5: Share of queries whose most attended token stays among the five most
            attended.
        layers: Errors of each layer.
        kl_by_position: Mean KL divergence of each run of 64 predictions.
        seconds: Time that reading the texts took.
    """

    scheme: str
    bits_per_value: float
    sink: int
    window: int
    cache_bytes: int
    packed_tokens: int
    ppl: float
    kl: float
    kl_interval: Interval
    kl_median: float
    kl_median_interval: Interval
    kl_p99: float
    kl_p99_interval: Interval
    kl_p999: float
    kl_p999_interval: Interval
    kl_max: float
    kl_difference: Interval
    top1: float
    top1_interval: Interval
    greedy_tokens: float
    sampled_tokens: tuple[int, ...]
    sampled_median: float | None
    sampled_interval: Interval | None
    sampled_never: float | None
    sampled_never_interval: Interval | None
    tasks: tuple[tasks.Score, ...]
    cosine: float
    attention_top1: float
    attention_top5: float
    layers: tuple[attention_error.LayerError, ...]
    kl_by_position: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Result:
    """All rows of a run, and its settings.

    Args:
        model: Name of the model.
        command: The command line that repeats the run.
        date: Day of the run.
        machine: Processor and device.
        versions: Versions of Python and of the packages that a measurement depends on.
        texts: Names of the texts.
        tokens: Number of tokens read of each text.
        start: First compared prediction of each text.
        predictions: Number of compared predictions over all texts.
        written: Settings of the continuations.
        dtype: The dtype of the model's computation and of exact tokens.
        exact_ppl: Perplexity through the exact cache.
        exact_bytes: Bytes of the exact cache.
        exact_tasks: Scores of the generated tasks through the exact cache.
        rows: One row per scheme.
    """

    model: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    texts: tuple[str, ...]
    tokens: int
    start: int
    predictions: int
    written: Settings
    dtype: str
    exact_ppl: float
    exact_bytes: int
    exact_tasks: tuple[tasks.Score, ...]
    rows: tuple[Row, ...]

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
    texts: dict[str, str] | None = None,
    tokens: int = 1216,
    written: Settings | None = None,
    items: int = 0,
    dtype: str | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Read texts through every scheme and compare with the exact cache.

    A run that ended early continues if it is called again with the same ``output``.

    Args:
        model: An mlx-lm model with its own caches.
        tokenizer: Its tokenizer.
        names: Names of schemes, see :func:`rotormlx.measure.schemes.scheme`; all are also compared
            with the first.
        model_name: Name of the model for the report.
        command: The command line for the report.
        texts: Texts by name; prose of CPython's documentation if None.
        tokens: Number of tokens to read of each text.
        written: Settings of the continuations; the defaults of :class:`Settings` if None.
        items: Questions of each generated task, see :mod:`rotormlx.measure.haystack`; 0 for none.
        dtype: The dtype to compute in, one of ``scoring.DTYPES``; the model's own if None.
        output: A folder for partial results while the run lasts; a temporary one if None. Each
            text takes 4 bytes per token and vocabulary entry there.
        progress: Shows the progress, if given.
        keep: Called with the results so far, after each scheme.

    Raises:
        ValueError: If a scheme or the dtype is unknown, or a text is too short.
        RuntimeError: If a compared prediction read too few packed tokens.
    """
    schemes = [scheme(name).bound(model) for name in dict.fromkeys(names) if name != EXACT]
    if not schemes:
        raise ValueError("[quality] At least one scheme must be given; add one, such as k4v4.")
    progress = progress or Progress(disable=True)
    written = Settings() if written is None else written
    start = first_packed(schemes)
    ids = {
        name: encoded(tokenizer, name, text, tokens, start)
        for name, text in (texts or {"pydoc_data.topics": default_text()}).items()
    }
    stacks = stacks_for(tokenizer, schemes, items)
    done: list[_Done] = []
    solved: list[tasks.Solved] = []  # the exact cache comes first
    with (
        unfinished.folder(output, "quality") as folder,
        hosts.MLX_LM.in_place(),
        numpy_linear(),
        numpy_attention(),
        scoring.computing_in(model, dtype),
    ):
        try_out(model, next(iter(ids.values())), schemes)
        setting = setting_of(model, written)
        read = [
            Text(
                name,
                own,
                start,
                written,
                folder / unfinished.digest(ids=own, start=start, **setting),
            )
            for name, own in ids.items()
        ]
        place = folder / unfinished.digest(tasks=stacks, **setting)
        unfinished.only(folder, [place.name, *(text.folder.name for text in read)])
        known = [[reading.found_coded(model, text, each) for each in schemes] for text in read]
        missing = sum(found.count(None) + (None in found) for found in known)
        task = progress.add_task("", total=missing * read[0].steps)

        def result() -> Result:
            asked = {"model": model_name, "command": command, "tokens": tokens, "start": start}
            return _result(asked, schemes, tuple(ids), written, done, solved)

        for text, found in zip(read, known, strict=True):
            for _ in _of_text(model, text, schemes, found, progress, task, done):
                # Rows that include a later text need it from every scheme to be comparable.
                if keep is not None and (len(done) == 1 or len(done[-1].coded) == len(schemes)):
                    keep(result())
        if stacks:
            for answers in _solve(model, stacks, schemes, place, progress):
                solved.append(answers)
                if keep is not None and len(solved) > 1:
                    keep(result())
        return result()


def _result(
    asked: dict[str, Any],
    schemes: Sequence[Scheme],
    names: tuple[str, ...],
    written: Settings,
    done: Sequence[_Done],
    solved: Sequence[tasks.Solved],
) -> Result:
    """Return the results so far; ``asked`` holds fields that repeat the arguments of the run."""
    likelihoods = np.concatenate([text.exact.log_likelihoods for text in done])
    return Result(
        **asked,
        date=datetime.now(UTC).date().isoformat(),
        machine=machine(),
        versions=versions(),
        texts=names[: len(done)],
        predictions=len(likelihoods),
        written=written,
        dtype=done[0].exact.dtype,
        exact_ppl=float(np.exp(-likelihoods.mean())),
        exact_bytes=done[-1].exact.cache_bytes,
        exact_tasks=tasks.scores(solved[0], solved[0]) if solved else (),
        rows=_rows(schemes, done, written, solved),
    )


# ---- one text -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """The results for one text: of the exact cache, and of each scheme in order."""

    exact: Exact
    coded: list[Coded]


def _of_text(
    model: Any,
    text: Text,
    schemes: Sequence[Scheme],
    known: Sequence[Coded | None],
    progress: Progress,
    task: TaskID,
    done: list[_Done],
) -> Iterator[None]:
    """Add the results for a text to ``done``, scheme by scheme."""

    def advance(steps: int) -> None:
        progress.advance(task, steps)

    progress.update(task, description=f"{text.name}: {EXACT}")
    exact = reading.exact(model, text, advance, distributions=None in known)
    done.append(_Done(exact, []))
    for chosen, found in zip(schemes, known, strict=True):
        progress.update(task, description=f"{text.name}: {chosen.name}")
        done[-1].coded.append(found or reading.coded(model, text, chosen, exact, advance))
        yield
    reading.drop_distributions(text)


def _solve(
    model: Any,
    stacks: Sequence[Haystack],
    schemes: Sequence[Scheme],
    place: Path,
    progress: Progress,
) -> Iterator[tasks.Solved]:
    """Yield the answers through the exact cache and then through each scheme."""
    questions = sum(len(stack.questions) for stack in stacks)
    task = progress.add_task("", total=(1 + len(schemes)) * questions)
    for chosen in (scheme(EXACT), *schemes):
        progress.update(task, description=f"tasks: {chosen.name}")
        yield tasks.solved(model, stacks, chosen, place, lambda: progress.advance(task))


# ---- all texts ----------------------------------------------------------------------------------


def _rows(
    schemes: Sequence[Scheme],
    texts: Sequence[_Done],
    written: Settings,
    solved: Sequence[tasks.Solved],
) -> tuple[Row, ...]:
    joined = [
        Differences.joined([text.coded[index].differences for text in texts])
        for index in range(len(texts[0].coded))
    ]
    answered = [tasks.scores(solved[0], own) for own in solved[1:]]
    answered += [()] * (len(joined) - len(answered))  # schemes that are not done yet
    return tuple(
        _row(
            chosen.name,
            differences,
            joined[0],
            [text.coded[index] for text in texts],
            written,
            answered[index],
        )
        for index, (chosen, differences) in enumerate(zip(schemes, joined, strict=False))
    )


def _row(
    name: str,
    differences: Differences,
    first: Differences,
    texts: Sequence[Coded],
    written: Settings,
    answered: tuple[tasks.Score, ...],
) -> Row:
    layers = tuple(
        _mean_error([text.layers[i] for text in texts]) for i in range(len(texts[0].layers))
    )
    summary = differences.quality
    median, p99, p999 = intervals.quantile_intervals(differences.kl, (0.5, 0.99, 0.999))
    longest = np.stack([text.differences.kl for text in texts]).mean(0)
    parted = tuple(common for text in texts for common in text.common[1:])
    never = sum(common == written.sampled for common in parted)
    sink, window = texts[-1].exact_tokens
    return Row(
        scheme=name,
        bits_per_value=texts[-1].bits_per_value,
        sink=sink,
        window=window,
        cache_bytes=texts[-1].cache_bytes,
        packed_tokens=texts[-1].packed_tokens,
        ppl=summary.ppl,
        kl=summary.kl_mean,
        kl_interval=intervals.mean_interval(differences.kl),
        kl_median=summary.kl_median,
        kl_median_interval=median,
        kl_p99=summary.kl_p99,
        kl_p99_interval=p99,
        kl_p999=summary.kl_p999,
        kl_p999_interval=p999,
        kl_max=float(differences.kl.max()),
        kl_difference=intervals.mean_interval(differences.kl - first.kl),
        top1=summary.top1,
        top1_interval=intervals.share_interval(differences.same),
        greedy_tokens=float(np.mean([text.common[0] for text in texts])),
        sampled_tokens=parted,
        sampled_median=float(np.median(parted)) if parted else None,
        sampled_interval=intervals.median_interval(parted),
        sampled_never=never / len(parted) if parted else None,
        sampled_never_interval=intervals.wilson(never, len(parted)) if parted else None,
        tasks=answered,
        cosine=float(np.mean([layer.cosine for layer in layers])),
        attention_top1=float(np.mean([layer.top1 for layer in layers])),
        attention_top5=float(np.mean([layer.top5 for layer in layers])),
        layers=layers,
        kl_by_position=tuple(
            float(longest[i : i + CHUNK].mean()) for i in range(0, len(longest), CHUNK)
        ),
        seconds=sum(text.seconds for text in texts),
    )


def _mean_error(errors: Sequence[attention_error.LayerError]) -> attention_error.LayerError:
    """Return the mean of one layer's errors over several texts."""
    means = np.mean([astuple(error)[1:] for error in errors], axis=0)
    return attention_error.LayerError(errors[0].layer, *map(float, means))
