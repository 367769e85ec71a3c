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
    """What came of one scheme.

    Args:
        scheme: Its name.
        bits_per_value: True bits of a compressed value.
        sink: First tokens that are never packed.
        window: Latest tokens that are never packed.
        cache_bytes: Bytes of the cache after the last text, without room for growth.
        packed_tokens: Tokens of it that are packed, in the layer with the fewest.
        ppl: Perplexity of the predictions compared.
        kl: Mean KL divergence from the exact cache, in nats.
        kl_interval: Bootstrap interval of that mean at 95 %.
        kl_median: Median; its interval and those of the percentiles are bootstrap intervals too.
        kl_median_interval: Of the median.
        kl_p99: 99th percentile.
        kl_p99_interval: Of it.
        kl_p999: 99.9th percentile.
        kl_p999_interval: Of it; where it ends at ``kl_max`` it has no upper bound.
        kl_max: Largest.
        kl_difference: Bootstrap interval at 95 % of the mean KL divergence less that of the first
            scheme, prediction by prediction.
        top1: Share of equal most likely tokens.
        top1_interval: Bootstrap interval of it at 95 %.
        greedy_tokens: Greedy tokens behind the text up to the first that differs from the exact
            cache's, the mean over texts.
        sampled_tokens: The same of each sampled continuation, seed by seed, text by text.
        sampled_median: Their median; None if nothing was sampled.
        sampled_interval: Interval of it at 95 %, from ranks; None for fewer than 6.
        sampled_never: Share of them that never differ.
        sampled_never_interval: Wilson interval of it at 95 %.
        tasks: Generated tasks that were solved; empty if none were given.
        cosine: Cosine of attention outputs, the mean over layers.
        attention_top1: Share of queries whose most attended token stays that.
        attention_top5: Share whose most attended token stays among the five most attended.
        layers: The errors of each layer.
        kl_by_position: Mean KL divergence of each run of 64 predictions.
        seconds: How long the texts took.
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
    """All rows of a run, and what was run.

    Args:
        model: The model, as it was named.
        command: The command line that gives this again.
        date: Day of the run.
        machine: Processor and device.
        versions: Of Python and the packages that matter.
        texts: Names of the texts.
        tokens: Tokens of each text that were read.
        start: First prediction compared in each text.
        predictions: How many were compared in all.
        written: What was written behind each text.
        dtype: What the model computed in, and its exact tokens were kept in.
        exact_ppl: Perplexity through the exact cache.
        exact_bytes: Bytes of the exact cache.
        exact_tasks: Generated tasks solved through the exact cache.
        rows: One a scheme.
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

    A run that was ended early goes on where it was if it is called again with the same ``output``.

    Args:
        model: An mlx-lm model with its own caches.
        tokenizer: Its tokenizer.
        names: Schemes, see :func:`rotormlx.measure.schemes.scheme`; the others are compared with
            the first.
        model_name: What the report calls the model.
        command: What the report gives as the command.
        texts: Texts by name; prose of CPython's documentation if None.
        tokens: Tokens of each text to read.
        written: What to write behind each text; as :class:`Settings` says if None.
        items: Questions of each generated task, see :mod:`rotormlx.measure.haystack`; 0 for none.
        dtype: What the model is to compute in, of ``scoring.DTYPES``; its own if None.
        output: A folder in which to keep what is measured until all is; a temporary one if None.
            Each text takes 4 bytes per token and entry of the vocabulary there.
        progress: Shows what is read, if given.
        keep: Takes what is known so far, after each scheme.

    Raises:
        ValueError: If a name is no scheme or dtype, or a text is too short.
        RuntimeError: If what was scored did not come from packed bytes.
    """
    schemes = [scheme(name).bound(model) for name in dict.fromkeys(names) if name != EXACT]
    if not schemes:
        raise ValueError("[quality] At least one scheme must be given; k4v4 is our default.")
    progress = progress or Progress(disable=True)
    written = Settings() if written is None else written
    start = first_packed(schemes)
    ids = {
        name: encoded(tokenizer, name, text, tokens, start)
        for name, text in (texts or {"pydoc_data.topics": default_text()}).items()
    }
    stacks = stacks_for(tokenizer, schemes, items)
    done: list[_Done] = []
    solved: list[tasks.Solved] = []  # of the exact cache first
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
                # What a later text has only in part would tear its rows apart.
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
    """The results so far, with the requested fields."""
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
    """What is known of a text: the exact cache's reading, and that of each scheme in order."""

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
    """Add to ``done`` what is known of a text, scheme by scheme."""

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
    """The answers through the exact cache and then through each scheme."""
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
    answered += [()] * (len(joined) - len(answered))  # not all are done, perhaps
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
    """The mean of one layer's errors over several texts."""
    means = np.mean([astuple(error)[1:] for error in errors], axis=0)
    return attention_error.LayerError(errors[0].layer, *map(float, means))
