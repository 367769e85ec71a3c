"""Attention of many queries at once, a prompt or a chunk of one, with torch's own attention.

Exact tokens are passed to it unchanged. Packed tokens are decoded tile by tile, which bounds the
memory. Every tile gives a part of the output, and parts are merged by their log-sum-exp. The
correction of scores for the noise of the codes is a product of one number per query and one per
token (docs/FORMAT.md, section 7), so it is added as one more channel of both.

Shapes: B batch, H query heads, K KV heads, L queries, T tokens of a part, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, Packed
from rotormlx.torch import ops, torch_ops
from rotormlx.torch.store import Rows, groups
from rotormlx.torch.torch_ops import AttendCall, KVView

# With this many query rows per KV head or fewer, attention reads packed tokens directly.
LEAST_ROWS = 64
# Elements of keys that are decoded at once: 32 MiB in 16 bits, and as much for values.
TILE_NUMBERS = 2**24
# Rows are padded to multiples of this many elements: multiples of 16 bytes in every dtype.
_WHOLE = 8
_SMALLEST = 1e-30


class Part(NamedTuple):
    """The result of attention over some of the tokens.

    output: ``[B, H, L, Dv]``.
    lse: Logarithm of the sum of exponentials, float32 ``[B, H, L]``; -inf where nothing is seen.
    """

    output: Tensor
    lse: Tensor


def takes(call: AttendCall) -> bool:
    """Return whether a call has enough queries, on a device with an implementation."""
    rows = call.repeats * call.query.shape[2]
    return rows > LEAST_ROWS and call.query.device.type in _PART_OF


def attend(call: AttendCall, counts: Sequence[tuple[int, int]]) -> Tensor:
    """Attend over a partly packed cache; return ``[B, H, L, Dv]`` in the dtype of the query.

    Args:
        call: The call. Its parts must fit, and if it is causal, the tokens of its queries must
            still be exact.
        counts: Packed tokens and all tokens of each batch row; equal to ``call.lengths``.

    Source: docs/FORMAT.md, section 7.
    """
    alike = [*groups(counts)]
    if len(alike) == 1:
        return _attend_alike(call, slice(None), *counts[0])
    output = call.query.new_empty(call.output_shape)
    mask = call.wide_mask
    for rows, (packed, tokens) in alike:
        own_mask = mask if mask is None or len(mask) == 1 else mask[rows]
        own = call._replace(query=call.query[rows], mask=own_mask)
        output[rows] = _attend_alike(own, rows, packed, tokens)
    return output


def _attend_alike(call: AttendCall, rows: Rows, packed: int, tokens: int) -> Tensor:
    """Attend for batch rows of equal lengths; query and mask hold only these rows."""
    length = call.query.shape[2]
    if not tokens:
        return call.query.new_zeros(call.output_shape)
    if call.causal and tokens < length:
        # Queries before the first token see nothing.
        seeing = call._replace(query=call.query[:, :, length - tokens :])
        return pad(_attend_alike(seeing, rows, packed, tokens), (0, 0, length - tokens, 0))
    dtype, exact = call.query.dtype, tokens - packed
    keys, values = (x.exact[rows, :, :exact].to(dtype) for x in (call.keys, call.values))
    if call.causal and exact == length and not packed and call.sink_logits is None:
        # For the first chunk, call the function that an exact cache uses.
        return scaled_dot_product_attention(
            call.query, keys, values, is_causal=True, scale=call.scale, enable_gqa=True
        )
    parts = [*_exact_parts(call, keys, values, packed)]
    parts += _packed_parts(call, rows, packed)
    if call.sink_logits is not None:
        # Attention-sink logits are scores without values.
        lse = call.sink_logits.float()[None, :, None].expand(call.output_shape[:3])
        parts.append(Part(call.query.new_zeros(call.output_shape), lse))
    return _merged(parts).to(dtype)


def _exact_parts(call: AttendCall, keys: Tensor, values: Tensor, packed: int) -> Iterator[Part]:
    """Yield the parts of sink and tail; if causal, tokens that all queries see are one part."""
    exact, query, scale = keys.shape[2], call.query, call.scale
    if call.causal:
        old = exact - query.shape[2]
        if old:
            yield _part(query, keys[:, :, :old], values[:, :, :old], scale)
        yield _part(query, keys[:, :, old:], values[:, :, old:], scale, causal=True)
    elif exact:
        mask = call.wide_mask
        if mask is not None and mask.shape[-1] > 1:
            sink = min(call.sink, exact)
            ends = ((0, sink), (packed + sink, packed + exact))
            mask = torch.cat([_columns(mask, *end) for end in ends], dim=-1)
        yield _part(query, keys, values, scale, mask=mask)


def _packed_parts(call: AttendCall, rows: Rows, packed: int) -> Iterator[Part]:
    """Yield the parts of the packed tokens, tile by tile."""
    if not packed:
        return
    query, query_noise, mask = call.query, _query_noise(call, rows), call.wide_mask
    widest = max(query.shape[3], call.output_shape[3])
    tile = max(1, TILE_NUMBERS // (len(query) * call.kv_heads * widest * BLOCK))
    for first, stop in torch_ops.tiles(-(-packed // BLOCK), tile):
        tokens, start = min(stop * BLOCK, packed) - first * BLOCK, call.sink + first * BLOCK
        keys, values = (
            _decoded(x, rows, first, stop, query.dtype)[:, :, :tokens]
            for x in (call.keys, call.values)
        )
        square = _scales(call.keys, rows, first, stop)[:, :, :tokens].square()
        # Division by the largest keeps both factors in the range of 16 bits.
        largest = square.nan_to_num(0.0).amax((2, 3), keepdim=True).clamp(min=_SMALLEST)
        of_keys = (square / largest).to(query.dtype)
        of_query = (-query_noise * largest.repeat_interleave(call.repeats, 1)).to(query.dtype)
        yield _part(
            torch.cat([query, of_query], -1),
            torch.cat([keys, of_keys], -1),
            values,
            call.scale,
            mask=None if mask is None else _columns(mask, start, start + tokens),
        )


def _decoded(view: KVView, rows: Rows, first: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Decode the tokens of blocks ``first`` to ``stop`` (excluded), ``[B, K, T, D]``."""
    parts = (None if a is None else a[rows, :, first:stop] for a in view.packed or ())
    scale = torch_ops.scale_of_rows(view.channel_scale, rows)
    return ops.decode_fitting(Packed(*parts), view.codec, channel_scale=scale, dtype=dtype)


