"""Attention over tensors under the name ``rotormlx``: layers that are left exact, and no cache.

Where a gradient may be needed, the model's own attention function is called, so training is as
without rotormlx. Inference uses torch's own attention or, for attention-sink logits, the operator.
Neither holds all scores at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import ops
from rotormlx.torch.store import lengths_on
from rotormlx.torch.torch_ops import KVView

_EAGER = "eager"
# Tensor arguments that are accepted: the operator takes them, or they change no score.
_KNOWN = ("s_aux", "position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
Eager = Callable[..., tuple[Tensor, Tensor | None]]


class Name(str):
    """The name ``rotormlx`` in a model's configuration; remembers the attention it replaces."""

    former: str

    def __new__(cls, name: str, former: str) -> Name:
        """Make the name that replaces ``former``."""
        made = super().__new__(cls, name)
        made.former = former
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        # Configurations are copied and pickled.
        return str(self), self.former


def attend_tensors(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over tensors, with the arguments of ``attention.attention_forward``.

    Raises:
        ValueError: If attention-sink logits must be trained and the model's module has no
            ``eager_attention_forward``.
    """
    logits = kwargs.get("s_aux")
    tensors = (query, key, value, logits)
    trains = module.training or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    )
    causal = causality(module, is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    eager = _eager_of(module) if trains else None
    if eager is not None and (logits is not None or former_of(module) == _EAGER):
        mask = _additive(module, query, key, mask, causal)
        return eager(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)
    if logits is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )
    if trains:
        raise ValueError(
            f"[RotorCache] To train attention-sink logits, the Python module of "
            f"{type(module).__name__} must have eager_attention_forward, but it has none; call "
            "rotormlx.torch.remove(model) first."
        )
    check_options(module, dropout, kwargs)
    output = _attend(query, key, value, mask, scale, causal, logits)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    logits: Tensor,
) -> Tensor:
    """Attend with attention-sink logits, which torch's own attention does not support."""
    config = RotorConfig()
    keys, values = (
        KVView(codec(config, x.shape[-1], layer=0, role=role), x.contiguous(), None, None)
        for role, x in ((KEY, key), (VALUE, value))
    )
    lengths = lengths_on(key.device, ((0, key.shape[2]),) * len(key))
    return ops.attend(
        query if query.stride(-1) == 1 else query.contiguous(),
        lengths,
        keys,
        values,
        config,
        layer=0,
        scale=scale,
        causal=mask is None and causal,
        mask=mask,
        sink_logits=logits,
    ).to(value.dtype)


def causality(module: torch.nn.Module, asked: bool | None) -> bool:
    """Return whether attention is causal: from the argument, or else from the module."""
    return bool(getattr(module, "is_causal", True)) if asked is None else asked


def former_of(module: torch.nn.Module) -> str | None:
    """Return the attention that rotormlx replaced in a module, if its configuration records it."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return getattr(name, "former", None)


def _eager_of(module: torch.nn.Module) -> Eager | None:
    """Return the eager attention function of the Python module that defines a model."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def _additive(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Return an additive mask; hidden positions hold the smallest number of the model's dtype.

    Without a mask, causal attention gets a causal one, in which the last query sees all keys.
    """
    length, tokens = query.shape[2], key.shape[2]
    if mask is None and causal and length > 1:
        ones = torch.ones(1, 1, length, tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril(tokens - length)
    if mask is None or mask.dtype != torch.bool:
        return mask
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    # The dtype of the hidden states; under autocast, that of queries differs.
    dtype = next(floats, query.dtype)
    return torch.where(
        mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min
    )


def check_options(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse options that the operator does not support, because they might change the scores."""
    asked = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _KNOWN]
    if kwargs.get("softcap") is not None:
        asked.append("softcap")
    if dropout:
        asked.append("dropout")
    if kwargs.get("output_attentions"):
        asked.append("output_attentions")
    if asked:
        raise ValueError(
            f"[RotorCache] The model passes {' and '.join(asked)} to its attention "
            f"({type(module).__name__}), which compressed attention does not support; use the "
            "model without rotormlx."
        )
