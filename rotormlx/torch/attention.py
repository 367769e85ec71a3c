"""The attention function that transformers calls by the name ``rotormlx``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rotormlx.torch import checks, ops, prefill
from rotormlx.torch.exact import attend_tensors, causality, check_options, former_of
from rotormlx.torch.handle import KVHandle, untraced
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.static_layer import DeviceStep
from rotormlx.torch.torch_ops import AttendCall

NAME = "rotormlx"


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
) -> tuple[Tensor, Tensor | None]:
    """Attend over a compressed layer; pass exact layers to torch's own attention.

    Args:
        module: The attention module.
        query: ``[B, H, L, D]``.
        key: What the cache's ``update`` returned.
        value: The values, likewise.
        attention_mask: ``[B, H or 1, L, S]``, boolean or additive; None for causal.
        dropout: Must be 0 for a compressed layer.
        scaling: Factor of the scores; D^-1/2 if None.
        is_causal: Whether no mask means causal; the module's own setting if None.
        **kwargs: ``s_aux`` holds attention-sink logits; unsupported options are refused.

    Returns:
        The output ``[B, L, H, Dv]``, in the dtype of autocast, or else that of the values, and the
        weights, which only eager attention returns, in training. Asking the output of a compressed
        layer for a gradient raises an error.

    Raises:
        ValueError: If the model asks for something that the operator does not support.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        return attend_tensors(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    is_causal = causality(module, is_causal)
    key = checked(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = kwargs.get("s_aux")
    if isinstance(key.step, DeviceStep):
        with torch.no_grad():
            output = key.step.attend(query.to(value.dtype), attention_mask, scale, logits)
        return _refusing_gradients(output.transpose(1, 2), query, logits, key.step.layer), None
    return _attend(query, key, value.dtype, attention_mask, scale, is_causal, logits), None


def checked(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> KVHandle:
    """Return the keys, if compressed attention supports the call.

    Raises:
        ValueError: If it does not.
    """
    check_options(module, dropout, kwargs)
    if not (isinstance(key, KVHandle) and key.goes_with(value)):
        raise ValueError(
            "[RotorCache] Keys must come with the values of their own layer, but the model mixes "
            "them; use the model without rotormlx."
        )
    shape, asked = key.shape, query.shape
    if asked[-1] != shape[-1] or asked[1] % shape[1]:
        raise ValueError(
            f"[RotorCache] Queries must have the keys' head_dim {shape[-1]} and a multiple of "
            f"their {shape[1]} heads, but have shape {tuple(asked)}; use the model "
            "without rotormlx."
        )
    if mask is None and not is_causal and query.shape[2] > 1 and former_of(module) != "sdpa":
        # Like sdpa, rotormlx gets no mask here. Another function would have got a causal one.
        raise ValueError(
            f"[RotorCache] The model's attention ({type(module).__name__}) is not causal without a "
            "mask, which compressed attention supports only in models that used sdpa before; use "
            "the model without rotormlx."
        )
    return key


@untraced
def _attend(
    query: Tensor,
    key: KVHandle,
    dtype: torch.dtype,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    logits: Tensor | None,
) -> Tensor:
    """Return the output ``[B, L, H, Dv]``; asking it for a gradient raises an error."""
    if not torch.is_grad_enabled():
        return _attend_compressed(query.to(dtype), key, mask, scale, is_causal, logits)
    with torch.no_grad():
        output = _attend_compressed(query.to(dtype), key, mask, scale, is_causal, logits)
    return _refusing_gradients(output, query, logits, key.step.layer)


def _refusing_gradients(
    output: Tensor, query: Tensor, logits: Tensor | None, layer: RotorLayer
) -> Tensor:
    """Return the output; asking it for a gradient raises an error."""
    asked = any(x is not None and x.requires_grad for x in (query, logits))
    if torch.is_grad_enabled() and (asked or layer.requires_grad):
        output = _WithoutGradient.apply(output.requires_grad_())  # type: ignore[no-untyped-call]
    return output


class _WithoutGradient(torch.autograd.Function):
    """The identity forward; an error backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise ValueError(
            "[RotorCache] Gradients need an exact cache, but one was requested through a "
            "compressed cache; train with use_cache=False."
        )


def _attend_compressed(
    query: Tensor,
    key: KVHandle,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    """Return the output ``[B, L, H, Dv]``."""
    padding = None if mask is None else left_padding(mask)
    view = key.step.read(padding)
    causal = padding is not None or (mask is None and is_causal)
    if mask is not None and padding is None:
        mask = of_tokens(mask, view.padding)
    call = AttendCall(
        query,
        view.lengths,
        view.keys,
        view.values,
        key.step.layer.config.sink,
        scale,
        causal,
        None if causal else mask,
        sink_logits,
    )
    if call.mask is not None or sink_logits is not None:
        checks.check_call(call)
    many = query.shape[2] > 1 and prefill.takes(call)
    output = prefill.attend(call, view.counts) if many else ops.attend_fitting(call)
    return output.transpose(1, 2).contiguous()


def left_padding(mask: Tensor) -> tuple[int, ...] | None:
    """Count hidden positions at the start of each row, if a mask is causal and hides nothing else.

    Reads the mask, once for all layers of a step.

    Args:
        mask: ``[B, 1, L, S]``.

    Returns:
        The first position that each row's last query sees (S if it sees none); None for any
        other mask.
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
    """Convert a mask with one column per position to one column per token of each row."""
    if not any(padding) or mask.shape[-1] == 1:
        return mask
    tokens = mask.shape[-1]
    shift = torch.tensor(padding, device=mask.device)[:, None]
    index = (torch.arange(tokens, device=mask.device) + shift).clamp(max=tokens - 1)
    mask = mask.expand(len(padding), -1, -1, -1)
    return mask.gather(3, index[:, None, None, :].expand(-1, *mask.shape[1:3], -1))


def mask_of(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask that sdpa takes, but None for a causal step of a static cache.

    In such a step, lengths on the device hide unused positions. Left padding needs no mask, because
    it never enters the cache.
    """
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    is_step = kwargs.get("q_length") == 1 and not kwargs.get("allow_is_causal_skip", True)
    given = kwargs.get("attention_mask")
    if plain and is_step:
        if given is None:
            return None
        if not torch.compiler.is_dynamo_compiling() and given.ndim == 2:
            seen = given.bool()
            if bool((seen[:, 1:] >= seen[:, :-1]).all()):
                return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_of)
