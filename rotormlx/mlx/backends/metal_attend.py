"""Attention on packed bytes in Metal: launches ``attend``, ``prefill`` and ``attend_merge``.

The sequence is cut into packed and exact parts, each computed by its own threadgroups; a last
kernel merges them. For a short sequence, one threadgroup per KV head computes the output alone.
Buffers of the cache are passed whole, with the lengths in use, so nothing is copied.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
S tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, Packed
from rotormlx.codec.rotation import Rotation
from rotormlx.kernels.parts import Parts, cut
from rotormlx.kernels.source import KernelText, matrices, metal_rotation, metal_text, read
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import constants, metal_levels
from rotormlx.mlx.backends.first_call import FirstCallKernel
from rotormlx.mlx.backends.mlx_ops import MLXBackend, rotated_queries
from rotormlx.mlx.cache.view import KVView

# The most query rows per KV head that read levels straight from words; more rows use matrix
# products. It bounds registers (four sums per row) and threadgroup memory (26.1 KiB at head_dim 256
# and 8 bits).
MAX_ROWS = 8
# The most channels that a threadgroup can hold; longer vectors are left to MLX's operations.
MAX_HEAD_DIM = 256
# Kernels index a buffer in 32 bits; buffers of this many numbers are left to MLX's operations.
MAX_BUFFER = 2**31
# Simdgroups of the kernel ``prefill``, and blocks per step of the kernel ``attend``. More than 32
# query rows get twice as many simdgroups, so that 4 heads with 16 queries each read a byte once.
SIMDGROUPS = 4
# The tokens of a part are a multiple of this number.
PART_STEP = SIMDGROUPS * BLOCK
# Threadgroups that keep a large GPU busy; beyond them, parts get longer, not more numerous.
THREADGROUPS = 512
MAX_PARTS = 128
# The most steps that one threadgroup computes alone, without parts and without a merge.
ALONE_STEPS = 2
MERGE_THREADS = 128

Kernel = Callable[..., list[mx.array]]
Template = list[tuple[str, object]]


class Plan(NamedTuple):
    """The parts into which a call is cut.

    packed, exact: Parts of the packed and of the exact tokens.
    alone: Whether one threadgroup per KV head computes all tokens.
    """

    packed: Parts
    exact: Parts
    alone: bool

    @property
    def parts(self) -> int:
        """The number of all parts."""
        return self.packed.number + self.exact.number


class Tiling(NamedTuple):
    """The division of the G query rows of a KV head among threadgroups of the kernel ``prefill``.

    tiles: Number of threadgroups.
    rows: Query rows per threadgroup.
    simdgroups: Simdgroups per threadgroup.
    tile: Tokens that are decoded at once.
    """

    tiles: int
    rows: int
    simdgroups: int
    tile: int


def attend(call: AttendCall) -> mx.array:
    """Attend over a partly packed cache; see :meth:`MLXBackend.attend`.

    MLX's operations compute vectors of more than 256 numbers and buffers of 2^31 or more numbers.
    """
    if call.larger_dim > MAX_HEAD_DIM or _largest_buffer(call) >= MAX_BUFFER:
        return MLXBackend().attend(call)
    if call.group_rows > MAX_ROWS:
        tiling = _tiling(call.group_rows, call.larger_dim)
        plan = _plan(call, tiling.tiles)
        return _merged(call, plan, _prefill_parts(call, plan, tiling), rows=8)
    widths = (call.keys.codec.bits, call.values.codec.bits)
    return _attend_few(call, metal_levels.chosen(*widths, _attend_few))


def _attend_few(call: AttendCall, way: str) -> mx.array:
    """Attend with few query rows; ``way`` finds levels, see :mod:`metal_levels`."""
    plan = _plan(call)
    if plan.alone:
        return _attended_alone(call, plan, way)
    return _merged(call, plan, _parts(call, plan, way), rows=1)


def _plan(call: AttendCall, tiles: int = 1) -> Plan:
    keys = call.keys
    limit = max(1, min(MAX_PARTS, THREADGROUPS // (call.batch * call.kv_heads * tiles)))
    exact_tokens = keys.exact_tokens if keys.rows is None else call.most_exact_tokens
    packed = cut(keys.packed_tokens, limit, PART_STEP)
    exact = cut(exact_tokens, limit, PART_STEP)
    steps = sum(-(-tokens // PART_STEP) for tokens in (keys.packed_tokens, exact_tokens))
    return Plan(packed, exact, alone=steps <= ALONE_STEPS or limit == 1)


def _largest_buffer(call: AttendCall) -> int:
    """Return the size of the largest buffer, in numbers."""
    views = call.keys, call.values
    packed = (a for view in views for a in view.packed or () if a is not None)
    return max(a.size for a in (*(view.exact for view in views), *packed))


def _tiling(group: int, larger_dim: int) -> Tiling:
    simdgroups = SIMDGROUPS if group <= 8 * SIMDGROUPS else 2 * SIMDGROUPS
    rows = 8 * simdgroups
    # 16 KiB of decoded tokens, in float32.
    return Tiling(-(-group // rows), rows, simdgroups, 32 if larger_dim <= 128 else 16)


# ---- few query rows -----------------------------------------------------------------------------


def _attended_alone(call: AttendCall, plan: Plan, way: str) -> mx.array:
    """Return the output ``[B, H, L, Dv]``, computed by one threadgroup per KV head."""
    keys, values = call.keys.codec.rotation, call.values.codec.rotation
    # Two places per thread, so that the single threadgroup has twice as many simdgroups.
    (output,) = _attend_kernel(keys, values, alone=True)(
        inputs=[*_inputs(call, plan), *_output_inputs(call)],
        template=[*_template(call, 2, way), *_output_template(call)],
        **_grid(call, 2, 1),
        output_shapes=[call.output_shape],
        output_dtypes=[call.queries.dtype],
    )
    return output


def _parts(call: AttendCall, plan: Plan, way: str) -> list[mx.array]:
    """Return tops, totals and outputs of all parts, float32 ``[B, K, G, parts(, Dv)]``."""
    # Four places share one load of a query; with more than four rows, registers do not suffice.
    places = 4 if call.group_rows <= 4 else 2
    shape = (call.batch, call.kv_heads, call.group_rows, plan.parts)
    return _attend_kernel(call.keys.codec.rotation, call.values.codec.rotation, alone=False)(
        inputs=_inputs(call, plan),
        template=_template(call, places, way),
        **_grid(call, places, plan.parts),
        output_shapes=[shape, shape, (*shape, call.value_dim)],
        output_dtypes=[mx.float32] * 3,
    )


def _inputs(call: AttendCall, plan: Plan) -> list[mx.array]:
    keys, values = call.keys, call.values
    rotation = keys.codec.rotation
    key_rotation = (
        constants.coefficients(rotation)
        if rotation.has_stages
        else constants.query_matrix(rotation)
    )
    return [
        *(call.queries, key_rotation, constants.or_nothing(keys.channel_scale, mx.float32)),
        *(*_packed(keys), _exact(keys), *_packed(values)[:2], _exact(values)),
        *(_mask_of_kernel(call), constants.lengths(keys), _plan_numbers(call, plan)),
    ]


def _template(call: AttendCall, places: int, way: str) -> Template:
    keys, group = call.keys, call.group_rows
    width = next(width for width in (4, 2, 1) if group % width == 0)
    return [
        *(("KEY_BITS", keys.codec.bits), ("VALUE_BITS", call.values.codec.bits), ("BLOCK", BLOCK)),
        *(("ROWS", group), ("WIDTH", width), ("SIMDGROUPS", _simdgroups(places))),
        *(("PLACES", places), ("MASK", call.mask_kind)),
        *metal_levels.template(keys.codec.bits, call.values.codec.bits, way),
        *(("HAS_KEY_SCALE", keys.channel_scale is not None),),
        *(("KEY_MATRICES", matrices(keys.codec.rotation)),),
    ]


def _grid(call: AttendCall, places: int, parts: int) -> dict[str, tuple[int, int, int]]:
    threads = 32 * _simdgroups(places)
    return {
        "grid": (threads * parts, call.batch * call.kv_heads, 1),
        "threadgroup": (threads, 1, 1),
    }


def _simdgroups(places: int) -> int:
    """Return the simdgroups that read the blocks of a step, with ``places`` tokens per thread."""
    return SIMDGROUPS * 2 // places


# ---- many query rows ----------------------------------------------------------------------------


def _prefill_parts(call: AttendCall, plan: Plan, tiling: Tiling) -> list[mx.array]:
    """Compute parts as in :func:`_parts`, with query rows padded to whole tiles."""
    keys, values, group = call.keys, call.values, call.group_rows
    rows = tiling.tiles * tiling.rows
    # Flattened in between, because the kernel needs contiguous rows and a reshape may keep strides.
    q = call.scaled_queries
    q = mx.pad(q.reshape(-1).reshape(q.shape), [(0, 0), (0, 0), (0, rows - group), (0, 0)])
    rotated = rotated_queries(q, keys) if keys.packed_tokens else q
    threads = 32 * tiling.simdgroups
    shape = (call.batch, call.kv_heads, rows, plan.parts)
    return _prefill_kernel()(
        inputs=[
            *(q, rotated, *_packed(keys), _exact(keys), *_packed(values)[:2], _exact(values)),
            *(_mask_of_kernel(call), constants.lengths(keys), _plan_numbers(call, plan)),
        ],
        template=[
            *(("KEY_BITS", keys.codec.bits), ("VALUE_BITS", values.codec.bits)),
            *(("KEY_DIM", call.key_dim), ("VALUE_DIM", call.value_dim), ("BLOCK", BLOCK)),
            *(("SIMDGROUPS", tiling.simdgroups), ("TILE", tiling.tile), ("MASK", call.mask_kind)),
        ],
        grid=(threads * plan.parts, call.batch * call.kv_heads, tiling.tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, shape, (*shape, call.value_dim)],
        output_dtypes=[mx.float32] * 3,
    )


# ---- the output ---------------------------------------------------------------------------------


def _merged(call: AttendCall, plan: Plan, parts: list[mx.array], *, rows: int) -> mx.array:
    """Merge parts to the output ``[B, H, L, Dv]``, ``rows`` query rows per threadgroup."""
    (output,) = _merge_kernel(call.values.codec.rotation)(
        inputs=[*parts, _plan_numbers(call, plan), *_output_inputs(call)],
        template=[
            *(("ROWS", rows), ("THREADS", MERGE_THREADS), ("MOST_PARTS", 2 * MAX_PARTS)),
            *_output_template(call),
        ],
        grid=(MERGE_THREADS, -(-call.group_rows // rows), call.batch * call.kv_heads),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[call.output_shape],
        output_dtypes=[call.queries.dtype],
    )
    return output


def _output_inputs(call: AttendCall) -> list[mx.array]:
    """Return the inputs that turn sums of values into the output."""
    values = call.values
    return [
        constants.coefficients(values.codec.rotation, back=True),
        constants.or_nothing(values.channel_scale, mx.float32),
        constants.or_nothing(call.sink_logits, mx.float32),
    ]


def _output_template(call: AttendCall) -> Template:
    values = call.values
    return [
        *(("T", call.queries.dtype), ("VALUE_MATRICES", matrices(values.codec.rotation))),
        ("HAS_VALUE_SCALE", values.channel_scale is not None),
        ("HAS_SINK_LOGITS", call.sink_logits is not None),
    ]


# ---- inputs -------------------------------------------------------------------------------------


def _plan_numbers(call: AttendCall, plan: Plan) -> mx.array:
    """Return the numbers that kernels read by position.

    They are: sink; number of packed parts, tokens per packed part, tokens per exact part; L; G; the
    scale as raw bits; strides of the batch rows' channel scales of keys and of values; K.
    """
    return constants.numbers(
        (
            *(call.keys.sink, *plan.packed, plan.exact.tokens, call.length, call.group_rows),
            int(np.float32(call.scale).view(np.int32)),
            *(_scale_stride(call.keys), _scale_stride(call.values), call.kv_heads),
        ),
        mx.int32,
    )


def _scale_stride(view: KVView) -> int:
    """Return the stride of the batch rows' channel scales; 0 if they share one."""
    scale = view.channel_scale
    return 0 if scale is None or scale.ndim == 2 else scale.shape[1] * scale.shape[2]


