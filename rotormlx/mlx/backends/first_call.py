"""Kernels of MLX whose first call is waited for, so that an error of the compiler names them.

MLX compiles a kernel when its result is evaluated, far from the call and after other kernels, and
says what the compiler said but not for which kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class FirstCallKernel:
    """A kernel that evaluates the result of its first call for each template and set of dtypes.

    Args:
        name: For messages.
        make: Makes the kernel: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
        **options: What it takes beside the name.

    Raises:
        RuntimeError: If the kernel cannot be made; calls raise it if it cannot be compiled or run.
    """

    def __init__(self, name: str, make: Callable[..., Any], **options: Any) -> None:
        self.name = name
        self._done: set[Any] = set()
        try:
            self._kernel = make(name=name, **options)
        except RuntimeError as error:
            self._explain(error)
            raise

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
            self._explain(error)
            raise
        self._done.add(types)
        return made

    def _explain(self, error: RuntimeError) -> None:
        """Let an error name the kernel and the device, and say what to do."""
        device = mx.device_info().get("device_name", mx.default_device())
        error.args = (
            f"[kernel] The kernel {self.name} must compile and run on {device}, but it does not; "
            "rotormlx.remove(model) gives a model its own caches back, and ROTORMLX_BACKEND=mlx "
            f"needs no kernels. MLX says: {error}",
        )


def _evaluated(arrays: list[Any]) -> bool:
    """Evaluate what is given; False while a function is traced, which has no numbers yet."""
    try:
        mx.eval([a for a in arrays if isinstance(a, mx.array)])
    except ValueError:
        return False
    return True
