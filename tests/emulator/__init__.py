"""Run Metal kernels on a machine without Metal, and check what they do. See README.md."""

from .launch import KernelError, Kind, Report
from .lint import lint
from .metal import EmulatedKernel, compiling_ahead, execution_order, metal_kernel, run_text
from .toolchain import CompilerMissingError, missing

__all__ = [
    "CompilerMissingError",
    "EmulatedKernel",
    "KernelError",
    "Kind",
    "Report",
    "compiling_ahead",
    "execution_order",
    "lint",
    "metal_kernel",
    "missing",
    "run_text",
]
