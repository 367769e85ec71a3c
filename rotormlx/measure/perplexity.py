"""Perplexity of text that is read through the cache.

``mlx_lm.perplexity`` runs a model without a cache, so it cannot measure the loss from a compressed
cache. Here every chunk of a text attends to the tokens of earlier chunks in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from rotormlx.measure.scoring import CHUNK


class CacheMaker(Protocol):
    """An object that makes the caches of a model."""

    def make_prompt_cache(self, model: Any) -> list[Any]:
        """Make caches for one run."""


def replacements(
    tool: ModuleType, maker: CacheMaker, tell: Callable[[str], None]
) -> dict[str, Callable[..., Any]]:
    """Return the functions that replace those of ``mlx_lm.perplexity``, by name.

    Args:
        tool: ``mlx_lm.perplexity``.
        maker: Makes the caches.
        tell: Called with the results so far, as text, when the user interrupts.
    """
    from_hub = tool.load_data

    def load_data(
        tokenizer: Any, data_path: str, num_samples: int, sequence_length: int
    ) -> mx.array:
        """Load samples ``[N, sequence_length]`` from a text file, or as mlx-lm loads them."""
        if not Path(data_path).is_file():
            return _from_hub(from_hub, tokenizer, data_path, num_samples, sequence_length)
        try:
            tokens = tokenizer.encode(Path(data_path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"[perplexity] The text must be UTF-8, but reading {data_path} failed: {error}; "
                "convert it."
            ) from error
        samples = len(tokens) // sequence_length
        if not samples:
            raise ValueError(
                f"[perplexity] The text must have at least {sequence_length} tokens, but "
                f"{data_path} has {len(tokens)}; lower --sequence-length."
            )
        data = mx.array(tokens[: samples * sequence_length]).reshape(samples, sequence_length)
        return data[:num_samples] if num_samples > 0 else data

    def eval_ppl(model: Any, data: mx.array, batch_size: int = 8) -> tuple[float, float]:
        """Return the perplexity and its standard error."""
        return through_cache(model, data, maker.make_prompt_cache, batch_size, tell)

    return {"load_data": load_data, "eval_ppl": eval_ppl}


def _from_hub(from_hub: Callable[..., mx.array], tokenizer: Any, path: str, *sizes: int) -> Any:
    try:
        return from_hub(tokenizer, path, *sizes)
    except Exception as error:  # data sets and their servers can raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"[perplexity] {path} must be a text file or a data set that mlx-lm can load, but "
            f"loading failed: {lines[0].rstrip('.')}; check the name."
        ) from error


def through_cache(
    model: Any,
    data: mx.array,
    make_caches: Callable[[Any], list[Any]],
    batch_size: int = 8,
    tell: Callable[[str], None] | None = None,
) -> tuple[float, float]:
    """Return the perplexity and its standard error.

    Args:
        model: The model.
        data: Tokens ``[N, S]``; each row is a separate text.
        make_caches: Makes empty caches of the model.
        batch_size: Number of rows read at once.
        tell: Called with the perplexity so far, as text, when the user interrupts.
    """
    losses: list[mx.array] = []
    done = 0
    try:
        for start in range(0, len(data), batch_size):
            losses += _losses(model, data[start : start + batch_size], make_caches(model))
            done = min(start + batch_size, len(data))
    except KeyboardInterrupt:
        if done and tell is not None:
            value, error = _mean(losses)
            tell(f"perplexity {value:.3f} ± {error:.3f} over {done} of {len(data)} samples")
        raise
    return _mean(losses)


def _losses(model: Any, rows: mx.array, caches: list[Any]) -> list[mx.array]:
    losses = []
    for first in range(0, rows.shape[1] - 1, CHUNK):
        targets = rows[:, first + 1 : first + CHUNK + 1]
        logits = model(rows[:, first : first + targets.shape[1]], cache=caches)
        loss = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="none")
        mx.eval(loss, [cache.state for cache in caches])
        losses.append(loss.flatten())
    return losses


def _mean(losses: list[mx.array]) -> tuple[float, float]:
    every = mx.concatenate(losses)
    value = math.exp(float(every.mean()))
    if every.size < 2:  # one prediction has no spread
        return value, math.nan
    return value, value * math.sqrt(float(mx.var(every, ddof=1)) / every.size)
