"""Run ``mx.fast.metal_kernel`` kernels on the CPU: the same call, MLX's own text, with checks."""

import contextlib
import contextvars
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from . import toolchain
from .launch import Buffer, CompiledKernel, Report, Role, launch
from .msl_text import (
    Parameter,
    kernel_parameters,
    share_threadgroup_variables,
    without_host_names,
)

Template = Sequence[tuple[str, bool | int | mx.Dtype]]
Scalar = bool | int | float

_mlx_metal_kernel = mx.fast.metal_kernel  # the real one, even where tests put ours in its place
_order: contextvars.ContextVar[int] = contextvars.ContextVar("order", default=0)
# Kernels to compile, while none is run.
_ahead: contextvars.ContextVar[dict["_Source", None] | None] = contextvars.ContextVar(
    "ahead", default=None
)


@contextlib.contextmanager
def execution_order(order: int) -> Iterator[None]:
    """Run threads in another order: 0 ascending, 1 descending, any other number a random one."""
    token = _order.set(order)
    try:
        yield
    finally:
        _order.reset(token)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
) -> "EmulatedKernel":
    """Stands in for ``mx.fast.metal_kernel``, with those of its arguments that are used here."""
    mlx_kernel = _mlx_metal_kernel(
        name, input_names, output_names, source, header, ensure_row_contiguous
    )
    return EmulatedKernel(
        cast(Callable[..., list[mx.array]], mlx_kernel),
        tuple(input_names),
        tuple(output_names),
        ensure_row_contiguous,
    )


class EmulatedKernel:
    """Stands in for the object that ``mx.fast.metal_kernel`` returns, with the same call.

    A call runs at once, not lazily, so it cannot be made inside ``mx.compile`` or a gradient.

    Attributes:
        report: What the latest call cost, or ``None`` before the first.
    """

    def __init__(
        self,
        mlx_kernel: Callable[..., list[mx.array]],
        input_names: tuple[str, ...],
        output_names: tuple[str, ...],
        ensure_row_contiguous: bool,
    ) -> None:
        self._mlx_kernel = mlx_kernel
        self._input_names = input_names
        self._output_names = output_names
        self._ensure_row_contiguous = ensure_row_contiguous
        self.report: Report | None = None

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | Scalar],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Run the kernel. Arguments as for MLX.

        Raises:
            KernelError: If the kernel breaks a rule.
        """
        arrays = _as_arrays(inputs)
        name, text = self._trace(
            arrays,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
            init_value=init_value,
        )
        arguments: dict[str, np.ndarray] = {}
        for input_name, array in zip(self._input_names, arrays, strict=True):
            arguments |= _input_arguments(input_name, array, self._ensure_row_contiguous)
        outputs = {
            output_name: _output_array(shape, dtype, init_value)
            for output_name, shape, dtype in zip(
                self._output_names, output_shapes, output_dtypes, strict=True
            )
        }
        self.report = run_text(
            text,
            name,
            arguments,
            outputs,
            grid=grid,
            threadgroup=threadgroup,
            initialised=init_value is not None,
        )
        return [
            _to_mlx(output, dtype)
            for output, dtype in zip(outputs.values(), output_dtypes, strict=True)
        ]

    def metal_text(self, *, inputs: Sequence[mx.array | Scalar], **call: Any) -> str:
        """The text that MLX would hand to Apple's compiler for a call, for the lint."""
        return self.named_text(inputs=inputs, **call)[1]

    def named_text(self, *, inputs: Sequence[mx.array | Scalar], **call: Any) -> tuple[str, str]:
        """The name of the kernel's function, and that text."""
        return self._trace(_as_arrays(inputs), **call)

    def _trace(self, inputs: list[mx.array], **call: Any) -> tuple[str, str]:
        """The kernel's name and text, both MLX's, recorded by exporting the call."""
        recorded: list[tuple[str, str]] = []

        def record(event: dict[str, Any]) -> None:
            if event["type"] == "primitive" and event["name"] == "CustomKernel":
                name, text = event["arguments"][:2]
                recorded.append((name, text))

        def traced(*arrays: mx.array) -> list[mx.array]:
            return self._mlx_kernel(inputs=list(arrays), **call)

        mx.export_function(record, traced, *inputs)
        if len(recorded) != 1:
            raise RuntimeError(
                f"[emulator] The call must record one CustomKernel, but MLX "
                f"{importlib.metadata.version('mlx')} recorded {len(recorded)}."
            )
        return recorded[0]