def _scales(view: KVView, rows: Rows, first: int, stop: int) -> Tensor:
    """Return the scales of the same tokens, float32 ``[B, K, T, 1]``."""
    packed = cast(Packed, view.packed)
    return packed.scales[rows, :, first:stop].flatten(2)[..., None].float()


def _query_noise(call: AttendCall, rows: Rows) -> Tensor:
    """Return the score correction for a token whose scale is 1, float32 ``[B, H, L, 1]``."""
    keys, scaled = call.keys, call.query.float()
    if (own := torch_ops.scale_of_rows(keys.channel_scale, rows)) is not None:
        scaled = scaled * own.repeat_interleave(call.repeats, -2)[..., None, :]
    # A matrix per KV head serves the query heads that share it.
    matrix = torch_ops.inverse_matrix(keys.codec.rotation, scaled.device).mT
    if matrix.ndim == 3:
        matrix = matrix.repeat_interleave(call.repeats, 0)
    square = (scaled @ matrix).square().sum(-1, keepdim=True)
    return codebook.SCORE_NOISE[keys.codec.bits] * call.scale * square


def _columns(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return columns of a mask with four axes; tokens after its last column are hidden."""
    if mask.shape[-1] == 1:
        return mask
    part = mask[..., start:stop]
    hidden = False if mask.dtype == torch.bool else -math.inf
    return pad(part, (0, stop - start - part.shape[-1]), value=hidden)


def _merged(parts: list[Part]) -> Tensor:
    """Merge the parts into the output, float32; zero for a query that sees no token."""
    lse = torch.stack([part.lse for part in parts])
    top = lse.amax(0)
    weights = torch.exp(lse - torch.where(top == -math.inf, 0.0, top))
    shares = weights / weights.sum(0).clamp(min=_SMALLEST)
    output = torch.zeros_like(parts[0].output, dtype=torch.float32)
    for part, share in zip(parts, shares, strict=True):
        output.addcmul_(part.output.float(), share[..., None])
    return output


# ---- torch's attention with its log-sum-exp -----------------------------------------------------


def _part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Part:
    """Attend over keys and values ``[B, K, T, D]``; T is L if it is causal.

    A mask is ``[B or 1, H or 1, L or 1, T]``, boolean or additive.
    """
    value_dim = values.shape[3]
    wide = -(-max(query.shape[3], value_dim) // _WHOLE) * _WHOLE
    query, keys, values = (
        x if x.shape[3] == wide else pad(x, (0, wide - x.shape[3])) for x in (query, keys, values)
    )
    part_of = _PART_OF[query.device.type]
    if mask is None:
        part = part_of(query, keys, values, scale, causal, None)
        return Part(part.output[..., :value_dim], part.lse)
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    shown = torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask
    shape = (*query.shape[:3], keys.shape[2])
    additive = shown.to(query.dtype).masked_fill(hidden, -math.inf).expand(shape)
    part = part_of(query, keys, values, scale, False, additive)
    blind = hidden.all(-1).expand(shape[:3])
    return Part(
        part.output[..., :value_dim].masked_fill(blind[..., None], 0.0),
        part.lse.masked_fill(blind, -math.inf),
    )


def _part_on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Part:
    return Part(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, attn_mask=mask, scale=scale
        )
    )


def _part_on_cuda(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Part:
    if mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return Part(*flash(query, keys, values, 0.0, causal, False, scale=scale)[:2])
    repeats = query.shape[1] // keys.shape[1]
    if mask is not None:
        # Rows of the bias must start at multiples of 16 bytes.
        room = -mask.shape[-1] % _WHOLE
        mask = pad(mask, (0, room))[..., : mask.shape[-1]]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    output, lse = efficient(query, keys, values, mask, True, 0.0, causal, scale=scale)[:2]
    # The log-sum-exp is padded along the queries.
    return Part(output, lse[..., : query.shape[2]])


_PART_OF = {"cpu": _part_on_cpu, "cuda": _part_on_cuda}
