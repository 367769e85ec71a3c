"""Loads the library built from cpu_kernels/ and passes arrays to it without copying them.

Arrays are anything that has ``__dlpack__`` and lies in the memory of the CPU (MLX, numpy, torch),
or what that gives.
They are neither copied nor converted; strides may be any, except that the words of a block lie side
by side. What is asked must fit together: the callers check it and name what is wrong.

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

# Where hatch_build.py puts it.
PATH = Path(__file__).parents[1] / "librotormlx_cpu.so"
INTERFACE_VERSION = 5
# As in cpu_kernels/pool.h.
MAX_THREADS = 1024
# Products of numbers of queries with tokens that one thread has done before another one wakes.
FEW_PRODUCTS = 2**19


class Blocks(NamedTuple):
    """Packed blocks of keys or values, each array as docs/FORMAT.md has it.

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


class Source:
    """The keys or the values of a cache, described once for many calls of :func:`attend`.

    A description holds the arrays, and is of the memory in which they lay when it was made.

    Args:
        exact: Those of sink and tail, ``[B, K, capacity, D]``.
        blocks: The packed ones.
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
    """Return the threads of a call: ``OMP_NUM_THREADS``, else the cores of this process."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if re.fullmatch("0*[1-9][0-9]*", wanted):
        return min(int(wanted), MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(query_numbers: int, tokens: int, most: int) -> int:
    """Return the threads of a call of :func:`attend`: one for little work, else all.

    Args:
        query_numbers: Numbers of all queries, B * H * L * D.
        tokens: Tokens of the longest batch row.
        most: Threads that there may be.
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
        blocks: Written, but for the channel scale.
        given_centres: The centres are read; otherwise they are the means, and written.
        start: Tokens before it are coded already; what is written for them does not count.
        state: What their codes leave the paths of values, uint32 ``[B, K, N, D]``; None for 0.
        threads: Threads at most; None for :func:`thread_count`. Results do not depend on it.
        variant: Index into :func:`variants`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 5.
    """
    _codec_call("rotormlx_encode", rows, blocks, state, start, given_centres, threads, variant)


def decode(blocks: Blocks, rows: Any, *, threads: int | None = None, variant: int = 0) -> None:
    """Write the vectors that packed blocks stand for into ``rows``; see :func:`encode`.

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
    """Attention over a partly packed cache, written into ``output``.

    Args:
        queries: ``[B, H, L, D]``, float16, bfloat16 or float32.
        output: ``[B, H, L, Dv]``, with room for the dtype of the queries, which is what is written.
        keys: Exact and packed keys.
        values: Likewise.
        lengths: (Packed tokens, all tokens) of every batch row.
        sink: Exact tokens before the packed ones.
        scale: Factor of the scores.
        mask: Boolean (True: visible) or additive and floating, broadcastable to ``[B, H, L, S]``.
        sink_logits: Attention-sink logits ``[H]``, floating.
        causal: Whether a query sees only tokens up to its own; the last one of a row is the last
            query.
        threads: As for :func:`encode`.
        variant: As for :func:`encode`.

    Raises:
        RuntimeError: If the library refuses the arrays.

    Source: docs/FORMAT.md, section 7.
    """
    library = _library()
    threads = threads or thread_count()
    if threads > 1:
        # They wake while the arguments are made.
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
    """``AttendCall`` of cpu_kernels/problem.h, with so many numbers behind it."""
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
        raise RuntimeError(f"[cpu] The library cannot do this: {message.decode()}.")


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
    """Return the address of a rotation in the library's form, and the object that owns it."""
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
        return "its library was not built: install rotormlx anew where a C++ compiler is found"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"its library cannot be loaded ({error}): install rotormlx anew"
    version = library.rotormlx_interface_version()
    if version != INTERFACE_VERSION:
        return f"its library is of another version of rotormlx ({version}): install it anew"
    takes_number, takes_call = ("variant", "announce"), ("encode", "decode", "attend")
    for name in (*takes_number, *takes_call):
        function = getattr(library, f"rotormlx_{name}")
        function.argtypes = (ctypes.c_int64 if name in takes_number else ctypes.c_char_p,)
        function.restype = ctypes.c_char_p
    return library