def run_text(
    text: str,
    name: str,
    arguments: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    instance: str | None = None,
    initialised: bool = False,
) -> Report | None:
    """Compile a kernel's text and run it.

    Args:
        text: Metal source with one kernel of that name.
        name: The function's name.
        arguments: Inputs by parameter name; bfloat16 as uint16.
        outputs: Outputs by parameter name; written in place.
        grid, threadgroup: In threads.
        instance: The template's instance to run, such as ``"f<float, 4>"``; by default the one
            that the text instantiates, or the function itself.
        initialised: Whether the outputs hold values to start from.

    Returns:
        What the launch cost; None inside ``compiling_ahead``.

    Raises:
        KernelError: If the kernel breaks a rule.
    """
    source = _source(text, name, instance)
    buffers = []
    for parameter in source.parameters:
        if parameter.is_attribute:
            continue
        if parameter.name in outputs:
            role = Role.INITIALISED_OUTPUT if initialised else Role.OUTPUT
            buffers.append(Buffer(parameter.name, outputs[parameter.name], role))
        else:
            array = np.require(arguments[parameter.name], requirements="C")
            buffers.append(Buffer(parameter.name, array, Role.INPUT))
    if (wanted := _ahead.get()) is not None:
        wanted[source] = None
        for output in outputs.values():
            output[...] = 0
        return None
    return launch(
        _compile(source),
        buffers,
        grid=grid,
        threadgroup=threadgroup,
        order=_order.get(),
    )


@dataclass(frozen=True)
class _Source:
    """A kernel's text and how it is called; in C++ it is two parts, which compile in a row.

    Kernels that differ in types or template arguments only have the same first part.
    """

    text: str
    name: str
    instance: str | None

    @functools.cached_property
    def parameters(self) -> list[Parameter]:
        """What the kernel is declared to take."""
        return kernel_parameters(self.text, self.name)

    @functools.cached_property
    def entry(self) -> str:
        """Name of the function that the runtime calls for every thread."""
        whole = f"{self.text}{self.name}{self.instance}"
        return f"emulator_entry_{hashlib.sha256(whole.encode()).hexdigest()[:20]}"

    @functools.cached_property
    def parts(self) -> tuple[str, str]:
        """What precedes the kernel, as C++, and the kernel with its entry function."""
        text = share_threadgroup_variables(without_host_names(self.text))
        start = _KERNEL_START.search(text)
        split = start.start() if start else 0
        line = text.count("\n", 0, split) + 1
        kernel = (
            f'#line {line} "{self.name}.metal"\n{text[split:]}\n#line 1 "entry"\n{self._called()}'
        )
        return text[:split], kernel

    @property
    def alone(self) -> str:
        """The C++ text of this kernel only."""
        before, kernel = self.parts
        return f'#line 1 "{self.name}.metal"\n{before}{kernel}'

    def compiled(self) -> CompiledKernel:
        """Compile the text, or find it compiled."""
        module = toolchain.kernel_module(self.alone, _prelude())
        names = (f"{self.name}.metal", _SHARED_NAME)
        return CompiledKernel(self.name, module, names, self.text, self.entry)

    def _called(self) -> str:
        instance = self.instance
        if instance is None:
            instantiated = re.search(r"\[\[kernel\]\]\s+decltype\((.*?)\)\s", self.text)
            instance = instantiated[1] if instantiated else self.name
        arguments = []
        buffer = 0
        for parameter in self.parameters:
            if parameter.is_attribute:
                arguments.append(f"emulator::attribute::{parameter.attribute}(*context)")
            else:
                kind = "BufferReference" if parameter.is_reference else "BufferPointer"
                arguments.append(f"emulator::{kind}{{buffers[{buffer}]}}")
                buffer += 1
        return f"""
extern "C" __attribute__((no_sanitize("thread")))
void {self.entry}(void* const* buffers, const emulator::ThreadContext* context) {{
  {instance}({", ".join(arguments)});
}}
"""


