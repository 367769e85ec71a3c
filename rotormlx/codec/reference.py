"""The reference codec and its attention, in numpy and float64; every backend is tested against it.

It is written to be easy to follow, not to be fast.

Shapes: B batch, H query heads, K KV heads, L queries, S tokens, N blocks, D head_dim.

Source: docs/FORMAT.md, sections 5 to 7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rotormlx.codec import codebook, trellis
from rotormlx.codec.format import BLOCK, KEY, LARGEST_FLOAT16, VALUE, Codec, Packed
from rotormlx.codec.random_stream import Floats


def encode(
    x: npt.ArrayLike,
    codec: Codec,
    *,
    channel_scale: npt.ArrayLike | None = None,
    centres: npt.ArrayLike | None = None,
    start: int = 0,
    state: npt.ArrayLike = 0,
) -> Packed:
    """Compress whole blocks.

    Args:
        x: Keys or values, ``[B, K, N * 64, D]``.
        codec: Role, bits and rotation.
        channel_scale: Positive, ``[K, D]``; None for 1.
        centres: Centres of the blocks, float16 ``[B, K, N, D]``; None for the means. Keys only.
        start: Number of tokens at the start of each block that have codes already; their output
            has no meaning.
        state: State of trellis-coded values after those tokens, ``[B, K, N, D]``.
    """
    x = _blocks(x)
    if codec.role == KEY:
        mu = block_means(x) if centres is None else np.asarray(centres, np.float16)
        y = x - mu.astype(np.float64)[..., None, :]
    else:
        mu, y = None, x
    y = y / _scale_rows(channel_scale)

    rotated, norm = rotate(y, codec)
    root = np.sqrt(codec.head_dim)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        # A row whose size float16 cannot represent is coded as zeros.
        size = (norm / root).astype(np.float16)
        z = np.where((size > 0) & (size < np.inf), rotated * (root / norm), 0)
    if codec.has_trellis:
        begun = (start, state) if codec.role == VALUE else (0, 0)
        codes, level = _path(z, codec, *begun)
    else:
        codes = nearest(z, codec.bits)
        level = levels(codes, codec)
    with np.errstate(over="ignore", invalid="ignore"):
        along = np.maximum((level * z).sum(-1), codec.head_dim / 2)
        scales = (codec.shrink * norm[..., 0] * root / along).astype(np.float16)
    size = size[..., 0]
    scales = np.where(size == 0, np.float16(0), scales)
    scales = np.where(np.isfinite(size) & np.isfinite(scales), scales, np.float16(np.nan))
    return Packed(pack(codes, codec), scales, mu)


def decode(packed: Packed, codec: Codec, *, channel_scale: npt.ArrayLike | None = None) -> Floats:
    """Return the vectors that packed blocks represent, float64 ``[B, K, N * 64, D]``."""
    level = levels(unpack(packed.words, codec), codec)
    scaled = np.asarray(packed.scales, np.float64)[..., None] * level
    y = _multiplied(scaled, codec.rotation.inverse) * _scale_rows(channel_scale)
    if codec.role == KEY:
        y = y + np.asarray(packed.centres, np.float64)[..., None, :]
    batch, heads, blocks = y.shape[:3]
    return y.reshape(batch, heads, blocks * BLOCK, codec.head_dim)


def score_noise(
    queries: npt.ArrayLike,
    packed: Packed,
    codec: Codec,
    *,
    scale: float,
    channel_scale: npt.ArrayLike | None = None,
) -> Floats:
    """Return half the variance that the codes of packed keys add to the scores.

    Args:
        queries: ``[B, H, L, D]``.
        packed: Packed keys, N blocks.
        codec: Codec of the keys.
        scale: Factor of the scores.
        channel_scale: Positive, ``[K, D]``; None for 1.

    Returns:
        float64 ``[B, H, L, N * 64]``.
    """
    q = np.asarray(queries, np.float64)
    batch, kv_heads, blocks, _ = np.shape(packed.scales)
    rows = q.reshape(batch, kv_heads, 1, -1, codec.head_dim) * _scale_rows(channel_scale)
    rotated = _multiplied(rows, np.swapaxes(codec.rotation.inverse, -1, -2))
    square = np.square(np.asarray(packed.scales, np.float64)).reshape(batch, kv_heads, 1, -1)
    noise = codebook.SCORE_NOISE[codec.bits] * scale**2 * np.square(rotated).sum(-1)
    return (noise[:, :, 0, :, None] * square).reshape(*q.shape[:3], blocks * BLOCK)


def attend(
    queries: npt.ArrayLike,
    keys: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    scale: float,
    noise: npt.ArrayLike = 0,
    mask: npt.NDArray[Any] | str | None = None,
    sink_logits: npt.ArrayLike | None = None,
) -> Floats:
    """Compute attention over decoded keys and values.

    Args:
        queries: ``[B, H, L, D]``.
        keys: ``[B, K, S, D]``; head h reads KV head ``h * K // H``.
        values: ``[B, K, S, Dv]``.
        scale: Factor of the scores.
        noise: Subtracted from the scores, ``[B, H, L, S]``: :func:`score_noise` for packed tokens,
            0 for exact ones.
        mask: None, ``"causal"`` (the last query sees every token), boolean (True: visible) or
            additive, broadcastable to ``[B, H, L, S]``.
        sink_logits: Attention-sink logits ``[H]``: a score in the softmax without a value.

    Returns:
        float64 ``[B, H, L, Dv]``; zero for a query that sees nothing.
    """
    q = np.asarray(queries, np.float64)
    repeats = q.shape[1] // max(np.shape(keys)[1], 1)
    k = np.repeat(np.asarray(keys, np.float64), repeats, axis=1)
    v = np.repeat(np.asarray(values, np.float64), repeats, axis=1)
    scores = scale * (q @ np.swapaxes(k, -1, -2)) - np.asarray(noise, np.float64)
    if isinstance(mask, str):
        length, tokens = scores.shape[-2:]
        mask = np.asarray(np.arange(tokens) <= np.arange(length)[:, None] + tokens - length)
    if isinstance(mask, np.ndarray):
        if mask.dtype == np.bool_:
            scores = np.where(mask, scores, -np.inf)
        else:
            scores = scores + mask.astype(np.float64)
    if sink_logits is not None:
        logits = np.broadcast_to(
            np.asarray(sink_logits, np.float64)[:, None, None], (*scores.shape[:-1], 1)
        )
        scores = np.concatenate([scores, logits], -1)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    return weights[..., : v.shape[2]] @ v


def block_means(x: Floats) -> npt.NDArray[np.float16]:
    """Return the centres of blocks ``[..., 64, D]``, float16 ``[..., D]``.

    A centre is the sum over the tokens whose row is finite, divided by 64. Means beyond the range
    of float16 are clipped to its largest number.
    """
    finite = np.isfinite(x).all(-1, keepdims=True)
    mean = np.where(finite, x, 0).sum(-2) / BLOCK
    return np.clip(mean, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)


def prefill_scale(x: npt.ArrayLike, codec: Codec) -> npt.NDArray[np.float32]:
    """Return the channel scale ``prefill``, computed from the first block.

    Args:
        x: Keys or values of the first block, ``[1, K, 64, D]``.
        codec: Gives the role of the block.

    Returns:
        float32 ``[K, D]``: the square root of each channel's root mean square over the tokens (of
        centred keys), where the root mean square is relative to that of the whole block and at
        least 1/64; 1 where the block is zero or not finite.
    """
    blocks = _blocks(x)[0, :, 0]
    if codec.role == KEY:
        blocks = blocks - block_means(blocks).astype(np.float64)[:, None, :]
    square = (blocks * blocks).mean(1)
    whole = square.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.maximum(square / whole, 64.0**-2) ** 0.25
    return np.where(np.isfinite(whole) & (whole > 0), scale, 1).astype(np.float32)


def rotate(y: Floats, codec: Codec) -> tuple[Floats, Floats]:
    """Return rotated rows ``[..., D]`` and their norms ``[..., 1]``."""
    with np.errstate(invalid="ignore", over="ignore"):
        rotated = _multiplied(y, codec.rotation.matrix)
        return rotated, np.sqrt((rotated * rotated).sum(-1, keepdims=True))


def nearest(z: Floats, bits: int) -> npt.NDArray[np.uint32]:
    """Return the codes of the nearest levels; a boundary belongs to the larger magnitude."""
    limits = codebook.boundaries(bits).astype(np.float64)
    index = np.searchsorted(limits, np.abs(z), side="right").astype(np.uint32)
    return np.where(z < 0, index | np.uint32(1 << (bits - 1)), index)


def levels(codes: npt.NDArray[np.uint32], codec: Codec) -> Floats:
    """Return the levels of stored codes ``[..., 64, D]``."""
    if not codec.has_trellis:
        return codebook.levels(codec.bits).astype(np.float64)[codes]
    table = codebook.trellis_levels(codec.bits).astype(np.float64)
    return _packed_axis_first(
        table[trellis.level_codes(_packed_axis_first(codes, codec), codec.bits)], codec
    )


def _path(
    z: Floats, codec: Codec, start: int, state: npt.ArrayLike
) -> tuple[npt.NDArray[np.uint32], Floats]:
    """Return the trellis codes of numbers ``[..., 64, D]``, and their levels."""
    bits = codec.bits
    codes = trellis.encode(_packed_axis_first(z, codec), bits, start=start, state=state)
    index = trellis.level_codes(codes, bits, start=start, state=state)
    level = codebook.trellis_levels(bits).astype(np.float64)[index]
    return _packed_axis_first(codes, codec), _packed_axis_first(level, codec)


def pack(codes: npt.NDArray[np.uint32], codec: Codec) -> npt.NDArray[np.uint32]:
    """Pack codes ``[..., 64, D]`` into words ``[..., rows, lanes]``."""
    codes = _packed_axis_first(codes, codec)
    words = np.zeros((*codes.shape[:-2], *codec.words_shape), np.uint32)
    first_row = 0
    for plane, rows in zip(codec.planes, codec.plane_rows, strict=True):
        fields = (codes >> np.uint32(plane.shift)) & np.uint32(2**plane.bits - 1)
        for i in range(codec.packed_axis_size):
            row, field = divmod(i, plane.a_word)
            words[..., first_row + row, :] |= fields[..., i, :] << np.uint32(plane.bit_of(field))
        first_row += rows
    return words


def unpack(words: npt.ArrayLike, codec: Codec) -> npt.NDArray[np.uint32]:
    """Unpack words ``[..., rows, lanes]`` into codes ``[..., 64, D]``."""
    words = np.asarray(words, np.uint32)
    codes = np.zeros((*words.shape[:-2], codec.packed_axis_size, words.shape[-1]), np.uint32)
    first_row = 0
    for plane, rows in zip(codec.planes, codec.plane_rows, strict=True):
        for i in range(codec.packed_axis_size):
            row, field = divmod(i, plane.a_word)
            bits = words[..., first_row + row, :] >> np.uint32(plane.bit_of(field))
            codes[..., i, :] |= (bits & np.uint32(2**plane.bits - 1)) << np.uint32(plane.shift)
        first_row += rows
    return _packed_axis_first(codes, codec)


def _packed_axis_first(a: npt.NDArray[Any], codec: Codec) -> npt.NDArray[Any]:
    """Turn ``[..., 64, D]`` into ``[..., packed axis, lanes]``, or back."""
    return np.swapaxes(a, -1, -2) if codec.role == KEY else a


def _blocks(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float64)
    batch, heads, tokens, head_dim = x.shape
    return x.reshape(batch, heads, tokens // BLOCK, BLOCK, head_dim)


def _multiplied(rows: Floats, matrix: Floats) -> Floats:
    """Multiply each row of ``[B, K, N, 64, D]`` by a matrix ``[D, D]``, or one per KV head."""
    out: Floats = rows @ np.swapaxes(matrix, -1, -2)[..., None, :, :]
    return out


def _scale_rows(channel_scale: npt.ArrayLike | None) -> Floats:
    if channel_scale is None:
        return np.ones(())
    return np.asarray(channel_scale, np.float64)[None, :, None, None, :]
