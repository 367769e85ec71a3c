"""Absorbed attention over packed latents: one packed copy is both key and value.

With MLA, the queries of a decode step are projected into the space of the latent, so keys and
values are the same vectors, and all query heads read them. The packed tokens are read tile by tile.
The levels of a tile are used twice in rotated space: for the scores of the queries, and in the sum
weighted by the exponentials. At the end the sum is rotated back once, and the part of the centres
is added:

    score_j = scale_j * <C (s * q), c_j> + <q, mu_block(j)>
    out     = s * C^T ( sum_j p_j scale_j c_j ) + sum_blocks ( sum_j p_j ) mu_block

Shapes: B batch, H query heads, L queries, S tokens, R latent dimension, G = H * L query rows,
N blocks and T tokens of a tile.

Source: docs/FORMAT.md, section 7; docs/MLA.md.
"""

from __future__ import annotations

from functools import cache, partial

import mlx.core as mx

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, Codec, Packed
from rotormlx.codec.rotation import rotation
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import Backend
from rotormlx.mlx.backends.mlx_ops import (
    Masks,
    Softmax,
    advance,
    after,
    hide,
    inverse_matrix,
    mask_of_tile,
    start_softmax,
    tiles,
)

# Tokens whose levels are in memory at once: 4 MiB at 512 dimensions.
TILE_TOKENS = 2048


def attend(call: AttendCall, backend: Backend) -> mx.array:
    """Compute attention whose keys and values are the same latents.

    Args:
        call: A call whose keys are also its values, with one KV head for all query heads.
        backend: The backend that reads codes and multiplies matrices.

    Returns:
        ``[B, H, L, R]`` in the dtype of the queries; zero for a query that sees no token. Sums are
        in float32.
    """
    if 0 in call.output_shape or not call.keys.tokens:
        return mx.zeros(call.output_shape, call.queries.dtype)
    if call.rows_differ:
        return mx.concatenate([attend(row, backend) for row in call.rows()])
    q, masks = call.scaled_queries, partial(mask_of_tile, call)
    state = start_softmax(call)
    if call.keys.packed is not None and call.keys.packed_tokens:
        state = _attend_packed(q, call, call.keys.packed, masks, state, backend)
    state = _attend_exact(q, call, masks, state, backend)
    output = state.output / mx.where(state.total == 0, mx.array(1.0), state.total)
    return output.reshape(call.output_shape).astype(call.queries.dtype)


def _attend_packed(
    q: mx.array, call: AttendCall, packed: Packed, masks: Masks, state: Softmax, backend: Backend
) -> Softmax:
    """Attend to the packed blocks, which come first; q is ``[B, K, G, R]``, already scaled."""
    latents, codec = call.keys, call.keys.codec
    scale, inverse = latents.channel_scale, inverse_matrix(codec.rotation)
    scaled_queries = q if scale is None else q * scale[:, None, :]
    rotated = backend.product(scaled_queries, mx.swapaxes(inverse, -1, -2))
    noise = codebook.SCORE_NOISE[codec.bits] * mx.sum(rotated * rotated, -1, keepdims=True)
    of_centres = mx.zeros(state.output.shape, mx.float32)
    for start, stop in tiles(latents.packed_tokens, TILE_TOKENS):
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        words, scales, centres = (a[:, :, blocks] for a in packed)
        scales = scales.astype(mx.float32).reshape(*scales.shape[:2], 1, -1)  # [B, K, 1, T]
        centres = centres.astype(mx.float32)  # [B, K, N, R]
        levels = _levels(after(state.output, words), codec, backend)  # [B, K, T, R]

        scores = backend.product(rotated, mx.swapaxes(levels, -1, -2))
        about_centres = backend.product(q, mx.swapaxes(centres, -1, -2))
        scores = (scores - noise * scales) * scales + mx.repeat(about_centres, BLOCK, axis=-1)
        scores = hide(scores[:, :, None], masks, latents.sink + start, latents.sink + stop)

        before = state.top
        state, weights = advance(state, scores)
        weights = weights[:, :, 0]
        # The scale of a hidden token may be anything, even NaN.
        scaled = mx.where(weights == 0, mx.array(0.0), weights * scales)
        by_block = weights.reshape(*weights.shape[:-1], -1, BLOCK).sum(-1)
        of_centres = of_centres * _shrink(before, state.top) + backend.product(by_block, centres)
        state = state._replace(output=state.output + backend.product(scaled, levels))

    # Keys decode to their unbiased length; values need a slightly shorter one.
    output = backend.product(state.output * codebook.VALUE_SHRINK[codec.bits], inverse)
    if scale is not None:
        output = output * scale[:, None, :]
    return state._replace(output=output + of_centres)


def _attend_exact(
    q: mx.array, call: AttendCall, masks: Masks, state: Softmax, backend: Backend
) -> Softmax:
    """Attend to the sink and the tail, which have separate columns of the mask."""
    latents = call.keys
    sink = min(latents.sink, latents.exact_tokens)
    runs = [(0, sink, 0)] if sink else []
    runs += [
        (sink + a, sink + b, latents.packed_tokens)
        for a, b in tiles(latents.exact_tokens - sink, TILE_TOKENS)
    ]
    for start, stop, packed_before in runs:
        exact = latents.exact[:, :, start:stop].astype(mx.float32)
        scores = backend.product(q, mx.swapaxes(exact, -1, -2))
        scores = hide(scores[:, :, None], masks, packed_before + start, packed_before + stop)
        state, weights = advance(state, scores)
        state = state._replace(output=state.output + backend.product(weights[:, :, 0], exact))
    return state


def _shrink(before: mx.array, top: mx.array) -> mx.array:
    """Return the factor that :func:`advance` applied when the largest score became ``top``."""
    return mx.exp(before - mx.where(top == -mx.inf, mx.array(0.0), top))


def _levels(words: mx.array, codec: Codec, backend: Backend) -> mx.array:
    """Return the levels of whole blocks, float32 ``[B, K, T, R]``."""
    batch, heads, blocks = words.shape[:3]
    ones = mx.ones((batch, heads, blocks, BLOCK), mx.float16)
    zeros = mx.zeros((batch, heads, blocks, codec.head_dim), mx.float16)
    return backend.decode(Packed(words, ones, zeros), _unrotated(codec.bits, codec.head_dim))


@cache
def _unrotated(bits: int, head_dim: int) -> Codec:
    """Return the codec that decodes keys to their levels, with scales of 1 and centres of 0."""
    return Codec(KEY, bits, rotation("identity", head_dim))
