"""The codec as fused Metal kernels; docs/KERNELS.md explains each of them.

Shapes: B batch, K KV heads, N blocks, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, KEY, VALUE, Codec, Packed
from rotormlx.codec.rotation import Rotation, rotation
from rotormlx.config import BITS
from rotormlx.kernels.source import (
    KernelText,
    boundaries_text,
    lanes_of_row,
    matrices,
    metal_text,
    read,
    rotation_text,
    row_template,
)
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import constants
from rotormlx.mlx.backends.first_call import FirstCallKernel
from rotormlx.mlx.backends.metal_attend import attend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.dtypes import FLOATS

# Threads per threadgroup; every pipeline allows this many, whatever registers it uses.
THREADS = 256
THREADGROUP_BYTES = 32 * 1024

Kernel = Callable[..., list[mx.array]]


def missing() -> str | None:
    """Return the reason why this process cannot run Metal kernels, or None."""
    if not mx.metal.is_available():
        return "MLX finds no Metal GPU on this machine"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "MLX's default device is the CPU"
    return None


class MetalBackend(MLXBackend):
    """The backend with fused Metal kernels; other operations are inherited."""

    name = "metal"

    def _encode(
        self,
        x: mx.array,
        codec: Codec,
        channel_scale: mx.array | None,
        centres: mx.array | None,
        start: int,
        state: mx.array | None,
    ) -> Packed:
        """Compress whole blocks in one kernel; see :meth:`MLXBackend.encode`.

        A head_dim above 336 takes the inherited path, because its block of codes exceeds the
        threadgroup memory.
        """
        if encode_bytes(codec) > THREADGROUP_BYTES:
            return super()._encode(x, codec, channel_scale, centres, start, state)
        batch, heads, tokens, _ = x.shape
        blocks = (batch, heads, tokens // BLOCK)
        outputs = {
            "words": ((*blocks, *codec.words_shape), mx.uint32),
            "scales": ((*blocks, BLOCK), mx.float16),
        }
        macros: tuple[str, ...] = ()
        if codec.role == VALUE:
            centres = None
        elif centres is None:
            outputs["centres"] = ((*blocks, codec.head_dim), mx.float16)
            macros = ("CENTRE_MEANS",)
        inputs: dict[str, Any] = {"x": x, "coefficients": constants.coefficients(codec.rotation)}
        if start and codec.has_state:
            inputs["start"] = start
            if state is None:
                state = mx.zeros((*blocks, codec.head_dim), mx.uint32)
        else:
            state = None
        made = _launch(
            "encode",
            codec,
            inputs=inputs,
            optional_inputs={"centres": centres, "channel_scale": channel_scale, "state": state},
            outputs=outputs,
            macros=macros,
            dtype=x.dtype,
            blocks=blocks,
        )
        return Packed(made["words"], made["scales"], made.get("centres", centres))

    def _decode(
        self, packed: Packed, codec: Codec, channel_scale: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Decode packed blocks in one kernel; see :meth:`MLXBackend.decode`."""
        batch, heads, count = packed.words.shape[:3]
        made = _launch(
            "decode",
            codec,
            inputs={
                "words": packed.words,
                "scales": packed.scales,
                "coefficients": constants.coefficients(codec.rotation, back=True),
            },
            optional_inputs={"centres": packed.centres, "channel_scale": channel_scale},
            outputs={"out": ((batch, heads, count * BLOCK, codec.head_dim), dtype)},
            macros=(),
            dtype=dtype,
            blocks=(batch, heads, count),
        )
        return made["out"]

    def _attend(self, call: AttendCall) -> mx.array:
        """Attend over a partly packed cache; see :meth:`MLXBackend.attend`."""
        return attend(call)


