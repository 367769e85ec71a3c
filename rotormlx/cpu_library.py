"""The library of cpu_kernels/: loads it, and passes it arrays as they lie in memory.

Arrays are anything that has ``__dlpack__`` and lies in the memory of the CPU: MLX, numpy, torch.
They are neither copied nor converted; strides may be any, except that the words of a block lie side
by side. What is asked must fit together: the callers check it and name what is wrong.

Shapes: B batch, K KV heads, H query heads, L queries, N blocks, D head_dim.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rotormlx.format import KEY, Codec
from rotormlx.rotation import Rotation

# Where hatch_build.py puts it.
PATH = Path(__file__).parent / "librotormlx_cpu.so"
INTERFACE_VERSION = 1


class _Stage(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "radix", "stride", "outer")),
        ("blocks", ctypes.c_void_p),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        ("head_dim", ctypes.c_int64),
        ("stage_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("stages", "matrix", "inverse_transpose")),
    )


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "centres", "channel_scale")),
        ("rotation", ctypes.c_void_p),
        ("bits", ctypes.c_int64),
        ("is_key", ctypes.c_int64),
    )


class _CodecCall(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("packed", _Packed),
        *((name, ctypes.c_int64) for name in ("given_centres", "threads", "variant")),
    )


class _AttendCall(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("queries", "output", "key_exact", "value_exact")),
        ("keys", _Packed),
        ("values", _Packed),
        *((name, ctypes.c_void_p) for name in ("lengths", "mask", "sinks")),
        *((name, ctypes.c_int64) for name in ("sink", "causal")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("threads", "variant")),
    )


@dataclass(frozen=True)
class Blocks:
    """Packed blocks of keys or values, each array as docs/FORMAT.md has it.

    Args:
        codec: Role, bits and rotation.
        words: uint32 ``[B, K, N, rows, lanes]``; None where nothing is packed, and the others then.
        scales: float16 ``[B, K, N, 64]``.
        centres: float16 ``[B, K, N, D]``; None for values.
        channel_scale: float32 ``[K, D]`` or ``[B, K, D]``; None for 1.
    """

    codec: Codec
    words: Any
    scales: Any
    centres: Any
    channel_scale: Any


def missing() -> str | None:
    """What keeps this process from using the library, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def variants() -> tuple[str, ...]:
    """What this processor can run of the library, best first: ``("avx2", "baseline")``, say."""
    names: list[str] = []
    function = _library().rotormlx_variant
    while (name := function(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


@cache
def thread_count() -> int:
    """Threads of a call: ``OMP_NUM_THREADS``, or the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode(
    rows: Any,
    blocks: Blocks,
    *,
    given_centres: bool,
    threads: int | None = None,
    variant: int = 0,
) -> None:
    """Compress whole blocks into the arrays of ``blocks``, which must be contiguous.

    Args:
        rows: ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
        blocks: Written, but for the channel scale.
        given_centres: The centres are read; otherwise they are the means, and written.
        threads: Threads at most; None for :func:`thread_count`. Results do not depend on it.
        variant: Index into :func:`variants`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 5.
    """
    _codec_call("rotormlx_encode", rows, blocks, given_centres, threads, variant)


def decode(blocks: Blocks, rows: Any, *, threads: int | None = None, variant: int = 0) -> None:
    """Write the vectors that packed blocks stand for into ``rows``; see :func:`encode`.

    Source: docs/FORMAT.md, section 6.
    """
    _codec_call("rotormlx_decode", rows, blocks, True, threads, variant)


def attend(
    queries: Any,
    output: Any,
    exact: tuple[Any, Any],
    blocks: tuple[Blocks, Blocks],
    lengths: Iterable[tuple[int, int]],
    *,
    sink: int,
    scale: float,
    mask: Any = None,
    sinks: Any = None,
    causal: bool = False,
    threads: int | None = None,
    variant: int = 0,
) -> None:
    """Attention over a partly packed cache, written into ``output``.

    Args:
        queries: ``[B, H, L, D]``, float16, bfloat16 or float32.
        output: ``[B, H, L, Dv]``, with room for the dtype of the queries, which is what is written.
        exact: Keys and values of sink and tail, each ``[B, K, capacity, D]``.
        blocks: Packed keys and values.
        lengths: (Packed tokens, all tokens) of every batch row.
        sink: Exact tokens before the packed ones.
        scale: Factor of the scores.
        mask: Boolean (True: visible) or additive and floating, broadcastable to ``[B, H, L, S]``.
        sinks: Attention-sink logits ``[H]``, floating.
        causal: Whether a query sees only tokens up to its own; the last one of a row is the last
            query.
        threads: As for :func:`encode`.
        variant: As for :func:`encode`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 7.
    """
    keep: list[Any] = []
    counts = [n for pair in lengths for n in pair]
    call = _AttendCall(
        _pointer(queries, keep),
        _pointer(output, keep),
        *(_pointer(a, keep) for a in exact),
        *(_packed(b, keep) for b in blocks),
        ctypes.addressof(pairs := (ctypes.c_int64 * len(counts))(*counts)),
        _pointer(mask, keep),
        _pointer(sinks, keep),
        sink,
        causal,
        scale,
        threads or thread_count(),
        variant,
    )
    keep.append(pairs)
    _check(_library().rotormlx_attend(ctypes.byref(call)))


def _codec_call(
    function: str, rows: Any, blocks: Blocks, given_centres: bool, threads: int | None, variant: int
) -> None:
    keep: list[Any] = []
    call = _CodecCall(
        _pointer(rows, keep),
        _packed(blocks, keep),
        given_centres,
        threads or thread_count(),
        variant,
    )
    _check(getattr(_library(), function)(ctypes.byref(call)))


def _check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(f"[cpu] The library cannot do this: {message.decode()}.")


def _packed(blocks: Blocks, keep: list[Any]) -> _Packed:
    codec = blocks.codec
    arrays = (blocks.words, blocks.scales, blocks.centres, blocks.channel_scale)
    return _Packed(
        *(_pointer(a, keep) for a in arrays),
        _rotation(codec.rotation)[0],
        codec.bits,
        codec.role == KEY,
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _pointer(array: Any, keep: list[Any]) -> int | None:
    """The address of an array's DLPack description, which lives as long as ``keep`` does."""
    if array is None:
        return None
    capsule = array.__dlpack__()
    keep.append(capsule)
    address: int = _capsule_pointer(capsule, b"dltensor")
    return address


@cache
def _rotation(rotation: Rotation) -> tuple[int, object]:
    """The address of a rotation in the library's form, and what keeps it alive."""
    blocks = [np.ascontiguousarray(stage.blocks, np.float32) for stage in rotation.stages]
    stages = (_Stage * len(blocks))(
        *(
            _Stage(stage.start, stage.radix, stage.stride, stage.outer, block.ctypes.data)
            for stage, block in zip(rotation.stages, blocks, strict=True)
        )
    )
    matrices = []
    if not rotation.stages and rotation.name != "identity":
        inverse_transpose = rotation.inverse.T
        matrices = [
            np.ascontiguousarray(m, np.float32) for m in (rotation.matrix, inverse_transpose)
        ]
    made = _Rotation(
        rotation.head_dim,
        len(blocks),
        ctypes.addressof(stages),
        *(m.ctypes.data for m in matrices),
    )
    return ctypes.addressof(made), (made, stages, blocks, matrices)


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"[cpu] The CPU library is required, but {loaded}.")
    return loaded


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or what keeps this process from using it."""
    if not PATH.exists():
        return "its library was not built: install rotormlx anew where a C++ compiler is found"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"its library cannot be loaded ({error}): install rotormlx anew"
    version = library.rotormlx_interface_version()
    if version != INTERFACE_VERSION:
        return f"its library is of another version of rotormlx ({version}): install it anew"
    library.rotormlx_variant.argtypes = (ctypes.c_int64,)
    library.rotormlx_variant.restype = ctypes.c_char_p
    for name in ("encode", "decode", "attend"):
        function = getattr(library, f"rotormlx_{name}")
        function.argtypes = (ctypes.c_void_p,)
        function.restype = ctypes.c_char_p
    return library