def _packed(view: KVView) -> Packed:
    """Return the packed buffers; placeholders if nothing is packed."""
    if view.packed_tokens and view.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    given = (view.packed if view.packed_tokens else None) or Packed(None, None, None)
    dtypes, axes = (mx.uint32, mx.float16, mx.float16), (5, 4, 4)
    return Packed(*map(constants.or_nothing, given, dtypes, axes))


def _exact(view: KVView) -> mx.array:
    """Return the exact buffer; a placeholder if it is empty."""
    return view.exact if view.exact.size else constants.nothing(view.dtype, 4)


def _mask_of_kernel(call: AttendCall) -> mx.array:
    """Return the mask broadcast to ``[B, H, L, S]``; a placeholder if there is none."""
    mask = call.mask_array
    if mask is None:
        return constants.nothing(mx.bool_, 4)
    return mx.broadcast_to(mask, call.scores_shape)


# ---- kernels ------------------------------------------------------------------------------------

_CACHE_INPUTS = (
    *("key_words", "key_scales", "centres", "exact_keys"),
    *("value_words", "value_scales", "exact_values", "mask", "lengths", "plan"),
)
_QUERY_INPUTS = ("q", "key_rotation", "key_channel_scale")
_OUTPUT_INPUTS = ("value_rotation", "value_channel_scale", "sink_logits")
_PARTS = ("part_tops", "part_totals", "part_outputs")


