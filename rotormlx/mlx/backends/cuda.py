"""The codec as fused CUDA kernels in MLX's own CUDA build: the device code of ``cuda_kernels/``.

MLX compiles a kernel's text (``cuda_text.py``) at its first call. MLX makes arrays contiguous, so
strides follow from shapes. docs/CUDA.md explains the kernels.

An array made on the host is copied to the GPU while a kernel waits for it, so constant numbers are
made once.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
N blocks, D head_dim of keys, Dv of values.
"""

from __future__ import annotations

import math

import mlx.core as mx

from rotormlx.codec.format import BLOCK, KEY, Codec, Packed
from rotormlx.codec.limits import check_grid
from rotormlx.kernels import cuda_plan
from rotormlx.kernels.cuda_plan import MAX_HEAD_DIM, Plan, Shape, attend_plan
from rotormlx.kernels.source import matrices
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import constants, cuda_text
from rotormlx.mlx.backends.cuda_text import CODEC_THREADS
from rotormlx.mlx.backends.mlx_ops import MLXBackend, inverse_matrix
from rotormlx.mlx.cache.view import KVView

_DTYPES = {mx.float16: 0, mx.bfloat16: 1, mx.float32: 2}


def missing() -> str | None:
    """Return the reason why this process cannot run CUDA kernels in MLX, or None."""
    if not mx.cuda.is_available():
        return "MLX finds no CUDA GPU on this machine"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is the CPU"
    return None


