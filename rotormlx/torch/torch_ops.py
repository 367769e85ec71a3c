"""The codec and its attention in torch operations, for any device that torch supports.

Encoding uses only elementwise operations and sums in a fixed order. So a block's bytes do not
depend on how many blocks one call encodes, and are equal to those of the MLX path. Attention
rotates the query once, reads levels directly from words and rotates the output back once; it goes
through a long history tile by tile. Lengths stay on the device: nothing here waits for it.

Words are int32 tensors that hold the bits of the format's uint32, because torch shifts and gathers
int32 on every device.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
N blocks, T tokens of a tile, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rotormlx.codec import codebook, trellis_ops
from rotormlx.codec.derived import derived
from rotormlx.codec.format import (
    BLOCK,
    KEY,
    LARGEST_FLOAT16,
    PLANES,
    TRELLIS_BITS,
    Codec,
    Packed,
)
from rotormlx.codec.random_stream import Floats
from rotormlx.codec.rotation import Rotation, Stage

# Elements encoded at once; at 3 bits, about fifty float32 tensors of this size exist, 50 MiB.
TILE_VALUES = 2**18
# Scores held at once, over all query heads: 16 MiB in float32.
TILE_SCORES = 2**22
TILE_TOKENS = 2048

# From scores ``[B, K, G, T]``, positions ``[B, T]`` and which of them count, to scores in which the
# others are hidden.
Hide = Callable[[Tensor, Tensor, Tensor], Tensor]


class Softmax(NamedTuple):
    """The state of a softmax over the tokens seen so far, float32.

    top: Largest score, ``[B, K, G, 1]``.
    total: Sum of exponentials, ``[B, K, G, 1]``.
    output: Weighted sum of values, ``[B, K, G, Dv]``.
    """

    top: Tensor
    total: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False)
class KVView:
    """The keys or the values of one layer, as attention reads them.

    A backend keeps what it prepares from a view with the view, so using the view again costs less.

    codec: Codec of the packed tokens.
    exact: Exact tokens ``[B, K, capacity, D]``, the sink first.
    packed: Whole blocks with room at the end, or None.
    channel_scale: float32 ``[K, D]`` or ``[B, K, D]``, or None for 1.
    prepared: What backends have prepared from the view, by name of the backend.
    """

    codec: Codec
    exact: Tensor
    packed: Packed | None
    channel_scale: Tensor | None
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Prepared data depends on the addresses of these buffers, so a copy starts without it.
        return type(self), (self.codec, self.exact, self.packed, self.channel_scale)


class AttendCall(NamedTuple):
    """A call of attention; ``checks.check_call`` checks that its fields fit together.

    query: ``[B, H, L, D]``, float16, bfloat16 or float32; head h reads KV head ``h * K // H``.
    lengths: int32 ``[B, 2]`` on the device: packed tokens and all tokens of each batch row.
    keys: Keys with room after the counted tokens.
    values: Values, likewise.
    sink: Exact tokens before the packed ones.
    scale: Factor of the scores.
    causal: Whether the last query of a row sees all of its tokens, and each query before it one
        fewer.
    mask: Boolean (True: visible) or additive, broadcastable to ``[B, H, L, S]``, or None.
    sink_logits: ``[H]``, a score in the softmax that has no value; or None.
    """

    query: Tensor
    lengths: Tensor
    keys: KVView
    values: KVView
    sink: int
    scale: float
    causal: bool
    mask: Tensor | None
    sink_logits: Tensor | None

    @property
    def kv_heads(self) -> int:
        """Number of KV heads, K."""
        return self.keys.exact.shape[1]

    @property
    def capacity(self) -> int:
        """Exact tokens of a batch row that the buffers have room for."""
        return self.keys.exact.shape[2]

    @property
    def blocks(self) -> int:
        """Packed blocks of a batch row that the buffers have room for."""
        return 0 if self.keys.packed is None else self.keys.packed.scales.shape[2]

    @property
    def repeats(self) -> int:
        """Query heads that share a KV head."""
        return self.query.shape[1] // self.kv_heads

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, ``(B, H, L, Dv)``."""
        batch, heads, length, _ = self.query.shape
        return batch, heads, length, self.values.codec.head_dim

    @property
    def scaled_query(self) -> Tensor:
        """The query times the scale, grouped by KV head, float32 ``[B, K, G, D]``."""
        batch, _, length, head_dim = self.query.shape
        scaled = self.query.float() * self.scale
        return scaled.reshape(batch, self.kv_heads, self.repeats * length, head_dim)

    @property
    def wide_mask(self) -> Tensor | None:
        """The mask with four axes."""
        if self.mask is None:
            return None
        return self.mask.reshape((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))


