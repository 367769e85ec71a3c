"""What a compressed cache costs in quality, measured on text that is read through the cache.

``mlx_lm.perplexity`` runs a model without a cache, so it cannot see cache compression. Here the
text goes through the cache in chunks, and each chunk attends to what the chunks before it left
there. Quality of a cache is the distance of its next-token distributions from those of the exact
cache (KL divergence) and the share of equal most likely tokens (top-1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, QuantizedKVCache
from numpy.typing import NDArray

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Tokens of one call: their keys are exact, all earlier ones are read as the cache keeps them.
CHUNK = 64
_ROWS = 64  # rows of a vocabulary in float64 at a time: 25 MB for 49,152 tokens


@dataclass(frozen=True)
class Scores:
    """What a model predicted for every token of a text but the first.

    Args:
        log_probs: Log-probabilities of the next token, ``[S - 1, V]``, float32.
        targets: The tokens that came, ``[S - 1]``.
        packed_tokens: How many earlier tokens were read from packed bytes at each prediction, at
            least, ``[S - 1]``; zeros for a cache that packs nothing.
    """

    log_probs: NDArray[np.float32]
    targets: NDArray[np.int64]
    packed_tokens: NDArray[np.int64]

    def first(self, predictions: int) -> Scores:
        """The scores of the first predictions only."""
        return Scores(
            self.log_probs[:predictions],
            self.targets[:predictions],
            self.packed_tokens[:predictions],
        )

    def perplexity(self, start: int = 0) -> float:
        """Perplexity of the tokens from prediction ``start`` on."""
        rows = np.arange(start, len(self.targets))
        return float(np.exp(-self.log_probs[rows, self.targets[rows]].mean(dtype=np.float64)))


@dataclass(frozen=True)
class Quality:
    """Distance of one cache's predictions from the reference's.

    Args:
        kl_mean: Mean KL divergence (reference || other), in nats.
        kl_median: Its median.
        kl_p99: Its 99th percentile.
        kl_p999: Its 99.9th percentile.
        top1: Share of predictions with the same most likely token.
        ppl: Perplexity of the other cache's predictions.
        predictions: How many predictions were compared.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    top1: float
    ppl: float
    predictions: int


