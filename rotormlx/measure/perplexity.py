"""Perplexity of text that is read through the cache.

``mlx_lm.perplexity`` runs a model without a cache, so it cannot see what a cache's compression
costs. Here every chunk of a text attends to what the chunks before it left in the cache.
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
    """What makes the caches of a model."""

    def make_prompt_cache(self, model: Any) -> list[Any]:
        """Make caches for one run."""


def replacements(tool: ModuleType, maker: CacheMaker) -> dict[str, Callable[..., Any]]:
    """What ``mlx_lm.perplexity`` runs in place of its own functions."""
    from_hub = tool.load_data

    def load_data(
        tokenizer: Any, data_path: str, num_samples: int, sequence_length: int
    ) -> mx.array:
        """Samples ``[N, sequence_length]`` of a text file, or as mlx-lm loads them."""
        if not Path(data_path).is_file():
            tokens: mx.array = from_hub(tokenizer, data_path, num_samples, sequence_length)
            return tokens
        tokens = tokenizer.encode(Path(data_path).read_text(encoding="utf-8"))
        samples = len(tokens) // sequence_length
        if not samples:
            raise ValueError(
                f"[perplexity] The text must have at least {sequence_length} tokens, but "
                f"{data_path} has {len(tokens)}; lower --sequence-length."
            )
        data = mx.array(tokens[: samples * sequence_length]).reshape(samples, sequence_length)
        return data[:num_samples] if num_samples > 0 else data

    def eval_ppl(model: Any, data: mx.array, batch_size: int = 8) -> tuple[float, float]:
        """Perplexity and its standard error."""
        return through_cache(model, data, maker.make_prompt_cache, batch_size)

    return {"load_data": load_data, "eval_ppl": eval_ppl}


def through_cache(
    model: Any, data: mx.array, make_caches: Callable[[Any], list[Any]], batch_size: int = 8
) -> tuple[float, float]:
    """Perplexity and its standard error.

    Args:
        model: The model.
        data: Tokens ``[N, S]``; each row is a text by itself.
        make_caches: Makes empty caches of the model.
        batch_size: Rows that are read at once.
    """
    losses = []
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        caches = make_caches(model)
        for first in range(0, rows.shape[1] - 1, CHUNK):
            targets = rows[:, first + 1 : first + CHUNK + 1]
            logits = model(rows[:, first : first + targets.shape[1]], cache=caches)
            loss = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="none")
            mx.eval(loss, [cache.state for cache in caches])
            losses.append(loss.flatten())
    every = mx.concatenate(losses)
    value = math.exp(float(every.mean()))
    return value, value * math.sqrt(float(mx.var(every, ddof=1)) / every.size)