# ---- blocks -------------------------------------------------------------------------------------


def encode(
    x: Tensor,
    codec: Codec,
    *,
    channel_scale: Tensor | None = None,
    centres: Tensor | None = None,
    start: int = 0,
    state: Tensor | None = None,
) -> Packed:
    """Compress whole blocks.

    Args:
        x: Keys or values, ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
        codec: Codec: role, bits and rotation.
        channel_scale: float32 ``[K, D]`` or ``[B, K, D]``, positive; None for 1.
        centres: float16 ``[B, K, N, D]``; None for the means of the blocks. Keys only.
        start: Number of tokens at the start of the block that are coded already; the output for
            them has no meaning. If it is not 0, there is one block.
        state: State of the trellis codes of values after those tokens, int32 ``[B, K, N, D]``; see
            :func:`rotormlx.codec.trellis.state_after`.

    Returns:
        Packed words, scales and centres; docs/FORMAT.md gives each shape.

    Source: docs/FORMAT.md, section 5.
    """
    batch, heads, tokens, head_dim = x.shape
    x = x.reshape(batch, heads, tokens // BLOCK, BLOCK, head_dim)
    tile = max(1, TILE_VALUES // (batch * heads * BLOCK * head_dim))
    parts = []
    for first, stop in tiles(x.shape[2], tile):
        given = None if centres is None else centres[:, :, first:stop]
        path = start, None if state is None else state[:, :, first:stop]
        parts.append(encode_blocks(x[:, :, first:stop], codec, channel_scale, given, path))
    fields = zip(*parts, strict=True)
    return Packed(*(None if a[0] is None else torch.cat(a, dim=2) for a in fields))


def decode(
    packed: Packed, codec: Codec, *, channel_scale: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """Decode packed blocks to vectors ``[B, K, N * 64, D]``.

    Source: docs/FORMAT.md, section 6.
    """
    batch, heads, blocks = packed.words.shape[:3]
    out = packed.scales.new_empty((batch, heads, blocks * BLOCK, codec.head_dim), dtype=dtype)
    tile = max(1, TILE_VALUES // (batch * heads * BLOCK * codec.head_dim))
    for start, stop in tiles(blocks, tile):
        words, scales = (a[:, :, start:stop] for a in packed[:2])
        level = in_natural_order(levels(words, codec), codec)
        y = multiplied(
            level * scales.float()[..., None], inverse_matrix(codec.rotation, words.device)
        )
        if channel_scale is not None:
            y = y * channel_scale[..., None, None, :]
        if codec.role == KEY:
            y = y + packed.centres[:, :, start:stop].float()[..., None, :]
        out[:, :, start * BLOCK : stop * BLOCK] = y.flatten(2, 3)
    return out


def prefill_scale(x: Tensor, codec: Codec) -> Tensor:
    """Compute the channel scale ``prefill`` from a first block.

    Args:
        x: Keys or values of the first block, ``[B, K, 64, D]``.
        codec: Codec; gives the role of the block.

    Returns:
        The channel scale, float32 ``[B, K, D]``.

    Source: docs/FORMAT.md, section 5.
    """
    block = x.float()
    if codec.role == KEY:
        block = block - block_means(block).float()[..., None, :]
    square = sum_in_order(block * block, -2)[..., 0, :] / BLOCK
    whole = sum_in_order(square, -1) / codec.head_dim
    scale = square_root(square_root((square / whole).clamp(min=64.0**-2)))
    return torch.where(torch.isfinite(whole) & (whole > 0), scale, 1.0)


def encode_blocks(
    x: Tensor,
    codec: Codec,
    channel_scale: Tensor | None,
    centres: Tensor | None,
    path: tuple[int, Tensor | None],
) -> Packed:
    """Compress blocks ``[B, K, N, 64, D]``; see :func:`encode`.

    ``path`` holds its ``start`` and ``state``.
    """
    y = x.float()
    if codec.role == KEY:
        if centres is None:
            centres = block_means(y)
        y = y - centres.float()[..., None, :]
    if channel_scale is not None:
        y = y / channel_scale[..., None, None, :]

    rotated = rotate(y, codec.rotation)
    norm = square_root(sum_in_order(rotated * rotated, -1))
    # Two tensors, because torch divides a number by a tensor with two roundings.
    root = torch.full_like(norm, math.sqrt(codec.head_dim))
    size = (norm / root).half()
    is_special = (size == 0) | ~torch.isfinite(size)
    z = torch.where(is_special, 0.0, rotated * (root / norm))
    codes, level = path_codes(z, codec, *path) if codec.has_trellis else nearest_codes(z, codec)
    along = sum_in_order(level * z, -1).clamp(min=codec.head_dim / 2)
    scales = (norm * (codec.shrink * math.sqrt(codec.head_dim)) / along).half()
    scales = torch.where(size == 0, 0.0, scales)
    scales = torch.where(torch.isfinite(size) & torch.isfinite(scales), scales, math.nan)
    return Packed(pack(codes, codec), scales[..., 0], centres)


def nearest_codes(z: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Return the codes of the nearest levels, and these levels."""
    limits = boundaries(codec.bits, z.device)
    # right=True: a tie goes to the larger magnitude.
    index = torch.bucketize(z.abs(), limits, right=True, out_int32=True)
    codes = index | ((z < 0).int() << (codec.bits - 1))
    return codes, level_table(codec.bits, z.device)[codes]


def path_codes(z: Tensor, codec: Codec, start: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the trellis codes of ``[B, K, N, 64, D]``, and their levels; see :func:`encode`."""
    if codec.role == KEY:
        start, state = 0, None
    # The packed axis first, the lanes of all blocks side by side.
    axis = -1 if codec.role == KEY else -2
    sequences = z.movedim(axis, 0)
    shape = sequences.shape
    sequences = sequences[start:].reshape(shape[0] - start, -1)
    begun = sequences.new_zeros(sequences.shape[1:], dtype=torch.int32)
    begun = begun if state is None else state.reshape(-1)
    found = trellis_ops.cheapest_path(torch, sequences, begun, codec.bits)
    level = level_table(codec.bits, z.device)[found.index]
    coded = (torch.nn.functional.pad(a, (0, 0, start, 0)) for a in (found.codes, level))
    codes, level = (a.reshape(shape).movedim(0, axis) for a in coded)
    return codes, level


def block_means(x: Tensor) -> Tensor:
    """Return centres of blocks ``[..., 64, D]``, float16 ``[..., D]``: sums of finite rows / 64."""
    finite = torch.isfinite(x).all(-1, keepdim=True)
    mean = sum_in_order(torch.where(finite, x, 0.0), -2)[..., 0, :] / BLOCK
    return mean.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16).half()


def rotate(y: Tensor, rotation: Rotation) -> Tensor:
    """Rotate rows ``[B, K, N, 64, D]``, float32."""
    if not rotation.stages:
        # One product per block: matrix products of other shapes may sum in another order.
        whole = matrix(rotation, y.device)
        heads = whole.expand(y.shape[1], -1, -1)
        blocks = [
            block @ heads[index // y.shape[2] % len(heads)]
            for index, block in enumerate(y.reshape(-1, *y.shape[-2:]))
        ]
        return torch.stack(blocks).reshape(y.shape)
    for stage in rotation.stages:
        y = apply_stage(y, stage)
    return y


def multiplied(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows ``[B, K, N, 64, D]`` by a matrix ``[D, D]``, or one per KV head."""
    return rows @ (matrix if matrix.ndim == 2 else matrix[:, None])


def apply_stage(y: Tensor, stage: Stage) -> Tensor:
    """Mix the channels of float32 ``[..., D]``, column by column of all blocks."""
    outer, radix, stride = stage.outer, stage.radix, stage.stride
    groups = y[..., stage.start : stage.stop].unflatten(-1, (outer, radix, stride))
    columns = stage_columns(stage, y.device)
    mixed = columns[0] * groups[..., 0:1, :]
    for r in range(1, radix):
        mixed = mixed + columns[r] * groups[..., r : r + 1, :]
    mixed = mixed.flatten(-3)
    if mixed.shape == y.shape:
        return mixed
    return torch.cat([y[..., : stage.start], mixed, y[..., stage.stop :]], dim=-1)


def sum_in_order(x: Tensor, axis: int) -> Tensor:
    """Sum over an axis, kept with size 1, by adding halves until one number is left.

    The order is always the same; that of ``torch.sum`` may depend on the shape of the tensor.
    """
    x = x.transpose(axis, -1)
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., 2 * half :]], dim=-1) if n % 2 else folded
    return x.transpose(axis, -1)


def square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded float32 root; torch's own may be off by one unit."""
    return torch.sqrt(x.double()).float()


# ---- words --------------------------------------------------------------------------------------


def pack(codes: Tensor, codec: Codec) -> Tensor:
    """Pack codes ``[..., 64, D]`` into words ``[..., rows, lanes]``, int32."""
    if codec.role == KEY:
        codes = codes.transpose(-1, -2)
    planes = []
    for plane, rows in zip(codec.planes, codec.plane_rows, strict=True):
        fields = (codes >> plane.shift) & (2**plane.bits - 1)
        missing = rows * plane.a_word - codec.packed_axis_size
        fields = torch.nn.functional.pad(fields, (0, 0, 0, missing))
        fields = fields.unflatten(-2, (rows, plane.a_word))
        words = fields[..., 0, :].clone()
        for i in range(1, plane.a_word):
            words |= fields[..., i, :] << plane.bit_of(i)
        planes.append(words)
    return torch.cat(planes, dim=-2)


def levels(words: Tensor, codec: Codec) -> Tensor:
    """Return float32 levels ``[..., fields, lanes]`` of words ``[..., rows, lanes]``.

    Levels are in word order: the first fields of all words come before all second fields, so that
    unpacking moves nothing; see :func:`in_word_order`.
    """
    first, rows = codec.planes[0], codec.plane_rows[0]
    shifts = torch.arange(0, 32, first.bits, dtype=torch.int32, device=words.device)
    shifts = shifts[:, None, None]
    plane = words[..., None, :rows, :]
    codes = (plane >> shifts) & (2**first.bits - 1)
    if codec.has_trellis:
        before = torch.nn.functional.pad(plane[..., :-1, :], (0, 0, 1, 0))
        low = (trellis_ops.low_magnitudes(plane, before) >> shifts) & 3
        codes = low | (codes >> 1 << codec.bits)
    if len(codec.planes) > 1:
        codes = codes | (high_bits(words, codec) << 2)
    return level_table(codec.bits, words.device)[codes].flatten(-3, -2)


def high_bits(words: Tensor, codec: Codec) -> Tensor:
    """Return high bits of 3-bit codes in the low bits' word order, ``[..., 16, rows, lanes]``."""
    low, high = codec.planes
    rows = codec.plane_rows[0]
    a_high_word = high.a_word // low.a_word
    planes = words[..., rows:, :].repeat_interleave(a_high_word, dim=-2)[..., :rows, :]
    shifts = high_shifts(rows, words.device)
    return (planes[..., None, :, :] >> shifts[..., None]) & 1


def in_word_order(a: Tensor, codec: Codec) -> Tensor:
    """Put the packed axis, the last one of ``a``, into the order of :func:`levels`."""
    per_word, rows = codec.planes[0].a_word, codec.plane_rows[0]
    a = torch.nn.functional.pad(a, (0, rows * per_word - codec.packed_axis_size))
    return a.unflatten(-1, (rows, per_word)).transpose(-1, -2).flatten(-2)


def in_natural_order(level: Tensor, codec: Codec) -> Tensor:
    """Reorder levels from word order to ``[..., 64, D]``."""
    per_word, rows = codec.planes[0].a_word, codec.plane_rows[0]
    level = level.unflatten(-2, (per_word, rows)).transpose(-3, -2).flatten(-3, -2)
    level = level[..., : codec.packed_axis_size, :]
    return level.transpose(-1, -2) if codec.role == KEY else level


# ---- attention ----------------------------------------------------------------------------------


def attend(call: AttendCall) -> Tensor:
    """Attend over a partly packed cache.

    Returns:
        The output ``[B, H, L, Dv]`` in the dtype of the query; zero for a query that sees no token.
        Sums are in float32.

    Source: docs/FORMAT.md, section 7.
    """
    q, shape = call.scaled_query, call.output_shape
    tile = max(BLOCK, min(TILE_TOKENS, TILE_SCORES // math.prod(shape[:3])) // BLOCK * BLOCK)
    hide = partial(hide_tokens, call, last_seen(call) if call.causal else None)
    state = start_softmax(call)
    if call.keys.packed is not None:
        state = attend_packed(call, q, tile, hide, state)
    state = attend_exact(call, q, tile, hide, state)
    output = state.output / torch.where(state.total == 0, 1.0, state.total)
    return output.reshape(shape).to(call.query.dtype)


def attend_packed(call: AttendCall, q: Tensor, tile: int, hide: Hide, state: Softmax) -> Softmax:
    """Process the packed blocks, before all other tokens; q is ``[B, K, G, D]``, already scaled.

    The output stays in the rotated space of the values until the end, so no value may be summed
    before.
    """
    keys, values, device = call.keys, call.values, q.device
    if keys.packed is None or values.packed is None:
        return state
    scaled = q if keys.channel_scale is None else q * keys.channel_scale[..., None, :]
    rotated = scaled @ inverse_matrix(keys.codec.rotation, device).mT
    noise = codebook.SCORE_NOISE[keys.codec.bits] * rotated.square().sum(-1, keepdim=True)
    rotated = in_word_order(rotated, keys.codec)

    for start, stop in tiles(call.blocks, tile // BLOCK):
        words, scales, centres = (a[:, :, start:stop] for a in keys.packed)
        scales = scales.float()[..., None, :]
        # [B, K, N, G, 64]
        scores = rotated[:, :, None] @ levels(words, keys.codec)
        scores = (scores - noise[:, :, None] * scales) * scales
        about_centres = q @ centres.float().transpose(-1, -2)
        scores = scores + about_centres.transpose(-1, -2)[..., None]
        scores = scores.transpose(2, 3).flatten(3)

        slot = torch.arange(start * BLOCK, stop * BLOCK, device=device)
        position = (call.sink + slot).expand(len(q), -1)
        state, weights = advance(state, hide(scores, position, slot < call.lengths[:, :1]))
        words, scales = (a[:, :, start:stop] for a in values.packed[:2])
        weights = weights.unflatten(3, (stop - start, BLOCK)).transpose(2, 3)
        # The scale of a hidden token may be any number, including NaN.
        weights = torch.where(weights == 0, 0.0, weights * scales.float()[..., None, :])
        weights = in_word_order(weights, values.codec)
        output = (weights @ levels(words, values.codec)).sum(2)
        state = state._replace(output=state.output + output)

    output = state.output @ inverse_matrix(values.codec.rotation, device)
    if values.channel_scale is not None:
        output = output * values.channel_scale[..., None, :]
    return state._replace(output=output)


def attend_exact(call: AttendCall, q: Tensor, tile: int, hide: Hide, state: Softmax) -> Softmax:
    """Process the sink and the tail; q is ``[B, K, G, D]``, already scaled."""
    packed_count, count = call.lengths[:, :1], call.lengths[:, 1:]
    for start, stop in tiles(call.capacity, tile):
        slot = torch.arange(start, stop, device=q.device)
        position = slot + torch.where(slot < call.sink, 0, packed_count)
        counts = position < count
        keys, values = (x.exact[:, :, start:stop].float() for x in (call.keys, call.values))
        scores = q @ keys.transpose(-1, -2)
        state, weights = advance(state, hide(scores, position, counts))
        # Buffers after the last token may hold any number, including NaN.
        rows = torch.where(counts[:, None, :, None], values, 0.0)
        state = state._replace(output=state.output + weights @ rows)
    return state


def hide_tokens(
    call: AttendCall, last: Tensor | None, scores: Tensor, position: Tensor, counts: Tensor
) -> Tensor:
    """Mask scores ``[B, K, G, T]`` of tokens at positions ``[B, T]``; ``counts`` says which exist.

    ``last`` is the result of :func:`last_seen`, or None.
    """
    visible = counts[:, None, None, :]
    if last is not None:
        visible = visible & (position[:, None, None, :] <= last)
    part = mask_at(call, position)
    if part is not None and part.dtype == torch.bool:
        visible = visible & part
    elif part is not None:
        scores = scores + part.float()
    return torch.where(visible, scores, -math.inf)


def last_seen(call: AttendCall) -> Tensor:
    """Return the last position that each query of a causal call sees, ``[B, 1, G, 1]``."""
    length = call.query.shape[2]
    step = torch.arange(length, device=call.query.device)
    # Rows are ordered by query head, then by query.
    return (call.lengths[:, 1:] - length + step).repeat(1, call.repeats)[:, None, :, None]


def start_softmax(call: AttendCall) -> Softmax:
    """Return the state before any token; it includes the attention-sink logits, if any."""
    batch, _, length, dim = call.output_shape
    rows = (batch, call.kv_heads, call.repeats * length)
    output = call.query.new_zeros((*rows, dim), dtype=torch.float32)
    if call.sink_logits is None:
        seen = output.new_zeros((*rows, 1))
        return Softmax(torch.full_like(seen, -math.inf), seen, output)
    logits = call.sink_logits.float().reshape(1, call.kv_heads, call.repeats, 1)
    top = logits.expand(batch, -1, -1, length).reshape(*rows, 1)
    return Softmax(top, torch.ones_like(top), output)


def advance(state: Softmax, scores: Tensor) -> tuple[Softmax, Tensor]:
    """Add the scores ``[B, K, G, T]`` of a tile to the state.

    Returns:
        The state, whose output still lacks this tile's values, and the tile's exponentials.
    """
    top = torch.maximum(state.top, scores.amax(-1, keepdim=True))
    # If a row has seen no token, its top is -inf; subtract 0 instead.
    reference = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp(scores - reference)
    shrink = torch.exp(state.top - reference)
    total = state.total * shrink + weights.sum(-1, keepdim=True)
    return Softmax(top, total, state.output * shrink), weights


def mask_at(call: AttendCall, position: Tensor) -> Tensor | None:
    """Return the mask's columns at positions ``[B, T]``, as ``[B, K or 1, G, T]``."""
    mask, length = call.wide_mask, call.query.shape[2]
    if mask is None:
        return None
    if mask.shape[-1] > 1:
        _, mask_heads, rows, _ = mask.shape
        mask = mask.expand(len(position), -1, -1, -1)
        # Tokens after the last column are hidden; see docs/TORCH.md.
        columns = mask.shape[-1]
        index = position.clamp(max=columns - 1)[:, None, None, :]
        mask = mask.gather(3, index.expand(-1, mask_heads, rows, -1))
        hidden = False if mask.dtype == torch.bool else -math.inf
        mask = mask.masked_fill((position >= columns)[:, None, None, :], hidden)
    mask = mask.expand(-1, -1, length, -1)
    if mask.shape[1] == 1:
        return mask.repeat(1, 1, call.repeats, 1)
    return mask.reshape(len(mask), call.kv_heads, call.repeats * length, -1)


def scale_of_rows(scale: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    """Return the channel scale of some batch rows; ``[K, D]`` holds for all rows."""
    return scale if scale is None or scale.ndim == 2 else scale[rows]


def side_by_side(words: Tensor) -> Tensor:
    """Return words with those of a block contiguous, as native code reads them."""
    rows, lanes = words.shape[-2:]
    lie_so = words.stride(-1) == 1 and (rows == 1 or words.stride(-2) == lanes)
    return words if lie_so else words.contiguous()


# ---- constants, made once per device ------------------------------------------------------------


@cache
def level_table(bits: int, device: torch.device) -> Tensor:
    """Return the level of every code, float32 ``[2**(bits + 1)]`` (trellis) or ``[2**bits]``."""
    levels = codebook.trellis_levels if bits in TRELLIS_BITS else codebook.levels
    return torch.from_numpy(levels(bits)).to(device)


@cache
def high_shifts(rows: int, device: torch.device) -> Tensor:
    """Return the position of the high bit of each field in its word, int32 ``[16, rows]``."""
    low, high = PLANES[3]
    a_high_word = high.a_word // low.a_word
    shifts = [
        [high.bit_of(row % a_high_word * low.a_word + field) for row in range(rows)]
        for field in range(low.a_word)
    ]
    return torch.tensor(shifts, dtype=torch.int32, device=device)


@cache
def boundaries(bits: int, device: torch.device) -> Tensor:
    """Return the boundaries at which the nearest magnitude changes, float32."""
    return torch.from_numpy(codebook.boundaries(bits)).to(device)


@derived
def matrix(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the transposed matrix, float32 ``[D, D]`` or per KV head; rows @ it are rotated."""
    return float32(rotation.matrix, device).mT


@derived
def inverse_matrix(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the transposed inverse of :func:`matrix`; rows times it are rotated back."""
    return float32(np.swapaxes(rotation.inverse, -1, -2), device)


@derived
def stage_columns(stage: Stage, device: torch.device) -> tuple[Tensor, ...]:
    """Return, for each r, column r of all blocks of a stage, float32 ``[outer, radix, stride]``."""
    return tuple(float32(column, device) for column in stage.blocks.transpose(3, 0, 2, 1))


def float32(a: Floats, device: torch.device) -> Tensor:
    """Convert a float64 array to a float32 tensor."""
    return torch.from_numpy(np.array(a, np.float32, order="C")).to(device)


def tiles(count: int, tile: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of at most ``tile`` that cover ``count``."""
    for start in range(0, count, tile):
        yield start, min(start + tile, count)
