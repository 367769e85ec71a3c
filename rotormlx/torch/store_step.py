"""Storage of a decode step in buffers of a fixed place, with lengths on the same device.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rotormlx.codec.format import BLOCK, Packed
from rotormlx.torch import torch_ops
from rotormlx.torch.torch_ops import KVView


class Step(NamedTuple):
    """The tokens that a step stores and the buffers it changes; the parts must fit together.

    new: Keys and values, ``[B, K, L, D]``, L at most 64.
    lengths: Packed tokens and all tokens of each row, int32 ``[B, 2]``; changed.
    counter: int32 ``[B]``, 0 before and after; on a GPU, the thread blocks of a row count in it.
    keys: Buffers with room after the used part; changed. The exact one is ``[B, K, capacity, D]``,
        with a capacity of at least ``sink + window + 63 + L``.
    values: Buffers of the values, likewise.
    sink: Exact tokens before the packed ones.
    window: Exact tokens kept after the packed ones; the tail is full with 64 more.
    own_scale: Whether each row uses the channel scale of its own first block.
    """

    new: tuple[Tensor, Tensor]
    lengths: Tensor
    counter: Tensor
    keys: KVView
    values: KVView
    sink: int
    window: int
    own_scale: bool


def store(stored: Step, encode: Callable[..., Packed] = torch_ops.encode) -> None:
    """Pack full tails, and store the new tokens of every row; reads the lengths.

    Raises:
        ValueError: If a row has no room; then nothing is changed.
    """
    keys, values, sink = stored.keys, stored.values, stored.sink
    room, capacity = cast(Packed, keys.packed).scales.shape[2] * BLOCK, keys.exact.shape[2]
    count = stored.new[0].shape[2]
    lengths = stored.lengths.tolist()
    due = [
        tokens - packed - sink >= stored.window + BLOCK and packed < room
        for packed, tokens in lengths
    ]
    for row, ((packed, tokens), is_due) in enumerate(zip(lengths, due, strict=True)):
        if tokens - packed - BLOCK * is_due + count > capacity:
            raise ValueError(
                f"[step] A cache must have room for its tokens, but {count} more came to row {row} "
                f"with {tokens}, and it holds {room + capacity} at most; make it longer "
                "(max_cache_len)."
            )
    for row, ((packed, tokens), is_due) in enumerate(zip(lengths, due, strict=True)):
        exact = tokens - packed
        if is_due:
            for view in (keys, values):
                _pack(view, row, packed // BLOCK, stored, encode)
                tail = view.exact[row, :, sink + BLOCK : exact].clone()
                view.exact[row, :, sink : exact - BLOCK] = tail
            exact -= BLOCK
        for view, x in zip((keys, values), stored.new, strict=True):
            view.exact[row, :, exact : exact + count] = x[row]
        lengths[row] = [packed + BLOCK * is_due, tokens + count]
    stored.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))


def _pack(view: KVView, row: int, block: int, stored: Step, encode: Callable[..., Packed]) -> None:
    """Encode the first 64 tokens of a row's tail into a block."""
    x = view.exact[row : row + 1, :, stored.sink : stored.sink + BLOCK]
    scale = view.channel_scale
    if stored.own_scale and scale is not None and not block:
        scale[row] = torch_ops.prefill_scale(x, view.codec)[0]
    own = torch_ops.scale_of_rows(scale, slice(row, row + 1))
    made = encode(x, view.codec, channel_scale=own)
    for buffer, part in zip(cast(Packed, view.packed), made, strict=True):
        if buffer is not None:
            buffer[row, :, block] = part[0, :, 0]
