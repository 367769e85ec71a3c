"""mlx-vlm: models that read images besides text, from 0.7 on.

It imports nothing from mlx-lm: its attention and its caches are its own, of the same design. The
language model inside a model makes the caches.
"""

from __future__ import annotations

from typing import Any

from mlx.nn.layers.base import Module

from rotormlx.mlx.hosts.host import Exchange, Host

# This code runs with the globals of mlx-vlm's modules, hence the imports.
# ruff: noqa: PLC0415


def _attention(  # type: ignore[no-untyped-def]
    queries, keys, values, cache, scale, mask, sinks=None
):
    from rotormlx.mlx import hook
    from rotormlx.mlx.hosts.mlx_vlm import MLX_VLM

    own = MLX_VLM.own("scaled_dot_product_attention")
    return hook.attend(own, queries, keys, values, cache, scale, mask, sinks)


def _make_caches(model, max_kv_size=None):  # type: ignore[no-untyped-def]
    from rotormlx.mlx.hosts import limits
    from rotormlx.mlx.hosts.mlx_vlm import MLX_VLM

    return limits.make_caches(MLX_VLM.own("make_prompt_cache"), model, max_kv_size)


class MlxVlm(Host):
    """The host mlx-vlm."""

    name = "mlx-vlm"
    package = "mlx_vlm"
    tested = ("0.7.2", "0.7.10")

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Its attention, and its function that makes caches."""
        return (
            Exchange("mlx_vlm.models.base", "scaled_dot_product_attention", _attention),
            Exchange("mlx_vlm.models.cache", "make_prompt_cache", _make_caches),
        )

    def target(self, model: Module) -> Module:
        """Return the language model inside a model; the model itself if there is none."""
        inner: Any = getattr(model, "language_model", None)
        return inner if isinstance(inner, Module) else model


MLX_VLM = MlxVlm()