def _text(name: str, *before: str, lookup: bool = False) -> KernelText:
    files = [*(f"shared_kernels/{name}.h" for name in ("levels", "trellis", "rotation"))]
    files += [f"metal_kernels/{name}.h" for name in ("scores", "rows", *(["lookup"] * lookup))]
    return metal_text(name, *map(read, files), *before)


@derived
def _attend_kernel(keys: Rotation, values: Rotation, *, alone: bool) -> Kernel:
    """Return the kernel ``attend``, which gives the output if ``alone``, else the parts."""
    kind = "alone" if alone else "parts"
    types = [metal_rotation("KeyRotation", keys), metal_rotation("ValueRotation", values)]
    return _kernel(
        "_".join(("attend", kind, *(f"{r.name}_{r.head_dim}" for r in (keys, values)))),
        (*_QUERY_INPUTS, *_CACHE_INPUTS, *(_OUTPUT_INPUTS if alone else ())),
        ("output",) if alone else _PARTS,
        _text("attend", *types, *(["#define ALONE\n"] if alone else []), lookup=True),
    )


@derived
def _merge_kernel(rotation: Rotation) -> Kernel:
    return _kernel(
        f"attend_merge_{rotation.name}_{rotation.head_dim}",
        ("tops", "totals", "outputs", "plan", *_OUTPUT_INPUTS),
        ("output",),
        _text("attend_merge", metal_rotation("ValueRotation", rotation)),
    )


@cache
def _prefill_kernel() -> Kernel:
    files = ("shared_kernels/levels.h", "shared_kernels/trellis.h", "metal_kernels/scores.h")
    text = metal_text("prefill", *map(read, files))
    return _kernel("prefill", ("q", "rotated", *_CACHE_INPUTS), _PARTS, text)


@cache
def _kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], text: KernelText
) -> Kernel:
    """Return the kernel object that layers share; it reads the buffers of the cache in place."""
    return FirstCallKernel(
        f"rotormlx_{name}",
        mx.fast.metal_kernel,
        input_names=list(inputs),
        output_names=list(outputs),
        source=text.source,
        header=text.header,
        ensure_row_contiguous=False,
    )
