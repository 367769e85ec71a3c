"""Examine the models of mlx-lm, for ``scripts/coverage.py mlx-lm``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx_lm
import mlx_lm.models
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

import rotormlx
from rotormlx.mlx.host_caches import leaves
from rotormlx.report import brief
from scripts.coverage_table import COLUMNS, CONFIG, ROOT, STEPS, Result, begin, judge, refused
from tests.support.models import visible

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "support" / "zoo.json").read_text()
)
SMALLEST_VOCABULARY = 64
# Packages that a module of mlx-lm only imports to check that they are installed.
_ASKED_FOR = {"olmo": ("hf_olmo",)}

HEAD = (
    """# Models of mlx-lm

This page lists which model types of mlx-lm {version} work with compressed caches.
`python scripts/coverage.py mlx-lm` writes it. Each model has a tiny configuration and random
float32 weights, and reads {tokens} tokens in chunks of {chunks}. Keys and values have 8 bits,
with no sink and no window, so that nearly all tokens are read from packed bytes. After `remove`,
every model gives the same logits as before `apply`, bit for bit.

- **caches compressed**: how many caches are compressed. *latents* are caches of multi-head latent
  attention ([MLA](MLA.md)). *decoded* caches belong to models with their own attention code;
  rotormlx decodes the tokens for it, one layer at a time.
- **error**: the largest error of a token's logits against the float cache, relative to the norm of
  the logits.
- **other experts**: for models with a router, the number of tokens for which it chose other experts
  because of the codec's error. The error then covers only the tokens before the first of these.
- **left alone, or why not**: the caches that stay exact, with the reason; or the reason why the
  model is refused or was not run.

"""
    + COLUMNS
)


class MlxLm:
    """The host mlx-lm and its models."""

    path = ROOT / "docs" / "COVERAGE.md"
    head = HEAD
    version = mlx_lm.__version__
    name = "mlx-lm"

    def prepare_process(self) -> None:
        """Do nothing; a process that examines models of mlx-lm needs no setup."""

    def model_types(self) -> list[str]:
        """Return the modules of mlx-lm that define a model; some need packages that are missing."""
        names = []
        for module in pkgutil.iter_modules(mlx_lm.models.__path__):
            text = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
            if text.is_file() and "\nclass Model(" in text.read_text(encoding="utf-8"):
                names.append(module.name)
        return sorted({*names, *CONFIGS})

    def why_not_run(self, model_type: str) -> str:
        """Return why a model type cannot be built; empty if it can."""
        return "" if model_type in CONFIGS else "no configuration in tests/support/zoo.json"

    def build(self, model_type: str) -> Any:
        """Return a float32 model with random weights."""
        for asked in _ASKED_FOR.get(model_type, ()):
            sys.modules.setdefault(asked, ModuleType(asked))
        module = importlib.import_module(f"mlx_lm.models.{model_type}")
        mx.random.seed(0)
        arguments = {"model_type": model_type} | json.loads(json.dumps(CONFIGS[model_type]))
        model = module.Model(module.ModelArgs.from_dict(arguments))
        model.update(tree_map(visible, model.parameters()))
        return model.eval()

    def caches(self, model: Any) -> list[Any]:
        """Return new caches for one sequence, as the host makes them."""
        return make_prompt_cache(model)

    def forget(self, model: Any) -> None:
        """Do nothing; models of mlx-lm keep no state of a prompt."""

    def begin_sequence(self, model: Any, tokens: mx.array) -> None:
        """Do nothing; models of mlx-lm need no preparation for a sequence ``[1, L]``."""

    def logits(self, model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
        """Return the logits ``[1, L, V]`` of tokens ``[1, L]``."""
        return model(tokens, cache=caches)

    def examine(self, model_type: str, steps: Sequence[int] = STEPS) -> Result:
        """Compare a model's logits with and without compression, over tokens in these chunks."""
        if reason := self.why_not_run(model_type):
            return Result(model_type, "not run", reason)
        try:
            model = self.build(model_type)
            want, want_routes = self.read(model, self.caches(model), steps)
        except (Exception, SystemExit) as error:
            reason = f"{self.name} itself does not run it here: {brief(error)}"
            return Result(model_type, "not run", reason)
        self.forget(model)
        try:
            result = begin(model_type, rotormlx.apply(model, CONFIG))
        except ValueError as error:
            return refused(model_type, error)
        try:
            caches = self.caches(model)
            got, routes = self.read(model, caches, steps)
        except Exception as error:
            result.verdict, result.note = "crashes", brief(error)
            return result
        finally:
            rotormlx.remove(model)
        judge(result, want, got, want_routes, routes)
        packed = [c for _, _, c in leaves(caches) if isinstance(c, rotormlx.RotorKVCache)]
        full = sum(steps) // 64 * 64
        if len(packed) != result.compressed or any(c.packed_tokens != full for c in packed):
            result.verdict, result.note = "differs", "a cache that must be packed is not"
        again, _ = self.read(model, self.caches(model), steps)
        if not np.array_equal(again, want, equal_nan=True):
            result.verdict, result.note = "differs", "remove does not restore the model"
        return result

    def read(
        self, model: Any, caches: list[Any], steps: Sequence[int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return logits ``[tokens, V]`` and, for each router, its choice for each token."""
        tokens = mx.random.randint(0, SMALLEST_VOCABULARY, (1, sum(steps)), key=mx.random.key(1))
        logits, routes, start = [], [], 0
        self.begin_sequence(model, tokens)
        for count in steps:
            with recorded_routing() as seen:
                out = self.logits(model, tokens[:, start : start + count], caches)
            mx.eval(out, seen, [cache.state for cache in caches])
            logits.append(np.array(out[0].astype(mx.float32)))
            routes.append([np.array(r).reshape(count, -1) for r in seen if r.size % count == 0])
            start += count
        return np.concatenate(logits), by_layer(routes)


def by_layer(routes: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Return each router's choice for each token, ``[tokens, experts]``.

    Args:
        routes: For each step, the recorded choices in order, ``[step, experts]``. Other uses of the
            same functions have a different width in another step, and are left out.
    """
    if len({len(step) for step in routes}) > 1:
        return []
    layers = zip(*routes, strict=True)
    return [np.concatenate(x) for x in layers if len({choice.shape[1] for choice in x}) == 1]


@contextmanager
def recorded_routing() -> Iterator[list[mx.array]]:
    """Collect every router choice: the indices of the largest entries along the last axis."""
    seen: list[mx.array] = []
    argpartition, argmax = mx.argpartition, mx.argmax

    def few(a: mx.array, kth: int, axis: int = -1, **rest: Any) -> mx.array:
        order = argpartition(a, kth, axis, **rest)
        if axis in (-1, a.ndim - 1):
            chosen = order[..., : kth + 1] if kth >= 0 else order[..., kth:]
            seen.append(mx.sort(chosen, axis=-1))
        return order

    def largest(a: mx.array, axis: int | None = None, **rest: Any) -> mx.array:
        chosen = argmax(a, axis, **rest)
        if axis in (-1, a.ndim - 1):
            seen.append(chosen)
        return chosen

    # Arrays inside a compiled function cannot be kept.
    mx.disable_compile()
    try:
        with patch.object(mx, "argpartition", few), patch.object(mx, "argmax", largest):
            yield seen
    finally:
        mx.enable_compile()
