"""One run of ``rotormlx quality``: a text read through the exact cache and through every scheme."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from scipy.stats import bootstrap

from rotormlx.measure import attention_error, cache_contents, scoring
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.schemes import EXACT, Scheme, scheme
from rotormlx.measure.scoring import CHUNK
from rotormlx.measure.text import default_text
from rotormlx.mlx import backends, hook

# Neighbouring predictions are alike, so the bootstrap draws runs of this many.
RUN = 16
RESAMPLES = 4000
LEVEL = 0.95


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
        kl_median: Median.
        kl_p99: 99th percentile.
        kl_difference: Bootstrap interval at 95 % of the mean KL divergence less that of the first
            scheme, prediction by prediction.
        top1: Share of equal most likely tokens.
        greedy_tokens: Greedy tokens behind the text that equal those of the exact cache, the mean
            over texts.
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
    kl_interval: tuple[float, float]
    kl_median: float
    kl_p99: float
    kl_difference: tuple[float, float]
    top1: float
    greedy_tokens: float
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
        greedy: Greedy tokens tried behind each text.
        dtype: What the model computed in, and its exact tokens were kept in.
        exact_ppl: Perplexity through the exact cache.
        exact_bytes: Bytes of the exact cache.
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
    greedy: int
    dtype: str
    exact_ppl: float
    exact_bytes: int
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Reading:
    """One text through the caches of one scheme."""

    scores: scoring.Scores
    answer: list[int]
    seconds: float
    caches: list[Any]


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    model_name: str,
    command: str,
    texts: dict[str, str] | None = None,
    tokens: int = 1216,
    greedy: int = 64,
    dtype: str | None = None,
    progress: Progress | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Read texts through every scheme and compare with the exact cache.

    Args:
        model: An mlx-lm model with its own caches.
        tokenizer: Its tokenizer.
        names: Schemes, see :func:`rotormlx.measure.schemes.scheme`; the others are compared with
            the first.
        model_name: What the report calls the model.
        command: What the report gives as the command.
        texts: Texts by name; prose of CPython's documentation if None.
        tokens: Tokens of each text to read.
        greedy: Greedy tokens to try behind each text; 0 for none.
        dtype: What the model is to compute in, of ``scoring.DTYPES``; its own if None.
        progress: Shows what is read, if given.
        keep: Takes what is known so far: after each scheme of the first text, and after each text.

    Raises:
        ValueError: If a name is no scheme or dtype, or a text is too short.
        RuntimeError: If what was scored did not come from packed bytes.
    """
    schemes = [scheme(name).bound(model) for name in dict.fromkeys(names) if name != EXACT]
    if not schemes:
        raise ValueError("[quality] At least one scheme must be given; k4v4 is our default.")
    progress = progress or Progress(disable=True)
    texts = texts or {"pydoc_data.topics": default_text()}
    read = {name: _encode(tokenizer, name, text, tokens) for name, text in texts.items()}

    def result(done: Sequence[_Text]) -> Result:
        likelihoods = np.concatenate([text.exact_log_likelihoods for text in done])
        return Result(
            model=model_name,
            command=command,
            date=datetime.now(UTC).date().isoformat(),
            machine=machine(),
            versions=versions(),
            texts=tuple(texts)[: len(done)],
            tokens=tokens,
            start=done[0].start,
            predictions=len(likelihoods),
            greedy=greedy,
            dtype=done[0].dtype,
            exact_ppl=float(np.exp(-likelihoods.mean())),
            exact_bytes=done[-1].exact_bytes,
            rows=_rows(schemes, done),
        )

    read_texts: list[_Text] = []

    def kept(text: _Text) -> None:
        if keep is not None and not read_texts:
            keep(result([text]))

    with hook.in_place(), numpy_linear(), scoring.computing_in(model, dtype):
        for name, ids in read.items():
            read_texts.append(_of_text(model, ids, schemes, greedy, progress, name, kept))
            if keep is not None and len(read) > 1:
                keep(result(read_texts))
    return result(read_texts)


