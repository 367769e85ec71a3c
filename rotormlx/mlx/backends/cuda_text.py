"""The kernel texts that MLX's own CUDA build compiles, which wrap ``cuda_kernels/``.

A body fills the arguments of ``cuda_kernels/launch.h`` from MLX's pointers and calls the device
function. MLX makes arrays contiguous, so strides follow from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, KEY, VALUE, Codec, words_shape
from rotormlx.kernels import cuda_plan
from rotormlx.kernels.source import cuda_header, matrices, read
from rotormlx.mlx.backends.first_call import FirstCallKernel

_SIGN = r"[-+*/&|<>=!:]"
_NEEDLESS = re.compile(rf" +(?!(?<=\w )\w)(?!(?<={_SIGN} ){_SIGN})")
# Threads per thread block of the kernels that encode and decode.
CODEC_THREADS = 256

Kernel = Callable[..., list[mx.array]]


class CodecText(NamedTuple):
    """The values from which the kernels of a codec are generated."""

    role: str
    bits: int
    head_dim: int
    rotation: str
    header: str
    rows: int
    matrices: int


@derived
def text_of(codec: Codec) -> CodecText:
    """Return the values from which the kernels of a codec are generated."""
    header = cuda_header(codec)
    facts = (codec.role, codec.bits, codec.head_dim, codec.rotation.name)
    return CodecText(*facts, header, codec.words_shape[0], matrices(codec.rotation))


def header_of(*texts: str) -> str:
    """Return the common header and then these texts, minified, without MLX's own includes."""
    common = [
        *(read("cuda_kernels/vocabulary.cuh"), f"constexpr int BLOCK = {BLOCK};\n"),
        *(read("cuda_kernels/launch.h"), read("cuda_kernels/scores.cuh")),
    ]
    text = "\n".join([*common, *texts])
    return minified(re.sub(r"^#(include|pragma once).*$", "", text, flags=re.MULTILINE))


def minified(text: str) -> str:
    """Return a text without comments and needless spaces, since MLX hashes it at every call.

    Line breaks stay, so that line numbers in compiler messages are useful.
    """
    text = re.sub(r"//.*$", "", text, flags=re.MULTILINE)
    lines = (line.strip() for line in text.splitlines())
    return "".join(_without_spaces(line) + "\n" for line in lines if line)


def _without_spaces(line: str) -> str:
    """Return a line with spaces only between two words or two operator signs."""
    if line.startswith("#"):
        return line
    parts = re.split(r'("(?:[^"\\]|\\.)*")', line)  # strings, at odd indices, stay unchanged
    parts[::2] = (_NEEDLESS.sub("", part) for part in parts[::2])
    return "".join(parts)


def codec_header(*texts: str) -> str:
    """Return the header with the functions for levels and rotations."""
    shared = (read(f"shared_kernels/{name}.h") for name in ("levels", "trellis", "rotation"))
    return header_of(*shared, *texts)


def attend_header() -> str:
    """Return the header with the functions that compute one part."""
    shared = (read(f"shared_kernels/{name}.h") for name in ("levels", "trellis"))
    files = ("fragments.cuh", "attend.cu", "attend_plain.cu")
    return header_of(*shared, *(read(f"cuda_kernels/{name}") for name in files))


