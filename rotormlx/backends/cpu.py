"""The codec as native code on the CPU: the library of cpu_kernels/; docs/CPU.md says how it works.

Shapes: B batch, H query heads, K KV heads, L queries, N blocks, D head_dim.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from rotormlx import cpu_library
from rotormlx.backends.mlx_ops import MLXBackend, check_rows
from rotormlx.format import BLOCK, KEY, Codec, Packed
from rotormlx.view import KVView

# What numpy calls room for each dtype; it has no bfloat16.
_ROOM = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}


def missing() -> str | None:
    """What keeps this process from computing on the CPU with the library, or None."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return "MLX's default device is the GPU"
    return cpu_library.missing()


class CPUBackend(MLXBackend):
    """Encode, decode and attend in the library; the rest is inherited.

    The library reads arrays that are there, so a call evaluates its inputs. While a function is
    traced (``mx.compile``, ``mx.export_function``) that is not possible, and the inherited
    operations do it.
    """

    name = "cpu"

    def encode(
        self,
        x: mx.array,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        centres: mx.array | None = None,
    ) -> Packed:
        """Compress whole blocks; see :meth:`MLXBackend.encode`."""
        check_rows(x, codec)
        if not _evaluated(x, channel_scale, centres):
            return super().encode(x, codec, channel_scale=channel_scale, centres=centres)
        batch, heads, tokens, head_dim = x.shape
        front = (batch, heads, tokens // BLOCK)
        words = np.empty((*front, *codec.words_shape), np.uint32)
        scales = np.empty((*front, BLOCK), np.float16)
        given = codec.role == KEY and centres is not None
        means = np.empty((*front, head_dim), np.float16) if codec.role == KEY else None
        blocks = cpu_library.Blocks(
            codec, words, scales, centres if given else means, channel_scale
        )
        cpu_library.encode(x, blocks, given_centres=given)
        made = centres if given or means is None else mx.array(means)
        return Packed(mx.array(words), mx.array(scales), made)

    def decode(
        self,
        packed: Packed,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """The vectors that packed blocks stand for; see :meth:`MLXBackend.decode`."""
        if dtype not in _ROOM or not _evaluated(*packed, channel_scale):
            return super().decode(packed, codec, channel_scale=channel_scale, dtype=dtype)
        batch, heads, count = packed.scales.shape[:3]
        rows = mx.zeros((batch, heads, count * BLOCK, codec.head_dim), dtype)
        mx.eval(rows)
        cpu_library.decode(cpu_library.Blocks(codec, *packed, channel_scale), rows)
        return rows

    def attend(
        self,
        queries: mx.array,
        keys: KVView,
        values: KVView,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention over a partly packed cache; see :meth:`MLXBackend.attend`."""
        mask_array = None if isinstance(mask, str) else mask
        if mask_array is not None and mask_array.dtype not in (mx.bool_, *_ROOM):
            mask_array = mask_array.astype(mx.float32)
        if sinks is not None and sinks.dtype not in _ROOM:
            sinks = sinks.astype(mx.float32)
        exact, blocks = (keys.exact, values.exact), (_blocks(keys), _blocks(values))
        if not _evaluated(queries, mask_array, sinks, exact, blocks[0][1:], blocks[1][1:]):
            return super().attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        output = np.empty((*queries.shape[:3], values.codec.head_dim), _ROOM[queries.dtype])
        cpu_library.attend(
            queries,
            output,
            exact,
            blocks,
            keys.lengths,
            sink=keys.sink,
            scale=scale,
            mask=mask_array,
            sinks=sinks,
            causal=isinstance(mask, str),
        )
        made = mx.array(output)
        return made.view(mx.bfloat16) if queries.dtype == mx.bfloat16 else made


def _blocks(view: KVView) -> cpu_library.Blocks:
    packed = view.packed or Packed(None, None, None)
    return cpu_library.Blocks(view.codec, *packed, view.channel_scale)


def _evaluated(*arrays: Any) -> bool:
    """Evaluate arrays and tuples of them; False while a function is traced, without numbers yet."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True
