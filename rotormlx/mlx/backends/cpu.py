"""The codec as native code on the CPU, in the library of cpu_kernels/; docs/CPU.md explains it.

Shapes: B batch, H query heads, K KV heads, L queries, N blocks, D head_dim.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, Codec, Packed
from rotormlx.kernels import cpu_library
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends.mlx_ops import KERNEL, MLXBackend, Prompts
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.dtypes import FLOATS

# The most numbers of an output array that is copied from a cached one.
_SMALL = 2**13


def missing() -> str | None:
    """Return the reason why this process cannot use the CPU library, or None."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return "MLX's default device is the GPU"
    return cpu_library.missing()


class CPUBackend(MLXBackend):
    """The backend that encodes, decodes and attends in the library; the rest is inherited.

    The library reads evaluated arrays, so a call evaluates its inputs. That is not possible while a
    function is traced (``mx.compile``, ``mx.export_function``), so the inherited operations are
    used then.
    """

    name = "cpu"

    def prompts(self, dtype: mx.Dtype) -> Prompts:
        """Return native code, since MLX's attention takes 30 times as long (docs/KERNELS.md)."""
        return Prompts(KERNEL, KERNEL)

    def _encode(
        self,
        x: mx.array,
        codec: Codec,
        channel_scale: mx.array | None,
        centres: mx.array | None,
        start: int,
        state: mx.array | None,
    ) -> Packed:
        """Compress whole blocks; see :meth:`MLXBackend.encode`."""
        if not _evaluated(x, channel_scale, centres, state):
            return super()._encode(x, codec, channel_scale, centres, start, state)
        batch, heads, tokens, head_dim = x.shape
        front = (batch, heads, tokens // BLOCK)
        words = _room((*front, *codec.words_shape), mx.uint32)
        scales = _room((*front, BLOCK), mx.float16)
        given = codec.role == KEY and centres is not None
        means = centres if given else None
        if codec.role == KEY and not given:
            means = _room((*front, head_dim), mx.float16)
        blocks = cpu_library.Blocks(codec, words, scales, means, channel_scale)
        cpu_library.encode(x, blocks, given_centres=given, start=start, state=state)
        return Packed(words, scales, means)

    def _decode(
        self, packed: Packed, codec: Codec, channel_scale: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Decode packed blocks; see :meth:`MLXBackend.decode`."""
        if dtype not in FLOATS or not _evaluated(*packed, channel_scale):
            return super()._decode(packed, codec, channel_scale, dtype)
        batch, heads, count = packed.scales.shape[:3]
        rows = _room((batch, heads, count * BLOCK, codec.head_dim), dtype)
        cpu_library.decode(cpu_library.Blocks(codec, *packed, channel_scale), rows)
        return rows

    def product(self, a: mx.array, b: mx.array) -> mx.array:
        """Multiply with numpy, since MLX takes 30 times as long; see :meth:`MLXBackend.product`."""
        if not _evaluated(a, b):
            return super().product(a, b)
        return mx.array(np.matmul(np.array(a, copy=False), np.array(b, copy=False)))

    def _attend(self, call: AttendCall) -> mx.array:
        """Attend over a partly packed cache; see :meth:`MLXBackend.attend`."""
        keys, values, mask, sink_logits = call.keys, call.values, call.mask_array, call.sink_logits
        if mask is not None and mask.dtype not in (mx.bool_, *FLOATS):
            mask = mask.astype(mx.float32)
        if sink_logits is not None and sink_logits.dtype not in FLOATS:
            sink_logits = sink_logits.astype(mx.float32)
        key_blocks, value_blocks = _blocks(keys), _blocks(values)
        arrays = (keys.exact, *key_blocks[1:], values.exact, *value_blocks[1:])
        if not _evaluated(call.queries, mask, sink_logits, arrays):
            return super()._attend(call)
        output = _room(call.output_shape, call.queries.dtype)
        threads = cpu_library.threads_for(
            call.queries.size, keys.tokens, cpu_library.thread_count()
        )
        cpu_library.attend(
            call.queries,
            output,
            cpu_library.Source(keys.exact, key_blocks),
            cpu_library.Source(values.exact, value_blocks),
            keys.lengths,
            sink=keys.sink,
            scale=call.scale,
            mask=mask,
            sink_logits=sink_logits,
            causal=call.is_causal,
            threads=threads,
        )
        return output


def _room(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an output buffer that the library fills in place."""
    if math.prod(shape) > _SMALL:
        return _zeros.__wrapped__(shape, dtype)
    # A copy is made at once, while evaluation would wait for another thread.
    return mx.from_dlpack(_zeros(shape, dtype), copy=True)


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    made = mx.zeros(shape, dtype)
    mx.eval(made)
    return made


def _blocks(view: KVView) -> cpu_library.Blocks:
    packed = view.packed or Packed(None, None, None)
    return cpu_library.Blocks(view.codec, *packed, view.channel_scale)


def _evaluated(*arrays: Any) -> bool:
    """Evaluate arrays and tuples of them; return False while a function is traced."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True