# Sets pointers, and strides of the axes (B, K, N), for contiguous packed arrays.
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
  enum {{ NEIGHBOURS = NS::NEIGHBOURS, CELL_COUNT = NS::CELL_COUNT }};
  enum {{ CELLS_OF_UNIT = NS::CELLS_OF_UNIT }};
  static DEVICE_FN const float* boundaries() {{ return NS::BOUNDARIES; }}
  static DEVICE_FN const uint2* cells() {{ return NS::CELLS; }}
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {{
    NS::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }}
  template <int NEAR_LANES, int ROWS>
  static DEVICE_FN void rotate_near(float* rows, const float* coefficients, uint lane) {{
    NS::rotate_near<NEAR_LANES, ROWS>(rows, coefficients, lane);
  }}
  template <int ROWS>
  static DEVICE_FN void rotate_far(float* rows, const float* coefficients, uint lane) {{
    NS::rotate_far<LANES, ROWS>(rows, coefficients, lane);
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
  call.coefficients = coefficients;
  call.coefficients_stride = MATRICES > 1 ? CODEC::D * CODEC::D : 0;
  call.channel_scale = SCALE;
  call.start = numbers[5];
  call.state = STATE;
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
  call.coefficients = coefficients;
  call.coefficients_stride = MATRICES > 1 ? CODEC::D * CODEC::D : 0;
  call.channel_scale = SCALE;
  call.out = out;
  decode_block<CODEC, THREADS>(call);
"""

# Reads `numbers` in the kernels of attention.
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
  call.exact_tokens = numbers[11];
  call.packed_tokens = numbers[12] * BLOCK;
  call.mask_columns = call.packed_tokens + call.exact_tokens;
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
  call.key_matrix = key_matrix;
  call.key_matrix_stride = MATRICES > 1 ? KEY_DIM * KEY_DIM : 0;
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
  call.value_matrix = unrotation;
  call.value_matrix_stride = MATRICES > 1 ? VALUE_DIM * VALUE_DIM : 0;
  call.value_channel_scale = SCALE;
  call.value_channel_scale_stride = numbers[19];
  call.sink_logits = SINK_LOGITS;
  call.out = out;
  all.tops = const_cast<float*>(tops);
  all.totals = const_cast<float*>(totals);
  all.outputs = const_cast<float*>(outputs);
  merge_parts<VALUE_DIM, ROWS, THREADS>(all, reinterpret_cast<float*>(shared));
"""


def _filled(body: str, **words: object) -> str:
    """Return a body with its placeholders in capitals replaced."""
    for word, meaning in words.items():
        body = body.replace(word, str(meaning))
    return body


@cache
def codec_kernel(
    name: str, text: CodecText, has_scale: bool, takes_means: bool = False, has_state: bool = False
) -> Kernel:
    """Return the kernel ``encode`` or ``decode``."""
    is_key = text.role == KEY
    lanes = BLOCK if is_key else text.head_dim
    codec_text = _CODEC_TEXT.format(is_key=int(is_key), bits=text.bits, d=text.head_dim)
    codec_text = codec_text.replace("NS::", f"{text.role}_rotation::")
    body = _filled(
        {"encode": _ENCODE_BODY, "decode": _DECODE_BODY}[name],
        MATRICES=text.matrices,
        SCALE="channel_scale" if has_scale else "nullptr",
        CENTRES="centres" if takes_means else "given_centres",
        STATE="state" if has_state else "nullptr",
        BLOCK_WORDS=text.rows * lanes,
        THREADS=CODEC_THREADS,
    )
    inputs, outputs = {
        "encode": (
            ["input", "coefficients", "channel_scale", "given_centres", "state", "numbers"],
            ["words", "scales", *(["centres"] if takes_means else [])],
        ),
        "decode": (
            ["words", "scales", "centres", "coefficients", "channel_scale", "numbers"],
            ["out"],
        ),
    }[name]
    facts = (*(name, text.role, text.bits, text.head_dim), text.rotation, text.matrices)
    return _kernel(
        "_".join(map(str, (*facts, has_scale, takes_means, has_state))),
        inputs,
        outputs,
        body,
        codec_header(text.header, read(f"cuda_kernels/{name}.cu"), _PACKED_TEXT, codec_text),
    )


@cache
def parts_kernel(
    key_dim: int, value_dim: int, key_bits: int, value_bits: int, operands: int
) -> Kernel:
    """Return the kernel that computes a part; ``operands`` as in :class:`cuda_plan.Plan`."""
    widths = (key_bits, value_bits, key_dim, value_dim)
    key_rows, _ = words_shape(KEY, key_bits, key_dim)
    value_rows, _ = words_shape(VALUE, value_bits, value_dim)
    arguments = ", ".join(map(str, widths))
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
        KEY_WORDS=key_rows * BLOCK,
        VALUE_WORDS=value_rows * value_dim,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
    )
    return _kernel(
        "_".join(map(str, ("attend", *widths, operands))),
        [
            *("queries", "rotated", "key_words", "key_scales", "centres"),
            *("value_words", "value_scales", "tail_keys", "tail_values"),
            *("visible", "lengths", "numbers", "scale"),
        ],
        ["part_tops", "part_totals", "part_outputs"],
        body,
        attend_header() + _PACKED_TEXT,
        cuda_plan.part_shared_bytes(key_dim, value_dim, key_bits, value_bits, operands),
    )


@cache
def query_kernel(key_dim: int, matrices: int, has_scale: bool, rows: int) -> Kernel:
    """Return the kernel that rotates queries, ``rows`` of them per thread block."""
    body = _filled(
        _CALL_TEXT + _QUERIES_TEXT + _QUERY_BODY,
        KEY_DIM=key_dim,
        MATRICES=matrices,
        ROWS=rows,
        THREADS=cuda_plan.THREADS,
        SCALE="channel_scale" if has_scale else "nullptr",
    )
    return _kernel(
        f"attend_query_{key_dim}_{matrices}_{has_scale}_{rows}",
        ["queries", "key_matrix", "channel_scale", "numbers"],
        ["rotated"],
        body,
        header_of(read("cuda_kernels/attend_query.cu")),
        cuda_plan.query_shared_bytes(key_dim, rows),
    )


@cache
def merge_kernel(
    value_dim: int, matrices: int, has_scale: bool, rows: int, has_sink_logits: bool
) -> Kernel:
    """Return the kernel that merges parts, ``rows`` query rows per thread block."""
    body = _filled(
        _CALL_TEXT + _MERGE_BODY,
        VALUE_DIM=value_dim,
        MATRICES=matrices,
        ROWS=rows,
        THREADS=cuda_plan.THREADS,
        SCALE="channel_scale" if has_scale else "nullptr",
        SINK_LOGITS="sink_logits" if has_sink_logits else "nullptr",
    )
    return _kernel(
        f"attend_merge_{value_dim}_{matrices}_{has_scale}_{rows}_{has_sink_logits}",
        ["tops", "totals", "outputs", "unrotation", "channel_scale", "sink_logits", "numbers"],
        ["out"],
        body,
        header_of(read("cuda_kernels/attend_merge.cu")),
        cuda_plan.merge_shared_bytes(value_dim, rows),
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
