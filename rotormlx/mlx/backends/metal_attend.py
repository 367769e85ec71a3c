"""Attention on packed bytes in Metal: launches ``attend``, ``prefill`` and ``attend_merge``.

The sequence is cut into parts, packed and exact ones, each done by its own threadgroups; a last
kernel merges them. Buffers of the cache are passed whole, with their strides and the lengths that
count, so nothing is copied.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
S tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from rotormlx.codec.format import BLOCK, Packed
from rotormlx.kernels.parts import cut
from rotormlx.kernels.source import matrices, metal_text, read
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends.first_call import FirstCallKernel
from rotormlx.mlx.backends.mlx_ops import MLXBackend, inverse_matrix, rotated_queries
from rotormlx.mlx.cache.view import KVView

# Up to so many query rows of a KV head are done on words as they lie; more of them are matrix
# products. It bounds registers (four sums a row) and threadgroup memory (18.1 KiB at head_dim 256
# and 8 bits).
MAX_ROWS = 8
# Two channels of a thread are at most that many; longer vectors are left to MLX's operations.
MAX_HEAD_DIM = 256
# Simdgroups of a threadgroup, and so blocks of a step of the kernel ``attend``. For more than 32
# query rows there are twice as many, so that a group of 4 heads and 16 queries reads a byte once.
SIMDGROUPS = 4
# Tokens that a part is a multiple of.
PART_STEP = SIMDGROUPS * BLOCK
# Threadgroups that keep a large GPU busy: a longer sequence gets longer parts, not more of them.
THREADGROUPS = 512
MAX_PARTS = 128
MERGE_THREADS = 128

Kernel = Callable[..., list[mx.array]]


class Tiling(NamedTuple):
    """How the G query rows of a KV head are spread over threadgroups.

    kernel: ``"attend"`` or ``"prefill"``.
    tiles: Threadgroups.
    rows: Query rows of each.
    simdgroups: Of each.
    merged: Query rows of a threadgroup of the kernel ``attend_merge``.
    template: Template arguments that only this kernel has.
    """

    kernel: str
    tiles: int
    rows: int
    simdgroups: int
    merged: int
    template: tuple[tuple[str, int], ...]


def attend(call: AttendCall) -> mx.array:
    """Attention over a partly packed cache; see :meth:`MLXBackend.attend`.

    Vectors of more than 256 numbers take MLX's operations.
    """
    if call.larger_dim > MAX_HEAD_DIM:
        return MLXBackend().attend(call)
    tiling = _tiling(call.group_rows, call.larger_dim)
    limit = THREADGROUPS // (call.batch * call.kv_heads * tiling.tiles)
    limit = max(1, min(MAX_PARTS, limit))
    packed = cut(call.keys.packed_tokens, limit, PART_STEP)
    exact = cut(call.most_exact_tokens, limit, PART_STEP)
    numbers = (call.keys.sink, *packed, exact.tokens, call.length, call.group_rows)
    plan = mx.array(numbers, mx.int32)
    return _merged(call, tiling, plan, _parts(call, tiling, plan, packed.number + exact.number))


def _parts(call: AttendCall, tiling: Tiling, plan: mx.array, parts: int) -> list[mx.array]:
    """Tops, totals and outputs of all parts, float32 ``[B, K, rows, parts]`` and ``[..., Dv]``."""
    keys, values, group = call.keys, call.values, call.group_rows
    rows = tiling.tiles * tiling.rows
    # Flat in between: the kernels read it row by row, and a reshape alone may keep strides.
    q = call.scaled_queries
    q = mx.pad(q.reshape(-1).reshape(q.shape), [(0, 0), (0, 0), (0, rows - group), (0, 0)])
    threads = 32 * tiling.simdgroups
    shape = (call.batch, call.kv_heads, rows, parts)
    return _parts_kernel(tiling.kernel)(
        inputs=[
            *(q, _rotated(q, keys), *_packed(keys), _exact(keys)),
            *(*_packed(values)[:2], _exact(values), _mask_of_kernel(call)),
            *(mx.array(keys.lengths, mx.int32), plan),
        ],
        template=[
            *(("KEY_BITS", keys.codec.bits), ("VALUE_BITS", values.codec.bits)),
            *(("KEY_DIM", call.key_dim), ("VALUE_DIM", call.value_dim), ("BLOCK", BLOCK)),
            *(("SIMDGROUPS", tiling.simdgroups), ("MASK", call.mask_kind)),
            *tiling.template,
        ],
        grid=(threads * parts, call.batch * call.kv_heads, tiling.tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, shape, (*shape, call.value_dim)],
        output_dtypes=[mx.float32] * 3,
    )


def _merged(call: AttendCall, tiling: Tiling, plan: mx.array, parts: list[mx.array]) -> mx.array:
    """The output ``[B, H, L, Dv]`` from what :func:`_parts` gives."""
    scale, sink_logits, rotation = (
        call.values.channel_scale,
        call.sink_logits,
        call.values.codec.rotation,
    )
    if scale is not None:
        scale = mx.broadcast_to(scale, (call.batch, call.kv_heads, call.value_dim))
    nothing = mx.zeros((1,), mx.float32)
    (output,) = _merge_kernel()(
        inputs=[
            *(*parts, inverse_matrix(rotation), nothing if scale is None else scale),
            *(nothing if sink_logits is None else sink_logits.astype(mx.float32), plan),
        ],
        template=[
            *(("T", call.queries.dtype), ("VALUE_DIM", call.value_dim), ("ROWS", tiling.merged)),
            *(("THREADS", MERGE_THREADS), ("MATRICES", matrices(rotation))),
            *(("HAS_SCALE", scale is not None), ("HAS_SINK_LOGITS", sink_logits is not None)),
        ],
        grid=(MERGE_THREADS, -(-call.group_rows // tiling.merged), call.batch * call.kv_heads),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[call.output_shape],
        output_dtypes=[call.queries.dtype],
    )
    return output


def _tiling(group: int, larger_dim: int) -> Tiling:
    if group <= MAX_ROWS:
        width = next(width for width in (4, 2, 1) if group % width == 0)
        return Tiling("attend", 1, group, SIMDGROUPS, 1, (("ROWS", group), ("WIDTH", width)))
    simdgroups = SIMDGROUPS if group <= 8 * SIMDGROUPS else 2 * SIMDGROUPS
    # Decoded tokens of a tile: 16 KiB of them, in float32.
    tile = 32 if larger_dim <= 128 else 16
    rows = 8 * simdgroups
    return Tiling("prefill", -(-group // rows), rows, simdgroups, 8, (("TILE", tile),))


# ---- inputs -------------------------------------------------------------------------------------


def _rotated(q: mx.array, keys: KVView) -> mx.array:
    """The queries as the levels of the keys meet them, float32 ``[B, K, G, D]``."""
    if not keys.packed_tokens:
        return q
    return rotated_queries(q, keys)


def _packed(view: KVView) -> Packed:
    """The packed buffers; where nothing is packed, some that no thread reads."""
    if not view.packed_tokens:
        scales = mx.zeros((1, 1, 1, 8), mx.float16)
        return Packed(mx.zeros((1, 1, 1, 1, 8), mx.uint32), scales, scales)
    if view.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    return view.packed


def _exact(view: KVView) -> mx.array:
    """The exact buffer; where it is empty, one that no thread reads."""
    return view.exact if view.exact.size else mx.zeros((1, 1, 1, 8), view.dtype)


def _mask_of_kernel(call: AttendCall) -> mx.array:
    """The mask as ``[B, H, L, S]``, which copies nothing; without one, one that no thread reads."""
    mask = call.mask_array
    if mask is None:
        return mx.zeros((1, 1, 1, 1), mx.bool_)
    return mx.broadcast_to(mask, call.scores_shape)


# ---- kernels ------------------------------------------------------------------------------------


@cache
def _parts_kernel(name: str) -> Kernel:
    files = ("shared_kernels/levels.h", "shared_kernels/trellis.h", "metal_kernels/scores.h")
    text = metal_text(name, *map(read, files))
    return FirstCallKernel(
        f"rotormlx_{name}",
        mx.fast.metal_kernel,
        input_names=[
            *("q", "rotated", "key_words", "key_scales", "centres", "exact_keys"),
            *("value_words", "value_scales", "exact_values", "mask", "lengths", "plan"),
        ],
        output_names=["part_tops", "part_totals", "part_outputs"],
        source=text.source,
        header=text.header,
        # The buffers of the cache are read where they lie.
        ensure_row_contiguous=False,
    )


@cache
def _merge_kernel() -> Kernel:
    text = metal_text("attend_merge", read("metal_kernels/scores.h"))
    return FirstCallKernel(
        "rotormlx_attend_merge",
        mx.fast.metal_kernel,
        input_names=[
            *("tops", "totals", "outputs", "unrotation", "channel_scale", "sink_logits", "plan"),
        ],
        output_names=["output"],
        source=text.source,
        header=text.header,
    )
