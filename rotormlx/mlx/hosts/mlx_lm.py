"""mlx-lm: language models, from 0.31.3 on.

Besides its attention, these functions get our code:

- ``make_prompt_cache`` ignores ``max_kv_size`` if a model makes its caches itself.
- ``speculative_generate_step`` silently keeps rejected tokens once a cache has reached its limit.
- ``maybe_quantize_kv_cache`` raises in the middle of a prompt if a model also has sliding windows.
- ``save_prompt_cache`` and ``load_prompt_cache``, before 0.32, store only arrays, which would lose
  the other entries of a compressed cache.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.hosts.host import Exchange, Host

# This code runs with the globals of mlx-lm's modules, hence the imports.
# ruff: noqa: PLC0415


def _attention(  # type: ignore[no-untyped-def]
    queries, keys, values, cache, scale, mask, sinks=None
):
    from rotormlx.mlx import hook
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    own = MLX_LM.own("scaled_dot_product_attention")
    return hook.attend(own, queries, keys, values, cache, scale, mask, sinks)


def _make_caches(model, max_kv_size=None):  # type: ignore[no-untyped-def]
    from rotormlx.mlx.hosts import limits
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    return limits.make_caches(MLX_LM.own("make_prompt_cache"), model, max_kv_size)


def _quantize(  # type: ignore[no-untyped-def]
    prompt_cache, quantized_kv_start, kv_group_size, kv_bits
):
    from rotormlx.mlx.hosts import limits
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    own = MLX_LM.own("maybe_quantize_kv_cache")
    limits.quantize(own, prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


def _speculate(*args, **options):  # type: ignore[no-untyped-def]
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    return MLX_LM.speculate(args, options)


def _save(file_name, cache, metadata={}):  # type: ignore[no-untyped-def]  # noqa: B006
    from rotormlx.mlx.hosts import old_files
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    old_files.save(MLX_LM.own("save_prompt_cache"), file_name, cache, metadata)


def _load(file_name, return_metadata=False):  # type: ignore[no-untyped-def]
    from rotormlx.mlx.hosts import old_files
    from rotormlx.mlx.hosts.mlx_lm import MLX_LM

    own = MLX_LM.own("load_prompt_cache")
    return old_files.load(own, MLX_LM.caches, file_name, return_metadata)


_SPECULATION = ("prompt", "model", "draft_model", "prompt_cache", "max_tokens", "num_draft_tokens")


class MlxLm(Host):
    """The host mlx-lm."""

    name = "mlx-lm"
    package = "mlx_lm"
    tested = ("0.31.3", "0.32.2")

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Its attention, and its functions that use caches."""
        cache, generate = "mlx_lm.models.cache", "mlx_lm.generate"
        exchanges = (
            Exchange("mlx_lm.models.base", "scaled_dot_product_attention", _attention),
            Exchange(cache, "make_prompt_cache", _make_caches),
            Exchange(generate, "speculative_generate_step", _speculate, _SPECULATION),
            Exchange(generate, "maybe_quantize_kv_cache", _quantize),
        )
        if not self._files_hold_arrays_only:
            return exchanges
        files = (
            Exchange(cache, "save_prompt_cache", _save),
            Exchange(cache, "load_prompt_cache", _load),
        )
        return exchanges + files

    @property
    def _files_hold_arrays_only(self) -> bool:
        """Whether caches have a ``meta_state`` besides their state, as before 0.32."""
        return hasattr(importlib.import_module("mlx_lm.models.cache").KVCache, "meta_state")

    def speculate(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Generate with a draft model, if every cache can drop tokens until the end.

        Raises:
            ValueError: If a cache would reach its limit.
        """
        from rotormlx.mlx.hosts import limits

        own = self.own("speculative_generate_step")
        call = inspect.signature(own).bind(*args, **options)
        call.apply_defaults()
        # Looked up as the function itself would, because a caller may have replaced it.
        make = own.__globals__.get("make_prompt_cache", self.caches.make_prompt_cache)
        caches, rewinding = limits.speculated(call.arguments, make)
        call.arguments["prompt_cache"] = caches
        return _rewinding(own(*call.args, **call.kwargs), rewinding)


def _rewinding(steps: Iterator[Any], caches: Sequence[RotorKVCache]) -> Iterator[Any]:
    """Yield steps of generation that drop at most as many tokens at once as a window holds."""
    for cache in caches:
        cache.rewinds = True
    try:
        yield from steps
    finally:
        for cache in caches:
            cache.rewinds = False


MLX_LM = MlxLm()
