"""The shared test vectors as arguments of a backend, and the check that it reproduces them.

Source: docs/FORMAT.md, section 9.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Codec, Packed, codec
from rotormlx.config import BITS, RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends.first_call import KernelError
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import tensor_file

# The finding of a check that found no difference.
RIGHT = "right"
Arrays = dict[str, Any]
Facts = dict[str, Any]

# The largest allowed error of decoded vectors and outputs, relative to the largest number.
TOLERANCE = 1e-5
# How often query heads are repeated for the operation with many query rows.
MANY = 4
# Enough tokens for kernels to cut a sequence into parts.
HIDDEN_TOKENS = 1024


class Operation(NamedTuple):
    """An operation of the kernels at one code width.

    name: One of :data:`NAMES`.
    bits: Bits per code.
    """

    name: str
    bits: int

    def __str__(self) -> str:
        return f"{self.name}, {self.bits} bits"


NAMES = (
    *(f"{verb} {role}s" for verb in ("encode", "decode") for role in ROLES),
    *("attend", "attend, many query rows"),
)


def operations() -> list[Operation]:
    """Return every operation at every width."""
    return [Operation(name, bits) for name in NAMES for bits in BITS]


def folder() -> Path:
    """Return the folder of the files: in the package in a wheel, in ``tests/`` in the repository.

    Raises:
        RuntimeError: If the installation lacks them.
    """
    package = Path(__file__).parents[2]
    for place in (package / "vectors", package.parent / "tests" / "vectors"):
        if place.is_dir():
            return place
    raise RuntimeError(
        f"[vectors] The test vectors must be in {package / 'vectors'}, but they are missing; "
        "reinstall rotormlx."
    )


def names() -> list[str]:
    """Return the names of the files, such as ``cascade-d128``: a rotation and a head_dim."""
    return sorted(path.stem for path in folder().glob("*.safetensors"))


@cache
def load(name: str) -> tuple[Arrays, Facts]:
    """Return the arrays of a file, and the facts about them."""
    path = folder() / f"{name}.safetensors"
    arrays, texts = tensor_file.read_arrays(path, where="test vectors", checksum_required=False)
    return dict(arrays), json.loads(texts["rotormlx"])


def codec_of(facts: Facts, bits: int, role: str) -> Codec:
    """Return the codec that wrote a role's blocks of this width."""
    config = RotorConfig(bits, bits, facts["rotation"], seed=facts["seed"])
    return codec(config, facts["head_dim"], layer=facts["layer"], role=role)


def channel_scale(arrays: Arrays, role: str) -> mx.array | None:
    """Return the channel scale of a role, or None."""
    scale = arrays.get(f"{role}.channel_scale")
    return None if scale is None else mx.array(scale)


def packed_of(arrays: Arrays, role: str, bits: int) -> Packed:
    """Return the packed rows of a role."""
    centres = mx.array(arrays["key.centres"]) if role == KEY else None
    words, scales = (mx.array(arrays[f"{role}.{part}.{bits}"]) for part in ("words", "scales"))
    return Packed(words, scales, centres)


def views_of(
    arrays: Arrays, facts: Facts, bits: int, dtype: mx.Dtype = mx.float32
) -> tuple[KVView, KVView]:
    """Return views of keys and of values, with exact tokens in this dtype."""
    views = []
    for role in ROLES:
        packed = packed_of(arrays, role, bits)
        packed_tokens = packed.scales.shape[2] * BLOCK - facts["missing"]
        exact = mx.array(arrays[f"{role}.exact"]).astype(dtype)
        tokens = packed_tokens + exact.shape[2]
        scale = channel_scale(arrays, role)
        counts = facts["sink"], packed_tokens, tokens
        views.append(KVView(codec_of(facts, bits, role), exact, packed, scale, *counts))
    return views[0], views[1]


# ---- the check of a backend --------------------------------------------------------------------


