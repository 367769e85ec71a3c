"""The operators on the CPU: the native library if it is available, else torch operations.

Both write the same bytes. The library reads tensors in place and with any strides. It uses
``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from rotormlx.codec.format import BLOCK, KEY, Codec, Packed
from rotormlx.kernels import cpu_library
from rotormlx.kernels.cpu_library import Blocks, Source
from rotormlx.torch import torch_ops
from rotormlx.torch.torch_ops import AttendCall, KVView


def encode(
    x: Tensor,
    codec: Codec,
    *,
    channel_scale: Tensor | None = None,
    centres: Tensor | None = None,
    start: int = 0,
    state: Tensor | None = None,
) -> Packed:
    """Encode as :func:`rotormlx.torch.torch_ops.encode` does."""
    if cpu_library.missing() is not None:
        return torch_ops.encode(
            x, codec, channel_scale=channel_scale, centres=centres, start=start, state=state
        )
    front = (*x.shape[:2], x.shape[2] // BLOCK)
    words = x.new_empty((*front, *codec.words_shape), dtype=torch.int32)
    scales = x.new_empty((*front, BLOCK), dtype=torch.float16)
    given = centres is not None
    if centres is not None:
        centres = centres.contiguous()
    elif codec.role == KEY:
        centres = x.new_empty((*front, codec.head_dim), dtype=torch.float16)
    packed = Packed(words, scales, centres)
    blocks = _blocks(codec, packed, channel_scale)
    cpu_library.encode(
        x.detach(),
        blocks,
        given_centres=given,
        start=start,
        state=state,
        threads=torch.get_num_threads(),
    )
    return packed


def decode(
    packed: Packed, codec: Codec, *, channel_scale: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """Decode as :func:`rotormlx.torch.torch_ops.decode` does."""
    if cpu_library.missing() is not None:
        return torch_ops.decode(packed, codec, channel_scale=channel_scale, dtype=dtype)
    batch, heads, blocks = packed.words.shape[:3]
    rows = packed.scales.new_empty((batch, heads, blocks * BLOCK, codec.head_dim), dtype=dtype)
    source = _blocks(codec, packed, channel_scale)
    cpu_library.decode(source, rows, threads=torch.get_num_threads())
    return rows


def attend(call: AttendCall) -> Tensor:
    """Attend as :func:`rotormlx.torch.torch_ops.attend` does."""
    if cpu_library.missing() is not None:
        return torch_ops.attend(call)
    query, keys, values = call.query.detach(), call.keys, call.values
    lengths = call.lengths.tolist()
    # With the memory layout of the queries, the output of a model needs no copy later.
    like = (
        query if query.shape[-1] == values.exact.shape[-1] else query.new_empty(call.output_shape)
    )
    output = torch.empty_like(like)
    tokens = max(lengths)[1]
    cpu_library.attend(
        to_dlpack(query),
        to_dlpack(output),
        keys.prepared.get("cpu") or _source(keys),
        values.prepared.get("cpu") or _source(values),
        lengths,
        sink=call.sink,
        scale=call.scale,
        mask=None if call.mask is None else call.mask.detach(),
        sink_logits=None if call.sink_logits is None else call.sink_logits.detach(),
        causal=call.causal,
        threads=cpu_library.threads_for(query.numel(), tokens, torch.get_num_threads()),
    )
    return output


def _source(view: KVView) -> Source:
    """Return the view in the form that the library reads; the result is kept with the view."""
    blocks = _blocks(view.codec, view.packed, view.channel_scale)
    source = view.prepared["cpu"] = Source(view.exact.detach(), blocks)
    return source


def _blocks(codec: Codec, packed: Packed | None, channel_scale: Tensor | None) -> Blocks:
    words, scales, centres = (_plain(part) for part in packed or (None, None, None))
    if words is not None:
        words = torch_ops.side_by_side(words).view(torch.uint32)
    return Blocks(codec, words, scales, centres, _plain(channel_scale))


def _plain(x: Tensor | None) -> Tensor | None:
    """Detach a tensor, because the library cannot read one that requires a gradient."""
    return None if x is None else x.detach()
