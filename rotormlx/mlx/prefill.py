"""Attention of many queries (a prompt or a chunk) with MLX's own kernels.

While nothing is packed, it reads the exact tokens like those of an exact cache, with the same
result. Later, the packed tokens of a few KV heads at a time are decoded to their place between sink
and tail. So memory is bounded, masks keep their meaning, and there are no parts to merge. The term
that is subtracted from the score of a packed token is a product of a number of the query and a
number of the token (docs/FORMAT.md, section 7). So it becomes one more channel of both, or a mask
if MLX has no fast kernel for one more channel.

Shapes: B batch, H query heads, K KV heads, L queries, S tokens, D head_dim of keys and queries,
Dv of values.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx

from rotormlx.codec import codebook
from rotormlx.codec.derived import derived
from rotormlx.codec.format import LARGEST_FLOAT16, Codec, Packed
from rotormlx.codec.rotation import calibrated
from rotormlx.config import RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import Backend, choices, example
from rotormlx.mlx.backends.example import Size
from rotormlx.mlx.backends.kept import findings
from rotormlx.mlx.backends.mlx_ops import KERNEL, LIBRARY, after, rotated_queries, tiles
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.in_place import counted, in_place, joined

# With fewer query rows per KV head, the backend's attention reads packed tokens directly: on Metal,
# decoding costs as much as it saves on 200 to 300 rows, by estimate (docs/KERNELS.md).
LEAST_ROWS = 256
# KV heads are computed together up to this many bytes of decoded keys, and of decoded values.
TILE_BYTES = 2**24
# The most such bytes of a single KV head: 262,144 tokens at head_dim 128 in 16 bits.
MOST_BYTES = 2**26
# The most bytes of scores, or of a mask of that shape, if they must be stored: 512 query rows at
# 32,768 tokens in 16 bits.
SCORE_BYTES = 2**25
# head_dims for which MLX may have a kernel that stores no scores and is therefore faster.
_FAST_DIMS = range(8, 129, 8)
# head_dims at which MLX uses the matrix units of Apple's GPUs since generation 17 (M5).
_UNIT_DIMS = (64, 96, 128)
# The cost of a mask per score, in channels, by estimate (docs/KERNELS.md).
_MASK_CHANNELS = 32
# The environment variable that names the attention for chunks of a prompt after packed tokens.
VARIABLE = "ROTORMLX_PROMPTS"
# The chunk that is timed on a GPU.
SIZE = Size(heads=32, kv_heads=8, head_dim=128, length=512, packed_tokens=4096)
_SMALLEST = 1e-30
_EXPONENT = 0x7F800000  # the exponent bits of a float32


class Layout(NamedTuple):
    """The layout of queries, keys and values for MLX's attention.

    key_dim: Channels of queries and keys, padded with zeros.
    value_dim: Channels of values, padded with zeros.
    has_channel: Whether one of ``key_dim`` channels subtracts the noise term; else a mask does.
    is_fast: Whether MLX has a kernel that stores no scores.
    """

    key_dim: int
    value_dim: int
    has_channel: bool
    is_fast: bool

    @property
    def stores_scores(self) -> bool:
        """Whether an array with the shape of the scores is stored."""
        return not (self.is_fast and self.has_channel)


def attend(call: AttendCall, backend: Backend) -> mx.array:
    """Attend over a partly packed cache, with MLX's attention or with the backend's.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of the queries; zero for a query that sees no token.

    Source: docs/FORMAT.md, section 7.
    """
    if choice(call, backend) == KERNEL:
        return backend.attend(call)
    if _is_alike(call):
        return _attend_alike(call, backend)
    return mx.concatenate([_attend_alike(row, backend) for row in call.rows()])


def choice(call: AttendCall, backend: Backend) -> str:
    """Choose the attention for a call: ``"library"`` is MLX's, ``"kernel"`` the backend's.

    If both can compute it, ``ROTORMLX_PROMPTS`` decides, else ``backend.timed_prompts``, else
    ``backend.prompts``. On a GPU without the first two, both are timed at the first chunk after
    packed tokens.

    Raises:
        RuntimeError: If the variable names neither of them.
    """
    if 0 in call.output_shape or not call.keys.tokens:
        return KERNEL
    many = call.group_rows >= LEAST_ROWS
    if call.keys.packed_tokens and not (many and _is_able(call)):
        return KERNEL  # among others, every decode step after packed tokens
    prompts = backend.timed_prompts or backend.prompts(call.queries.dtype)
    if not call.keys.packed_tokens:
        return prompts.first if many or _is_alike(call) else KERNEL
    if (named := _named()) is not None:
        return named
    if backend.timed_prompts is None and mx.default_device().type == mx.DeviceType.gpu:
        return _fastest(backend, call.keys.codec.bits, call.key_dim, call.queries.dtype)
    return prompts.later


def _named() -> str | None:
    name = os.environ.get(VARIABLE)
    if name not in (None, LIBRARY, KERNEL):
        raise RuntimeError(
            f"[attend] {VARIABLE} must be {LIBRARY} or {KERNEL}, but it is {name!r}; unset it."
        )
    return name


@cache
def _fastest(backend: Backend, bits: int, head_dim: int, dtype: mx.Dtype) -> str:
    """Return the faster choice on this device for a chunk after packed tokens."""
    size = SIZE._replace(head_dim=head_dim)
    timed = example.call(RotorConfig(bits, bits), size, dtype)
    ways = {
        LIBRARY: partial(_attend_alike, timed, backend),
        KERNEL: partial(backend.attend, timed),
    }
    name = f"attention of prompts, {bits} bits, head_dim {head_dim}, {str(dtype).split('.')[-1]}"
    return choices.fastest(findings(backend.name), name, ways)


def _is_alike(call: AttendCall) -> bool:
    """Whether batch rows share their lengths and, if something is packed, channel scales."""
    scales = (view.channel_scale for view in (call.keys, call.values))
    own_scales = any(scale is not None and scale.ndim == 3 for scale in scales)
    return len(set(call.keys.lengths)) == 1 and not (own_scales and call.keys.packed_tokens)


def _is_able(call: AttendCall) -> bool:
    """Whether the tokens of a KV head fit, and a causal mask hides only exact tokens."""
    keys = call.keys
    layout = _layout(call)
    widest = max(layout.key_dim, layout.value_dim)
    if keys.tokens * widest * call.queries.itemsize > MOST_BYTES:
        return False
    return not call.is_causal or all(
        not packed or call.length <= tokens - packed - keys.sink for packed, tokens in keys.lengths
    )


def _attend_alike(call: AttendCall, backend: Backend) -> mx.array:
    """Attend for batch rows that are alike."""
    tokens, length = call.keys.tokens, call.length
    if not tokens:
        return mx.zeros(call.output_shape, call.queries.dtype)
    if call.is_causal and tokens < length:
        # Queries before the first token see no token.
        blind = length - tokens
        seeing = call._replace(queries=call.queries[:, :, blind:])
        return mx.pad(_attend_alike(seeing, backend), [(0, 0), (0, 0), (blind, 0), (0, 0)])
    if call.keys.packed_tokens:
        return _attend_decoded(call, backend)
    keys, values = (view.exact[:, :, :tokens] for view in (call.keys, call.values))
    mask = _additive_in(mx.result_type(call.queries, keys, values), call.mask)
    return _unless_blind(_library(call, call.queries, keys, values, mask), mask)


# ---- packed tokens, decoded ---------------------------------------------------------------------


def _attend_decoded(call: AttendCall, backend: Backend) -> mx.array:
    """Attend to as many KV heads at once as fit into :data:`TILE_BYTES`."""
    layout = _layout(call)
    widest = max(layout.key_dim, layout.value_dim)
    head_bytes = call.batch * call.keys.tokens * widest * call.queries.itemsize
    if call.batch > 1 and head_bytes > MOST_BYTES:
        return mx.concatenate([_attend_decoded(row, backend) for row in call.rows()])
    outputs: list[mx.array] = []
    for first, stop in tiles(call.kv_heads, max(1, TILE_BYTES // head_bytes)):
        part = _heads(call, first, stop)
        outputs += _attend_heads(part, backend, layout, outputs[-1:])
    return mx.concatenate(outputs, axis=1)


def _attend_heads(
    call: AttendCall, backend: Backend, layout: Layout, earlier: list[mx.array]
) -> list[mx.array]:
    """Return the outputs of some KV heads, computed after an earlier output."""
    queries, keys, values = call.queries, call.keys, call.values
    dtype, mask = queries.dtype, _additive_in(queries.dtype, call.mask)
    of_queries, of_keys = _noise(call)
    if isinstance(mask, mx.array):
        # A NaN goes to the noise term, which a mask hides; a weight of zero would not hide it.
        broken = mx.isnan(_scales(keys)) | mx.isnan(_scales(values))
        of_keys = _spoiled(of_keys, joined(keys, mx.zeros((1, 1, 1, 1), mx.bool_), broken))
        keys, values = _mended(keys), _mended(values)
    if not layout.has_channel:
        # An additive mask does not hide a NaN or an infinity in an exact key either.
        broken = ~mx.all(mx.isfinite(keys.exact), axis=-1, keepdims=True)
        of_keys = _spoiled(of_keys, joined(keys, broken, mx.zeros((1, 1, 1, 1), mx.bool_)))
        keys = replace(keys, exact=mx.where(broken, mx.array(0, keys.dtype), keys.exact))
    if earlier:
        keys = _begun_after(earlier[-1], keys)
    k = in_place(keys, backend, dtype)
    v = in_place(values, backend, dtype)
    if layout.has_channel:
        k = _widened(k, layout.key_dim, of_keys.astype(dtype))
        queries = _widened(queries, layout.key_dim, of_queries.astype(dtype))
    else:
        of_keys = mx.repeat(mx.swapaxes(of_keys, -1, -2), call.heads // call.kv_heads, axis=1)
        queries, k = _widened(queries, layout.key_dim), _widened(k, layout.key_dim)
    v = _widened(v, layout.value_dim)
    outputs: list[mx.array] = []
    for start, stop in tiles(call.length, _rows_at_once(call, layout)):
        # A causal mask hides all tokens after the last of these queries.
        seen = call.keys.tokens - (call.length - stop if call.is_causal else 0)
        part = queries[:, :, start:stop]
        lost = (call.scale * of_queries[:, :, start:stop]).astype(dtype)
        if outputs:
            part, lost = mx.depends([part, lost], [outputs[-1]])
        own = whole = _rows_of(mask, start, stop)
        if not layout.has_channel:
            whole = _with_noise(own, lost, of_keys[..., :seen].astype(dtype))
        output = _library(call, part, k[:, :, :seen], v[:, :, :seen], whole)
        outputs.append(_unless_blind(output[..., : call.value_dim], own))
    return [mx.concatenate(outputs, axis=2)]


def _rows_at_once(call: AttendCall, layout: Layout) -> int:
    """Return how many queries are computed at once."""
    if not layout.stores_scores:
        return call.length
    a_query = call.batch * call.heads * call.keys.tokens * call.queries.itemsize
    return max(1, SCORE_BYTES // a_query)


def _noise(call: AttendCall) -> tuple[mx.array, mx.array]:
    """Return two factors whose product corrects the score of a query and a key.

    Returns:
        The factor of the queries, float32 ``[B, H, L, 1]``, not positive.
        The factor of the keys, float32 ``[B, K, S, 1]``, from 0 to 2, and 0 for exact ones.
    """
    keys, square = call.keys, _scales(call.keys).astype(mx.float32) ** 2
    largest = mx.max(mx.where(mx.isnan(square), mx.array(0.0), square), axis=2, keepdims=True)
    # Divided by a power of two, so that both fit 16 bits and no token changes another's term.
    power = (mx.maximum(largest, _SMALLEST).view(mx.uint32) & _EXPONENT).view(mx.float32)

    shape = (call.batch, call.kv_heads, call.group_rows, call.key_dim)
    rotated = rotated_queries(call.queries.astype(mx.float32).reshape(shape), keys)
    lost = codebook.SCORE_NOISE[keys.codec.bits] * call.scale
    of_queries = -lost * mx.sum(rotated * rotated, axis=-1, keepdims=True) * power
    if call.queries.dtype == mx.float16:
        of_queries = mx.maximum(of_queries, -LARGEST_FLOAT16)
    of_queries = of_queries.reshape(call.batch, call.heads, call.length, 1)
    return of_queries, joined(keys, mx.zeros((1, 1, 1, 1)), square / power)


def _with_noise(mask: mx.array | str | None, of_queries: mx.array, of_keys: mx.array) -> mx.array:
    """Add the noise term, a product of factors ``[.., L, 1]`` and ``[.., S]``, to a mask.

    With a causal mask, the queries are the last tokens.

    Returns:
        ``[B, H, L, S]``.
    """
    taken = of_queries * of_keys
    hidden = mx.array(-mx.inf, taken.dtype)
    if mask is None:
        return taken
    if isinstance(mask, str):
        length = taken.shape[2]
        # Computed again and not sliced, so that ``taken`` can be written in place.
        own = of_queries * of_keys[..., -length:]
        taken[..., -length:] = mx.where(mx.tri(length, dtype=mx.bool_), own, hidden)
        return taken
    return mx.where(mask, taken, hidden) if mask.dtype == mx.bool_ else taken + mask


def _heads(call: AttendCall, first: int, stop: int) -> AttendCall:
    """Return the call restricted to some KV heads and their query heads."""
    repeats = call.heads // call.kv_heads
    heads = slice(first * repeats, stop * repeats)
    mask, sink_logits = call.mask, call.sink_logits
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        mask = mask[..., heads, :, :]
    return call._replace(
        queries=call.queries[:, heads],
        keys=_view_of_heads(call.keys, first, stop),
        values=_view_of_heads(call.values, first, stop),
        mask=mask,
        sink_logits=None if sink_logits is None else sink_logits[heads],
    )


def _view_of_heads(view: KVView, first: int, stop: int) -> KVView:
    packed, scale = view.packed, view.channel_scale
    if packed is not None:
        packed = Packed(*(None if a is None else a[:, first:stop] for a in packed))
    return replace(
        view,
        codec=_codec_of_heads(view.codec, first, stop),
        exact=view.exact[:, first:stop],
        packed=packed,
        channel_scale=None if scale is None else scale[..., first:stop, :],
    )


def _codec_of_heads(codec: Codec, first: int, stop: int) -> Codec:
    """Return the codec of some KV heads; a calibrated one has one matrix per head."""
    if not codec.rotation.is_per_head or stop - first == len(codec.rotation.matrix):
        return codec
    return _own_codec(codec, first, stop)


@derived
def _own_codec(codec: Codec, first: int, stop: int) -> Codec:
    return replace(codec, rotation=calibrated(codec.rotation.matrix[first:stop]))


def _scales(view: KVView) -> mx.array:
    """Return the scales of the packed tokens, float16 ``[B, K, T, 1]``."""
    return counted(view).scales.flatten(2)[:, :, : view.packed_tokens, None]


def _mended(view: KVView) -> KVView:
    """Return the view with NaN scales replaced by a number."""
    packed = counted(view)
    scales = mx.where(mx.isnan(packed.scales), mx.array(0, mx.float16), packed.scales)
    return replace(view, packed=packed._replace(scales=scales))


def _begun_after(earlier: mx.array, view: KVView) -> KVView:
    """Return a view that is decoded only after ``earlier`` is computed."""
    packed = counted(view)
    return replace(view, packed=packed._replace(words=after(earlier, packed.words)))


def _spoiled(numbers: mx.array, broken: mx.array) -> mx.array:
    return mx.where(broken, mx.array(mx.nan), numbers)


# ---- MLX's attention ----------------------------------------------------------------------------


def _library(
    call: AttendCall,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | str | None,
) -> mx.array:
    """Attend over whole sequences with MLX's attention, in the dtype of the queries."""
    sinks = call.sink_logits
    if sinks is not None:
        sinks = sinks.astype(mx.result_type(queries, keys, values))
    output: mx.array = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=call.scale, mask=mask, sinks=sinks
    )
    return output.astype(call.queries.dtype)