def score(
    model: Callable[..., mx.array],
    tokens: Sequence[int],
    caches: Sequence[Any],
    *,
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Read a text through a model's caches and keep every next-token distribution.

    Args:
        model: An mlx-lm model, called as ``model(tokens[1, L], cache=caches)``.
        tokens: The text, S tokens.
        caches: One cache per layer, empty at the start; they hold the text afterwards.
        chunk: Tokens of one call. Keys of earlier chunks are read as the cache keeps them.
        progress: Called with the number of tokens read after each chunk.

    Returns:
        Log-probabilities, targets and the packed tokens behind each prediction. 4 bytes times the
        vocabulary for each token: 100 MB for 512 tokens of a vocabulary of 49,152.

    Raises:
        ValueError: If there is nothing to predict, or the chunk is empty.
    """
    if len(tokens) < 2 or chunk < 1:
        raise ValueError(
            f"[score] At least 2 tokens and a chunk of at least 1 token are required, but "
            f"{len(tokens)} tokens and chunk={chunk} came; give a longer text."
        )
    predictions = len(tokens) - 1
    packed_tokens = np.zeros(predictions, np.int64)
    log_probs = np.empty((0, 0), np.float32)
    for start, rows, packed in chunks(model, tokens, caches, chunk=chunk):
        if start == 0:
            log_probs = np.empty((predictions, rows.shape[-1]), np.float32)
        log_probs[start : start + len(rows)] = rows
        packed_tokens[start : start + len(rows)] = packed
        if progress is not None:
            progress(len(rows))
    return Scores(log_probs, np.asarray(tokens[1:], np.int64), packed_tokens)


def chunks(
    model: Callable[..., mx.array],
    tokens: Sequence[int],
    caches: Sequence[Any],
    *,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, NDArray[np.float32], int]]:
    """The same, chunk by chunk, for texts whose distributions do not fit into memory.

    Yields:
        The first prediction of a chunk, its log-probabilities ``[L, V]``, and the packed tokens
        behind it.
    """
    for start in range(0, len(tokens) - 1, chunk):
        # Counted before the call: what the chunk itself adds may be read exact or packed.
        packed = packed_of(caches)
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = model(mx.array([part]), cache=caches)[0].astype(mx.float32)
        yield start, np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)), packed


@dataclass(frozen=True)
class Differences:
    """Predictions through one cache beside those through the exact cache, one by one.

    Args:
        kl: KL divergence (reference || other) of each next-token distribution, in nats, ``[n]``.
        same: Whether the most likely token is the same, ``[n]``.
        log_likelihoods: Log-probabilities of the tokens that came, through the other cache.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    log_likelihoods: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Differences]) -> Differences:
        """Those of several texts as one."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.same for part in parts]),
            np.concatenate([part.log_likelihoods for part in parts]),
        )

    @property
    def quality(self) -> Quality:
        """Their summary."""
        return Quality(
            kl_mean=float(self.kl.mean()),
            kl_median=float(np.median(self.kl)),
            kl_p99=quantile(self.kl, 0.99),
            kl_p999=quantile(self.kl, 0.999),
            top1=float(self.same.mean()),
            ppl=float(np.exp(-self.log_likelihoods.mean())),
            predictions=len(self.kl),
        )


def differences(reference: Scores, other: Scores, *, start: int = 0) -> Differences:
    """Compare the predictions through one cache with those through another, one by one.

    Args:
        reference: Scores through the exact cache.
        other: Scores of the same text through the cache in question.
        start: First prediction compared; earlier ones read nothing packed and only dilute a mean.

    Raises:
        ValueError: If the scores are of different texts or vocabularies, or nothing is left.
    """
    if reference.log_probs.shape != other.log_probs.shape or not np.array_equal(
        reference.targets, other.targets
    ):
        raise ValueError(
            f"[compare] Both scores must be of the same text and vocabulary, but their shapes are "
            f"{reference.log_probs.shape} and {other.log_probs.shape}, or their tokens differ; "
            "score one text with one model."
        )
    predictions = len(other.targets) - start
    if start < 0 or predictions < 1:
        raise ValueError(
            f"[compare] start must leave a prediction of {len(other.targets)}, but {start} came."
        )
    return Differences.joined(
        [
            differences_of_rows(
                reference.log_probs[row : row + _ROWS],
                other.log_probs[row : row + _ROWS],
                other.targets[row : row + _ROWS],
            )
            for row in range(start, start + predictions, _ROWS)
        ]
    )


def differences_of_rows(
    reference: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.int64]
) -> Differences:
    """Compare log-probabilities ``[n, V]`` of the same predictions; targets ``[n]``."""
    p_log, q_log = reference.astype(np.float64), other.astype(np.float64)
    p = np.exp(p_log)
    # A token of probability 0 adds 0, also where both logarithms are -inf.
    terms = np.subtract(p_log, q_log, out=np.zeros_like(p), where=p > 0)
    return Differences(
        (p * terms).sum(axis=1),
        p_log.argmax(axis=1) == q_log.argmax(axis=1),
        q_log[np.arange(len(targets)), targets],
    )


def quantile(values: NDArray[np.float64], level: float) -> float:
    """The smallest of some values that has a share of ``level`` of them up to it."""
    return float(np.quantile(values, level, method="inverted_cdf"))


def compare(reference: Scores, other: Scores, *, start: int = 0) -> Quality:
    """Measure how far the predictions through one cache are from those through another.

    Arguments and errors are those of :func:`differences`.

    Returns:
        KL divergence, top-1 agreement and perplexity over the predictions from ``start`` on.
    """
    return differences(reference, other, start=start).quality


@contextmanager
def computing_in(model: Any, dtype: str | None) -> Iterator[None]:
    """Let a model compute in another dtype, which its caches then hold too.

    Args:
        model: An mlx-lm model.
        dtype: One of ``DTYPES``, or None for the model's own.

    Raises:
        ValueError: If it is another.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"[quality] A dtype must be one of {', '.join(DTYPES)}, but {dtype!r} was given."
        )
    before = model.parameters()
    if dtype is not None:
        model.set_dtype(DTYPES[dtype])
    try:
        yield
    finally:
        model.update(before)


def packed_of(caches: Sequence[Any]) -> int:
    """The fewest tokens any compressed layer holds as packed bytes; 0 if no layer is compressed."""
    return min(_packed_tokens(caches), default=0)


def assert_packed(caches: Sequence[Any], at_least: int) -> None:
    """Refuse a measurement whose keys and values did not come from packed bytes.

    Args:
        caches: The caches after the measurement.
        at_least: Tokens that every compressed layer must hold as packed bytes.

    Raises:
        RuntimeError: If no layer is compressed, or one holds fewer packed tokens.
    """
    packed = packed_of(caches)
    if packed < max(at_least, 1):
        raise RuntimeError(
            f"[assert_packed] Every compressed layer must hold at least {max(at_least, 1)} tokens "
            f"as packed bytes, but only {packed} are; the measurement would say nothing about "
            "compression: use a longer text, and check which layers are compressed."
        )


def _packed_tokens(caches: Sequence[Any]) -> Iterator[int]:
    for cache in caches:
        if hasattr(cache, "packed_tokens"):
            yield int(cache.packed_tokens)
        elif isinstance(cache, QuantizedKVCache):
            yield cache.offset  # it has codes for every token
        elif isinstance(cache, CacheList):
            yield from _packed_tokens(cache.caches)
