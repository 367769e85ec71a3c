"""Calls of cuda_kernels/launch.h on numpy arrays, run in the emulator."""

import ctypes
import functools
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Packed
from rotormlx.kernels import cuda_plan
from rotormlx.kernels.source import coefficients, cuda_header
from rotormlx.mlx.backends.mlx_ops import inverse_matrix
from tests.emulator.cuda import Buffers, CudaModule

KERNELS = Path(__file__).parents[2] / "cuda_kernels"
DTYPES = {mx.float16: 0, mx.bfloat16: 1, mx.float32: 2}
MASKS = {"none": 0, "causal": 1, "boolean": 2, "additive": 3}
POINTER = ctypes.c_void_p


class PackedArguments(ctypes.Structure):
    """``rotormlx_packed``."""

    _fields_ = [
        *((name, POINTER) for name in ("words", "scales", "centres")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("words", "scales", "centres")),
    ]


class EncodeArguments(ctypes.Structure):
    """``rotormlx_encode_arguments``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("role", "dtype", "batch", "kv_heads", "blocks")),
        *(("given_centres", ctypes.c_int32), ("x", POINTER), ("x_strides", ctypes.c_int64 * 3)),
        *(("coefficients", POINTER), ("channel_scale", POINTER), ("packed", PackedArguments)),
        ("coefficients_stride", ctypes.c_int64),
        *(("start", ctypes.c_int32), ("state", POINTER)),
        ("channel_scale_stride", ctypes.c_int64),
    ]


class DecodeArguments(ctypes.Structure):
    """``rotormlx_decode_arguments``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("role", "dtype", "batch", "kv_heads", "blocks")),
        *(("packed", PackedArguments), ("coefficients", POINTER), ("channel_scale", POINTER)),
        *(("out", POINTER), ("coefficients_stride", ctypes.c_int64)),
        ("channel_scale_stride", ctypes.c_int64),
    ]


class StoreArguments(ctypes.Structure):
    """``rotormlx_store_arguments``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "kv_heads", "length")),
        *((name, ctypes.c_int32) for name in ("sink", "window", "blocks", "capacity")),
        *(("own_scale", ctypes.c_int32), ("lengths", POINTER), ("counter", POINTER)),
        *((f"new_{role}", POINTER) for role in ("keys", "values")),
        *((f"exact_{role}", POINTER) for role in ("keys", "values")),
        *((f"new_{role}_strides", ctypes.c_int64 * 3) for role in ("keys", "values")),
        *((f"exact_{role}_strides", ctypes.c_int64 * 3) for role in ("keys", "values")),
        *(("keys", PackedArguments), ("values", PackedArguments)),
        *((f"{role}_channel_scale", POINTER) for role in ("key", "value")),
        *((f"{role}_channel_scale_stride", ctypes.c_int64) for role in ("key", "value")),
        *((f"{role}_coefficients", POINTER) for role in ("key", "value")),
        *((f"{role}_coefficients_stride", ctypes.c_int64) for role in ("key", "value")),
    ]


class Rotor3Arguments(ctypes.Structure):
    """``rotormlx_rotor3_arguments``."""

    _fields_ = [
        *(("dtype", ctypes.c_int32), ("rows", ctypes.c_int64)),
        *(("x", POINTER), ("x_stride", ctypes.c_int64)),
        *(("coefficients", POINTER), ("out", POINTER)),
    ]


class AttendArguments(ctypes.Structure):
    """``rotormlx_attend_arguments``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "heads", "kv_heads", "length")),
        *((name, ctypes.c_int32) for name in ("sink", "packed_tokens", "exact_tokens")),
        *(("lengths", POINTER), ("scale", ctypes.c_float)),
        *(("q", POINTER), ("q_strides", ctypes.c_int64 * 3)),
        *(("keys", PackedArguments), ("values", PackedArguments)),
        *(("exact_keys", POINTER), ("exact_values", POINTER)),
        *((f"exact_{role}_strides", ctypes.c_int64 * 3) for role in ("keys", "values")),
        *((f"key_{name}", POINTER) for name in ("matrix", "channel_scale")),
        *((f"value_{name}", POINTER) for name in ("matrix", "channel_scale")),
        *(("mask_kind", ctypes.c_int32), ("mask_columns", ctypes.c_int32)),
        *(("mask", POINTER), ("mask_strides", ctypes.c_int64 * 4)),
        *(("sink_logits", POINTER), ("out", POINTER), ("workspace", POINTER)),
        *((f"{role}_channel_scale_stride", ctypes.c_int64) for role in ("key", "value")),
        *((f"{role}_matrix_stride", ctypes.c_int64) for role in ("key", "value")),
        *((f"{role}_coefficients", POINTER) for role in ("key", "value")),
        ("counters", POINTER),
    ]