def _additive_in(dtype: mx.Dtype, mask: mx.array | str | None) -> mx.array | str | None:
    """Return a mask for MLX's attention: additive masks get the dtype of the scores."""
    if not isinstance(mask, mx.array) or mask.dtype == mx.bool_:
        return mask
    return mask.astype(dtype)


def _unless_blind(output: mx.array, mask: mx.array | str | None) -> mx.array:
    """Return the output with 0 for queries that see no token."""
    if not isinstance(mask, mx.array):
        return output
    mask = mask if mask.ndim > 1 else mask.reshape(1, -1)
    shown = mask if mask.dtype == mx.bool_ else mask != -mx.inf
    return mx.where(mx.any(shown, axis=-1, keepdims=True), output, mx.array(0, output.dtype))


def _layout(call: AttendCall) -> Layout:
    """Return the cheapest layout, counted in channels per score."""
    dtype, has_mask = call.queries.dtype, call.mask_array is not None
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    dims = [dim for dim in _FAST_DIMS if _is_fast(dim, dtype, has_mask, on_gpu)]
    masked_dims = [dim for dim in _FAST_DIMS if _is_fast(dim, dtype, True, on_gpu)]
    ways = [
        (_channels(dim, dtype), Layout(dim, dim, True, True))
        for dim in dims
        if dim > call.key_dim and dim >= call.value_dim
    ]
    ways += [
        (_channels(dim, dtype) + _MASK_CHANNELS, Layout(dim, dim, False, True))
        for dim in masked_dims
        if dim >= call.larger_dim
    ]
    if not ways:
        return Layout(call.key_dim + 1, call.value_dim, True, False)
    return min(ways, key=lambda way: way[0])[1]


