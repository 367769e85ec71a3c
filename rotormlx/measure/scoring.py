"""The quality of a compressed cache, measured on text that is read through the cache.

``mlx_lm.perplexity`` runs a model without a cache, so it cannot measure cache compression. Here the
text is read through the cache in chunks, and each chunk attends to the tokens of earlier chunks in
the cache. Quality is the distance of the next-token distributions from those of the exact cache (KL
divergence), and the share of equal most likely tokens (top-1).
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
# Tokens per call. Their keys are exact; all earlier ones are read as the cache keeps them.
CHUNK = 64
_ROWS = 64  # rows of log-probabilities in float64 at a time: 25 MB for 49,152 tokens


@dataclass(frozen=True)
class Scores:
    """The predictions of a model for every token of a text but the first.

    Args:
        log_probs: Log-probabilities of the next token, ``[S - 1, V]``, float32.
        targets: The actual next tokens, ``[S - 1]``.
        packed_tokens: Minimum number of earlier tokens that each prediction read from packed
            bytes, ``[S - 1]``; zeros for a cache that packs nothing.
    """

    log_probs: NDArray[np.float32]
    targets: NDArray[np.int64]
    packed_tokens: NDArray[np.int64]

    def first(self, predictions: int) -> Scores:
        """Return the scores of the first predictions only."""
        return Scores(
            self.log_probs[:predictions],
            self.targets[:predictions],
            self.packed_tokens[:predictions],
        )

    def perplexity(self, start: int = 0) -> float:
        """Return the perplexity of the predictions from ``start`` on."""
        rows = np.arange(start, len(self.targets))
        return float(np.exp(-self.log_probs[rows, self.targets[rows]].mean(dtype=np.float64)))


@dataclass(frozen=True)
class Quality:
    """The distance of one cache's predictions from the reference's.

    Args:
        kl_mean: Mean KL divergence (reference || other), in nats.
        kl_median: Median of the KL divergence.
        kl_p99: 99th percentile of the KL divergence.
        kl_p999: 99.9th percentile of the KL divergence.
        top1: Share of predictions with the same most likely token.
        ppl: Perplexity of the other cache's predictions.
        predictions: Number of compared predictions.
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
        chunk: Tokens per call. Keys of earlier chunks are read as the cache keeps them.
        progress: Called after each chunk with the number of tokens read.

    Returns:
        Log-probabilities, targets, and the number of packed tokens that each prediction read. They
        take 4 bytes per token and vocabulary entry: 100 MB for 512 tokens and a vocabulary of
        49,152.

    Raises:
        ValueError: If there is nothing to predict, or the chunk is empty.
    """
    if len(tokens) < 2 or chunk < 1:
        raise ValueError(
            f"[score] At least 2 tokens and a chunk of at least 1 token are required, but "
            f"{len(tokens)} tokens and chunk={chunk} were given; give a longer text."
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
    """Read a text as :func:`score` does, for texts whose distributions do not fit into memory.

    Yields:
        For each chunk: its first prediction, its log-probabilities ``[L, V]``, and the number of
        packed tokens that it read.
    """
    for start in range(0, len(tokens) - 1, chunk):
        # Counted before the call, because the chunk's own tokens may be read exact or packed.
        packed = packed_of(caches)
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = model(mx.array([part]), cache=caches)[0].astype(mx.float32)
        yield start, np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)), packed


@dataclass(frozen=True)
class Differences:
    """The predictions through one cache compared one by one with those through the exact cache.

    Args:
        kl: KL divergence (reference || other) of each next-token distribution, in nats, ``[n]``.
        same: Whether the most likely token is the same, ``[n]``.
        log_likelihoods: Log-probabilities of the actual next tokens through the other cache,
            ``[n]``.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    log_likelihoods: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Differences]) -> Differences:
        """Return the differences of several texts as one object."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.same for part in parts]),
            np.concatenate([part.log_likelihoods for part in parts]),
        )

    @property
    def quality(self) -> Quality:
        """Summary of the differences."""
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
        other: Scores of the same text through the cache to compare.
        start: First prediction to compare. Predictions that read no packed tokens would only
            dilute the mean.

    Raises:
        ValueError: If the texts or vocabularies differ, or no prediction is left to compare.
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
            f"[compare] start must be from 0 to {len(other.targets) - 1}, but {start} was given."
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
    """Compare log-probabilities ``[n, V]`` of the same predictions, with targets ``[n]``."""
    p_log, q_log = reference.astype(np.float64), other.astype(np.float64)
    p = np.exp(p_log)
    # A token of probability 0 adds 0, even if both logarithms are -inf.
    terms = np.subtract(p_log, q_log, out=np.zeros_like(p), where=p > 0)
    return Differences(
        (p * terms).sum(axis=1),
        p_log.argmax(axis=1) == q_log.argmax(axis=1),
        q_log[np.arange(len(targets)), targets],
    )


def quantile(values: NDArray[np.float64], level: float) -> float:
    """Return the smallest value that at least a share ``level`` of the values do not exceed."""
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
    """Let a model compute in another dtype; its caches then hold that dtype too.

    Args:
        model: An mlx-lm model.
        dtype: One of ``DTYPES``, or None for the model's own.

    Raises:
        ValueError: If the dtype is not one of these.
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
    """Return the smallest number of packed tokens in a compressed layer; 0 without such a layer."""
    return min(_packed_tokens(caches), default=0)


def assert_packed(caches: Sequence[Any], at_least: int) -> None:
    """Refuse a measurement that did not read enough packed tokens.

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
            f"as packed bytes, but only {packed} are packed, so compression would not be measured; "
            "use a longer text, and check which layers are compressed."
        )


def _packed_tokens(caches: Sequence[Any]) -> Iterator[int]:
    for cache in caches:
        if hasattr(cache, "packed_tokens"):
            yield int(cache.packed_tokens)
        elif isinstance(cache, QuantizedKVCache):
            yield cache.offset  # every token has codes
        elif isinstance(cache, CacheList):
            yield from _packed_tokens(cache.caches)