def machine() -> str:
    """The processor, and what MLX computes on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [
                line.partition(":")[2].strip() for line in lines if line.startswith("model name")
            ]
        name = f"{models[0]}, {len(models)} cores" if models else name
    except OSError:  # not Linux
        pass
    return f"{name}, MLX on {mx.default_device()}, backend {backends.backend().name}"


def versions() -> dict[str, str]:
    """Of Python and the packages that a measurement depends on."""
    packages = ("rotormlx", "mlx", "mlx-lm", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval at 95 % of a mean of neighbouring numbers.

    What is drawn are runs of 16 neighbours, since neighbours are alike.
    """
    runs = [part.mean() for part in np.array_split(values, max(2, len(values) // RUN))]
    if np.ptp(runs) == 0:
        return float(runs[0]), float(runs[0])
    result = bootstrap(
        (np.array(runs),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


# ---- one text -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SchemeResult:
    """What one scheme did to one text."""

    differences: scoring.Differences
    common: int
    layers: tuple[attention_error.LayerError, ...]
    bits_per_value: float
    exact_tokens: tuple[int, int]
    cache_bytes: int
    packed_tokens: int
    seconds: float


@dataclass(frozen=True)
class _Text:
    start: int
    dtype: str
    exact_log_likelihoods: NDArray[np.float64]
    exact_bytes: int
    results: list[_SchemeResult]


def _encode(tokenizer: Any, name: str, text: str, tokens: int) -> list[int]:
    # A token of English is 4 or 5 characters; all of a long text would take long to encode.
    ids: list[int] = tokenizer.encode(text[: 8 * tokens])[:tokens]
    if len(ids) < tokens:
        raise ValueError(
            f"[quality] A text of at least {tokens} tokens is required, but {name} has {len(ids)}; "
            "give a longer one or a smaller --tokens."
        )
    return ids


def first_packed(schemes: Sequence[Scheme]) -> int:
    """The first prediction, in whole chunks, for which every scheme reads packed tokens."""
    needs = []
    for chosen in schemes:
        cache = chosen.make(0)
        unpacked = sum(cache_contents.exact_tokens(cache))
        needs.append(-(-(unpacked + cache_contents.block_tokens(cache)) // CHUNK) * CHUNK)
    return max(needs)


def _of_text(
    model: Any,
    ids: list[int],
    schemes: Sequence[Scheme],
    greedy: int,
    progress: Progress,
    name: str,
    keep: Callable[[_Text], None],
) -> _Text:
    start = first_packed(schemes)
    if len(ids) < start + 2:
        raise ValueError(
            f"[quality] At least {start + 2} tokens are required, so that every scheme is read "
            f"from packed bytes, but {len(ids)} were asked for; give more with --tokens."
        )
    task = progress.add_task("", total=(1 + len(schemes)) * (len(ids) - 1 + greedy))

    def read(chosen: Scheme) -> _Reading:
        progress.update(task, description=f"{name}: {chosen.name}")
        return _read(model, ids, chosen.caches(model), greedy, lambda n: progress.advance(task, n))

    with attention_error.record_queries() as latest:
        # The queries of the text's end are wanted, not those of the greedy tokens behind it.
        progress.update(task, description=f"{name}: {EXACT}")
        caches = scheme(EXACT).caches(model)
        scores = scoring.score(
            model, ids, caches, chunk=CHUNK, progress=lambda n: progress.advance(task, n)
        )
        layers = list(attention_error.attended(caches, latest))
        size = cache_contents.used_bytes(caches)
        keys, _ = cache_contents.decoded(
            next(cache for _, cache in cache_contents.compressed(caches))
        )
    answer = scoring.greedy(model, ids[-1], caches, greedy)
    progress.advance(task, greedy)
    exact = _Reading(scores, answer, 0.0, caches)
    rows = np.arange(start, len(exact.scores.targets))
    likelihoods = exact.scores.log_probs[rows, exact.scores.targets[rows]].astype(np.float64)
    text = _Text(start, str(keys.dtype).rpartition(".")[2], likelihoods, size, [])
    for chosen in schemes:
        text.results.append(_measured(chosen, exact, read(chosen), layers, start))
        keep(text)
    return text


def _read(
    model: Any, ids: list[int], caches: list[Any], greedy: int, advance: Callable[[int], None]
) -> _Reading:
    began = time.perf_counter()
    scores = scoring.score(model, ids, caches, chunk=CHUNK, progress=advance)
    seconds = time.perf_counter() - began
    # score() leaves the last token unread.
    answer = scoring.greedy(model, ids[-1], caches, greedy)
    advance(greedy)
    return _Reading(scores, answer, seconds, caches)


def _measured(
    chosen: Scheme,
    exact: _Reading,
    reading: _Reading,
    layers: Sequence[attention_error.Attended],
    start: int,
) -> _SchemeResult:
    scoring.assert_packed(reading.caches, CHUNK)
    least = reading.scores.packed_tokens[start:].min()
    if least < CHUNK:
        raise RuntimeError(
            f"[quality] Every prediction compared must read at least {CHUNK} packed tokens, but "
            f"one through {chosen.name} read {least}; start later."
        )
    return _SchemeResult(
        scoring.differences(exact.scores, reading.scores, start=start),
        scoring.common_start(exact.answer, reading.answer),
        tuple(attention_error.layer_error(layer, chosen.make(layer.layer)) for layer in layers),
        cache_contents.bits_per_value(
            [cache for _, cache in cache_contents.compressed(reading.caches)]
        ),
        cache_contents.exact_tokens(chosen.make(layers[0].layer)),
        cache_contents.used_bytes(reading.caches),
        scoring.packed_of(reading.caches),
        reading.seconds,
    )


# ---- all texts ----------------------------------------------------------------------------------


def _rows(schemes: Sequence[Scheme], texts: Sequence[_Text]) -> tuple[Row, ...]:
    joined = [
        scoring.Differences.joined([text.results[index].differences for text in texts])
        for index in range(len(texts[0].results))
    ]
    return tuple(
        _row(chosen.name, differences, joined[0], [text.results[index] for text in texts])
        for index, (chosen, differences) in enumerate(
            zip(schemes, joined, strict=False)
        )  # not all are done, perhaps
    )


def _row(
    name: str,
    differences: scoring.Differences,
    first: scoring.Differences,
    results: Sequence[_SchemeResult],
) -> Row:
    layers = tuple(
        _mean_error([result.layers[i] for result in results]) for i in range(len(results[0].layers))
    )
    summary = differences.quality
    longest = np.stack([result.differences.kl for result in results]).mean(0)
    sink, window = results[-1].exact_tokens
    return Row(
        scheme=name,
        bits_per_value=results[-1].bits_per_value,
        sink=sink,
        window=window,
        cache_bytes=results[-1].cache_bytes,
        packed_tokens=results[-1].packed_tokens,
        ppl=summary.ppl,
        kl=summary.kl_mean,
        kl_interval=mean_interval(differences.kl),
        kl_median=summary.kl_median,
        kl_p99=summary.kl_p99,
        kl_difference=mean_interval(differences.kl - first.kl),
        top1=summary.top1,
        greedy_tokens=float(np.mean([result.common for result in results])),
        cosine=float(np.mean([layer.cosine for layer in layers])),
        attention_top1=float(np.mean([layer.top1 for layer in layers])),
        attention_top5=float(np.mean([layer.top5 for layer in layers])),
        layers=layers,
        kl_by_position=tuple(
            float(longest[i : i + CHUNK].mean()) for i in range(0, len(longest), CHUNK)
        ),
        seconds=sum(result.seconds for result in results),
    )


def _mean_error(errors: Sequence[attention_error.LayerError]) -> attention_error.LayerError:
    """The mean of one layer's errors over several texts."""
    means = np.mean([astuple(error)[1:] for error in errors], axis=0)
    return attention_error.LayerError(errors[0].layer, *map(float, means))