@cache
def _is_fast(head_dim: int, dtype: mx.Dtype, has_mask: bool, on_gpu: bool) -> bool:
    """Whether MLX has a kernel for prompts that stores no scores; without one, MLX refuses."""
    if not on_gpu:
        return False
    x = mx.zeros((1, 1, 16, head_dim), dtype)
    mask = mx.zeros((16, 16), dtype) if has_mask else None
    try:
        mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask=mask, force_fused=True)
    except ValueError:
        return False
    return True


def _channels(head_dim: int, dtype: mx.Dtype) -> int:
    """Return the cost of a score in a kernel of this head_dim."""
    architecture = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture")))
    has_units = architecture is not None and int(architecture[1]) >= 17 and dtype != mx.float32
    return head_dim if not has_units or head_dim in _UNIT_DIMS else 4 * head_dim


def _widened(x: mx.array, dim: int, *channels: mx.array) -> mx.array:
    """Return the rows padded with zero channels up to ``dim``."""
    missing = dim - x.shape[-1] - len(channels)
    if missing:
        channels += (mx.zeros((*x.shape[:-1], missing), x.dtype),)
    return mx.concatenate([x, *channels], axis=-1) if channels else x


def _rows_of(mask: mx.array | str | None, start: int, stop: int) -> mx.array | str | None:
    """Return the rows of a mask for some queries."""
    if not isinstance(mask, mx.array) or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., start:stop, :]
