"""The codec and its attention in MLX operations, correct on every device that MLX supports.

Encoding uses only elementwise operations and sums in a fixed order, so a block's bytes do not
depend on how many blocks are encoded in one call. Attention rotates the query once, reads levels
straight from words and rotates the output back once. It reads a long history tile by tile.

Shapes: B batch, H query heads, K KV heads, G = H / K * L query rows of a KV head, N blocks,
T tokens of a tile, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx.codec import codebook, trellis_ops
from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, KEY, LARGEST_FLOAT16, TRELLIS_BITS, Codec, Packed
from rotormlx.codec.rotation import Rotation, Stage
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.dtypes import FLOATS

# Values encoded at once: at 3 bits, about fifty float32 arrays of this size are alive, 25 MiB.
TILE_VALUES = 2**17
# Scores held at once over all query heads, 16 MiB in float32.
TILE_SCORES = 2**22
TILE_TOKENS = 2048

# The attention for a prompt: that of MLX (see rotormlx/mlx/prefill.py) or that of a backend.
LIBRARY, KERNEL = "library", "kernel"


# Takes the first token of a tile and the first one after it; returns its mask ``[B or 1, K or 1, G,
# T]``, boolean or additive, or None if every token is visible.
Masks = Callable[[int, int], "mx.array | None"]


class Softmax(NamedTuple):
    """The intermediate state of a softmax over the tokens read so far, float32.

    top: Largest score, ``[B, K, G, 1]``.
    total: Sum of exponentials, ``[B, K, G, 1]``.
    output: Weighted sum of values, ``[B, K, G, Dv]``.
    """

    top: mx.array
    total: mx.array
    output: mx.array


class Prompts(NamedTuple):
    """The attention for a chunk of a prompt, ``LIBRARY`` or ``KERNEL``.

    first: While nothing is packed. ``LIBRARY`` gives the same bits as an exact cache.
    later: Once something is packed.
    """

    first: str
    later: str


class MLXBackend:
    """The backend in MLX operations; other backends replace the operations that they fuse."""

    name = "mlx"

    # The faster attention as timed on this device, which replaces the result of `prompts`.
    timed_prompts: Prompts | None = None

    def prompts(self, dtype: mx.Dtype) -> Prompts:
        """Return the faster attention for prompts, estimated or measured (docs/KERNELS.md)."""
        if mx.default_device().type == mx.DeviceType.gpu:
            return Prompts(LIBRARY, LIBRARY)
        # On a CPU, MLX multiplies 16-bit numbers more slowly than float32, which KERNEL uses.
        return Prompts(LIBRARY if dtype == mx.float32 else KERNEL, KERNEL)

    def encode(
        self,
        x: mx.array,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        centres: mx.array | None = None,
        start: int = 0,
        state: mx.array | None = None,
    ) -> Packed:
        """Compress whole blocks.

        Args:
            x: Keys or values, ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
            codec: Role, bits and rotation.
            channel_scale: float32 ``[K, D]``, positive; None for 1.
            centres: float16 ``[B, K, N, D]``; None for the means of the blocks. Keys only.
            start: Number of tokens at the start of the single block that are already coded; their
                results do not count.
            state: State of the trellis after these tokens, uint32 ``[B, K, N, D]``, for values; see
                :func:`rotormlx.codec.trellis.state_after`.

        Returns:
            Packed words, scales and centres; docs/FORMAT.md gives each shape.

        Raises:
            ValueError: If the shape or dtype of x does not fit.

        Source: docs/FORMAT.md, section 5.
        """
        check_rows(x, codec)
        if x.size == 0:
            batch, heads, tokens, _ = x.shape
            front = batch, heads, tokens // BLOCK
            if codec.role == KEY and centres is None:
                centres = mx.zeros((*front, codec.head_dim), mx.float16)
            words = mx.zeros((*front, *codec.words_shape), mx.uint32)
            scales = mx.zeros((*front, BLOCK), mx.float16)
            return Packed(words, scales, centres if codec.role == KEY else None)
        return self._encode(x, codec, channel_scale, centres, start, state)

    def _encode(
        self,
        x: mx.array,
        codec: Codec,
        channel_scale: mx.array | None,
        centres: mx.array | None,
        start: int,
        state: mx.array | None,
    ) -> Packed:
        """Encode checked rows, at least one block."""
        batch, heads, tokens, head_dim = x.shape
        x = x.reshape(batch, heads, tokens // BLOCK, BLOCK, head_dim)
        tile = max(1, TILE_VALUES // (batch * heads * BLOCK * head_dim))
        done: list[Packed] = []
        for first, stop in tiles(x.shape[2], tile):
            part = x[:, :, first:stop]
            if done:
                part = after(done[-1].words, part)
            given = None if centres is None else centres[:, :, first:stop]
            path = start, None if state is None else state[:, :, first:stop]
            done.append(encode_blocks(part, codec, channel_scale, given, path))
        fields = (list(parts) for parts in zip(*done, strict=True))
        return Packed(*(None if a[0] is None else mx.concatenate(a, axis=2) for a in fields))

    def prefill_scale(self, x: mx.array, codec: Codec) -> mx.array:
        """Return the channel scale ``prefill`` of a first block.

        Args:
            x: Keys or values of the first block, ``[B, K, 64, D]``; only batch row 0 is used.
            codec: The codec, which gives the role of the block.

        Returns:
            float32 ``[K, D]``.

        Source: docs/FORMAT.md, section 5.
        """
        block = x[0].astype(mx.float32)
        if codec.role == KEY:
            block = block - block_means(block).astype(mx.float32)[:, None, :]
        square = sum_in_order(block * block, -2)[:, 0] / BLOCK
        whole = sum_in_order(square, -1) / codec.head_dim
        scale = mx.sqrt(mx.sqrt(mx.maximum(square / whole, 64.0**-2)))
        return mx.where(mx.isfinite(whole) & (whole > 0), scale, mx.array(1.0))

    def decode(
        self,
        packed: Packed,
        codec: Codec,
        *,
        channel_scale: mx.array | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> mx.array:
        """Decode packed blocks.

        Returns:
            ``[B, K, N * 64, D]``.

        Source: docs/FORMAT.md, section 6.
        """
        if packed.scales.size == 0:
            batch, heads, blocks, _ = packed.scales.shape
            return mx.zeros((batch, heads, blocks * BLOCK, codec.head_dim), dtype)
        return self._decode(packed, codec, channel_scale, dtype)

    def _decode(
        self, packed: Packed, codec: Codec, channel_scale: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Decode at least one block."""
        level = in_natural_order(levels(packed.words, codec), codec)
        y = level * packed.scales.astype(mx.float32)[..., None]
        if codec.rotation.name != "identity":
            y = multiplied(y, inverse_matrix(codec.rotation))
        if channel_scale is not None:
            y = y * channel_scale[:, None, None, :]
        if codec.role == KEY:
            y = y + packed.centres.astype(mx.float32)[..., None, :]
        return y.reshape(*y.shape[:2], -1, codec.head_dim).astype(dtype)

    def product(self, a: mx.array, b: mx.array) -> mx.array:
        """Return the matrix product of float32 ``[..., M, N]`` and ``[..., N, P]``."""
        return a @ b

    def attend(self, call: AttendCall) -> mx.array:
        """Attend over a partly packed cache.

        Returns:
            ``[B, H, L, Dv]`` in the dtype of the queries; zero for a query that sees no token.
            Sums are in float32.

        Source: docs/FORMAT.md, section 7.
        """
        if 0 in call.output_shape or call.keys.tokens == 0:
            return mx.zeros(call.output_shape, call.queries.dtype)
        return self._attend(call)

    def _attend(self, call: AttendCall) -> mx.array:
        """Attend with at least one query and one token."""
        if call.rows_differ:
            return mx.concatenate([self.attend(row) for row in call.rows()])
        q, shape = call.scaled_queries, call.output_shape
        masks = partial(mask_of_tile, call)
        tile = max(BLOCK, min(TILE_TOKENS, TILE_SCORES // math.prod(shape[:3])) // BLOCK * BLOCK)

        state = start_softmax(call)
        if call.keys.packed_tokens:
            state = attend_packed(q, call.keys, call.values, masks, tile, state)
        state = attend_exact(q, call.keys, call.values, masks, tile, state)
        output = state.output / mx.where(state.total == 0, mx.array(1.0), state.total)
        return output.reshape(shape).astype(call.queries.dtype)


# ---- attention ----------------------------------------------------------------------------------


def start_softmax(call: AttendCall) -> Softmax:
    """Return a softmax over no token, or only over the attention-sink logits."""
    rows = (call.batch, call.kv_heads, call.group_rows, 1)
    output = mx.zeros((*rows[:-1], call.value_dim), mx.float32)
    if call.sink_logits is None:
        return Softmax(mx.full(rows, -np.inf, mx.float32), mx.zeros(rows, mx.float32), output)
    repeats = call.heads // call.kv_heads
    logits = call.sink_logits.astype(mx.float32).reshape(1, call.kv_heads, repeats, 1, 1)
    top = mx.broadcast_to(logits, (*rows[:2], repeats, call.length, 1)).reshape(rows)
    return Softmax(top, mx.ones(rows, mx.float32), output)


def advance(state: Softmax, scores: mx.array) -> tuple[Softmax, mx.array]:
    """Add the scores of a tile to a softmax.

    Args:
        state: The softmax so far.
        scores: ``[B, K, *, G, T]``, where * is the number of blocks.

    Returns:
        The new state, whose output still lacks the values of this tile, and the exponentials of the
        tile in the shape of the scores.
    """
    top = mx.maximum(state.top, mx.max(scores, axis=(2, 4))[..., None])
    # For a row without a visible token, subtract 0 instead of its top, which is -inf.
    reference = mx.where(top == -np.inf, mx.array(0.0), top)
    weights = mx.exp(scores - reference[:, :, None])
    shrink = mx.exp(state.top - reference)
    total = state.total * shrink + mx.sum(weights, axis=(2, 4))[..., None]
    return Softmax(top, total, state.output * shrink), weights


def attend_packed(
    q: mx.array, keys: KVView, values: KVView, masks: Masks, tile: int, state: Softmax
) -> Softmax:
    """Add the packed blocks, which come first; q is ``[B, K, G, D]``, already scaled.

    The output stays in the rotated space of the values until the end, so no value may have been
    added before.
    """
    if keys.packed is None or values.packed is None:
        raise ValueError("[attend] A view that counts packed tokens must hold packed blocks.")
    rotated = rotated_queries(q, keys)
    noise = codebook.SCORE_NOISE[keys.codec.bits] * mx.sum(rotated * rotated, -1, keepdims=True)
    rotated = in_word_order(rotated, keys.codec)

    for start, stop in tiles(keys.packed_tokens, tile):
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        words, scales, centres = (a[:, :, blocks] for a in keys.packed)
        scales = scales.astype(mx.float32)[..., None, :]
        # [B, K, N, G, 64]
        scores = rotated[:, :, None] @ levels(after(state.output, words), keys.codec)
        scores = (scores - noise[:, :, None] * scales) * scales
        about_centres = q @ mx.swapaxes(centres.astype(mx.float32), -1, -2)
        scores = scores + mx.swapaxes(about_centres, -1, -2)[..., None]
        scores = hide(scores, masks, keys.sink + start, keys.sink + stop)

        state, weights = advance(state, scores)
        words, scales = (a[:, :, blocks] for a in values.packed[:2])
        # The scale of a hidden token may be anything, even NaN.
        weights = mx.where(
            weights == 0, mx.array(0.0), weights * scales.astype(mx.float32)[..., None, :]
        )
        weights = in_word_order(weights, values.codec)
        output = (weights @ levels(after(weights, words), values.codec)).sum(2)
        state = state._replace(output=state.output + output)

    output = state.output @ inverse_matrix(values.codec.rotation)
    if values.channel_scale is not None:
        output = output * values.channel_scale[:, None, :]
    return state._replace(output=output)


def attend_exact(
    q: mx.array, keys: KVView, values: KVView, masks: Masks, tile: int, state: Softmax
) -> Softmax:
    """Add the sink and the tail; q is ``[B, K, G, D]``, already scaled."""
    # Sink and tail are adjacent in the buffer, but two runs if a mask depends on positions.
    apart = keys.packed_tokens and masks(0, keys.tokens) is not None
    sink = min(keys.sink, keys.exact_tokens) if apart else 0
    runs = [(0, sink, 0)] if sink else []
    runs += [
        (sink + a, sink + b, keys.packed_tokens) for a, b in tiles(keys.exact_tokens - sink, tile)
    ]
    for start, stop, packed_before in runs:
        tokens = slice(start, stop)
        scores = q @ mx.swapaxes(keys.exact[:, :, tokens].astype(mx.float32), -1, -2)
        scores = hide(scores[:, :, None], masks, packed_before + start, packed_before + stop)
        state, weights = advance(state, scores)
        output = weights[:, :, 0] @ values.exact[:, :, tokens].astype(mx.float32)
        state = state._replace(output=state.output + output)
    return state


def mask_of_tile(call: AttendCall, start: int, stop: int) -> mx.array | None:
    """Return the part of a call's mask that a tile needs; see :data:`Masks`."""
    mask, tokens = call.mask, call.keys.tokens
    if mask is None:
        return None
    length, repeats = call.length, call.heads // call.kv_heads
    if isinstance(mask, str):
        last_seen_by_first = tokens - length
        if stop <= last_seen_by_first + 1:
            return None
        part = mx.arange(start, stop) <= mx.arange(length)[:, None] + last_seen_by_first
    else:
        part = mask[..., start:stop] if mask.shape[-1] == tokens else mask
    part = part.reshape((1,) * (4 - part.ndim) + part.shape)
    batch, mask_heads, _, _ = part.shape
    part = mx.broadcast_to(part, (batch, mask_heads, length, stop - start))
    if mask_heads == 1:
        part = mx.broadcast_to(part, (batch, repeats, length, stop - start))
    return part.reshape(batch, -1, repeats * length, stop - start)


def hide(scores: mx.array, masks: Masks, start: int, stop: int) -> mx.array:
    """Mask scores ``[B, K, N, G, T]`` of tokens start to stop; hide the lanes after them."""
    _, _, blocks, _, lanes = scores.shape
    missing = blocks * lanes - (stop - start)
    mask = masks(start, stop)
    if mask is None:
        if not missing:
            return scores
        mask = mx.ones((1, 1, 1, stop - start), mx.bool_)
    if missing:
        hidden = mx.array(False if mask.dtype == mx.bool_ else -np.inf, mask.dtype)
        mask = mx.pad(mask, [(0, 0)] * 3 + [(0, missing)], constant_values=hidden)
    mask = mx.swapaxes(mask.reshape(*mask.shape[:3], blocks, lanes), 2, 3)
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(-np.inf, mx.float32))
    return scores + mask.astype(mx.float32)


def after(earlier: mx.array, a: mx.array) -> mx.array:
    """Return the array a, which MLX then computes only after ``earlier``.

    Without this, MLX may compute all tiles at once; with it, one tile at a time is in memory.
    """
    return mx.depends([a], [earlier])[0]


def tiles(tokens: int, tile: int) -> Iterator[tuple[int, int]]:
    """Split ``tokens`` into runs of at most ``tile``."""
    for start in range(0, tokens, tile):
        yield start, min(start + tile, tokens)


# ---- rows and codes -----------------------------------------------------------------------------


def encode_blocks(
    x: mx.array,
    codec: Codec,
    channel_scale: mx.array | None,
    centres: mx.array | None,
    path: tuple[int, mx.array | None] = (0, None),
) -> Packed:
    """Compress blocks ``[B, K, N, 64, D]``; see :meth:`MLXBackend.encode`.

    ``path`` is its ``start`` and ``state``.
    """
    y = x.astype(mx.float32)
    if codec.role == KEY:
        if centres is None:
            centres = block_means(y)
        y = y - centres.astype(mx.float32)[..., None, :]
    if channel_scale is not None:
        y = y / channel_scale[:, None, None, :]

    rotated = rotate(y, codec.rotation)
    norm = mx.sqrt(sum_in_order(rotated * rotated, -1))
    root = math.sqrt(codec.head_dim)
    size = (norm / root).astype(mx.float16)
    is_special = (size == 0) | ~mx.isfinite(size)
    z = mx.where(is_special, mx.array(0.0), rotated * (root / norm))
    codes, level = path_codes(z, codec, *path) if codec.has_trellis else nearest_codes(z, codec)
    along = mx.maximum(sum_in_order(level * z, -1), codec.head_dim / 2)
    scales = (norm * (codec.shrink * root) / along).astype(mx.float16)
    scales = mx.where(size == 0, mx.array(0, mx.float16), scales)
    # The NaN of the format; MLX's NaN has other bits and is signalling.
    nan = mx.array(0x7E00, mx.uint16).view(mx.float16)
    scales = mx.where(mx.isfinite(size) & mx.isfinite(scales), scales, nan)
    return Packed(pack(codes, codec), scales[..., 0], centres)


def nearest_codes(z: mx.array, codec: Codec) -> tuple[mx.array, mx.array]:
    """Return the codes of the nearest levels, and these levels."""
    index = nearest_magnitude(mx.abs(z), codec.bits)
    codes = index | ((z < 0).astype(mx.uint32) << (codec.bits - 1))
    return codes, levels_of_codes(codes, codec.bits)


def path_codes(
    z: mx.array, codec: Codec, start: int, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return trellis codes of ``[B, K, N, 64, D]``, and levels; see :meth:`MLXBackend.encode`."""
    if codec.role == KEY:
        start, state = 0, None
    # The packed axis comes first, then the lanes of all blocks in one axis.
    axis = -1 if codec.role == KEY else -2
    sequences = mx.moveaxis(z, axis, 0)
    shape = sequences.shape
    sequences = sequences[start:].reshape(shape[0] - start, -1)
    begun = mx.zeros(sequences.shape[1:], mx.uint32) if state is None else state.reshape(-1)
    found = trellis_ops.cheapest_path(mx, sequences, begun, codec.bits)
    level = mx.array(codebook.trellis_levels(codec.bits))[found.index]
    coded = (mx.pad(a, [(start, 0), (0, 0)]) for a in (found.codes, level))
    codes, level = (mx.moveaxis(a.reshape(shape), 0, axis) for a in coded)
    return codes, level


def block_means(x: mx.array) -> mx.array:
    """Return centres of blocks ``[..., 64, D]``: means of the finite rows, float16 ``[..., D]``."""
    finite = mx.all(mx.isfinite(x), axis=-1, keepdims=True)
    mean = sum_in_order(mx.where(finite, x, mx.array(0.0)), -2)[..., 0, :] / BLOCK
    return mx.clip(mean, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(mx.float16)


def rotate(y: mx.array, rotation: Rotation) -> mx.array:
    """Rotate rows ``[B, K, N, 64, D]``, float32."""
    if not rotation.stages:
        # One product per block, since a product of another shape may sum in another order.
        whole = mx.swapaxes(matrix(rotation), -1, -2)
        blocks = [multiplied(y[:, :, n : n + 1], whole) for n in range(y.shape[2])]
        return mx.concatenate(blocks, axis=2)
    for stage in rotation.stages:
        y = apply_stage(y, stage)
    return y


def rotated_queries(q: mx.array, keys: KVView) -> mx.array:
    """Return queries ``[B, K, G, D]`` in the rotated space of the keys, float32."""
    scaled = q if keys.channel_scale is None else q * keys.channel_scale[..., None, :]
    return scaled @ mx.swapaxes(inverse_matrix(keys.codec.rotation), -1, -2)


def multiplied(rows: mx.array, matrix: mx.array) -> mx.array:
    """Multiply rows ``[B, K, ..., D]`` by a matrix ``[D, D]``, or by one per head ``[K, D, D]``."""
    if matrix.ndim == 3:
        matrix = matrix.reshape(-1, *(1,) * (rows.ndim - 4), *matrix.shape[1:])
    return rows @ matrix


def apply_stage(y: mx.array, stage: Stage) -> mx.array:
    """Mix the channels of float32 ``[..., D]``, column by column for all blocks of a stage."""
    outer, radix, stride = stage.outer, stage.radix, stage.stride
    groups = y[..., stage.start : stage.stop].reshape(*y.shape[:-1], outer, radix, stride)
    columns = stage_columns(stage)
    mixed = columns[0] * groups[..., 0:1, :]
    for r in range(1, radix):
        mixed = mixed + columns[r] * groups[..., r : r + 1, :]
    mixed = mixed.reshape(*y.shape[:-1], -1)
    if mixed.shape == y.shape:
        return mixed
    return mx.concatenate([y[..., : stage.start], mixed, y[..., stage.stop :]], axis=-1)


def sum_in_order(x: mx.array, axis: int) -> mx.array:
    """Sum over an axis, kept with size 1, by adding halves until one number is left.

    ``mx.sum`` may choose its order by the shape of the whole array; this order is always the same.
    """
    x = mx.swapaxes(x, axis, -1)
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = mx.concatenate([folded, x[..., 2 * half :]], axis=-1) if n % 2 else folded
    return mx.swapaxes(x, axis, -1)


def nearest_magnitude(size: mx.array, bits: int) -> mx.array:
    """Return the index of the nearest magnitude, uint32; at a boundary, of the larger one."""
    limits = mx.array(codebook.boundaries(bits))
    index = mx.zeros(size.shape, mx.uint32)
    step = 2 ** (bits - 2)
    while step:
        index = index + step * (size >= limits[index + (step - 1)]).astype(mx.uint32)
        step //= 2
    return index


def levels_of_codes(codes: mx.array, bits: int) -> mx.array:
    """Return the float32 levels of codes."""
    return mx.array(codebook.levels(bits))[codes]


# ---- words --------------------------------------------------------------------------------------


def pack(codes: mx.array, codec: Codec) -> mx.array:
    """Pack codes ``[..., 64, D]`` into words ``[..., rows, lanes]``, uint32."""
    if codec.role == KEY:
        codes = mx.swapaxes(codes, -1, -2)
    lanes = codes.shape[-1]
    planes = []
    for plane, rows in zip(codec.planes, codec.plane_rows, strict=True):
        fields = (codes >> plane.shift) & (2**plane.bits - 1)
        missing = rows * plane.a_word - codec.packed_axis_size
        if missing:
            fields = mx.pad(fields, [(0, 0)] * (codes.ndim - 2) + [(0, missing), (0, 0)])
        fields = fields.reshape(*codes.shape[:-2], rows, plane.a_word, lanes)
        shifts = mx.array([plane.bit_of(i) for i in range(plane.a_word)], mx.uint32)[:, None]
        planes.append(mx.sum(fields << shifts, axis=-2))
    return mx.concatenate(planes, axis=-2)


def levels(words: mx.array, codec: Codec) -> mx.array:
    """Return float32 levels ``[..., fields, lanes]`` of words ``[..., rows, lanes]`` in word order.

    Word order puts the first field of every word before the second field of any word, so that
    unpacking moves nothing; see :func:`in_word_order`.
    """
    first, rows = codec.planes[0], codec.plane_rows[0]
    shifts = mx.arange(0, 32, first.bits, dtype=mx.uint32)[:, None, None]
    plane = words[..., None, :rows, :]
    codes = (plane >> shifts) & (2**first.bits - 1)
    if not codec.has_trellis:
        negative = codes >> (codec.bits - 1)
        index = codes & (2 ** (codec.bits - 1) - 1)
        return flat_fields(signed_magnitudes(index, negative, codec.bits))
    before = mx.pad(plane[..., :-1, :], [(0, 0)] * (plane.ndim - 2) + [(1, 0), (0, 0)])
    index = (trellis_ops.low_magnitudes(plane, before) >> shifts) & 3
    if len(codec.planes) > 1:
        index = index | (high_bits(words, codec) << 2)
    return flat_fields(signed_magnitudes(index, codes >> 1, codec.bits))


def high_bits(words: mx.array, codec: Codec) -> mx.array:
    """Return high bits of 3-bit codes in word order of the low bits, ``[..., 16, rows, lanes]``."""
    low, high = codec.planes
    rows = codec.plane_rows[0]
    a_high_word = high.a_word // low.a_word
    planes = mx.repeat(words[..., rows:, :], a_high_word, axis=-2)[..., :rows, :]
    shifts = [
        [high.bit_of(row % a_high_word * low.a_word + field) for row in range(rows)]
        for field in range(low.a_word)
    ]
    return (planes[..., None, :, :] >> mx.array(shifts, mx.uint32)[..., None]) & 1


def signed_magnitudes(index: mx.array, negative: mx.array, bits: int) -> mx.array:
    """Return float32 levels from magnitude indices and sign bits.

    Up to 8 magnitudes are computed by the polynomial through them, because on a CPU a multiply-add
    of MLX is sixty times as fast as a look-up or a select. Its error is at most 3e-8.
    """
    if bits == 8:
        return mx.array(codebook.levels(bits))[index | (negative << (bits - 1))]
    offset, coefficients = magnitude_polynomial(bits)
    t = index.astype(mx.float32) - offset
    size = mx.array(coefficients[0], mx.float32)
    for c in coefficients[1:]:
        size = size * t + c
    return (size.view(mx.uint32) | (negative << 31)).view(mx.float32)


def in_word_order(a: mx.array, codec: Codec) -> mx.array:
    """Reorder the last axis of ``a``, the packed axis, into the word order of :func:`levels`."""
    per_word, rows = codec.planes[0].a_word, codec.plane_rows[0]
    missing = rows * per_word - codec.packed_axis_size
    if missing:
        a = mx.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
    return mx.swapaxes(a.reshape(*a.shape[:-1], rows, per_word), -1, -2).reshape(a.shape)


def in_natural_order(level: mx.array, codec: Codec) -> mx.array:
    """Return levels ``[..., 64, D]`` from levels in word order."""
    per_word, rows = codec.planes[0].a_word, codec.plane_rows[0]
    *front, fields, lanes = level.shape
    level = mx.swapaxes(level.reshape(*front, per_word, rows, lanes), -3, -2)
    level = level.reshape(*front, fields, lanes)[..., : codec.packed_axis_size, :]
    return mx.swapaxes(level, -1, -2) if codec.role == KEY else level


def flat_fields(a: mx.array) -> mx.array:
    """Merge the first two of the axes ``[..., fields per word, rows, lanes]``."""
    return a.reshape(*a.shape[:-3], -1, a.shape[-1])


# ---- constants, made once -----------------------------------------------------------------------


@derived
def matrix(rotation: Rotation) -> mx.array:
    """Return the matrix of a rotation, float32 ``[D, D]``; ``[K, D, D]`` if calibrated."""
    return mx.array(rotation.matrix.astype(np.float32))


@derived
def inverse_matrix(rotation: Rotation) -> mx.array:
    """Return the transposed inverse, shaped as :func:`matrix`; it rotates rows back."""
    return mx.array(np.swapaxes(rotation.inverse, -1, -2).astype(np.float32))


@derived
def stage_columns(stage: Stage) -> tuple[mx.array, ...]:
    """Return for each r column r of every block of a stage, float32 ``[outer, radix, stride]``."""
    by_column = stage.blocks.transpose(3, 0, 2, 1).astype(np.float32)
    return tuple(mx.array(column) for column in by_column)


@cache
def magnitude_polynomial(bits: int) -> tuple[float, tuple[float, ...]]:
    """Return offset and coefficients, highest first, of a polynomial: magnitude i at i - offset."""
    is_trellis = bits in TRELLIS_BITS
    sizes = codebook.trellis_levels(bits)[: 2**bits] if is_trellis else codebook.magnitudes(bits)
    sizes = sizes.astype(np.float64)
    offset = (len(sizes) - 1) / 2
    t = np.arange(len(sizes)) - offset
    return offset, tuple(np.linalg.solve(np.vander(t), sizes).tolist())


def check_rows(x: mx.array, codec: Codec) -> None:
    """Refuse rows of a shape or dtype that cannot be encoded."""
    if x.ndim != 4 or x.shape[-1] != codec.head_dim or x.shape[2] % BLOCK:
        raise ValueError(
            f"[encode] Rows must have shape [B, K, S, {codec.head_dim}] with S a multiple of "
            f"{BLOCK}, but the {codec.role}s have shape {x.shape}."
        )
    if x.dtype not in FLOATS:
        raise ValueError(
            f"[encode] Rows must be float16, bfloat16 or float32, but the {codec.role}s are "
            f"{x.dtype}; cast them."
        )
