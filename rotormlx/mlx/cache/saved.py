"""The reader of MLX arrays in the states of saved caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rotormlx.codec.format import FORMAT_VERSION
from rotormlx.storage.cache_fields import Field, StateReader

# MLX's dtypes, by the names that files use.
DTYPE_NAMES = {
    **{mx.bool_: "BOOL", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"},
    **{mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"},
    **{mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64"},
}


class MLXReader(StateReader):
    """A reader of states for a cache of the class ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def field(self, entry: Any) -> Any:
        """Return the dtype and shape of an array; return anything else unchanged."""
        if not isinstance(entry, mx.array):
            return entry
        return Field(DTYPE_NAMES.get(entry.dtype, str(entry.dtype)), entry.shape)

    def numbers(self, entry: Any) -> npt.NDArray[Any]:
        """Return the content of an array."""
        return np.array(entry)

    def refuse(self, required: str, came: object) -> ValueError:
        """Return the error for a state that no cache has written."""
        shown = tuple(came) if isinstance(came, Field) else came
        return ValueError(
            f"[{self.name}] A saved cache must hold {required}, but it holds {shown!r}; "
            "the file is damaged; make it again."
        )

    def refuse_version(self, version: object) -> ValueError:
        """Return the error for another format version."""
        return ValueError(
            f"[{self.name}] This rotormlx reads format version {FORMAT_VERSION}, but the saved "
            f"cache has version {version}; make it again, or use the rotormlx that wrote it."
        )