def rotor3_quantize_dequantize(
    x: mx.array, bits: int, *, seed: int = 0, layer: int = 0
) -> mx.array:
    """Quantize and dequantize vectors with the published method, in one kernel.

    The result is that of encoding and decoding with a codec of values, the rotation ``rotor3`` and
    no channel scale, but no codes are stored in between.

    Args:
        x: Rows ``[n, D]``, float16, bfloat16 or float32.
        bits: Bits per code.
        seed: Selects the rotors, together with ``layer``.
        layer: Selects the rotors, together with ``seed``.

    Returns:
        ``[n, D]`` in the dtype of x.

    Raises:
        ValueError: If x has another shape or dtype, or there is no codebook of ``bits``.
    """
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"[rotor3_quantize_dequantize] Rows must have shape [n, D] and be float16, bfloat16 or "
            f"float32, but they have shape {x.shape} and dtype {x.dtype}."
        )
    if bits not in BITS:
        raise ValueError(
            f"[rotor3_quantize_dequantize] bits must be one of {BITS}, but {bits} was given."
        )
    count, head_dim = x.shape
    rotors = rotation("rotor3", head_dim, seed=seed, layer=layer, role=VALUE)
    rows = THREADS // lanes_of_row(rotors)
    (out,) = _rotor3_kernel(bits, rotors.head_dim)(
        inputs=[x, constants.coefficients(rotors), count],
        template=[("T", x.dtype), ("BITS", bits), ("THREADS", THREADS), *row_template(rotors)],
        grid=(-(-count // rows) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return out


def encode_bytes(codec: Codec) -> int:
    """Return the most bytes of threadgroup memory that the kernel ``encode`` needs.

    It holds a block of codes. In addition it holds either the sums for the centre or, in the same
    place, the numbers of some trellis sequences: ``BlockEncoder`` of rotation.h, ``Slice`` of
    trellis.h.
    """
    codes = BLOCK * (codec.head_dim + 4)
    sums = codec.head_dim * (THREADS // 32)
    numbers = 0
    if codec.has_trellis:
        stride = codec.packed_axis_size + 1
        most = (THREADGROUP_BYTES - codes) // (4 * stride)
        numbers = stride * next((count for count in (64, 32, 16) if count <= most), 8)
    return codes + 4 * max(sums, numbers)


def _launch(
    name: str,
    codec: Codec,
    *,
    inputs: dict[str, Any],
    optional_inputs: dict[str, mx.array | None],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    macros: tuple[str, ...],
    dtype: mx.Dtype,
    blocks: tuple[int, int, int],
) -> dict[str, mx.array]:
    """Run a kernel with one threadgroup per block; ``blocks`` is (B, K, N)."""
    given = {name: array for name, array in optional_inputs.items() if array is not None}
    inputs = inputs | given
    macros += tuple(name.upper() for name in given)
    kernel = _codec_kernel(codec.rotation, name, codec.bits, macros, tuple(inputs), tuple(outputs))
    batch, heads, count = blocks
    template: list[tuple[str, Any]] = [
        ("T", dtype),
        ("BITS", codec.bits),
        ("BLOCK", BLOCK),
        ("THREADS", THREADS),
        ("KEY", codec.role == KEY),
        ("MATRICES", matrices(codec.rotation)),
        *row_template(codec.rotation),
    ]
    arrays = kernel(
        inputs=list(inputs.values()),
        template=template,
        grid=(THREADS * count, heads, batch),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
    return dict(zip(outputs, arrays, strict=True))


@derived
def _codec_kernel(
    rotation: Rotation,
    name: str,
    bits: int,
    macros: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> Kernel:
    """Return the kernel ``encode`` or ``decode`` of a rotation and a codebook."""
    text = _codec_text(name, bits, rotation, macros)
    # MLX keeps one compiled text per name, so the name holds everything the text depends on.
    parts = (name, rotation.name, str(rotation.head_dim), str(bits), *map(str.lower, macros))
    return _metal_kernel("_".join(parts), inputs, outputs, text)


@cache
def _rotor3_kernel(bits: int, head_dim: int) -> Kernel:
    text = _codec_text("rotor3", bits, rotation("rotor3", head_dim))
    name = f"rotor3_{head_dim}_{bits}"
    return _metal_kernel(name, ("x", "coefficients", "count"), ("out",), text)


def _codec_text(
    name: str, bits: int, rotation: Rotation, macros: tuple[str, ...] = ()
) -> KernelText:
    return metal_text(
        name,
        "".join(f"#define {macro}\n" for macro in macros),
        *(read(f"shared_kernels/{part}.h") for part in ("levels", "trellis", "rotation")),
        boundaries_text(bits),
        rotation_text(rotation),
    )


@cache
def _metal_kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], text: KernelText
) -> Kernel:
    """Return the kernel object that the layers of a model share; it reads inputs in place."""
    return FirstCallKernel(
        f"rotormlx_{name}",
        mx.fast.metal_kernel,
        input_names=list(inputs),
        output_names=list(outputs),
        source=text.source,
        header=text.header,
        ensure_row_contiguous=False,
    )
