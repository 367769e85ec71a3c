"""Launch a compiled kernel in the runtime, and turn a broken rule into a KernelError.

Knows nothing of Metal: any front end that compiles to an entry function uses it.
"""

import ctypes
import enum
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import toolchain


class Kind(enum.StrEnum):
    """The rules a kernel can break."""

    RACE = "race"
    OUT_OF_BOUNDS = "out of bounds"
    UNINITIALISED = "uninitialised"
    READ_ONLY = "read-only"
    STRAY_POINTER = "stray pointer"
    THREADGROUP_MEMORY = "threadgroup memory"
    DIVERGENCE = "divergence"
    ABSENT_LANE = "absent lane"
    ARITHMETIC = "arithmetic"
    ALIGNMENT = "alignment"
    UNWRITTEN_OUTPUT = "unwritten output"
    LAUNCH = "launch"


class KernelError(RuntimeError):
    """A kernel broke a rule of the GPU's programming model.

    Attributes:
        kind: Which rule.
        kernel: The kernel's name.
        threadgroup, thread: Position of the threadgroup, and of the thread in the grid; ``None``
            if the launch as a whole is at fault.
        buffer: The buffer or threadgroup variable concerned, or ``None``.
        line: The line in the kernel's text, or ``None`` if it cannot be told.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        kernel: str,
        threadgroup: tuple[int, ...] | None = None,
        thread: tuple[int, ...] | None = None,
        buffer: str | None = None,
        line: int | None = None,
        source_line: str = "",
    ) -> None:
        place = f"kernel {kernel}"
        if thread is not None:
            place += f", threadgroup {threadgroup}, thread {thread}"
        if line is not None:
            place += f", line {line}: {source_line.strip()}"
        super().__init__(f"[{kind}] {message} [{place}]")
        self.kind = kind
        self.kernel = kernel
        self.threadgroup = threadgroup
        self.thread = thread
        self.buffer = buffer
        self.line = line


class Role(enum.IntEnum):
    """What a kernel may do with a buffer."""

    INPUT = 0
    OUTPUT = 1
    INITIALISED_OUTPUT = 2


class Buffer(NamedTuple):
    """An array bound to a kernel; outputs are overwritten in place."""

    name: str
    array: np.ndarray
    role: Role


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's module and entry function, and its text for messages.

    Attributes:
        source_names: What the compiler takes the text to be files of.
    """

    name: str
    module: Path
    source_names: tuple[str, ...]
    source: str
    entry: str = "emulator_entry"


@dataclass(frozen=True)
class Report:
    """What a launch cost.

    Attributes:
        accesses: Loads and stores that were checked.
        switches: Changes from one thread to another.
        threadgroup_bytes: Threadgroup memory that the kernel declares.
        seconds: Time of the launch alone.
    """

    accesses: int
    switches: int
    threadgroup_bytes: int
    seconds: float


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element_bytes", ctypes.c_uint32),
        ("role", ctypes.c_uint32),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("threadgroup_memory_limit", ctypes.c_uint32),
    ]


class _Violation(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 256),
        ("buffer", ctypes.c_char * 64),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("module_offset", ctypes.c_uint64),
        ("line", ctypes.c_int32),
    ]


class _Statistics(ctypes.Structure):
    _fields_ = [
        ("accesses", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
    ]


_one_launch_at_a_time = threading.Lock()  # the runtime has one set of threads


def launch(
    kernel: CompiledKernel,
    buffers: Sequence[Buffer],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    order: int = 0,
    threadgroup_memory_limit: int = 32 * 1024,
) -> Report:
    """Run a kernel over a grid with every check on.

    Args:
        kernel: What to run.
        buffers: Its buffers, in the order of its entry function; C-contiguous.
        grid: Threads in the grid, three numbers.
        threadgroup: Threads in a threadgroup, three numbers.
        order: Of execution: 0 ascending, 1 descending, any other number seeds a random one.
        threadgroup_memory_limit: In bytes.

    Returns:
        What the launch cost. The outputs' arrays hold the results.

    Raises:
        KernelError: If the kernel breaks a rule; the outputs are then unchanged.
    """
    runtime = toolchain.runtime_library()
    entry = getattr(ctypes.CDLL(str(kernel.module)), kernel.entry)
    bound = (_Buffer * max(1, len(buffers)))(*[_bind(buffer) for buffer in buffers])
    request = _Request(
        ctypes.cast(entry, ctypes.c_void_p),
        bound,
        len(buffers),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        order,
        threadgroup_memory_limit,
    )
    violation = _Violation()
    statistics = _Statistics()
    with _one_launch_at_a_time:
        start = time.perf_counter()
        runtime.emulator_launch(
            ctypes.byref(request), ctypes.byref(violation), ctypes.byref(statistics)
        )
        seconds = time.perf_counter() - start
    if violation.kind:
        raise _error(kernel, violation)
    return Report(statistics.accesses, statistics.switches, statistics.threadgroup_bytes, seconds)


def _bind(buffer: Buffer) -> _Buffer:
    array = buffer.array
    return _Buffer(
        buffer.name.encode(), array.ctypes.data, array.nbytes, array.itemsize, buffer.role
    )


def _error(kernel: CompiledKernel, violation: _Violation) -> KernelError:
    line = violation.line or None
    if violation.module_offset:
        line = toolchain.source_place(kernel.module, violation.module_offset, kernel.source_names)
    lines = kernel.source.splitlines()
    kind = Kind(violation.kind.decode())
    has_thread = kind not in (Kind.UNWRITTEN_OUTPUT, Kind.LAUNCH)
    return KernelError(
        kind,
        violation.message.decode(),
        kernel=kernel.name,
        threadgroup=tuple(violation.threadgroup) if has_thread else None,
        thread=tuple(violation.thread) if has_thread else None,
        buffer=violation.buffer.decode() or None,
        line=line,
        source_line=lines[line - 1] if line and line <= len(lines) else "",
    )