class MLXCUDABackend(MLXBackend):
    """The backend with fused CUDA kernels; other operations are inherited."""

    name = "mlx_cuda"

    def _encode(
        self,
        x: mx.array,
        codec: Codec,
        channel_scale: mx.array | None,
        centres: mx.array | None,
        start: int,
        state: mx.array | None,
    ) -> Packed:
        """Compress whole blocks in one kernel; see :meth:`MLXBackend.encode`."""
        if codec.head_dim > MAX_HEAD_DIM:
            return super()._encode(x, codec, channel_scale, centres, start, state)
        batch, heads, tokens, head_dim = x.shape
        check_grid("encode", batch, heads)
        blocks = (batch, heads, tokens // BLOCK)
        outputs = [((*blocks, *codec.words_shape), mx.uint32), ((*blocks, BLOCK), mx.float16)]
        if takes_means := codec.role == KEY and centres is None:
            outputs.append(((*blocks, head_dim), mx.float16))
        given = codec.role == KEY and not takes_means
        text, has_scale = cuda_text.text_of(codec), channel_scale is not None
        made = cuda_text.codec_kernel("encode", text, has_scale, takes_means, state is not None)(
            inputs=[
                x,
                constants.coefficients(codec.rotation),
                constants.or_nothing(channel_scale, mx.float32),
                constants.or_nothing(centres if given else None, mx.float16),
                constants.or_nothing(state, mx.uint32),
                constants.numbers((_DTYPES[x.dtype], *blocks, int(given), start), mx.int32),
            ],
            grid=(CODEC_THREADS * blocks[2], heads, batch),
            threadgroup=(CODEC_THREADS, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return Packed(made[0], made[1], made[2] if takes_means else centres if given else None)

    def _decode(
        self, packed: Packed, codec: Codec, channel_scale: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Decode packed blocks in one kernel; see :meth:`MLXBackend.decode`."""
        if codec.head_dim > MAX_HEAD_DIM:
            return super()._decode(packed, codec, channel_scale, dtype)
        batch, heads, blocks = packed.scales.shape[:3]
        check_grid("decode", batch, heads)
        text, has_scale = cuda_text.text_of(codec), channel_scale is not None
        (out,) = cuda_text.codec_kernel("decode", text, has_scale)(
            inputs=[
                packed.words,
                packed.scales,
                constants.or_nothing(packed.centres, mx.float16),
                constants.coefficients(codec.rotation, back=True),
                constants.or_nothing(channel_scale, mx.float32),
                constants.numbers((_DTYPES[dtype], batch, heads, blocks), mx.int32),
            ],
            grid=(CODEC_THREADS * blocks, heads, batch),
            threadgroup=(CODEC_THREADS, 1, 1),
            output_shapes=[(batch, heads, blocks * BLOCK, codec.head_dim)],
            output_dtypes=[dtype],
        )
        return out

    def _attend(self, call: AttendCall) -> mx.array:
        """Attend over a partly packed cache; see :meth:`MLXBackend.attend`."""
        if call.larger_dim > MAX_HEAD_DIM:
            return super()._attend(call)
        check_grid("attend", call.batch, call.kv_heads)
        plan = attend_plan(_shape(call))
        # Contiguous once, because two kernels read the queries.
        call = call._replace(queries=mx.contiguous(call.queries))
        mask = _mask(call)
        numbers = _numbers(call, plan, mask)
        rotated = _rotated(call, plan, numbers)
        return _merged(call, plan, numbers, _parts(call, plan, numbers, rotated, mask))


# ---- attention ----------------------------------------------------------------------------------


def _shape(call: AttendCall) -> Shape:
    keys, values = call.keys.codec, call.values.codec
    batch, heads, length, _ = call.queries.shape
    return Shape(
        *(batch, heads, call.kv_heads, length),
        *(keys.head_dim, values.head_dim, keys.bits, values.bits),
        exact_tokens=call.most_exact_tokens,
        packed_tokens=call.keys.packed_tokens,
        is_float32=call.queries.dtype == mx.float32,
    )


def _numbers(call: AttendCall, plan: Plan, mask: mx.array) -> mx.array:
    """Return the numbers that kernels read by position, ``numbers`` in cuda_text.py."""
    keys, values = call.keys, call.values
    sizes = (call.batch, call.heads, call.kv_heads, call.length, keys.sink, call.mask_kind)
    return constants.numbers(
        (
            *(_DTYPES[call.queries.dtype], *sizes),
            *(*plan.exact, *plan.packed, keys.exact.shape[2]),
            *(1 if keys.packed is None else keys.packed.scales.shape[2],),
            *(1 if values.packed is None else values.packed.scales.shape[2],),
            # Strides of the mask, 0 along a broadcast axis.
            *_strides(mask.shape),
            *(_scale_stride(keys), _scale_stride(values)),
        ),
        # 64 bits, because strides of a mask of many queries and tokens exceed 32 bits.
        mx.int64,
    )


def _rotated(call: AttendCall, plan: Plan, numbers: mx.array) -> mx.array:
    """Return the queries in the rotated space of the keys, float32 ``[B, K, G, D]``."""
    keys = call.keys
    if not keys.packed_tokens:
        return constants.nothing(mx.float32)
    (rotated,) = cuda_text.query_kernel(*_side(keys), plan.matrix_rows)(
        inputs=[
            *(call.queries, constants.query_matrix(keys.codec.rotation)),
            *(constants.or_nothing(keys.channel_scale, mx.float32), numbers),
        ],
        grid=_row_grid(call, plan),
        threadgroup=(cuda_plan.THREADS, 1, 1),
        output_shapes=[(call.batch, call.kv_heads, call.group_rows, call.key_dim)],
        output_dtypes=[mx.float32],
    )
    return rotated


def _parts(
    call: AttendCall, plan: Plan, numbers: mx.array, rotated: mx.array, mask: mx.array
) -> list[mx.array]:
    """Return tops, totals and outputs of all parts, float32 ``[B, K, G, parts(, Dv)]``."""
    keys, values, dtype = call.keys, call.values, call.queries.dtype
    shape = (call.batch, call.kv_heads, call.group_rows, plan.parts)
    widths = (call.key_dim, call.value_dim, keys.codec.bits, values.codec.bits)
    return cuda_text.parts_kernel(*widths, plan.operands)(
        inputs=[
            *(call.queries, rotated, *_packed(keys), *_packed(values)[:2]),
            *(keys.exact.astype(dtype), values.exact.astype(dtype), mask),
            *(constants.lengths(keys), numbers, constants.numbers((call.scale,), mx.float32)),
        ],
        grid=(cuda_plan.THREADS * plan.tiles, call.batch * call.kv_heads, plan.parts),
        threadgroup=(cuda_plan.THREADS, 1, 1),
        output_shapes=[shape, shape, (*shape, call.value_dim)],
        output_dtypes=[mx.float32] * 3,
    )


def _merged(call: AttendCall, plan: Plan, numbers: mx.array, parts: list[mx.array]) -> mx.array:
    """Return the output ``[B, H, L, Dv]`` from the result of :func:`_parts`."""
    values, sink_logits = call.values, call.sink_logits
    (output,) = cuda_text.merge_kernel(*_side(values), plan.matrix_rows, sink_logits is not None)(
        inputs=[
            *(*parts, inverse_matrix(values.codec.rotation)),
            constants.or_nothing(values.channel_scale, mx.float32),
            constants.or_nothing(sink_logits, mx.float32).astype(mx.float32),
            numbers,
        ],
        grid=_row_grid(call, plan),
        threadgroup=(cuda_plan.THREADS, 1, 1),
        output_shapes=[call.output_shape],
        output_dtypes=[call.queries.dtype],
    )
    return output


def _row_grid(call: AttendCall, plan: Plan) -> tuple[int, int, int]:
    """Return the grid, in threads, of the kernels that multiply by a matrix."""
    blocks = -(-call.group_rows // plan.matrix_rows)
    return cuda_plan.THREADS * blocks, call.batch * call.kv_heads, 1


# ---- inputs -------------------------------------------------------------------------------------


def _side(view: KVView) -> tuple[int, int, bool]:
    """Return the values from which the query and merge kernels are generated."""
    rotation = view.codec.rotation
    return rotation.head_dim, matrices(rotation), view.channel_scale is not None


def _scale_stride(view: KVView) -> int:
    """Return the stride of the batch rows' channel scales; 0 if they share one."""
    scale = view.channel_scale
    return 0 if scale is None or scale.ndim == 2 else math.prod(scale.shape[1:])


def _packed(view: KVView) -> Packed:
    if view.packed_tokens and view.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    given = view.packed or Packed(None, None, None)
    dtypes = (mx.uint32, mx.float16, mx.float16)
    return Packed(*map(constants.or_nothing, given, dtypes))


def _mask(call: AttendCall) -> mx.array:
    """Return the mask with four axes, boolean or float32; a placeholder if there is none."""
    mask = call.mask_array
    if mask is None:
        return constants.nothing(mx.bool_, 4)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Return the strides of a contiguous array, 0 along axes of size 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(0 if size == 1 else step)
        step *= size
    return strides[::-1]
