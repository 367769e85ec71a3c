"""Checks of the operators' arguments: shapes, dtypes, strides and devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rotormlx.codec.format import BLOCK, ROLES, VALUE, Codec, Packed
from rotormlx.torch.dtypes import FLOATS
from rotormlx.torch.torch_ops import AttendCall


def require_vectors(where: str, **tensors: Tensor) -> None:
    """Require a floating tensor ``[B, heads, tokens, head_dim]``; errors give its name."""
    for key, x in tensors.items():
        name = key.replace("_", " ")
        if x.ndim != 4:
            raise ValueError(
                f"[{where}] The {name} must have 4 dimensions (batch, heads, tokens, head_dim), "
                f"but the shape is {tuple(x.shape)}."
            )
        require_float(where, f"The {name}", x.dtype)
        _require_contiguous(where, f"the {name}", x)


def require_no_gradient(where: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that require a gradient, because the operators have no derivative."""
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"[{where}] Tensors must need no gradient, because this operator has no "
                f"derivative, but {name} requires one; call detach(), or run under "
                "torch.no_grad()."
            )


def check_rows(x: Tensor, codec: Codec) -> None:
    """Require a number of rows that fills whole blocks."""
    if x.shape[2] % BLOCK:
        raise ValueError(
            f"[encode] Rows must have shape [B, K, S, {codec.head_dim}] with S a multiple "
            f"of {BLOCK}, but the {codec.role}s have shape {tuple(x.shape)}."
        )


def check_first_block(x: Tensor, role: str) -> None:
    """Require a first block of at least one batch row."""
    require_vectors("prefill_scale", **{f"{role}s": x})
    if x.shape[2] != BLOCK or not len(x):
        raise ValueError(
            f"[prefill_scale] A first block must have shape [B, K, {BLOCK}, D] with B at least 1, "
            f"but the {role}s have shape {tuple(x.shape)}."
        )


