"""Examine the models of mlx-vlm, for ``scripts/coverage.py mlx-vlm``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_vlm
from mlx_vlm.models.cache import make_prompt_cache

from scripts.coverage_mlx import MlxLm
from scripts.coverage_table import COLUMNS, ROOT
from tests.support import vlm_models

HEAD = (
    """# Models of mlx-vlm

This page lists which language models of mlx-vlm {version} work with compressed caches.
`python scripts/coverage.py mlx-vlm` writes it. It covers every package of `mlx_vlm.models` with a
language model. Each has a tiny configuration and random float32 weights, and reads {tokens} tokens
in chunks of {chunks}. Keys and values have 8 bits, with no sink and no window, so that
nearly all tokens are read from packed bytes. [Models of mlx-lm](COVERAGE.md) explains the columns.

"""
    + COLUMNS
)


class MlxVlm(MlxLm):
    """The host mlx-vlm and its models; tokens go to the language model, as in generation."""

    path = ROOT / "docs" / "COVERAGE_VLM.md"
    head = HEAD
    version = mlx_vlm.__version__
    name = "mlx-vlm"

    def model_types(self) -> list[str]:
        """Return the packages of mlx-vlm that contain a language model."""
        return sorted({*vlm_models.model_types(), *vlm_models.CONFIGS})

    def why_not_run(self, model_type: str) -> str:
        """Return why a model type cannot be built; empty if it can."""
        if reason := vlm_models.NOT_RUN.get(model_type):
            return reason
        known = model_type in vlm_models.CONFIGS
        return "" if known else "no configuration in tests/support/vlm_zoo.json"

    def build(self, model_type: str) -> Any:
        """Return a float32 model with random weights."""
        return vlm_models.build(model_type)

    def caches(self, model: Any) -> list[Any]:
        """Return new caches for one sequence, as the host makes them."""
        return make_prompt_cache(model.language_model)

    def forget(self, model: Any) -> None:
        """Remove the positions of an earlier prompt from a model."""
        vlm_models.forget(model)

    def begin_sequence(self, model: Any, tokens: mx.array) -> None:
        """Give a model the positions of a new sequence ``[1, L]``, if it needs them."""
        vlm_models.begin_sequence(model, tokens)

    def logits(self, model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
        """Return the logits ``[1, L, V]`` of tokens ``[1, L]``."""
        return vlm_models.logits(model, tokens, caches)
