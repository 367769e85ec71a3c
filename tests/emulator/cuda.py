"""Run CUDA kernels on the CPU: the text of ``.cu`` files and of the functions that launch them.

A module is made of one ``.cu`` file with all it includes. Its functions for the host are called
with pointers that name a buffer; what they launch is kept, and then run with every check on.
"""

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import toolchain
from .launch import Buffer, CompiledKernel, Report, Role, launch
from .metal import _order, _output_array, _to_mlx, _to_numpy
from .msl_text import share_threadgroup_variables, without_comments

# A thread block of sm_80 may have 163 KiB, one of sm_90 227 KiB.
SHARED_MEMORY_LIMIT = 227 * 1024
_HANDLE = 0x7A5A << 48
_OFFSET_BITS = 40


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
    ]


class Buffers:
    """Arrays that kernels may touch; ``handle`` gives what stands for a pointer to one."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []

    def handle(self, name: str, array: np.ndarray | None, *, written: bool = False) -> int:
        """A pointer to an array, which must be C-contiguous; null for None.

        Args:
            name: For messages.
            array: A view of a longer array comes with all of it.
            written: Whether kernels may write to it; it then keeps what nobody writes.
        """
        if array is None:
            return 0
        role = Role.INITIALISED_OUTPUT if written else Role.INPUT
        self._buffers.append(Buffer(name, array, role))
        return _HANDLE | (len(self._buffers) - 1) << _OFFSET_BITS

    def __iter__(self):
        return iter(self._buffers)


class CudaModule:
    """A ``.cu`` file, compiled.

    Args:
        path: The file.
        macros: What ``-D`` would define.
        headers: Texts of generated headers, by name.
        changes: Pairs of texts; the first, which must stand once in all the text, is replaced.
        multiprocessors: Of the device that a call is planned for.

    Attributes:
        multiprocessors: As given.
        shared_memory: The most bytes of a thread block on the device that a call is planned for.
        reports: What the launches of the latest call cost.
    """

    def __init__(
        self,
        path: Path,
        macros: Mapping[str, int],
        headers: Mapping[str, str],
        *,
        changes: Sequence[tuple[str, str]] = (),
        multiprocessors: int = 1,
    ) -> None:
        text = flat_text(path, headers)
        for old, new in changes:
            if text.count(old) != 1:
                raise ValueError(f"{old!r} must stand once, but stands {text.count(old)} times.")
            text = text.replace(old, new)
        self._kernel = _compile(text, path.name, _WITH_LAUNCHERS, tuple(sorted(macros.items())))
        toolchain.runtime_library()  # whose functions the module finds by name
        self._library = ctypes.CDLL(str(self._kernel.module))
        self._library.emulator_select_launch.restype = ctypes.POINTER(_Launch)
        self.multiprocessors = multiprocessors
        self.shared_memory = SHARED_MEMORY_LIMIT
        self.reports: list[Report] = []

    def number(self, function: str, *arguments: ctypes.Structure) -> int:
        """What a function of the host that launches nothing returns."""
        called = getattr(self._library, function)
        called.restype = ctypes.c_size_t
        return int(called(*map(ctypes.byref, arguments)))

    def call(
        self,
        function: str,
        arguments: ctypes.Structure,
        buffers: Buffers,
        *,
        plan: ctypes.Structure | None = None,
    ) -> None:
        """Call a function of the host and run what it launches, in the ``execution_order``.

        Args:
            function: Its name.
            arguments: Its first argument.
            buffers: What the arguments' pointers name.
            plan: Its second argument, if it takes one beside the stream.

        Raises:
            KernelError: If a kernel breaks a rule.
            RuntimeError: If the function returns an error.
        """
        self._library.emulator_forget_launches()
        structures = [arguments] if plan is None else [arguments, plan]
        error = getattr(self._library, function)(*map(ctypes.byref, structures), None)
        if error:
            raise RuntimeError(f"[emulator] {function} returned the CUDA error {error}.")
        self.reports = []
        for i in range(self._library.emulator_launch_count()):
            made = self._library.emulator_select_launch(i).contents
            self.reports.append(
                launch(
                    self._kernel,
                    list(buffers),
                    grid=[g * b for g, b in zip(made.grid, made.block, strict=True)],
                    threadgroup=list(made.block),
                    order=_order.get(),
                    threadgroup_memory_limit=SHARED_MEMORY_LIMIT,
                )
            )


def flat_text(path: Path, headers: Mapping[str, str]) -> str:
    """A file with all that it includes in its place, each once, and without CUDA's own headers."""
    seen: set[str] = set()

    def flattened(text: str, folder: Path) -> str:
        def replaced(match: re.Match[str]) -> str:
            name = match[1]
            where = folder / name
            key = name if name in headers else str(where.resolve())
            if key in seen:
                return ""
            seen.add(key)
            if name in headers:
                return headers[name]
            return flattened(where.read_text(encoding="utf-8"), where.parent)

        text = re.sub(r"^#include <cuda\w*\.h>$|^#pragma once$", "", text, flags=re.MULTILINE)
        return re.sub(r'^#include "([^"]+)"$', replaced, text, flags=re.MULTILINE)

    return flattened(path.read_text(encoding="utf-8"), path.parent)