def check_packed(
    where: str, like: Tensor, codec: Codec, packed: Packed, channel_scale: Tensor | None
) -> None:
    """Require packed parts with the shape, dtype, stride and device of the codec.

    Args:
        where: Name of the operator, for messages.
        like: The exact vectors ``[B, K, S, D]`` that the parts belong to. They give B, K, the
            device and, for encoding, the number of blocks. For decoding, the words.
        codec: Codec of the parts: role, bits and rotation.
        packed: int32 words ``[B, K, N, rows, lanes]``, float16 scales ``[B, K, N, 64]`` and float16
            centres ``[B, K, N, D]``; each may be None.
        channel_scale: float32 ``[K, D]`` or ``[B, K, D]``, or None.
    """
    role, head_dim = codec.role, codec.head_dim
    words, scales, centres = packed
    front = (*like.shape[:2], words.shape[2] if words is not None and words.ndim > 2 else 0)
    if where == "encode":
        front = (*front[:2], like.shape[2] // BLOCK)
    if words is not None:
        _require(where, f"{role} words", words, (*front, *codec.words_shape), torch.int32)
    if scales is not None:
        _require(where, f"{role} scales", scales, (*front, BLOCK), torch.float16)
    if centres is not None and role == VALUE:
        raise ValueError(
            f"[{where}] Only keys have centres, but values came with centres; leave them out."
        )
    if centres is not None:
        _require(where, "key centres", centres, (*front, head_dim), torch.float16)
    if channel_scale is not None:
        name = f"{role} channel scale"
        by_row = front[:1] if channel_scale.ndim == 3 else ()
        _require(where, name, channel_scale, (*by_row, front[1], head_dim), torch.float32)
    rotation, has_heads = codec.rotation, words is not None or where == "encode"
    if rotation.is_per_head and has_heads and len(rotation.matrix) != front[1]:
        raise ValueError(
            f"[{where}] A calibrated rotation must have one matrix per KV head, but the {role}s "
            f"have {front[1]} heads and it has {len(rotation.matrix)}; use this layer's."
        )
    parts = {"words": words, "scales": scales, "centres": centres, "channel scale": channel_scale}
    _require_device(where, like, {f"the {role} {name}": part for name, part in parts.items()})


def check_path(x: Tensor, codec: Codec, start: int, state: Tensor | None) -> None:
    """Refuse a start outside of a block, or a state that does not fit its rows."""
    if not 0 <= start < BLOCK:
        raise ValueError(
            f"[encode] start must be a number of tokens from 0 to {BLOCK - 1}, but it is {start}."
        )
    if state is None:
        return
    if not codec.has_state:
        raise ValueError(
            "[encode] Only values of 2 or 3 bits continue from a state, but one was given for "
            f"{codec.role}s of {codec.bits} bits; leave it out."
        )
    shape = (*x.shape[:2], x.shape[2] // BLOCK, codec.head_dim)
    _require("encode", "state", state, shape, torch.int32)
    _require_device("encode", x, {"the state": state})


def check_call(call: AttendCall) -> None:
    """Refuse a call of attention whose parts do not fit together."""
    _check_query(call.query, call.lengths, call.keys.exact, call.values.exact)
    _check_blocks(call)
    _check_mask(call.query, call.mask, call.causal)
    heads, sink_logits = call.query.shape[1], call.sink_logits
    if sink_logits is None:
        return
    if sink_logits.shape != (heads,):
        raise ValueError(
            f"[attend] Attention-sink logits must have shape ({heads},), one per query "
            f"head, but they have shape {tuple(sink_logits.shape)}."
        )
    require_float("attend", "Attention-sink logits", sink_logits.dtype)
    _require_device("attend", call.query, {"the attention-sink logits": sink_logits})


def check_step(new: tuple[Tensor, Tensor], counter: Tensor, call: AttendCall, window: int) -> None:
    """Refuse new tokens that do not fit the buffers of a call, or buffers that are too small."""
    for role, x, view in zip(ROLES, new, (call.keys, call.values), strict=True):
        batch, heads, capacity, head_dim = view.exact.shape
        length = call.query.shape[2]
        if tuple(x.shape) != (batch, heads, length, head_dim) or not 0 < length <= BLOCK:
            raise ValueError(
                f"[step] New {role}s must have shape [{batch}, {heads}, L, {head_dim}], with the "
                f"queries' L of {length}, from 1 to {BLOCK}, but they have shape "
                f"{tuple(x.shape)}."
            )
        least = call.sink + window + BLOCK - 1 + length
        if capacity < least or view.packed is None:
            raise ValueError(
                f"[step] The {role}s must have buffers for blocks and for at least {least} exact "
                f"tokens (sink, window, {BLOCK - 1} and new ones), but there is room for "
                f"{capacity} and blocks are {'missing' if view.packed is None else 'present'}."
            )
        _require_device("step", call.query, {f"the new {role}s": x})
    _require("step", "counter", counter, (len(call.query),), torch.int32)
    _require_device("step", call.query, {"the counter": counter})


def check_lengths(call: AttendCall) -> None:
    """Refuse lengths that the buffers do not hold; reads the lengths, so for CPU tensors only."""
    room, capacity = call.blocks * BLOCK, call.capacity
    lengths = call.lengths.tolist()
    for row, (packed, tokens) in enumerate(lengths):
        # The sink comes before packed tokens.
        least = call.sink if packed else 0
        if not (0 <= packed <= room and least <= tokens - packed <= capacity):
            raise ValueError(
                f"[attend] A row must have from 0 to {room} packed tokens and at most {capacity} "
                f"exact ones, including a sink of {call.sink} if tokens are packed, but row {row} "
                f"has {packed} packed of {tokens} tokens."
            )
    if call.mask is None or not call.mask.ndim or call.mask.shape[-1] == 1:
        return
    most = max((tokens for _, tokens in lengths), default=0)
    if call.mask.shape[-1] < most:
        raise ValueError(
            f"[attend] A mask must have a column for each of {most} tokens, or one for all, but it "
            f"has shape {tuple(call.mask.shape)}."
        )


def _check_blocks(call: AttendCall) -> None:
    """Refuse packed blocks that are incomplete, or do not fit their codecs or each other."""
    nothing = Packed(None, None, None)
    keys, values = call.keys.packed or nothing, call.values.packed or nothing
    if len({part is None for part in (*keys, *values[:2])}) > 1:
        raise ValueError(
            "[attend] Words and scales of keys and values and the centres of keys must be "
            "given together or not at all, but some are missing; pass what encode returned."
        )
    for source, packed in ((call.keys, keys), (call.values, values)):
        check_packed("attend", source.exact, source.codec, packed, source.channel_scale)
    if keys.words is not None and keys.words.shape[2] != values.words.shape[2]:
        raise ValueError(
            f"[attend] Packed keys and values must agree in blocks, but their words have shape "
            f"{tuple(keys.words.shape)} and {tuple(values.words.shape)}."
        )


def _check_query(query: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse a query, lengths and exact vectors that do not fit together."""
    batch, kv_heads, _, head_dim = keys.shape
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"[attend] Exact keys and values must agree in batch, KV heads and capacity, but they "
            f"have shape {tuple(keys.shape)} and {tuple(values.shape)}."
        )
    heads = query.shape[1]
    fits = heads % kv_heads == 0 if kv_heads else heads == 0
    if query.shape[0] != batch or not fits or query.shape[3] != head_dim:
        raise ValueError(
            f"[attend] The query must have shape [{batch}, a multiple of {kv_heads}, L, "
            f"{head_dim}] to read keys of shape {tuple(keys.shape)}, but it has shape "
            f"{tuple(query.shape)}."
        )
    _require("attend", "lengths", lengths, (batch, 2), torch.int32)
    devices = {"the lengths": lengths, "the exact keys": keys, "the exact values": values}
    _require_device("attend", query, devices)


def _check_mask(query: Tensor, mask: Tensor | None, causal: bool) -> None:
    """Refuse a mask that is not broadcastable to the scores, or is given with ``causal``."""
    if mask is None:
        return
    if causal:
        raise ValueError(
            "[attend] Only one of causal and a mask is possible, but both were given; put the "
            "causal pattern into the mask."
        )
    want = query.shape[:3]
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(have not in (1, n) for have, n in zip(shape, want, strict=False)):
        raise ValueError(
            f"[attend] A mask must be broadcastable to {(*want, 'S')} (batch, query heads, "
            f"queries, tokens), but it has shape {tuple(mask.shape)}."
        )
    if mask.dtype not in (torch.bool, *FLOATS):
        raise ValueError(
            f"[attend] A mask must be boolean or floating, but it is {mask.dtype}; cast it."
        )
    _require_device("attend", query, {"the mask": mask})


def _require(where: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(
            f"[{where}] The {name} must have shape {shape} and dtype {dtype}, but they have shape "
            f"{tuple(x.shape)} and dtype {x.dtype}; use the configuration that they were made with."
        )
    _require_contiguous(where, f"the {name}", x)


def require_float(where: str, name: str, dtype: torch.dtype) -> None:
    """Require a floating dtype."""
    if dtype not in FLOATS:
        raise ValueError(
            f"[{where}] {name} must be float16, bfloat16 or float32, but the dtype is {dtype}; "
            "cast them."
        )


def _require_contiguous(where: str, name: str, x: Tensor) -> None:
    # An empty tensor from a file has strides of 0.
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise ValueError(
            f"[{where}] The last dimension of {name} must be contiguous, but its stride is "
            f"{x.stride(-1)}; call contiguous() first."
        )


def _require_device(where: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != like.device:
            raise ValueError(
                f"[{where}] All tensors must be on {like.device}, but {name} are on {x.device}; "
                f"move them with to({str(like.device)!r})."
            )
