"""The codec as fused CUDA kernels in MLX's own CUDA build: the device code of ``cuda_kernels/``.

MLX compiles the text when a kernel is first called. A body fills the arguments of
``cuda_kernels/launch.h`` from MLX's pointers; arrays come contiguous, so strides follow from
shapes. docs/CUDA.md says how the kernels work.

An array that the host makes comes to the GPU when a kernel waits for it, so numbers that do not
change are made once.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
N blocks, D head_dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, Codec, Packed
from rotormlx.codec.limits import check_grid
from rotormlx.codec.rotation import Rotation
from rotormlx.kernels.source import coefficients, cuda_header, matrices, read
from rotormlx.mlx.backends.first_call import FirstCallKernel
from rotormlx.mlx.backends.metal_attend import Parts, cut
from rotormlx.mlx.backends.mlx_ops import MLXBackend, check_rows, inverse_matrix
from rotormlx.mlx.cache.view import KVView

THREADS = 256
ATTEND_THREADS = 128
# Vectors of a lane are held in registers: longer ones are left to MLX's operations.
MAX_HEAD_DIM = 256
# Every GPU from sm_80 on gives a thread block so much shared memory.
MOST_SHARED_BYTES = 99 * 1024
# Of a large GPU, and the most parts of a sequence.
MULTIPROCESSORS, MAX_PARTS = 132, 512
# Exact tokens that a part is a multiple of.
EXACT_STEP = 32
# So many query rows share, by eight, what they read of a matrix; fewer are done at once.
MANY_ROWS = 2048
_DTYPES = {mx.float16: 0, mx.bfloat16: 1, mx.float32: 2}

Kernel = Callable[..., list[mx.array]]


def missing() -> str | None:
    """What keeps this process from running CUDA kernels in MLX, or None."""
    if not mx.cuda.is_available():
        return "MLX finds no CUDA GPU on this machine"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is the CPU"
    return None


class MLXCUDABackend(MLXBackend):
    """What is fused runs as CUDA kernels; the rest is inherited."""

    name = "mlx_cuda"

    def encode(
        self,
        x: mx.array,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        centres: mx.array | None = None,
    ) -> Packed:
        """Compress whole blocks in one kernel; see :meth:`MLXBackend.encode`."""
        check_rows(x, codec)
        if codec.head_dim > MAX_HEAD_DIM:
            return super().encode(x, codec, channel_scale=channel_scale, centres=centres)
        batch, heads, tokens, head_dim = x.shape
        check_grid("encode", batch, heads)
        blocks = (batch, heads, tokens // BLOCK)
        outputs = [((*blocks, *codec.words_shape), mx.uint32), ((*blocks, BLOCK), mx.float16)]
        if takes_means := codec.role == KEY and centres is None:
            outputs.append(((*blocks, head_dim), mx.float16))
        given = codec.role == KEY and not takes_means
        made = _codec_kernel("encode", _text_of(codec), channel_scale is not None, takes_means)(
            inputs=[
                x,
                _coefficients(codec.rotation),
                _or_nothing(channel_scale, mx.float32),
                _or_nothing(centres if given else None, mx.float16),
                _kept((_DTYPES[x.dtype], *blocks, int(given)), mx.int32),
            ],
            grid=(THREADS * blocks[2], heads, batch),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
        return Packed(made[0], made[1], made[2] if takes_means else centres if given else None)

    def decode(
        self,
        packed: Packed,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """The vectors that packed blocks stand for; see :meth:`MLXBackend.decode`."""
        if codec.head_dim > MAX_HEAD_DIM:
            return super().decode(packed, codec, channel_scale=channel_scale, dtype=dtype)
        batch, heads, blocks = packed.scales.shape[:3]
        check_grid("decode", batch, heads)
        (out,) = _codec_kernel("decode", _text_of(codec), channel_scale is not None, False)(
            inputs=[
                packed.words,
                packed.scales,
                _or_nothing(packed.centres, mx.float16),
                _coefficients(codec.rotation, back=True),
                _or_nothing(channel_scale, mx.float32),
                _kept((_DTYPES[dtype], batch, heads, blocks), mx.int32),
            ],
            grid=(THREADS * blocks, heads, batch),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, heads, blocks * BLOCK, codec.head_dim)],
            output_dtypes=[dtype],
        )
        return out

    def attend(
        self,
        queries: mx.array,
        keys: KVView,
        values: KVView,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention over a partly packed cache; see :meth:`MLXBackend.attend`."""
        key_dim, value_dim = keys.shape[3], values.shape[3]
        if max(key_dim, value_dim) > MAX_HEAD_DIM:
            return super().attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        batch, heads, length, _ = queries.shape
        kv_heads = keys.shape[1]
        check_grid("attend", batch, kv_heads)
        group = heads // kv_heads * length
        operands = _operands(keys.codec, values.codec, queries.dtype, group)
        tiles = -(-group // (8 * max(operands, 1)))
        exact, packed = cut_both(
            min(keys.exact.shape[2], keys.tokens),
            keys.packed_tokens,
            operands,
            batch * kv_heads * tiles,
        )
        parts = exact.number + packed.number
        kind, visible = _mask(mask, (batch, heads, length, keys.tokens))
        numbers = _kept(
            (
                *(_DTYPES[queries.dtype], batch, heads, kv_heads, length, keys.sink, kind),
                *(*exact, *packed, keys.exact.shape[2]),
                *(1 if keys.packed is None else keys.packed.scales.shape[2],),
                *(1 if values.packed is None else values.packed.scales.shape[2],),
                # Strides of the mask: 0 along an axis that is broadcast.
                *_strides(visible.shape),
                *(_scale_stride(keys), _scale_stride(values)),
            ),
            # Strides of a mask of many queries and tokens are no 32-bit integers.
            mx.int64,
        )
        rows = (batch, kv_heads, group)
        together = 8 if batch * kv_heads * group >= MANY_ROWS else 1
        row_grid = (ATTEND_THREADS * -(-group // together), batch * kv_heads, 1)
        # Two kernels read them.
        queries = mx.contiguous(queries)
        rotated = _nothing(mx.float32)
        if keys.packed_tokens:
            (rotated,) = _query_kernel(*_side(keys), together)(
                inputs=[
                    *(queries, _key_matrix(keys.codec.rotation)),
                    *(_or_nothing(keys.channel_scale, mx.float32), numbers),
                ],
                grid=row_grid,
                threadgroup=(ATTEND_THREADS, 1, 1),
                output_shapes=[(*rows, key_dim)],
                output_dtypes=[mx.float32],
            )
        key_packed, value_packed = _packed(keys), _packed(values)
        tops, totals, outputs = _parts_kernel(keys.codec, values.codec, operands)(
            inputs=[
                *(queries, rotated, *key_packed, *value_packed[:2]),
                *(keys.exact.astype(queries.dtype), values.exact.astype(queries.dtype)),
                *(visible, _kept(keys.lengths, mx.int32), numbers),
                _kept((scale,), mx.float32),
            ],
            grid=(ATTEND_THREADS * tiles, batch * kv_heads, parts),
            threadgroup=(ATTEND_THREADS, 1, 1),
            output_shapes=[(*rows, parts), (*rows, parts), (*rows, parts, value_dim)],
            output_dtypes=[mx.float32] * 3,
        )
        (output,) = _merge_kernel(*_side(values), together, sinks is not None)(
            inputs=[
                *(tops, totals, outputs, inverse_matrix(values.codec.rotation)),
                _or_nothing(values.channel_scale, mx.float32),
                _nothing(mx.float32) if sinks is None else sinks.astype(mx.float32),
                numbers,
            ],
            grid=row_grid,
            threadgroup=(ATTEND_THREADS, 1, 1),
            output_shapes=[(batch, heads, length, value_dim)],
            output_dtypes=[queries.dtype],
        )
        return output


def cut_both(
    exact_tokens: int, packed_tokens: int, operands: int, thread_blocks: int
) -> tuple[Parts, Parts]:
    """The parts of exact and of packed tokens, as ``plan_attend`` of ``launch_attend.cu`` has them.

    Args:
        exact_tokens: The most of a batch row.
        packed_tokens: The most of a batch row.
        operands: See ``_operands``.
        thread_blocks: Of one part.
    """
    at_once = MULTIPROCESSORS * (2 if operands == 2 else 3)
    limit = max(1, min(MAX_PARTS // 2, at_once // thread_blocks))
    exact_cost = 4 * exact_tokens
    exact_limit = limit * exact_cost // max(exact_cost + packed_tokens, 1)
    exact = cut(exact_tokens, max(exact_limit, 1), EXACT_STEP)
    beside = cut(packed_tokens, max(limit - exact.number, 1))
    after = cut(packed_tokens, limit)
    return exact, beside if beside.tokens <= after.tokens + 4 * exact.tokens else after


# ---- inputs -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _kept(numbers: tuple[object, ...], dtype: mx.Dtype) -> mx.array:
    """An array of numbers that other calls, and other layers, have as well."""
    return mx.array(numbers, dtype)


@cache
def _coefficients(rotation: Rotation, *, back: bool = False) -> mx.array:
    return mx.array(coefficients(rotation, back=back))


@cache
def _key_matrix(rotation: Rotation) -> mx.array:
    """What rows of queries are multiplied by: the levels of the keys will meet them."""
    return mx.array(rotation.inverse.astype(np.float32))


@cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    """An array that no thread reads."""
    return mx.array([0], dtype)


def _or_nothing(array: mx.array | None, dtype: mx.Dtype) -> mx.array:
    return _nothing(dtype) if array is None else array


def _side(view: KVView) -> tuple[int, int, bool]:
    """What the text of the kernels around the first pass depends on."""
    rotation = view.codec.rotation
    return rotation.head_dim, matrices(rotation), view.channel_scale is not None


def _scale_stride(view: KVView) -> int:
    """Of the batch rows' channel scales; 0 where they have one together."""
    scale = view.channel_scale
    return 0 if scale is None or scale.ndim == 2 else math.prod(scale.shape[1:])


def _packed(view: KVView) -> Packed:
    if view.packed_tokens and view.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    given = view.packed or Packed(None, None, None)
    dtypes = (mx.uint32, mx.float16, mx.float16)
    return Packed(*(_or_nothing(a, dtype) for a, dtype in zip(given, dtypes, strict=True)))


def _mask(mask: mx.array | str | None, scores: tuple[int, int, int, int]) -> tuple[int, mx.array]:
    """The kind of a mask (see launch.h), and the mask with four axes, boolean or float32."""
    if mask is None or isinstance(mask, str):
        return 0 if mask is None else 1, _kept(((((False,),),),), mx.bool_)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype == mx.bool_:
        return 2, mask
    return 3, mask.astype(mx.float32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a contiguous array, 0 along axes of size 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(0 if size == 1 else step)
        step *= size
    return strides[::-1]


def _operands(keys: Codec, values: Codec, dtype: mx.Dtype, group: int) -> int:
    """Operands of 8 query rows that a thread block takes on the tensor cores; 0 for float32."""
    wanted = 0 if dtype == mx.float32 else 1 if group <= 8 else 2
    while wanted and shared_bytes(keys, values, wanted) > MOST_SHARED_BYTES:
        wanted -= 1
    return wanted


def shared_bytes(keys: Codec, values: Codec, operands: int) -> int:
    """Shared memory of a thread block: ``SHARED_BYTES`` of the kernel's structures."""
    rows = 8 * max(operands, 1)
    levels = 2**keys.bits + 2**values.bits
    plain = 4 * (rows * (keys.head_dim + 4 * BLOCK + 4) + levels)
    if operands == 0:
        return plain
    key_loads, key_steps = _loads(keys.bits, keys.head_dim)
    value_loads, _ = _loads(values.bits, BLOCK)
    slot = max(2 * key_loads + 1, -(-values.head_dim // 32) * value_loads)
    slots = 4 if slot <= 8 else 3 if slot <= 24 else 2
    operand_steps = key_steps + -(-keys.head_dim // 32)
    units = 128 * slots * slot + 32 * operands * operand_steps
    units += rows // 2 + 4 * rows * BLOCK // 8 + 16 * rows
    units += 32 if 8 in (keys.bits, values.bits) else 0
    return max(16 * units, 16 * rows * (2 + values.head_dim), plain)


def query_shared_bytes(key_dim: int, rows: int) -> int:
    """The same of the kernel that rotates queries: ``QueryShape``, in bytes."""
    return 4 * rows * key_dim * (1 + ATTEND_THREADS // 32)


def merge_shared_bytes(value_dim: int, rows: int) -> int:
    """The same of the kernel that merges the parts: ``MergeShape``, in bytes."""
    return 4 * rows * (value_dim + max(ATTEND_THREADS // 32 * value_dim, MAX_PARTS))


def _loads(bits: int, axis: int) -> tuple[int, int]:
    """Words of four lanes that a thread loads for the packed axis, and steps of 32 codes."""
    share = 2 if bits in (2, 3) else 1
    loads = -(-axis // (32 * share))
    return loads * (2 if bits in (3, 8) else 1), loads * share


# ---- kernels ------------------------------------------------------------------------------------


class _CodecText(NamedTuple):
    """What the text of a codec's kernels depends on."""

    role: str
    bits: int
    head_dim: int
    rotation: str
    header: str
    rows: int
    matrices: int


@cache
def _text_of(codec: Codec) -> _CodecText:
    header = cuda_header(codec)
    facts = (codec.role, codec.bits, codec.head_dim, codec.rotation.name)
    return _CodecText(*facts, header, codec.words_shape[0], matrices(codec.rotation))


def _header(*texts: str) -> str:
    """Texts behind what all kernels need, without what MLX includes itself.

    Without comments and indentation too: MLX puts the text together and hashes it at every call.
    """
    common = [
        *(read("cuda_kernels/vocabulary.cuh"), f"constexpr int BLOCK = {BLOCK};\n"),
        *(read("cuda_kernels/launch.h"), read("cuda_kernels/scores.cuh")),
    ]
    text = "\n".join([*common, *texts])
    text = re.sub(r"//.*$|^#(include|pragma once).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n\s+", "\n", text) + "\n"


def _codec_header(*texts: str) -> str:
    """The same with levels and rotations."""
    shared = (read(f"shared_kernels/{name}.h") for name in ("levels", "rotation"))
    return _header(*shared, *texts)


def _attend_header() -> str:
    files = ("fragments.cuh", "attend.cu", "attend_plain.cu")
    return _codec_header(*(read(f"cuda_kernels/{name}") for name in files))


# Axes (B, K, N) of contiguous packed arrays.
_PACKED_TEXT = """
DEVICE_FN void place_packed(rotormlx_packed& packed, const uint32_t* words, const __half* scales,
                  const __half* centres, int kv_heads, int blocks, int block_words, int head_dim) {
  packed.words = const_cast<uint32_t*>(words);
  packed.scales = const_cast<__half*>(scales);
  packed.centres = const_cast<__half*>(centres);
  int64_t heads = blocks;
  const int64_t sizes[3] = {heads * kv_heads, heads, 1};
  for (int i = 0; i < 3; ++i) {
    packed.words_strides[i] = sizes[i] * block_words;
    packed.scales_strides[i] = sizes[i] * BLOCK;
    packed.centres_strides[i] = sizes[i] * head_dim;
  }
}
"""

_CODEC_TEXT = """
struct CODEC {{
  enum {{ IS_KEY = {is_key}, BITS = {bits}, D = {d}, LANES = NS::LANES, HELD = NS::HELD }};
  static DEVICE_FN const float* boundaries() {{ return NS::BOUNDARIES; }}
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {{
    NS::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }}
  template <int ROWS>
  static DEVICE_FN void unrotate(float* rows, const float* coefficients, uint lane) {{
    NS::unrotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }}
}};
"""

_ENCODE_BODY = """
  rotormlx_encode_arguments call = {};
  call.dtype = numbers[0];
  call.batch = numbers[1];
  call.kv_heads = numbers[2];
  call.blocks = numbers[3];
  call.given_centres = numbers[4];
  call.x = input;
  const int64_t head_tokens = int64_t(call.blocks) * BLOCK;
  call.x_strides[0] = call.kv_heads * head_tokens * CODEC::D;
  call.x_strides[1] = head_tokens * CODEC::D;
  call.x_strides[2] = CODEC::D;
  call.coefficients = coefficients + int(blockIdx.y) % MATRICES * (CODEC::D * CODEC::D);
  call.channel_scale = SCALE;
  place_packed(call.packed, words, scales, CENTRES, call.kv_heads, call.blocks, BLOCK_WORDS,
               CODEC::D);
  encode_block<CODEC, THREADS>(call);
"""

_DECODE_BODY = """
  rotormlx_decode_arguments call = {};
  call.dtype = numbers[0];
  call.batch = numbers[1];
  call.kv_heads = numbers[2];
  call.blocks = numbers[3];
  place_packed(call.packed, words, scales, centres, call.kv_heads, call.blocks, BLOCK_WORDS,
               CODEC::D);
  call.coefficients = coefficients + int(blockIdx.y) % MATRICES * (CODEC::D * CODEC::D);
  call.channel_scale = SCALE;
  call.out = out;
  decode_block<CODEC, THREADS>(call);
"""

# What the kernels of attention read of `numbers`.
_CALL_TEXT = """
  extern __shared__ uint4 shared[];
  AttendParts all = {};
  rotormlx_attend_arguments& call = all.call;
  call.dtype = numbers[0];
  call.batch = numbers[1];
  call.heads = numbers[2];
  call.kv_heads = numbers[3];
  call.length = numbers[4];
  call.sink = numbers[5];
  call.mask_kind = numbers[6];
  all.exact_parts = numbers[7];
  all.exact_part_tokens = numbers[8];
  all.packed_parts = numbers[9];
  all.packed_part_tokens = numbers[10];
"""

_QUERIES_TEXT = """
  call.q = queries;
  call.q_strides[2] = KEY_DIM;
  call.q_strides[1] = call.length * call.q_strides[2];
  call.q_strides[0] = call.heads * call.q_strides[1];
"""

_QUERY_BODY = """
  const int matrix = int(blockIdx.y) % call.kv_heads % MATRICES;
  call.key_matrix = key_matrix + matrix * (KEY_DIM * KEY_DIM);
  call.key_channel_scale = SCALE;
  call.key_channel_scale_stride = numbers[18];
  all.rotated = rotated;
  rotate_queries<KEY_DIM, ROWS, THREADS>(all, reinterpret_cast<float*>(shared));
"""

_PARTS_BODY = """
  call.scale = scale[0];
  call.lengths = lengths;
  place_packed(call.keys, key_words, key_scales, centres, call.kv_heads, numbers[12], KEY_WORDS,
               KEY_DIM);
  place_packed(call.values, value_words, value_scales, nullptr, call.kv_heads, numbers[13],
               VALUE_WORDS, VALUE_DIM);
  call.exact_keys = tail_keys;
  call.exact_values = tail_values;
  for (int i = 0; i < 3; ++i) {
    const int64_t rows =
        i == 2 ? 1 : i == 1 ? numbers[11] : int64_t(numbers[11]) * call.kv_heads;
    call.exact_keys_strides[i] = rows * KEY_DIM;
    call.exact_values_strides[i] = rows * VALUE_DIM;
  }
  call.mask = visible;
  for (int i = 0; i < 4; ++i) call.mask_strides[i] = numbers[14 + i];
  all.rotated = const_cast<float*>(rotated);
  all.tops = part_tops;
  all.totals = part_totals;
  all.outputs = part_outputs;
"""

_MERGE_BODY = """
  const int matrix = int(blockIdx.y) % call.kv_heads % MATRICES;
  call.value_matrix = unrotation + matrix * (VALUE_DIM * VALUE_DIM);
  call.value_channel_scale = SCALE;
  call.value_channel_scale_stride = numbers[19];
  call.sinks = SINKS;
  call.out = out;
  all.tops = const_cast<float*>(tops);
  all.totals = const_cast<float*>(totals);
  all.outputs = const_cast<float*>(outputs);
  merge_parts<VALUE_DIM, ROWS, THREADS>(all, reinterpret_cast<float*>(shared));
"""


def _filled(body: str, **words: object) -> str:
    """A body with what its words in capitals stand for."""
    for word, meaning in words.items():
        body = body.replace(word, str(meaning))
    return body


@cache
def _codec_kernel(name: str, text: _CodecText, has_scale: bool, takes_means: bool) -> Kernel:
    """The kernel ``encode`` or ``decode``."""
    is_key = text.role == KEY
    lanes = BLOCK if is_key else text.head_dim
    codec_text = _CODEC_TEXT.format(is_key=int(is_key), bits=text.bits, d=text.head_dim)
    codec_text = codec_text.replace("NS::", f"{text.role}_rotation::")
    body = _filled(
        {"encode": _ENCODE_BODY, "decode": _DECODE_BODY}[name],
        MATRICES=text.matrices,
        SCALE="channel_scale" if has_scale else "nullptr",
        CENTRES="centres" if takes_means else "given_centres",
        BLOCK_WORDS=text.rows * lanes,
        THREADS=THREADS,
    )
    inputs, outputs = {
        "encode": (
            ["input", "coefficients", "channel_scale", "given_centres", "numbers"],
            ["words", "scales", *(["centres"] if takes_means else [])],
        ),
        "decode": (
            ["words", "scales", "centres", "coefficients", "channel_scale", "numbers"],
            ["out"],
        ),
    }[name]
    facts = (*(name, text.role, text.bits, text.head_dim), text.rotation, text.matrices)
    return _kernel(
        "_".join(map(str, (*facts, has_scale, takes_means))),
        inputs,
        outputs,
        body,
        _codec_header(text.header, read(f"cuda_kernels/{name}.cu"), _PACKED_TEXT, codec_text),
    )


@cache
def _parts_kernel(keys: Codec, values: Codec, operands: int) -> Kernel:
    dims = (keys.bits, values.bits, keys.head_dim, values.head_dim)
    arguments = ", ".join(map(str, dims))
    plain = f"AttendPlain<{arguments}, {8 * max(operands, 1)}>"
    run = f"{plain}::run(all, plain_shared);"
    if operands:
        run = (
            f"if (int(blockIdx.z) < all.exact_parts) {plain}::run_part<true>(all, plain_shared);\n"
            f"  else AttendPacked<{arguments}, {operands}>::run(all, shared);"
        )
    shared = "  float* plain_shared = reinterpret_cast<float*>(shared);\n"
    body = _filled(
        f"{_CALL_TEXT}{_QUERIES_TEXT}{_PARTS_BODY}{shared}  {run}\n",
        KEY_WORDS=keys.words_shape[0] * BLOCK,
        VALUE_WORDS=values.words_shape[0] * values.head_dim,
        KEY_DIM=keys.head_dim,
        VALUE_DIM=values.head_dim,
    )
    return _kernel(
        "_".join(map(str, ("attend", *dims, operands))),
        [
            *(
                "queries",
                "rotated",
                "key_words",
                "key_scales",
                "centres",
                "value_words",
                "value_scales",
            ),
            *("tail_keys", "tail_values", "visible", "lengths", "numbers", "scale"),
        ],
        ["part_tops", "part_totals", "part_outputs"],
        body,
        _attend_header() + _PACKED_TEXT,
        shared_bytes(keys, values, operands),
    )


@cache
def _query_kernel(key_dim: int, matrices: int, has_scale: bool, rows: int) -> Kernel:
    body = _filled(
        _CALL_TEXT + _QUERIES_TEXT + _QUERY_BODY,
        KEY_DIM=key_dim,
        MATRICES=matrices,
        ROWS=rows,
        THREADS=ATTEND_THREADS,
        SCALE="channel_scale" if has_scale else "nullptr",
    )
    return _kernel(
        f"attend_query_{key_dim}_{matrices}_{has_scale}_{rows}",
        ["queries", "key_matrix", "channel_scale", "numbers"],
        ["rotated"],
        body,
        _header(read("cuda_kernels/attend_query.cu")),
        query_shared_bytes(key_dim, rows),
    )


@cache
def _merge_kernel(
    value_dim: int, matrices: int, has_scale: bool, rows: int, has_sinks: bool
) -> Kernel:
    body = _filled(
        _CALL_TEXT + _MERGE_BODY,
        VALUE_DIM=value_dim,
        MATRICES=matrices,
        ROWS=rows,
        THREADS=ATTEND_THREADS,
        SCALE="channel_scale" if has_scale else "nullptr",
        SINKS="sinks" if has_sinks else "nullptr",
    )
    return _kernel(
        f"attend_merge_{value_dim}_{matrices}_{has_scale}_{rows}_{has_sinks}",
        ["tops", "totals", "outputs", "unrotation", "channel_scale", "sinks", "numbers"],
        ["out"],
        body,
        _header(read("cuda_kernels/attend_merge.cu")),
        merge_shared_bytes(value_dim, rows),
    )


def _kernel(
    name: str,
    inputs: list[str],
    outputs: list[str],
    source: str,
    header: str,
    shared_memory: int = 0,
) -> Kernel:
    return FirstCallKernel(
        f"rotormlx_{name}",
        mx.fast.cuda_kernel,
        input_names=inputs,
        output_names=outputs,
        source=source,
        header=header,
        shared_memory=shared_memory,
    )
