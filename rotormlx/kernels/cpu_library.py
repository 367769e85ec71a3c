"""Loads the library built from cpu_kernels/ and passes arrays to it without copying them.

An array is an object with ``__dlpack__`` whose data is in CPU memory (MLX, numpy, torch), or the
result of that method. Arrays are neither copied nor converted. Strides are arbitrary, except that
the words of a block must be contiguous. Callers must check that shapes and dtypes match.

Shapes: B batch, K KV heads, H query heads, L queries, N blocks, D head_dim.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rotormlx.codec.derived import derived
from rotormlx.codec.format import KEY, Codec
from rotormlx.codec.rotation import Rotation

# hatch_build.py writes the library to this path.
PATH = Path(__file__).parents[1] / "librotormlx_cpu.so"
INTERFACE_VERSION = 5
# Equals MAX_THREADS of cpu_kernels/pool.h.
MAX_THREADS = 1024
# Up to this amount of work (numbers of the queries times tokens), one thread finishes before
# another one wakes.
FEW_PRODUCTS = 2**19


class Blocks(NamedTuple):
    """Packed blocks of keys or values, in the layout of docs/FORMAT.md.

    All arrays are None if nothing is packed.

    codec: Role, bits and rotation.
    words: uint32 ``[B, K, N, rows, lanes]``.
    scales: float16 ``[B, K, N, 64]``.
    centres: float16 ``[B, K, N, D]``; None for values.
    channel_scale: float32 ``[K, D]`` or ``[B, K, D]``; None for 1.
    """

    codec: Codec
    words: Any
    scales: Any
    centres: Any
    channel_scale: Any


class Source:
    """The keys or the values of a cache, described once for many calls of :func:`attend`.

    A description keeps the arrays alive. It refers to the memory that they had when it was made.

    Args:
        exact: Exact vectors of sink and tail, ``[B, K, capacity, D]``.
        blocks: Packed blocks.
    """

    def __init__(self, exact: Any, blocks: Blocks) -> None:
        self._capsules = _described((exact, *blocks[1:]))
        numbers = (*_addresses(self._capsules), *_coding(blocks.codec))
        self.described = struct.pack("=8q", *numbers)


def missing() -> str | None:
    """Return the reason why this process cannot use the library, or None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def variants() -> tuple[str, ...]:
    """Return the variants this processor can run, best first, e.g. ``("avx2", "baseline")``."""
    names: list[str] = []
    function = _library().rotormlx_variant
    while (name := function(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


@cache
def thread_count() -> int:
    """Return the number of threads of a call.

    This is the first number in ``OMP_NUM_THREADS`` if it is a positive integer, at most
    ``MAX_THREADS``. Otherwise it is the number of cores that this process may use.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if re.fullmatch("0*[1-9][0-9]*", wanted):
        return min(int(wanted), MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(query_numbers: int, tokens: int, most: int) -> int:
    """Return the number of threads for a call of :func:`attend`: one for little work, else all.

    Args:
        query_numbers: Count of numbers in all queries, B * H * L * D.
        tokens: Tokens of the longest batch row.
        most: Largest number of threads.
    """
    return 1 if query_numbers * tokens <= FEW_PRODUCTS else most


def encode(
    rows: Any,
    blocks: Blocks,
    *,
    given_centres: bool,
    start: int = 0,
    state: Any = None,
    threads: int | None = None,
    variant: int = 0,
) -> None:
    """Compress whole blocks into the arrays of ``blocks``, which must be contiguous.

    Args:
        rows: ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
        blocks: Arrays to write; the channel scale is only read.
        given_centres: Whether the centres are read; otherwise the means are written there.
        start: Number of tokens at the start of a block that have codes already; their output has no
            meaning.
        state: State of trellis-coded values after those tokens, uint32 ``[B, K, N, D]``; None for
            0.
        threads: Largest number of threads; None for :func:`thread_count`. Results do not depend on
            it.
        variant: Index into :func:`variants`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 5.
    """
    _codec_call("rotormlx_encode", rows, blocks, state, start, given_centres, threads, variant)


def decode(blocks: Blocks, rows: Any, *, threads: int | None = None, variant: int = 0) -> None:
    """Write the vectors that packed blocks represent into ``rows``; see :func:`encode`.

    Source: docs/FORMAT.md, section 6.
    """
    _codec_call("rotormlx_decode", rows, blocks, None, 0, True, threads, variant)


def attend(
    queries: Any,
    output: Any,
    keys: Source,
    values: Source,
    lengths: Iterable[Iterable[int]],
    *,
    sink: int,
    scale: float,
    mask: Any = None,
    sink_logits: Any = None,
    causal: bool = False,
    threads: int | None = None,
    variant: int = 0,
) -> None:
    """Compute attention over a partly packed cache and write it into ``output``.

    Args:
        queries: ``[B, H, L, D]``, float16, bfloat16 or float32.
        output: ``[B, H, L, Dv]``, written in the dtype of the queries; its own dtype must have the
            same size.
        keys: Exact and packed keys.
        values: Exact and packed values.
        lengths: Number of packed tokens and of all tokens, for every batch row.
        sink: Number of exact tokens before the packed ones.
        scale: Factor of the scores.
        mask: Boolean (True: visible) or additive and floating, broadcastable to ``[B, H, L, S]``.
        sink_logits: Attention-sink logits ``[H]``, floating.
        causal: Whether a query sees only tokens up to its own; the last query has the position of
            the last token of its row.
        threads: Same as for :func:`encode`.
        variant: Same as for :func:`encode`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 7.
    """
    library = _library()
    threads = threads or thread_count()
    if threads > 1:
        # The threads wake while the arguments are prepared.
        _check(library.rotormlx_announce(threads))
    capsules = _described((queries, output, mask, sink_logits))
    counts = [n for pair in lengths for n in pair]
    call = _attend_call(len(counts)).pack(
        *(*_addresses(capsules), sink, causal, threads, variant, scale),
        *(keys.described, values.described, *counts),
    )
    _check(library.rotormlx_attend(call))


@lru_cache
def _attend_call(counts: int) -> struct.Struct:
    """Return the layout of ``AttendCall`` of cpu_kernels/problem.h, followed by the lengths."""
    return struct.Struct(f"=8qd64s64s{counts}q")


def _codec_call(
    function: str,
    rows: Any,
    blocks: Blocks,
    state: Any,
    start: int,
    given_centres: bool,
    threads: int | None,
    variant: int,
) -> None:
    capsules = _described((rows, *blocks[1:], state))
    *addresses, state_address = _addresses(capsules)
    call = struct.pack(
        "=13q",
        *addresses,
        *_coding(blocks.codec),
        state_address,
        start,
        given_centres,
        threads or thread_count(),
        variant,
    )
    _check(getattr(_library(), function)(call))


def _check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(f"[cpu] The library refused the call: {message.decode()}.")


def _described(arrays: Iterable[Any]) -> list[Any]:
    """Return the DLPack descriptions of arrays; keep them alive while the library reads them."""
    return [a.__dlpack__() if hasattr(a, "__dlpack__") else a for a in arrays]


def _addresses(capsules: list[Any]) -> list[int]:
    return [0 if c is None else _capsule_pointer(c, b"dltensor") for c in capsules]


def _coding(codec: Codec) -> tuple[int, int, bool]:
    return _rotation(codec.rotation)[0], codec.bits, codec.role == KEY


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


@derived
def _rotation(rotation: Rotation) -> tuple[int, object]:
    """Return the address of a rotation in the library's form, and the objects that own it."""
    keep = [np.ascontiguousarray(stage.blocks, np.float32) for stage in rotation.stages]
    stages = np.array(
        [
            (stage.start, stage.radix, stage.stride, stage.outer, block.ctypes.data)
            for stage, block in zip(rotation.stages, keep, strict=True)
        ],
        np.int64,
    )
    matrices = [0, 0]
    if not rotation.has_stages:
        inverse_transpose = np.swapaxes(rotation.inverse, -1, -2)
        keep += [np.ascontiguousarray(m, np.float32) for m in (rotation.matrix, inverse_transpose)]
        matrices = [m.ctypes.data for m in keep]
    matrix_stride = rotation.head_dim**2 if rotation.is_per_head else 0
    numbers = (rotation.head_dim, len(stages), stages.ctypes.data, *matrices, matrix_stride)
    made = np.array(numbers, np.int64)
    return made.ctypes.data, (made, stages, keep)


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"[cpu] The CPU library is required, but {loaded}.")
    return loaded


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason why this process cannot use it."""
    if not PATH.exists():
        return "its library was not built: reinstall rotormlx where a C++ compiler is available"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"its library cannot be loaded ({error}): reinstall rotormlx"
    version = library.rotormlx_interface_version()
    if version != INTERFACE_VERSION:
        return (
            f"its library belongs to another version of rotormlx (interface {version}): reinstall "
            "rotormlx"
        )
    takes_number, takes_call = ("variant", "announce"), ("encode", "decode", "attend")
    for name in (*takes_number, *takes_call):
        function = getattr(library, f"rotormlx_{name}")
        function.argtypes = (ctypes.c_int64 if name in takes_number else ctypes.c_char_p,)
        function.restype = ctypes.c_char_p
    return library
