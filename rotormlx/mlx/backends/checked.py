"""Kernels that are used only after they reproduce the shared test vectors on this device.

If the kernels of an operation do not compile, or do not reproduce the vectors, MLX's operations
compute it, with a warning. Findings are stored for later processes (``kept.py``).
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import mlx.core as mx

from rotormlx.codec.format import Codec, Packed
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends.first_call import KernelError
from rotormlx.mlx.backends.kept import Findings, device_name, findings
from rotormlx.mlx.backends.mlx_ops import MLXBackend, Prompts
from rotormlx.mlx.backends.vectors import RIGHT, Operation, check

# The file of vectors for the check at first use.
FILE = "cascade-d128"
# The most query rows per KV head for ``attend``; other kernels compute more of them.
FEW_ROWS = 8


class CheckedBackend(MLXBackend):
    """A backend with kernels, each checked at its first use.

    Args:
        fused: The backend whose kernels are checked.
    """

    def __init__(self, fused: MLXBackend) -> None:
        self.fused = fused
        self.name = fused.name
        self._found: dict[Operation, str] = {}

    @cached_property
    def _findings(self) -> Findings:
        return findings(self.name)

    def prompts(self, dtype: mx.Dtype) -> Prompts:
        """Return the prompt attention of the wrapped backend."""
        return self.fused.prompts(dtype)

    def replaced(self) -> dict[Operation, str]:
        """Return the operations replaced by MLX's own, with the reasons."""
        return {op: found for op, found in self._found.items() if found != RIGHT}

    def keep(self, operation: Operation, found: str) -> None:
        """Store a finding about an operation: ``RIGHT``, or a description of the error."""
        self._found[operation] = found
        self._findings.keep(str(operation), found)

    def _encode(
        self,
        x: mx.array,
        codec: Codec,
        channel_scale: mx.array | None,
        centres: mx.array | None,
        start: int,
        state: mx.array | None,
    ) -> Packed:
        asked = [Operation(f"encode {codec.role}s", codec.bits)]
        return self._done("_encode", asked, x, codec, channel_scale, centres, start, state)

    def _decode(
        self, packed: Packed, codec: Codec, channel_scale: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        asked = [Operation(f"decode {codec.role}s", codec.bits)]
        return self._done("_decode", asked, packed, codec, channel_scale, dtype)

    def _attend(self, call: AttendCall) -> mx.array:
        name = "attend" if call.group_rows <= FEW_ROWS else "attend, many query rows"
        widths = {call.keys.codec.bits, call.values.codec.bits}
        return self._done("_attend", [Operation(name, bits) for bits in widths], call)

    def _done(self, method: str, asked: list[Operation], *args: Any) -> Any:
        """Run a call with the kernels, or with MLX's operations."""
        if all(map(self._trusts, asked)):
            try:
                return getattr(self.fused, method)(*args)
            except KernelError as error:
                if error.lacks_memory:
                    raise
                # For this process only, because the kernel may work with another head_dim.
                for operation in asked:
                    self._distrust(operation, error.brief)
        return getattr(super(), method)(*args)

    def _trusts(self, operation: Operation) -> bool:
        found = self._found.get(operation)
        if found is None:
            found = self._findings.get(str(operation))
            if found is None:
                found = check(self.fused, operation, FILE)
                self.keep(operation, found)
            self._found[operation] = found
            if found != RIGHT:
                self._distrust(operation, found)
        return found == RIGHT

    def _distrust(self, operation: Operation, found: str) -> None:
        self._found[operation] = found
        warnings.warn(
            f"[kernels] On {device_name()} the {self.name} kernel of this operation cannot be "
            f"used: {operation}. It {found}. MLX's operations replace it, correct but slower; run "
            "rotormlx doctor and attach the file that it writes to an issue.",
            stacklevel=2,
        )
