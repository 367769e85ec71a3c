"""Kernels of MLX whose first call is waited for, so that an error of the compiler names them.

MLX compiles a kernel when its result is evaluated, far from the call and after other kernels, and
says what the compiler said but not for which kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx

# What MLX says then on Apple's GPUs and in CUDA, but not of threadgroup memory.
_NO_MEMORY = re.compile(r"unable to allocate|(out of|insufficient) memory", re.IGNORECASE)


class KernelError(RuntimeError):
    """A kernel does not compile or run; the message names it and says what to do.

    Args:
        name: The kernel.
        said: What MLX says.
    """

    def __init__(self, name: str, said: str) -> None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        #: The end of a sentence that begins with what the kernel does.
        self.brief = f"does not compile or run: {lines[0] if lines else 'MLX does not say why'}"
        #: Whether it is memory that is missing: then the kernel may be right.
        self.lacks_memory = _NO_MEMORY.search(said) is not None
        device = mx.device_info().get("device_name", mx.default_device())
        super().__init__(
            f"[kernel] The kernel {name} must compile and run on {device}, but it does not; "
            "rotormlx.remove(model) gives a model its own caches back, and ROTORMLX_BACKEND=mlx "
            f"needs no kernels. MLX says: {said}"
        )


class FirstCallKernel:
    """A kernel that evaluates the result of its first call for each template and set of dtypes.

    Args:
        name: For messages.
        make: Makes the kernel: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
        **options: What it takes beside the name.

    Raises:
        KernelError: If the kernel cannot be made; calls raise it if it cannot be compiled or run.
    """

    def __init__(self, name: str, make: Callable[..., Any], **options: Any) -> None:
        self.name = name
        self._done: set[Any] = set()
        try:
            self._kernel = make(name=name, **options)
        except RuntimeError as error:
            raise KernelError(name, str(error)) from error

    def __call__(self, **call: Any) -> list[mx.array]:
        """Call the kernel with MLX's arguments."""
        dtypes = [getattr(x, "dtype", None) for x in call["inputs"]]
        types = (*call.get("template", ()), *dtypes, *call["output_dtypes"])
        if types in self._done or not _evaluated(call["inputs"]):
            made: list[mx.array] = self._kernel(**call)
            return made
        try:
            made = self._kernel(**call)
            mx.eval(made)
        except RuntimeError as error:
            raise KernelError(self.name, str(error)) from error
        self._done.add(types)
        return made


def _evaluated(arrays: list[Any]) -> bool:
    """Evaluate what is given; False while a function is traced, which has no numbers yet."""
    try:
        mx.eval([a for a in arrays if isinstance(a, mx.array)])
    except ValueError:
        return False
    return True