class MLXKernel:
    """Stands in for what ``mx.fast.cuda_kernel`` returns; takes its arguments, and has its call.

    MLX offers CUDA kernels only where there is CUDA, so the signature is written here as MLX writes
    it for inputs whose shapes and strides the source does not name. A call runs at once.

    Attributes:
        report: What the latest call cost, or None before the first.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> None:
        named = [f"{n}_{what}" for n in input_names for what in ("shape", "strides", "ndim")]
        if not ensure_row_contiguous or any(word in source for word in named):
            raise ValueError("[emulator] Shapes and strides of inputs are not passed here.")
        self._name = f"custom_kernel_{name}"
        self._input_names, self._output_names = list(input_names), list(output_names)
        self._source, self._header = source, header
        self._shared_memory = shared_memory
        self.report: Report | None = None

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
    ) -> list[mx.array]:
        """Run the kernel; ``grid`` counts threads.

        Raises:
            KernelError: If the kernel breaks a rule.
        """
        types = [_TYPES[a.dtype] for a in inputs], [_TYPES[dtype] for dtype in output_dtypes]
        parameters = [
            *(f"const {t}* {n}" for t, n in zip(types[0], self._input_names, strict=True)),
            *(f"{t}* {n}" for t, n in zip(types[1], self._output_names, strict=True)),
        ]
        casts = [
            *(f"static_cast<const {t}*>(buffers[{i}])" for i, t in enumerate(types[0])),
            *(f"static_cast<{t}*>(buffers[{i + len(inputs)}])" for i, t in enumerate(types[1])),
        ]
        text = (
            f"{self._header}\nnamespace mlx::core::cu {{\n__global__ void {self._name}(\n    "
            + ",\n    ".join(parameters)
            + f") {{\n{self._source}\n}}\n}}\n"
            'extern "C" __attribute__((no_sanitize("thread")))\n'
            "void emulator_entry(void* const* buffers, const emulator::ThreadContext*) {\n"
            f"  mlx::core::cu::{self._name}({', '.join(casts)});\n}}\n"
            f"size_t emulator_dynamic_shared_bytes() {{ return {self._shared_memory}; }}\n"
        )
        outputs = [_output_array(*o, None) for o in zip(output_shapes, output_dtypes, strict=True)]
        bound = [
            *(
                Buffer(name, np.require(_to_numpy(a), requirements="C"), Role.INPUT)
                for name, a in zip(self._input_names, inputs, strict=True)
            ),
            *(
                Buffer(name, a, Role.OUTPUT)
                for name, a in zip(self._output_names, outputs, strict=True)
            ),
        ]
        self.report = launch(
            _compile(text, f"{self._name}.cu", _KERNEL_ALONE),
            bound,
            grid=[-(-g // t) * t for g, t in zip(grid, threadgroup, strict=True)],
            threadgroup=threadgroup,
            order=_order.get(),
            threadgroup_memory_limit=SHARED_MEMORY_LIMIT,
        )
        return [_to_mlx(a, dtype) for a, dtype in zip(outputs, output_dtypes, strict=True)]


# MLX's names of types in CUDA.
_TYPES = {
    mx.bool_: "bool",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint32: "uint32_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}


_KERNEL_ALONE = toolchain.Prelude(toolchain.HERE / "cuda" / "prelude.h")
_WITH_LAUNCHERS = toolchain.Prelude(toolchain.HERE / "cuda" / "host.h")


@functools.cache
def _compile(
    text: str, name: str, prelude: toolchain.Prelude, macros: tuple[tuple[str, int], ...] = ()
) -> CompiledKernel:
    shared = re.compile(r"\bextern\s+__shared__\s+(\w+)\s+(\w+)\[\];")
    rewritten = shared.sub(r"EMULATOR_DYNAMIC_SHARED(\1, \2);", without_comments(text))
    rewritten = share_threadgroup_variables(
        re.sub(r"\b__shared__\b(\s+alignas\(\d+\))?", "threadgroup ", rewritten)
    )
    defined = "".join(f"#define {macro} {value}\n" for macro, value in macros)
    module = toolchain.kernel_module(f'{defined}#line 1 "{name}"\n{rewritten}', prelude)
    return CompiledKernel(name, module, (name,), text)
