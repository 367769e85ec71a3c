"""The attention function that transformers calls by the name ``rotormlx``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import ops
from rotormlx.torch.handle import KVHandle
from rotormlx.torch.store import lengths_on
from rotormlx.torch.torch_ops import KVView

NAME = "rotormlx"
# What would change the scores in a way that the operator does not know.
_UNKNOWN = ("softcap", "position_bias")


def register() -> None:
    """Make the name known to transformers: attention, and the masks that it wants (as for sdpa)."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' models over compressed layers; exact ones go to torch's own.

    Args:
        module: The attention module.
        query: ``[B, H, L, D]``.
        key: What the cache's ``update`` returned.
        value: Likewise.
        attention_mask: ``[B, H or 1, L, S]``, boolean or additive; None for causal.
        dropout: Must be 0 for a compressed layer.
        scaling: Factor of the scores; D^-1/2 if None.
        is_causal: Whether no mask means causal; the module's own setting if None.
        **kwargs: ``s_aux`` are attention-sink logits; the rest is for other functions.

    Returns:
        ``[B, L, H, Dv]``, and None for the weights.

    Raises:
        ValueError: If the model asks for something that the operator cannot do.
    """
    sink_logits = kwargs.get("s_aux")
    if isinstance(key, Tensor) and isinstance(value, Tensor) and sink_logits is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    _check(module, dropout, kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query if query.stride(-1) == 1 else query.contiguous()
    if isinstance(key, KVHandle) and isinstance(value, KVHandle) and key.step is value.step:
        output = _attend_compressed(query, key, attention_mask, scale, is_causal, sink_logits)
    elif isinstance(key, Tensor) and isinstance(value, Tensor):
        output = _attend_exact(query, key, value, attention_mask, scale, is_causal, sink_logits)
    else:
        raise ValueError(
            "[RotorCache] Keys must come with the values of their own layer, but the model mixes "
            "them; use the model without rotormlx."
        )
    return output.transpose(1, 2).contiguous(), None


def _attend_compressed(
    query: Tensor,
    key: KVHandle,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    layer = key.step.layer
    padding = None if mask is None else left_padding(mask)
    view = key.step.read(padding)
    causal = padding is not None or (mask is None and is_causal)
    if mask is not None and padding is None:
        mask = of_tokens(mask, view.padding)
    return ops.attend(
        query,
        view.lengths,
        view.keys,
        view.values,
        layer.config,
        layer=layer.layer,
        scale=scale,
        causal=causal,
        mask=None if causal else mask,
        sink_logits=sink_logits,
    )


def _attend_exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention-sink logits over a layer that is left exact; torch's own attention has none."""
    config = RotorConfig()
    keys, values = (
        KVView(codec(config, x.shape[-1], layer=0, role=role), x.contiguous(), None, None)
        for role, x in ((KEY, key), (VALUE, value))
    )
    lengths = lengths_on(key.device, ((0, key.shape[2]),) * len(key))
    causal = mask is None and is_causal
    return ops.attend(
        query,
        lengths,
        keys,
        values,
        config,
        layer=0,
        scale=scale,
        causal=causal,
        mask=mask,
        sink_logits=sink_logits,
    )


def left_padding(mask: Tensor) -> tuple[int, ...] | None:
    """Hidden positions at the start of each row, if a mask is causal and hides nothing else.

    Reads the mask, once for all layers of a step.

    Args:
        mask: ``[B, 1, L, S]``.

    Returns:
        The first position that each row's last query sees, S if it sees nothing; None for a mask
        that is anything else.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    known: tuple[int, ...] | str | None = getattr(mask, "_rotormlx_left_padding", "")
    if not isinstance(known, str):
        return known
    rows = mask[:, 0]
    length, tokens = rows.shape[1:]
    position = torch.arange(tokens, device=mask.device)
    first = torch.where(rows[:, -1], position, tokens).amin(-1)
    seen = position <= torch.arange(length, device=mask.device)[:, None] + tokens - length
    plain = (rows == (seen & (position >= first[:, None, None]))).all()
    *padding, is_plain = torch.cat([first, plain[None].to(first.dtype)]).tolist()
    hidden = tuple(padding) if is_plain else None
    mask._rotormlx_left_padding = hidden  # type: ignore[attr-defined]
    return hidden


def of_tokens(mask: Tensor, padding: Sequence[int]) -> Tensor:
    """A mask whose columns are positions as one whose columns are each row's own tokens."""
    if not any(padding) or mask.shape[-1] == 1:
        return mask
    tokens = mask.shape[-1]
    shift = torch.tensor(padding, device=mask.device)[:, None]
    index = (torch.arange(tokens, device=mask.device) + shift).clamp(max=tokens - 1)
    mask = mask.expand(len(padding), -1, -1, -1)
    return mask.gather(3, index[:, None, None, :].expand(-1, *mask.shape[1:3], -1))


def _check(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    asked += ["dropout"] if dropout else []
    asked += ["output_attentions"] if kwargs.get("output_attentions") else []
    if asked:
        raise ValueError(
            f"[RotorCache] Compressed attention knows no {' and no '.join(asked)}, but "
            f"{type(module).__name__} asks for it; use the model without rotormlx."
        )
