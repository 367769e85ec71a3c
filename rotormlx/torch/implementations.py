"""Reads and sets the attention function of the parts of a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from rotormlx.torch.exact import Name

# Configurations of a model's parts, each with the name of its attention function.
Implementations = list[tuple[Any, str | None]]
# The attribute of a configuration that holds the name. Its property _attn_implementation also sets
# the parts inside.
_NAME = "_attn_implementation_internal"


def attention_of(config: Any) -> str | None:
    """Return the name of the attention function of a model's text part."""
    name = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
    return None if name is None else str(name)


def takes_cache(part: Any, cache_name: str) -> bool:
    """Return whether a module's ``forward`` takes a cache of this name."""
    return cache_name in inspect.signature(type(part).forward).parameters


def set_attention(model: PreTrainedModel, name: str, cache_name: str) -> Implementations:
    """Set the attention function of those parts of a model that use its cache.

    Other parts, such as vision towers, keep theirs.

    Args:
        model: The model.
        name: A name that is registered with transformers.
        cache_name: Name of the cache parameter of ``forward``.

    Returns:
        The former attention functions, for :func:`restore`.

    Raises:
        ValueError: If the model does not take the attention function; it is unchanged then.
    """
    former = _implementations(model)
    try:
        model.set_attn_implementation(name)
        is_set = attention_of(model.config) == name
    except ValueError:
        is_set = False
    restore(former)
    if not is_set:
        raise ValueError(
            f"[apply] {type(model).__name__} does not support set_attn_implementation, which "
            "compressed attention needs; use the model without rotormlx."
        )
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    of_text = [part.config for part in parts if takes_cache(part, cache_name)]
    of_text.append(model.config.get_text_config(decoder=True))
    for config, own in former:
        if any(config is known for known in of_text):
            setattr(config, _NAME, Name(name, str(own)))
    return former


def restore(former: Implementations) -> None:
    """Give every part its attention function back."""
    for config, name in former:
        setattr(config, _NAME, name)


@contextmanager
def another_attention(model: PreTrainedModel, name: str, cache_name: str) -> Iterator[None]:
    """Set another attention function for the duration of a block."""
    former = set_attention(model, name, cache_name)
    try:
        yield
    finally:
        restore(former)


def _implementations(model: PreTrainedModel) -> Implementations:
    found: Implementations = []

    def keep(config: Any) -> None:
        if any(config is known for known, _ in found):
            return
        found.append((config, getattr(config, _NAME)))
        for name in config.sub_configs:
            if (part := getattr(config, name, None)) is not None:
                keep(part)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            keep(module.config)
    return found
