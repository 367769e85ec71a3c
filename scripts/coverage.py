"""Which models of the installed mlx-lm rotormlx compresses; writes docs/COVERAGE.md.

    python scripts/coverage.py            # all of them, a few minutes
    python scripts/coverage.py llama gemma3_text    # these only, without writing

Every model type gets a tiny configuration (tests/support/zoo.json) and random weights. The same
tokens go through mlx-lm's own caches and through compressed ones: a prefill, a chunk and single
steps, most of them reading packed bytes. Where experts are chosen by a router, the first token
whose choice differs is noted: the codec's error decides between nearly equal experts there, and
from then on the two runs are of different models.
"""

from __future__ import annotations

import argparse
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
from rotormlx.mlx.probe import brief

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.coverage_table import CONFIG, ROOT, STEPS, Result, begin, judge, refused, table

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "support" / "zoo.json").read_text()
)
SMALLEST_VOCABULARY = 64
# Packages that a module of mlx-lm imports to see whether they are there, and never uses.
_ASKED_FOR = {"olmo": ("hf_olmo",)}


HEAD = """# Models of mlx-lm

Made by `python scripts/coverage.py` from mlx-lm {version}: every model type with a tiny
configuration and random float32 weights, {tokens} tokens in chunks of {chunks}, K8 V8,
no sink and no window, so that nearly everything is read from packed bytes. *error* is the largest
error of a token's logits against the float cache, relative to their norm. Where a router chooses
experts, *other experts* counts the tokens for which the codec's error tipped the choice in some
layer; the error is then of the tokens before the first of them.

Caches counted as *decoded* are read by attention of the model's own: it gets their tokens decoded,
one layer at a time.

{works} of {total} model types work, {nothing_to_compress} keep nothing that could be compressed,
{refused} are refused with the reason, {not_run} were not run.

| model type | | caches compressed | error | other experts | left alone, or why not |
|---|---|---|---|---|---|"""


def model_types() -> list[str]:
    """The modules of mlx-lm that define a model; they may need packages that are missing."""
    names = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        text = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        if text.is_file() and "\nclass Model(" in text.read_text(encoding="utf-8"):
            names.append(module.name)
    return sorted({*names, *CONFIGS})


def build(model_type: str) -> Any:
    """A float32 model with random weights."""
    for asked in _ASKED_FOR.get(model_type, ()):
        sys.modules.setdefault(asked, ModuleType(asked))
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(0)
    arguments = {"model_type": model_type} | json.loads(json.dumps(CONFIGS[model_type]))
    model = module.Model(module.ModelArgs.from_dict(arguments))
    model.update(tree_map(_visible, model.parameters()))
    return model.eval()


def _visible(p: mx.array) -> mx.array:
    """A parameter in float32; random where it starts from zeros, which would hide a layer."""
    if not mx.issubdtype(p.dtype, mx.floating):
        return p
    p = p.astype(mx.float32)
    return p if p.size == 0 or mx.any(p != 0) else 0.1 * mx.random.normal(p.shape)


@contextmanager
def recorded_routing() -> Iterator[list[mx.array]]:
    """Collect every choice of a router: the largest few, or the largest, of a last axis."""
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

    # What a compiled function computes inside cannot be kept.
    mx.disable_compile()
    try:
        with patch.object(mx, "argpartition", few), patch.object(mx, "argmax", largest):
            yield seen
    finally:
        mx.enable_compile()


def read(
    model: Any, caches: list[Any], steps: Sequence[int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits ``[tokens, V]`` and, for each router, its choice for each token."""
    tokens = mx.random.randint(0, SMALLEST_VOCABULARY, (1, sum(steps)), key=mx.random.key(1))
    logits, routes, start = [], [], 0
    for count in steps:
        with recorded_routing() as seen:
            out = model(tokens[:, start : start + count], cache=caches)
        mx.eval(out, seen, [cache.state for cache in caches])
        logits.append(np.array(out[0].astype(mx.float32)))
        routes.append([np.array(r).reshape(count, -1) for r in seen if r.size % count == 0])
        start += count
    by_layer = [np.concatenate(layer) for layer in zip(*routes, strict=True)]
    return np.concatenate(logits), by_layer


def examine(model_type: str, steps: Sequence[int] = STEPS) -> Result:
    """Compare a model's logits with and without compression, over tokens in these chunks."""
    if model_type not in CONFIGS:
        return Result(model_type, "not run", "no configuration in tests/support/zoo.json")
    try:
        model = build(model_type)
        want, want_routes = read(model, make_prompt_cache(model), steps)
    except (Exception, SystemExit) as error:
        return Result(model_type, "not run", f"mlx-lm itself does not run it here: {brief(error)}")
    try:
        result = begin(model_type, rotormlx.apply(model, CONFIG))
    except ValueError as error:
        return refused(model_type, error)
    try:
        caches = make_prompt_cache(model)
        got, routes = read(model, caches, steps)
    except Exception as error:
        result.verdict, result.note = "crashes", brief(error)
        return result
    finally:
        rotormlx.remove(model)
    packed = [c for _, _, c in leaves(caches) if isinstance(c, rotormlx.RotorKVCache)]
    full = sum(steps) // 64 * 64
    if len(packed) != result.compressed or any(c.packed_tokens != full for c in packed):
        result.verdict, result.note = "differs", "a cache that was to be packed is not"
        return result
    judge(result, want, got, want_routes, routes)
    return result


def main() -> int:
    """Examine models; the exit status tells whether one crashes or differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="all by default")
    chosen = parser.parse_args().model_types
    results = []
    for model_type in chosen or model_types():
        results.append(examine(model_type))
        print(results[-1], file=sys.stderr, flush=True)
    text = table(HEAD, results, mlx_lm.__version__)
    if not chosen:
        (ROOT / "docs" / "COVERAGE.md").write_text(text, encoding="utf-8")
    print(text.partition("\n\n| ")[0].splitlines()[-1])
    return int(any(r.verdict in ("crashes", "differs") for r in results))


if __name__ == "__main__":
    sys.exit(main())
