"""The operators on CUDA devices: compiled kernels, or torch operations if there are none.

This module makes checks and tables and sets the current device; the binding only fills
structures. Nothing waits for the device.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, KEY, ROLES, Codec, Packed
from rotormlx.codec.limits import check_grid, check_tokens
from rotormlx.codec.rotation import Rotation
from rotormlx.kernels import mask_kinds
from rotormlx.kernels.cuda_plan import MANY_ROWS, MAX_HEAD_DIM, Device, Shape, attend_plan
from rotormlx.kernels.source import coefficients
from rotormlx.torch import build, store_step, torch_ops
from rotormlx.torch.build import Configuration
from rotormlx.torch.store_step import Step
from rotormlx.torch.torch_ops import AttendCall, KVView

_ALIGNMENT = 16
# Limit of the stride, in elements, between tokens or blocks; see launch.h.
_STRIDE_LIMIT = 2**29

# Loaded libraries, newest last.
_loaded: dict[Configuration, Any] = {}


def encode(
    x: Tensor,
    codec: Codec,
    *,
    channel_scale: Tensor | None = None,
    centres: Tensor | None = None,
    start: int = 0,
    state: Tensor | None = None,
) -> Packed:
    """Encode as :func:`rotormlx.torch.torch_ops.encode` does."""
    operators = _operators_for(codec, x.device)
    if operators is None:
        return torch_ops.encode(
            x, codec, channel_scale=channel_scale, centres=centres, start=start, state=state
        )
    check_grid("encode", *x.shape[:2])
    with _on(x.device):
        packed = operators.encode(
            _aligned(x),
            None if centres is None else centres.contiguous(),
            _contiguous(channel_scale),
            _coefficients(codec.rotation, False, x.device),
            start,
            _contiguous(state),
            ROLES.index(codec.role),
            *codec.words_shape,
            _stream(x.device),
        )
    return Packed(packed[0], packed[1], packed[2] if codec.role == KEY else None)


def decode(
    packed: Packed, codec: Codec, *, channel_scale: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """Decode as :func:`rotormlx.torch.torch_ops.decode` does."""
    device = packed.words.device
    operators = _operators_for(codec, device)
    if operators is None:
        return torch_ops.decode(packed, codec, channel_scale=channel_scale, dtype=dtype)
    check_grid("decode", *packed.words.shape[:2])
    with _on(device):
        return operators.decode(
            *_blocks(packed),
            _contiguous(channel_scale),
            _coefficients(codec.rotation, True, device),
            ROLES.index(codec.role),
            codec.head_dim,
            dtype,
            _stream(device),
        )


def attend(call: AttendCall) -> Tensor:
    """Attend as :func:`rotormlx.torch.torch_ops.attend` does."""
    query, keys, values, device = call.query, call.keys, call.values, call.query.device
    operators = _operators(keys.codec, values.codec, device)
    if operators is None:
        return torch_ops.attend(call)
    check_grid("attend", *keys.exact.shape[:2])
    check_tokens("attend", call.blocks * BLOCK + call.capacity)
    kind, mask = _mask(call)
    sink_logits, plan = call.sink_logits, attend_plan(_shape(call), _device(device))
    with _on(device):
        output = operators.attend(
            _aligned(query),
            call.lengths.contiguous(),
            *_parts(keys, query.dtype),
            *_parts(values, query.dtype),
            _query_matrix(keys.codec.rotation, device),
            torch_ops.inverse_matrix(values.codec.rotation, device),
            *(_coefficients(x.codec.rotation, False, device) for x in (keys, values)),
            _counters(device, _stream(device)) if plan.one_kernel else None,
            mask,
            None if sink_logits is None else sink_logits.float().contiguous(),
            call.sink,
            call.scale,
            kind,
            plan.numbers,
            _stream(device),
        )
    return output


def store(stored: Step) -> None:
    """Store the tokens of a step and pack what is due; see :mod:`rotormlx.torch.store_step`.

    Without compiled kernels, this reads the lengths back and waits for the device.
    """
    keys, values, device = stored.keys, stored.values, stored.lengths.device
    operators = _operators(keys.codec, values.codec, device)
    if operators is None:
        store_step.store(stored)
        return
    with _on(device):
        operators.store(
            *(_aligned(x.to(keys.exact.dtype)) for x in stored.new),
            stored.lengths,
            stored.counter,
            keys.exact,
            *cast(Packed, keys.packed),
            keys.channel_scale,
            values.exact,
            *cast(Packed, values.packed)[:2],
            values.channel_scale,
            *(_coefficients(x.codec.rotation, False, device) for x in (keys, values)),
            stored.sink,
            stored.window,
            stored.own_scale,
            _stream(device),
        )


def _shape(call: AttendCall) -> Shape:
    """Return what the plan depends on; it takes whole buffers, as only the device knows lengths."""
    keys, values = call.keys.codec, call.values.codec
    batch, heads, length, _ = call.query.shape
    return Shape(
        *(batch, heads, call.kv_heads, length),
        *(keys.head_dim, values.head_dim, keys.bits, values.bits),
        exact_tokens=call.capacity,
        packed_tokens=call.blocks * BLOCK,
        is_float32=call.query.dtype == torch.float32,
        has_stages=keys.rotation.has_stages and values.rotation.has_stages,
    )


def _mask(call: AttendCall) -> tuple[int, Tensor | None]:
    """Return the kind of a mask (see launch.h), and the mask ``[B, H, L, S]``, bool or float32."""
    mask = call.wide_mask
    if mask is None:
        return (mask_kinds.CAUSAL if call.causal else mask_kinds.NONE), None
    is_boolean = mask.dtype == torch.bool
    mask = mask if is_boolean else mask.float()
    # Expanding sets the stride of broadcast axes to 0 and copies nothing.
    tokens = mask.shape[-1] if mask.shape[-1] > 1 else call.blocks * BLOCK + call.capacity
    mask = mask.expand(*call.query.shape[:3], tokens)
    return (mask_kinds.BOOLEAN if is_boolean else mask_kinds.ADDITIVE), mask


# ---- which library ------------------------------------------------------------------------------


def _operators(keys: Codec, values: Codec, device: torch.device) -> Any:
    """Return the compiled operators for keys and values; None if torch operations are used."""
    if max(keys.head_dim, values.head_dim) > MAX_HEAD_DIM or not _can_compile():
        return None
    configuration = Configuration(
        _compiled_for(keys.rotation),
        keys.head_dim,
        values.head_dim,
        keys.bits,
        values.bits,
        _architecture(device),
    )
    if configuration not in _loaded:
        build.build(configuration)
        _loaded[configuration] = getattr(torch.ops, configuration.name)
    return _loaded[configuration]


def _operators_for(codec: Codec, device: torch.device) -> Any:
    """Return operators for a codec, from a loaded library if possible."""
    facts = (_compiled_for(codec.rotation), codec.head_dim, codec.bits)
    for configuration, operators in _loaded.items():
        keys = (configuration.rotation, configuration.key_dim, configuration.key_bits)
        values = (configuration.rotation, configuration.value_dim, configuration.value_bits)
        arch = _architecture(device)
        if configuration.arch == arch and facts == (keys if codec.role == KEY else values):
            return operators
    return _operators(codec, codec, device)


def _compiled_for(rotation: Rotation) -> str:
    """Return the rotation to compile for; kernels for a matrix also take one per KV head."""
    return "dense" if rotation.is_per_head else rotation.name


@cache
def _can_compile() -> bool:
    reason = build.missing()
    if reason is not None:
        warnings.warn(
            f"CUDA kernels are not available, so rotormlx uses torch operations, which are slower: "
            f"{reason}.",
            stacklevel=2,
        )
    return reason is None


# ---- tensors for the kernels --------------------------------------------------------------------


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)


@cache
def _architecture(device: torch.device) -> str:
    """Return nvcc's name of the architecture."""
    return build.architecture(torch.cuda.get_device_capability(device))