_KERNEL_START = re.compile(r"^(template\s*<[^;{}]*>\s*)?\[\[kernel\]\]", re.MULTILINE)
_SHARED_NAME = "several.metal"
# Enough that what they share counts little, few enough that two processes both have work.
_MOST_AT_ONCE = 16


@functools.cache
def _prelude() -> toolchain.Prelude:
    return toolchain.Prelude(
        toolchain.HERE / "msl" / "prelude.h",
        (Path(mx.__file__).parent / "include",),
        importlib.metadata.version("mlx"),
    )


# One object for a text: what is derived from it is kept there.
_source = functools.cache(_Source)


@functools.cache
def _compile(source: _Source) -> CompiledKernel:
    return source.compiled()


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Kernels that are called inside are not run, and return zeros; at the end they are compiled.

    Those whose texts begin alike are compiled together, in a third of the time. One that does not
    compile is left to whoever calls it next.
    """
    wanted: dict[_Source, None] = {}
    token = _ahead.set(wanted)
    try:
        yield
    finally:
        _ahead.reset(token)
    alike: dict[str, list[_Source]] = {}
    for source in wanted:
        if not toolchain.module_of(source.alone, _prelude()).exists():
            alike.setdefault(source.parts[0], []).append(source)
    for before, sources in alike.items():
        for i in range(0, len(sources), _MOST_AT_ONCE):
            with contextlib.suppress(RuntimeError):
                _compile_several(before, sources[i : i + _MOST_AT_ONCE])


def _compile_several(before: str, sources: Sequence[_Source]) -> None:
    parts = [f"namespace {s.entry}_ {{\n{s.parts[1]}\n}}\n" for s in sources]
    parts[0] = f'#line 1 "{_SHARED_NAME}"\n{before}\n{parts[0]}'
    texts = [source.alone for source in sources]
    toolchain.kernel_modules(dict(zip(texts, parts, strict=True)), _prelude())


def _as_arrays(inputs: Sequence[mx.array | Scalar]) -> list[mx.array]:
    return [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]


def _input_arguments(
    name: str, array: mx.array, ensure_row_contiguous: bool
) -> dict[str, np.ndarray]:
    """The parameters that MLX may derive from an input."""
    view = _to_numpy(array)
    if ensure_row_contiguous:
        view = np.require(view, requirements="C")
    strides = [stride // view.itemsize for stride in view.strides]
    return {
        name: _memory(view, strides),
        f"{name}_shape": np.array(view.shape, np.int32),
        f"{name}_strides": np.array(strides, np.int64),
        f"{name}_ndim": np.array(view.ndim, np.int32),
    }


def _memory(view: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """A view's memory, with the gaps in it, which are filled with bytes that mean nothing."""
    if any(stride < 0 for stride in strides):
        raise ValueError("[emulator] An input's strides must not be negative; copy it first.")
    if view.size == 0:
        return np.empty(0, view.dtype)
    reach = sum((n - 1) * stride for n, stride in zip(view.shape, strides, strict=True))
    memory = np.full((reach + 1) * view.itemsize, 0xFF, np.uint8).view(view.dtype)
    np.lib.stride_tricks.as_strided(memory, view.shape, view.strides)[...] = view
    return memory


def _to_numpy(array: mx.array) -> np.ndarray:
    """A view of an array's memory; numpy has no bfloat16, so that comes as uint16."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def _output_array(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray:
    return np.array(_to_numpy(mx.full(tuple(shape), mx.array(init_value or 0, dtype))))
