"""MLX kernels whose first call is evaluated at once, so that a compiler error names the kernel.

MLX compiles a kernel when its result is evaluated, which may be far from the call and after other
kernels. Its error holds the compiler's message but not the name of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx

# MLX's messages for missing memory on Apple's GPUs and in CUDA; not those on threadgroup memory.
_NO_MEMORY = re.compile(r"unable to allocate|(out of|insufficient) memory", re.IGNORECASE)


class KernelError(RuntimeError):
    """An error for a kernel that does not compile or run; the message names it and gives a way out.

    Args:
        name: The kernel.
        said: The message of MLX.
    """

    def __init__(self, name: str, said: str) -> None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        #: The end of a sentence whose subject is the operation of the kernel.
        self.brief = f"does not compile or run: {lines[0] if lines else 'MLX does not say why'}"
        #: Whether memory is missing; the kernel itself may then be correct.
        self.lacks_memory = _NO_MEMORY.search(said) is not None
        device = mx.device_info().get("device_name", mx.default_device())
        super().__init__(
            f"[kernel] The kernel {name} must compile and run on {device}, but it does not; "
            "rotormlx.remove(model) restores the model's own caches, and ROTORMLX_BACKEND=mlx "
            f"needs no kernels. MLX says: {said}"
        )


class FirstCallKernel:
    """A kernel that evaluates the result of its first call for each template and set of dtypes.

    Args:
        name: The name of the kernel, also used in messages.
        make: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
        **options: The arguments of ``make`` other than the name.

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
    """Evaluate the arrays; return False while a function is traced, when this is impossible."""
    try:
        mx.eval([a for a in arrays if isinstance(a, mx.array)])
    except ValueError:
        return False
    return True