@cache
def _device(device: torch.device) -> Device:
    """Return the properties of a GPU that a plan depends on."""
    facts = torch.cuda.get_device_properties(device)
    # Some versions of torch do not report the opt-in limit; the default limit is used then.
    shared_bytes = getattr(facts, "shared_memory_per_block_optin", 48 * 1024)
    return Device(facts.multi_processor_count, shared_bytes)


def _counters(device: torch.device, stream: int) -> Tensor:
    """Return int32 ``[MANY_ROWS]``, enough for any kernel; all 0 between the calls of a stream.

    A call in a CUDA graph has its own counters, which the graph sets to 0. The graph may run beside
    other calls, and captured calls have not run yet.
    """
    if torch.cuda.is_current_stream_capturing():
        return _zeros(device)
    return _kept_counters(device, stream)


@cache
def _kept_counters(device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return _zeros(device)


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(MANY_ROWS, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _parts(view: KVView, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return what ``attend`` takes: exact, words, scales, centres (of keys), channel scale.

    The result is kept with the view if no tensor had to be copied.
    """
    kept, found = view.prepared.get("cuda", (None, ()))
    if kept == dtype:
        return found
    own = (view.exact, *(view.packed or (None, None, None)), view.channel_scale)
    made = (
        _aligned(view.exact.to(dtype)),
        *_blocks(view.packed),
        _contiguous(view.channel_scale),
    )
    taken = made if view.codec.role == KEY else (*made[:3], made[4])
    if all(a is b for a, b in zip(own, made, strict=True)):
        view.prepared["cuda"] = dtype, taken
    return taken


def _blocks(packed: Packed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return words, scales and centres, with the words of a block contiguous."""
    if packed is None:
        return None, None, None
    words, scales, centres = packed
    words = _aligned(torch_ops.side_by_side(words))
    return words, _aligned(scales), None if centres is None else _aligned(centres)


def _aligned(x: Tensor) -> Tensor:
    return x if _is_readable(x) else x.contiguous()


def _is_readable(x: Tensor) -> bool:
    """Return whether rows start at multiples of 16 bytes, with strides that fit 32 bits."""
    steps = (x.storage_offset(), *x.stride()[:-1])
    aligned = x.stride(-1) == 1 and all(n * x.itemsize % _ALIGNMENT == 0 for n in steps)
    return aligned and x.stride(2) < _STRIDE_LIMIT


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@derived
def _coefficients(rotation: Rotation, back: bool, device: torch.device) -> Tensor:
    """Return the coefficients of a rotation for the kernels, float32."""
    table = np.array(coefficients(rotation, back=back), np.float32)
    return torch.from_numpy(table).to(device)


@derived
def _query_matrix(rotation: Rotation, device: torch.device) -> Tensor:
    """Return float32 ``[D, D]``, or one per KV head; a query times it is rotated."""
    return torch_ops.inverse_matrix(rotation, device).mT.contiguous()
