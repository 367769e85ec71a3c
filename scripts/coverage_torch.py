"""Examine the models of transformers, for ``scripts/coverage.py transformers``.

Configurations come from tests/support/torch_zoo.py. In addition to the checks that
scripts/coverage.py makes for every host, ``generate`` must write a few tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers

import rotormlx.torch
from rotormlx.report import brief
from rotormlx.torch.cache import RotorCache
from rotormlx.torch.probe import cache_name, self_attention
from scripts.coverage_table import (
    COLUMNS,
    CONFIG,
    ROOT,
    STEPS,
    Result,
    begin,
    is_close,
    judge,
    refused,
)
from tests.support import torch_zoo

# Enough that generate reads its own tokens from the cache.
NEW_TOKENS = 4

HEAD = (
    """# Models of transformers

This page lists which language models of transformers {version} work with compressed caches.
`python scripts/coverage.py transformers` wrote it on {date}. Each has a tiny configuration and
random float32 weights, and reads {tokens} tokens in chunks of {chunks}. Keys and values have 8
bits, with no sink and no window, so that nearly all tokens are read from packed bytes. Then
`generate` must work with compressed caches and begin with the text of the exact ones. After
`remove`, every model gives the same logits as before `apply`, bit for bit.

- Names without a folder are causal language models. `seq2seq/`, `speech/` and `image/` are the
  types that transformers lists for these tasks; their audio and image inputs are left out or are
  noise.
- *Not run*: transformers itself cannot run the model in this way.
- [Models of mlx-lm](COVERAGE.md) explains the columns.

"""
    + COLUMNS
)


class Transformers:
    """The host transformers and its models."""

    path = ROOT / "docs" / "COVERAGE_TORCH.md"
    head = HEAD
    version = transformers.__version__

    def prepare_process(self) -> None:
        """Set up a process that only examines models."""
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)  # for such small matrices, threads cost more than they save

    def model_types(self) -> list[str]:
        """Return the model types that transformers lists as language models."""
        return torch_zoo.model_types()

    def examine(self, model_type: str, steps: Sequence[int] = STEPS) -> Result:
        """Compare a model's logits with and without compression, over tokens in these chunks."""
        return examine(model_type, steps)


@contextmanager
def recorded_routing() -> Iterator[list[torch.Tensor]]:
    """Collect every router choice: the indices of the largest entries along the last axis."""
    seen: list[torch.Tensor] = []

    def recording(function: Any) -> Any:
        def choose(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
            out = function(x, *rest, **named)
            chosen = getattr(out, "indices", out)
            if isinstance(chosen, torch.Tensor) and not chosen.is_floating_point():
                seen.append(chosen.sort(dim=-1).values if chosen.ndim else chosen)
            return out

        return choose

    with ExitStack() as stack:
        for place in (torch, torch.Tensor):
            for name in ("topk", "argmax", "max"):
                recorded = recording(getattr(place, name))
                stack.enter_context(patch.object(place, name, recorded))
        yield seen


@torch.no_grad()
def read(model: Any, steps: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray], Any]:
    """Return logits ``[tokens, V]``, each router's choice per token, and the final cache."""
    ids = torch_zoo.tokens(sum(steps))
    name, cache = cache_name(model), None
    logits, routes, start = [], [], 0
    for count in steps:
        inputs = torch_zoo.inputs(model, ids[:, start : start + count])
        with recorded_routing() as seen:
            out = model(**inputs, use_cache=True, **{name: cache})
        cache = getattr(out, name, None)
        if cache is None:
            raise ValueError("it returns no cache")
        logits.append(out.logits[0, -count:].float().numpy())
        routes.append([choice for r in seen if (choice := by_token(r, count)) is not None])
        start += count
    return np.concatenate(logits), by_layer(routes), cache


def by_token(chosen: torch.Tensor, count: int) -> np.ndarray | None:
    """Return a router's choice for each token; None for other uses of the same functions."""
    shape = chosen.shape
    if len(shape) > 1 and shape[:-1].numel() == count:
        return chosen.reshape(count, -1).numpy()
    return chosen.reshape(count, 1).numpy() if len(shape) and shape.numel() == count else None


def by_layer(routes: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Return each router's choice for each token; empty if steps used different routers."""
    shapes = {tuple(r.shape[1] for r in step) for step in routes}
    return [np.concatenate(r) for r in zip(*routes, strict=True)] if len(shapes) == 1 else []


def generated(model: Any) -> tuple[np.ndarray, Any]:
    """Return the logits of the first token of ``generate``, ``[1, V]``, and the cache it used."""
    used = []

    def look(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used.append(kwargs.get(cache_name(model)))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    given = torch_zoo.generate_inputs(model, torch_zoo.tokens(STEPS[0]))
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    try:
        out = model.generate(
            **given, **options, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
    finally:
        hook.remove()
    return out.logits[0].float().numpy(), used[-1]


def examine(model_type: str, steps: Sequence[int] = STEPS) -> Result:
    """Compare a model's logits with and without compression, over tokens in these chunks."""
    if reason := torch_zoo.NOT_RUN.get(model_type):
        return Result(model_type, "not run", reason)
    try:
        model = torch_zoo.build(model_type)
    except Exception as error:
        return Result(model_type, "not run", f"transformers does not build it here: {brief(error)}")
    plain, failure = attempt(lambda: (*read(model, steps), *attempt(lambda: generated(model))))
    not_run = Result(model_type, "not run", f"transformers does not run it here: {failure}")
    try:
        result = begin(model_type, rotormlx.torch.apply(model, CONFIG))
    except ValueError as error:
        # A model that fails even without rotormlx does not count as refused.
        if failure and "its trial run on a few tokens fails" in str(error):
            return not_run
        return refused(model_type, error)
    if failure:
        return not_run
    compare(model, result, plain, steps)
    return result


def compare(model: Any, result: Result, plain: tuple[Any, ...], steps: Sequence[int]) -> None:
    """Read and generate with compressed caches, then with exact ones again.

    Args:
        model: Compressed model; exact again afterwards.
        result: Receives the verdict and the errors.
        plain: Logits, routes and cache without compression, the result of ``generated``, and the
            reason if that failed.
        steps: Tokens in each chunk.
    """
    want, want_routes, _, want_generated, no_generation = plain
    try:
        got, routes, cache = read(model, steps)
        caches = [(cache, sum(steps))]
        if no_generation:
            result.left_alone.append(f"generate itself fails: {no_generation}")
        else:
            first, cache = generated(model)
            caches.append((cache, STEPS[0]))
    except Exception as error:
        result.verdict, result.note = "crashes", brief(error)
        return
    finally:
        rotormlx.torch.remove(model)
    judge(result, want, got, want_routes, routes)
    if not all(is_packed(cache, tokens, result) for cache, tokens in caches):
        result.verdict, result.note = "differs", "a cache that must be packed is not"
    if not (no_generation or want_routes or is_close(want_generated[0], first)):
        result.verdict, result.note = "differs", "generate writes a different text"
    if not np.array_equal(read(model, steps)[0], want):
        result.verdict, result.note = "differs", "remove does not restore the model"


def is_packed(cache: Any, tokens: int, result: Result) -> bool:
    """Return whether as many layers as promised hold every whole block packed."""
    cache = self_attention(cache)
    layers = cache.rotor_layers if isinstance(cache, RotorCache) else []
    full = tokens // 64 * 64
    return len(layers) == result.compressed and all(x.packed_tokens >= full for x in layers)


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of a call and, if it fails, a short form of the error instead."""
    try:
        return call(), ""
    except Exception as error:
        return None, brief(error)