def check(backend: MLXBackend, operation: Operation, name: str) -> str:
    """Check whether an operation of a backend reproduces a file.

    Returns:
        ``RIGHT``, or the end of a sentence whose subject is the operation.

    Raises:
        KernelError: If memory is missing, which says nothing about the kernel.
    """
    try:
        return difference(backend, operation, name) or RIGHT
    except KernelError as error:
        if error.lacks_memory:
            raise
        return error.brief


def difference(backend: MLXBackend, operation: Operation, name: str) -> str | None:
    """Compare the result of an operation with that in a vector file.

    Args:
        backend: The backend that runs the operation.
        operation: The operation and its width.
        name: The name of the file.

    Returns:
        The end of a sentence whose subject is the operation; None if there is no difference.
    """
    arrays, facts = load(name)
    verb, _, rest = operation.name.partition(" ")
    role = KEY if rest.startswith(KEY) else VALUE
    if verb == "encode":
        return _encodes(backend, operation.bits, arrays, facts, role)
    if verb == "decode":
        found = backend.decode(
            packed_of(arrays, role, operation.bits),
            codec_of(facts, operation.bits, role),
            channel_scale=channel_scale(arrays, role),
        )
        expected = arrays[f"{role}.decoded.{operation.bits}"]
        return _is_near(found[:, :, : expected.shape[2]], expected)
    repeats = MANY if rest else 1
    query, expected = (arrays[part] for part in ("query", f"output.{operation.bits}"))
    # Query heads of one KV head are adjacent.
    query, expected = (np.repeat(x, repeats, axis=1) for x in (query, expected))
    views = views_of(arrays, facts, operation.bits)
    call = AttendCall(mx.array(query), *views, facts["head_dim"] ** -0.5, "causal")
    # Long sequences may use other kernels than short ones.
    calls = [call] if rest else [call, _among_hidden_tokens(call)]
    return next(filter(None, (_is_near(backend.attend(c), expected) for c in calls)), None)


def _among_hidden_tokens(call: AttendCall) -> AttendCall:
    """Return the same call with HIDDEN_TOKENS more tokens that no query sees."""
    keys, values = call.keys, call.values
    if keys.packed is None or values.packed is None:
        return call
    block_tokens = keys.packed.scales.shape[2] * BLOCK
    copies = -(-HIDDEN_TOKENS // block_tokens)
    hidden = copies * block_tokens
    visible = np.tri(call.length, keys.tokens, keys.tokens - call.length, dtype=np.bool_)
    mask = np.insert(visible, [keys.sink + keys.packed_tokens] * hidden, False, axis=1)

    def longer(view: KVView, packed: Packed) -> KVView:
        repeated = (None if a is None else mx.concatenate([a] * (copies + 1), 2) for a in packed)
        counts = {"packed_tokens": view.packed_tokens + hidden, "tokens": view.tokens + hidden}
        return replace(view, packed=Packed(*repeated), **counts)

    return call._replace(
        keys=longer(keys, keys.packed), values=longer(values, values.packed), mask=mx.array(mask)
    )


def _encodes(backend: MLXBackend, bits: int, arrays: Arrays, facts: Facts, role: str) -> str | None:
    """Compare every bit of encoded words, scales and centres with the vectors."""
    x, scale = mx.array(arrays[f"{role}.input"]), channel_scale(arrays, role)
    packed = backend.encode(x, codec_of(facts, bits, role), channel_scale=scale)
    for part in ("words", "scales", "centres"):
        expected = arrays.get(f"{role}.{part}.{bits}", arrays.get(f"{role}.{part}"))
        if expected is None:
            continue
        wrong = int((np.array(getattr(packed, part)) != expected).sum())
        if wrong:
            return f"gives {wrong:,} of {expected.size:,} {part} wrong"
    return None


def _is_near(found: mx.array, expected: Any) -> str | None:
    largest = np.abs(expected).max()
    error = np.abs(np.array(found.astype(mx.float32)) - expected).max() / largest
    if error <= TOLERANCE:  # False for NaN
        return None
    return f"is wrong by {error:.1e} of the largest number, where {TOLERANCE} is allowed"