class AttendPlan(ctypes.Structure):
    """``rotormlx_attend_plan``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("operands", "tiles", "matrix_rows", "one_kernel")),
        *((f"exact_{name}", ctypes.c_int32) for name in ("parts", "part_tokens")),
        *((f"packed_{name}", ctypes.c_int32) for name in ("parts", "part_tokens")),
        *((f"{name}_bytes", ctypes.c_int32) for name in ("query", "part", "merge")),
    ]


def to_numpy(a):
    """An array's numbers; bfloat16 as uint16."""
    if a is None or isinstance(a, np.ndarray):
        return a
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def from_numpy(a, dtype):
    return mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a)


def with_gaps(a, axes):
    """The same numbers with others before them along the first axes: the whole, and the part that
    counts.

    Bytes that do not count are 0xff. Behind the last number that counts the array ends.
    """
    shape = [n + 1 if axis < axes else n for axis, n in enumerate(a.shape)]
    whole = np.full(int(np.prod(shape)) * a.itemsize, 0xFF, np.uint8).view(a.dtype).reshape(shape)
    part = whole[tuple(slice(-n, None) if n else slice(0) for n in a.shape)]
    part[...] = a
    return whole, part


def strides(part, axes):
    return (ctypes.c_int64 * axes)(*(s // part.itemsize for s in part.strides[:axes]))


class Call:
    """Buffers of one call, which hold numpy arrays alive."""

    def __init__(self):
        self.buffers = Buffers()
        self._alive = []

    def plain(self, name, a, *, written=False):
        """A pointer to a contiguous array, or null."""
        if a is None:
            return None
        a = np.ascontiguousarray(to_numpy(a)) if not written else a
        self._alive.append(a)
        return self.buffers.handle(name, a, written=written)

    def strided(self, name, a, axes=3, *, written=False):
        """A pointer to an array with gaps, and its strides; an output is given back as the part
        that counts.
        """
        whole, part = with_gaps(to_numpy(a), axes)
        self._alive.append(whole)
        handle = self.buffers.handle(name, whole, written=written)
        return handle + part.ctypes.data - whole.ctypes.data, strides(part, axes), part

    def scale(self, name, channel_scale):
        """A pointer to a channel scale ``[K, D]`` or ``[B, K, D]``, or null; its stride of B."""
        shape = () if channel_scale is None else channel_scale.shape
        return self.plain(name, channel_scale), shape[1] * shape[2] if len(shape) == 3 else 0

    def matrix(self, name, numbers):
        """A pointer to what a kernel reads of a rotation; its stride of K, if heads have theirs."""
        return self.plain(name, numbers), numbers[0].size if numbers.ndim == 3 else 0

    def packed(self, name, packed):
        arguments = PackedArguments()
        if packed is None:
            return arguments
        for field in ("words", "scales", "centres"):
            a = getattr(packed, field)
            if a is not None:
                handle, steps, _ = self.strided(f"{name}.{field}", a)
                setattr(arguments, field, handle)
                setattr(arguments, f"{field}_strides", steps)
        return arguments


@functools.cache
def module(name, keys, values, changes=(), multiprocessors=1):
    """``launch_<name>.cu`` compiled for the codecs of keys and values; ``changes`` are made in its
    text.
    """
    macros = {
        "ROTORMLX_KEY_DIM": keys.head_dim,
        "ROTORMLX_VALUE_DIM": values.head_dim,
        "ROTORMLX_KEY_BITS": keys.bits,
        "ROTORMLX_VALUE_BITS": values.bits,
    }
    headers = {"key_rotation.h": cuda_header(keys), "value_rotation.h": cuda_header(values)}
    path = KERNELS / f"launch_{name}.cu"
    return CudaModule(path, macros, headers, changes=changes, multiprocessors=multiprocessors)


def both_roles(chosen):
    """A codec of keys and one of values, of which one is the given one."""
    other = {KEY: VALUE, VALUE: KEY}[chosen.role]
    made = {chosen.role: chosen, other: replace(chosen, role=other)}
    return made[KEY], made[VALUE]


def output(shape, dtype):
    """An array of an MLX dtype that nobody has written to: all NaN."""
    kind = {mx.float16: np.uint16, mx.bfloat16: np.uint16, mx.float32: np.uint32}[dtype]
    full = np.full(shape, -1, np.int32).astype(kind)
    return full if dtype == mx.bfloat16 else full.view(to_numpy(mx.zeros(1, dtype)).dtype)


def encode(x, chosen, *, channel_scale=None, centres=None, start=0, state=None, made=None):
    """What ``rotormlx_encode`` gives, as numpy arrays; x is an MLX array."""
    made = made or module("codec", *both_roles(chosen))
    batch, heads, tokens, head_dim = x.shape
    blocks = (batch, heads, tokens // BLOCK)
    call, a = Call(), EncodeArguments()
    a.role, a.dtype = ROLES.index(chosen.role), DTYPES[x.dtype]
    a.batch, a.kv_heads, a.blocks = blocks
    a.x, a.x_strides, _ = call.strided("x", x)
    table = coefficients(chosen.rotation)
    a.coefficients, a.coefficients_stride = call.matrix("coefficients", table)
    a.channel_scale, a.channel_scale_stride = call.scale("channel_scale", channel_scale)
    a.start, a.state = start, call.plain("state", state)
    written = {
        "words": np.full((*blocks, *chosen.words_shape), 2**32 - 1, np.uint32),
        "scales": np.full((*blocks, BLOCK), np.nan, np.float16),
    }
    if chosen.role == KEY:
        a.given_centres = centres is not None
        written["centres"] = (
            np.full((*blocks, head_dim), np.nan, np.float16) if centres is None else centres
        )
    parts = {}
    for name, array in written.items():
        given = name == "centres" and centres is not None
        handle, steps, parts[name] = call.strided(name, array, written=not given)
        setattr(a.packed, name, handle)
        setattr(a.packed, f"{name}_strides", steps)
    made.call("rotormlx_encode", a, call.buffers)
    return Packed(parts["words"], parts["scales"], parts.get("centres"))


def decode(packed, chosen, *, channel_scale=None, dtype=mx.float32, made=None):
    """What ``rotormlx_decode`` gives, as an MLX array; ``packed`` are numpy arrays."""
    made = made or module("codec", *both_roles(chosen))
    batch, heads, blocks = packed.words.shape[:3]
    call, a = Call(), DecodeArguments()
    a.role, a.dtype = ROLES.index(chosen.role), DTYPES[dtype]
    a.batch, a.kv_heads, a.blocks = batch, heads, blocks
    a.packed = call.packed("packed", packed)
    table = coefficients(chosen.rotation, back=True)
    a.coefficients, a.coefficients_stride = call.matrix("coefficients", table)
    a.channel_scale, a.channel_scale_stride = call.scale("channel_scale", channel_scale)
    out = output((batch, heads, blocks * BLOCK, chosen.head_dim), dtype)
    a.out = call.plain("out", out, written=True)
    made.call("rotormlx_decode", a, call.buffers)
    return from_numpy(out, dtype)


def rotor3(x, chosen, *, made=None):
    """What ``rotormlx_rotor3`` gives for rows ``[n, D]``; ``chosen`` is a codec of values."""
    made = made or module("codec", *both_roles(chosen))
    call, a = Call(), Rotor3Arguments()
    a.dtype, a.rows = DTYPES[x.dtype], x.shape[0]
    a.x, steps, _ = call.strided("x", x, axes=1)
    a.x_stride = steps[0]
    a.coefficients = call.plain("coefficients", coefficients(chosen.rotation))
    out = output(x.shape, x.dtype)
    a.out = call.plain("out", out, written=True)
    made.call("rotormlx_rotor3", a, call.buffers)
    return from_numpy(out, x.dtype)


def store(state, new, codecs, *, sink, window, own_scale=False, made=None):
    """Run ``rotormlx_store`` on numpy arrays, which it changes.

    Args:
        state: ``lengths`` ``[B, 2]``, ``counter`` ``[B]``, and of keys and of values ``exact``
            ``[B, K, capacity, D]``, ``packed`` and ``channel_scale`` or None.
        new: Keys and values ``[B, K, L, D]``; bfloat16 as uint16, float16 otherwise, or float32.
        codecs: Of keys and of values.
    """
    made = made or module("store", *codecs)
    call, a = Call(), StoreArguments()
    kinds = [np.dtype(name) for name in ("float16", "uint16", "float32")]
    a.dtype = kinds.index(new[0].dtype)
    a.batch, a.kv_heads, a.length = new[0].shape[:3]
    a.sink, a.window, a.own_scale = sink, window, own_scale
    a.blocks, a.capacity = state.packed[0].words.shape[2], state.exact[0].shape[2]
    a.lengths = call.plain("lengths", state.lengths, written=True)
    a.counter = call.plain("counter", state.counter, written=True)
    changed = []
    for i, (plural, role) in enumerate((("keys", "key"), ("values", "value"))):
        handle, steps, _ = call.strided(f"new_{plural}", new[i])
        setattr(a, f"new_{plural}", handle)
        setattr(a, f"new_{plural}_strides", steps)
        handle, steps, part = call.strided(f"exact_{plural}", state.exact[i], written=True)
        changed.append((state.exact[i], part))
        setattr(a, f"exact_{plural}", handle)
        setattr(a, f"exact_{plural}_strides", steps)
        packed = PackedArguments()
        for field, array in state.packed[i]._asdict().items():
            if array is not None:
                handle, steps, part = call.strided(f"{plural}.{field}", array, written=True)
                changed.append((array, part))
                setattr(packed, field, handle)
                setattr(packed, f"{field}_strides", steps)
        setattr(a, plural, packed)
        scale = state.channel_scale[i]
        pointer = call.plain(f"{role}_channel_scale", scale, written=True)
        setattr(a, f"{role}_channel_scale", pointer)
        of_rows = scale is not None and scale.ndim == 3
        setattr(a, f"{role}_channel_scale_stride", scale[0].size if of_rows else 0)
        pointer, step = call.matrix(f"{role}_coefficients", coefficients(codecs[i].rotation))
        setattr(a, f"{role}_coefficients", pointer)
        setattr(a, f"{role}_coefficients_stride", step)
    made.call("rotormlx_store", a, call.buffers)
    for array, part in changed:
        array[...] = part


def plan_of(a, codecs, made):
    """The plan of a call for the device of a module."""
    keys, values = codecs
    shape = cuda_plan.Shape(
        *(a.batch, a.heads, a.kv_heads, a.length),
        *(keys.head_dim, values.head_dim, keys.bits, values.bits),
        *(a.exact_tokens, a.packed_tokens, a.dtype == DTYPES[mx.float32]),
        has_stages=all(codec.rotation.has_stages for codec in codecs),
    )
    device = cuda_plan.Device(made.multiprocessors, made.shared_memory)
    return AttendPlan(*cuda_plan.attend_plan(shape, device).numbers)


def attend(asked, *, made=None, lengths=None, counters=None):
    """What ``rotormlx_attend`` gives for an ``AttendCall``, as an MLX array.

    Args:
        asked: As a backend takes it.
        made: The module to run, by default the one of this configuration.
        lengths: What the device reads, ``[B, 2]``, instead of what the call says.
        counters: int32, changed, with which one kernel does it where it can; None for three.
    """
    queries, keys, values, scale, mask, sink_logits = asked
    batch, heads, length, key_dim = queries.shape
    value_dim = values.shape[3]
    made = made or module("attend", keys.codec, values.codec)
    call, a = Call(), AttendArguments()
    a.dtype, a.scale = DTYPES[queries.dtype], scale
    a.batch, a.heads, a.kv_heads, a.length = batch, heads, keys.shape[1], length
    stored = np.array(keys.lengths, np.int32)
    a.sink, a.packed_tokens = keys.sink, keys.packed_tokens
    a.exact_tokens = int((stored[:, 1] - stored[:, 0]).max())
    a.lengths = call.plain("lengths", stored if lengths is None else np.array(lengths, np.int32))
    # As models give them: [B, L, H, D] in memory.
    flat = np.ascontiguousarray(to_numpy(queries).swapaxes(1, 2))
    a.q = call.plain("q", flat)
    a.q_strides = (ctypes.c_int64 * 3)(length * heads * key_dim, key_dim, heads * key_dim)
    a.keys = call.packed("keys", keys.packed)
    a.values = call.packed("values", values.packed)
    for role, view in (("keys", keys), ("values", values)):
        handle, steps, _ = call.strided(f"exact_{role}", view.exact)
        setattr(a, f"exact_{role}", handle)
        setattr(a, f"exact_{role}_strides", steps)
    back = to_numpy(inverse_matrix(keys.codec.rotation)).swapaxes(-1, -2)
    a.key_matrix, a.key_matrix_stride = call.matrix("key_matrix", back)
    back = to_numpy(inverse_matrix(values.codec.rotation))
    a.value_matrix, a.value_matrix_stride = call.matrix("value_matrix", back)
    for role, view in (("key", keys), ("value", values)):
        table = coefficients(view.codec.rotation)
        setattr(a, f"{role}_coefficients", call.plain(f"{role}_coefficients", table))
    a.counters = call.plain("counters", counters, written=True)
    for role, view in (("key", keys), ("value", values)):
        name = f"{role}_channel_scale"
        handle, step = call.scale(name, view.channel_scale)
        setattr(a, name, handle)
        setattr(a, f"{name}_stride", step)
    if isinstance(mask, str):
        a.mask_kind = MASKS[mask]
    elif mask is not None:
        boolean = mask.dtype == mx.bool_
        a.mask_kind = MASKS["boolean" if boolean else "additive"]
        given = np.array(mask if boolean else mask.astype(mx.float32))
        a.mask = call.plain("mask", given)
        a.mask_columns = given.shape[-1] if given.shape[-1] > 1 else keys.tokens
        wide = np.broadcast_to(given, (batch, heads, length, a.mask_columns))
        a.mask_strides = strides(wide, 4)
    a.sink_logits = call.plain("sink_logits", sink_logits)
    out = output((batch, heads, length, value_dim), queries.dtype)
    a.out = call.plain("out", out, written=True)
    plan = plan_of(a, (keys.codec, values.codec), made)
    words = made.number("rotormlx_attend_workspace", a, plan) // 4
    a.workspace = call.plain("workspace", np.full(words, np.nan, np.float32), written=True)
    made.call("rotormlx_attend", a, call.buffers, plan=plan)
    return from_numpy(out, queries.dtype)
