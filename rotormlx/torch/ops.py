"""The operators ``torch.ops.rotormlx.{encode, decode, attend}``.

They are ordinary torch operators: ``torch.compile`` traces through them without a break, and under
CUDA graphs they replay, because shapes alone decide what is launched: how many tokens count is read
on the device from ``lengths``.

Words are int32 tensors with the bits of the format's uint32. What a layer's codec is (rotation,
seed, layer, bits) comes as plain numbers and strings; tables are made once a device and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Codec, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import cuda, native, torch_ops
from rotormlx.torch.torch_ops import Source

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

torch.library.define(
    "rotormlx::encode",
    "(Tensor x, Tensor? centres, Tensor? channel_scale, *, str role, int bits, str rotation, "
    "int seed, int layer) -> (Tensor words, Tensor scales, Tensor centres)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "rotormlx::decode",
    "(Tensor words, Tensor scales, Tensor? centres, Tensor? channel_scale, *, str role, int bits, "
    "str rotation, int head_dim, int seed, int layer, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "rotormlx::attend",
    "(Tensor query, Tensor lengths, Tensor key_exact, Tensor? key_words, Tensor? key_scales, "
    "Tensor? key_centres, Tensor? key_channel_scale, Tensor value_exact, Tensor? value_words, "
    "Tensor? value_scales, Tensor? value_channel_scale, Tensor? mask, Tensor? sink_logits, *, "
    "int key_bits, int value_bits, str rotation, int seed, int layer, int sink, float scale, "
    "bool causal) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def encode(
    x: Tensor,
    config: RotorConfig,
    *,
    layer: int,
    role: str,
    channel_scale: Tensor | None = None,
    centres: Tensor | None = None,
) -> Packed:
    """Compress whole blocks of keys or values.

    Args:
        x: ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
        config: Fixes the rotation, the seed and the bits of a code.
        layer: Index of the layer; selects the rotation.
        role: ``"key"`` (centred by block) or ``"value"``.
        channel_scale: float32 ``[K, D]``, positive; None for 1.
        centres: float16 ``[B, K, N, D]``; None for the means of the blocks. Keys only.

    Returns:
        Packed words (int32), scales and centres; docs/FORMAT.md gives each shape.

    Raises:
        ValueError: If a shape, dtype, stride or device does not fit.

    Source: docs/FORMAT.md, section 5.
    """
    words, scales, means = torch.ops.rotormlx.encode(
        x, centres, channel_scale, role=role, layer=layer, **_facts(config, role)
    )
    return Packed(words, scales, means if role == KEY else None)


def decode(
    packed: Packed,
    config: RotorConfig,
    *,
    head_dim: int,
    layer: int,
    role: str,
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The vectors that packed blocks stand for.

    Args:
        packed: Words, scales and centres as :func:`encode` gives them.
        config: The configuration they were coded with.
        head_dim: D.
        layer: The layer they were coded for.
        role: ``"key"`` or ``"value"``.
        channel_scale: float32 ``[K, D]``, positive; None for 1.
        dtype: Of the vectors.

    Returns:
        ``[B, K, N * 64, D]``.

    Raises:
        ValueError: If a shape, dtype, stride or device does not fit.

    Source: docs/FORMAT.md, section 6.
    """
    return torch.ops.rotormlx.decode(
        *packed,
        channel_scale,
        role=role,
        head_dim=head_dim,
        layer=layer,
        dtype=dtype,
        **_facts(config, role),
    )


def attend(
    query: Tensor,
    lengths: Tensor,
    keys: Source,
    values: Source,
    config: RotorConfig,
    *,
    layer: int,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over a partly packed cache.

    Args:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32; head h reads KV head ``h * K // H``.
        lengths: int32 ``[B, 2]`` on the device of the query: packed tokens and all tokens of each
            batch row. Buffers may be longer.
        keys: Exact and packed keys, ``[B, K, ...]``.
        values: Exact and packed values, likewise.
        config: The configuration they were coded with.
        layer: The layer they were coded for.
        scale: Factor of the scores.
        causal: The last query of a row sees all tokens of the row, each one before it one fewer.
        mask: Boolean (True: visible) or additive, broadcastable to ``[B, H, L, S]``; its columns
            are the tokens of each row. None if ``causal``.
        sink_logits: Attention-sink logits ``[H]``: a score in the softmax without a value.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of the query; zero for a query that sees nothing.

    Raises:
        ValueError: If a shape, dtype, stride, device, length or the mask does not fit.

    Source: docs/FORMAT.md, section 7.
    """
    no_keys = no_values = Packed(None, None, None)
    return torch.ops.rotormlx.attend(
        query,
        lengths,
        keys.exact,
        *(keys.packed or no_keys),
        keys.channel_scale,
        values.exact,
        *(values.packed or no_values)[:2],
        values.channel_scale,
        mask,
        sink_logits,
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        rotation=config.rotation,
        seed=config.seed,
        layer=layer,
        sink=config.sink,
        scale=scale,
        causal=causal,
    )


def prefill_scale(x: Tensor, config: RotorConfig, *, layer: int, role: str) -> Tensor:
    """The channel scale ``prefill`` of a first block.

    Args:
        x: Keys or values of the first block, ``[B, K, 64, D]``; batch row 0 counts.
        config: Fixes the rotation.
        layer: Index of the layer.
        role: ``"key"`` or ``"value"``.

    Returns:
        float32 ``[K, D]``.

    Source: docs/FORMAT.md, section 5.
    """
    chosen = codec(config, x.shape[-1], layer=layer, role=role)
    check_rows(x, chosen)
    return torch_ops.prefill_scale(x, chosen)


def _facts(config: RotorConfig, role: str) -> dict[str, Any]:
    return {
        "bits": config.key_bits if role == KEY else config.value_bits,
        "rotation": config.rotation,
        "seed": config.seed,
    }


# ---- what each device does ----------------------------------------------------------------------

# Raw keys or values, their codec, the channel scale and given centres to packed blocks.
Encode = Callable[..., Packed]


def _encode_with(implementation: Encode) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def encode(
        x: Tensor,
        centres: Tensor | None,
        channel_scale: Tensor | None,
        *,
        role: str,
        bits: int,
        rotation: str,
        seed: int,
        layer: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = _codec(rotation, x.shape[-1], role, bits, seed, layer)
        check_rows(x, chosen)
        check_parts("encode", x, chosen, None, None, centres, channel_scale)
        packed = implementation(x, chosen, channel_scale=channel_scale, centres=centres)
        if role == VALUE:
            means = packed.scales.new_empty((*packed.scales.shape[:3], 0))
        else:
            # An operator never returns one of its inputs.
            means = packed.centres if centres is None else centres.clone()
        return packed.words, packed.scales, means

    return encode


def _decode_with(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decode(
        words: Tensor,
        scales: Tensor,
        centres: Tensor | None,
        channel_scale: Tensor | None,
        *,
        role: str,
        bits: int,
        rotation: str,
        head_dim: int,
        seed: int,
        layer: int,
        dtype: torch.dtype,
    ) -> Tensor:
        chosen = _codec(rotation, head_dim, role, bits, seed, layer)
        _require_float("decode", "The decoded vectors", dtype)
        if role == KEY and centres is None:
            raise ValueError(
                "[decode] Packed keys must have centres, but none were given; pass what encode "
                "returned."
            )
        check_parts("decode", words, chosen, words, scales, centres, channel_scale)
        packed = Packed(words, scales, centres)
        return implementation(packed, chosen, channel_scale=channel_scale, dtype=dtype)

    return decode


def _attend_with(
    implementation: Callable[..., Tensor], *, reads_lengths: bool
) -> Callable[..., Tensor]:
    def attend(
        query: Tensor,
        lengths: Tensor,
        key_exact: Tensor,
        key_words: Tensor | None,
        key_scales: Tensor | None,
        key_centres: Tensor | None,
        key_channel_scale: Tensor | None,
        value_exact: Tensor,
        value_words: Tensor | None,
        value_scales: Tensor | None,
        value_channel_scale: Tensor | None,
        mask: Tensor | None,
        sink_logits: Tensor | None,
        *,
        key_bits: int,
        value_bits: int,
        rotation: str,
        seed: int,
        layer: int,
        sink: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        key_codec = _codec(rotation, key_exact.shape[-1], KEY, key_bits, seed, layer)
        value_codec = _codec(rotation, value_exact.shape[-1], VALUE, value_bits, seed, layer)
        check_query(query, lengths, key_exact, value_exact)
        parts = (key_words, key_scales, key_centres, value_words, value_scales)
        if len({part is None for part in parts}) > 1:
            raise ValueError(
                "[attend] Words and scales of keys and values and the centres of keys must be "
                "given together or not at all, but some are missing; pass what encode returned."
            )
        check_parts(
            "attend", query, key_codec, key_words, key_scales, key_centres, key_channel_scale
        )
        check_parts(
            "attend", query, value_codec, value_words, value_scales, None, value_channel_scale
        )
        if (
            key_words is not None
            and value_words is not None
            and value_words.shape[:3] != key_words.shape[:3]
        ):
            raise ValueError(
                f"[attend] Packed keys and values must agree in batch, KV heads and blocks, but "
                f"their words have shape {tuple(key_words.shape)} and {tuple(value_words.shape)}."
            )
        check_mask(query, mask, causal)
        if sink_logits is not None and sink_logits.shape != (query.shape[1],):
            raise ValueError(
                f"[attend] Attention-sink logits must have shape ({query.shape[1]},), one a query "
                f"head, but they have shape {tuple(sink_logits.shape)}."
            )
        _require_device("attend", query, {"the attention-sink logits": sink_logits})
        if reads_lengths:
            check_lengths(lengths, key_exact.shape[2], 0 if key_words is None else key_words)
        packed = None if key_words is None else Packed(key_words, key_scales, key_centres)
        keys = Source(key_codec, key_exact, packed, key_channel_scale)
        packed = None if value_words is None else Packed(value_words, value_scales, None)
        values = Source(value_codec, value_exact, packed, value_channel_scale)
        return implementation(
            query,
            lengths,
            keys,
            values,
            sink=sink,
            scale=scale,
            causal=causal,
            mask=mask,
            sink_logits=sink_logits,
        )

    return attend


def _fake_encode(x: Tensor, codec: Codec, *, centres: Tensor | None, **_: Any) -> Packed:
    front = (*x.shape[:2], x.shape[2] // BLOCK)
    scales = x.new_empty((*front, BLOCK), dtype=torch.float16)
    words = x.new_empty((*front, *codec.words_shape), dtype=torch.int32)
    if codec.role == KEY and centres is None:
        centres = x.new_empty((*front, codec.head_dim), dtype=torch.float16)
    return Packed(words, scales, centres)


def _fake_decode(packed: Packed, codec: Codec, *, dtype: torch.dtype, **_: Any) -> Tensor:
    batch, heads, blocks = packed.words.shape[:3]
    return packed.words.new_empty((batch, heads, blocks * BLOCK, codec.head_dim), dtype=dtype)


def _fake_attend(query: Tensor, lengths: Tensor, keys: Source, values: Source, **_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], values.codec.head_dim))


torch.library.impl("rotormlx::encode", "cpu", _encode_with(native.encode))
torch.library.impl("rotormlx::decode", "cpu", _decode_with(native.decode))
torch.library.impl("rotormlx::attend", "cpu", _attend_with(native.attend, reads_lengths=True))
torch.library.impl("rotormlx::encode", "cuda", _encode_with(cuda.encode))
torch.library.impl("rotormlx::decode", "cuda", _decode_with(cuda.decode))
torch.library.impl("rotormlx::attend", "cuda", _attend_with(cuda.attend, reads_lengths=False))
torch.library.register_fake("rotormlx::encode", _encode_with(_fake_encode))
torch.library.register_fake("rotormlx::decode", _decode_with(_fake_decode))
torch.library.register_fake("rotormlx::attend", _attend_with(_fake_attend, reads_lengths=False))


# ---- checks -------------------------------------------------------------------------------------


def _codec(rotation: str, head_dim: int, role: str, bits: int, seed: int, layer: int) -> Codec:
    if role not in ROLES:
        raise ValueError(f"[codec] role must be 'key' or 'value', but {role!r} was given.")
    config = RotorConfig(bits, bits, rotation, seed=seed)
    return codec(config, int(head_dim), layer=layer, role=role)


def check_rows(x: Tensor, codec: Codec) -> None:
    """Refuse rows of a shape, dtype or stride that cannot be encoded."""
    if x.ndim != 4 or x.shape[-1] != codec.head_dim or x.shape[2] % BLOCK or not x.shape[2]:
        raise ValueError(
            f"[encode] Rows must have shape [B, K, S, {codec.head_dim}] with S a positive multiple "
            f"of {BLOCK}, but the {codec.role}s have shape {tuple(x.shape)}."
        )
    _require_float("encode", f"The {codec.role}s", x.dtype)
    _require_contiguous("encode", f"the {codec.role}s", x)


def check_parts(
    where: str,
    like: Tensor,
    codec: Codec,
    words: Tensor | None,
    scales: Tensor | None,
    centres: Tensor | None,
    channel_scale: Tensor | None,
) -> None:
    """Refuse packed parts whose shape, dtype, stride or device is not what the codec asks for.

    Args:
        where: The operator, for the message.
        like: Gives batch and KV heads if ``words`` does not, and the device.
        codec: Role, bits and rotation.
        words: int32 ``[B, K, N, rows, lanes]``, or None.
        scales: float16 ``[B, K, N, 64]``, or None.
        centres: float16 ``[B, K, N, D]``, or None.
        channel_scale: float32 ``[K, D]``, or None.
    """
    role, head_dim = codec.role, codec.head_dim
    if words is not None:
        front = tuple(words.shape[:3])
        _require(where, f"{role} words", words, (*front, *codec.words_shape), torch.int32)
    else:
        blocks = like.shape[2] // BLOCK if where == "encode" else 0
        front = (*like.shape[:2], blocks)
    if scales is not None:
        _require(where, f"{role} scales", scales, (*front, BLOCK), torch.float16)
    if centres is not None and role == VALUE:
        raise ValueError(
            f"[{where}] Only keys have centres, but centres came with values; leave them out."
        )
    if centres is not None:
        _require(where, "key centres", centres, (*front, head_dim), torch.float16)
    if channel_scale is not None:
        heads = front[1] if words is not None or where == "encode" else channel_scale.shape[0]
        name = f"{role} channel scale"
        _require(where, name, channel_scale, (heads, head_dim), torch.float32)
    parts = {"words": words, "scales": scales, "centres": centres, "channel scale": channel_scale}
    _require_device(where, like, {f"the {role} {name}": part for name, part in parts.items()})


def check_query(query: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse a query, lengths and exact vectors that do not fit together."""
    for name, x in (("query", query), ("exact keys", keys), ("exact values", values)):
        if x.ndim != 4:
            raise ValueError(
                f"[attend] The {name} must have 4 dimensions (batch, heads, tokens, head_dim), but "
                f"the shape is {tuple(x.shape)}."
            )
        _require_float("attend", f"The {name}", x.dtype)
        _require_contiguous("attend", f"the {name}", x)
    batch, kv_heads, _, head_dim = keys.shape
    if values.shape[:3] != keys.shape[:3] or values.dtype != keys.dtype:
        raise ValueError(
            f"[attend] Exact keys and values must agree in batch, KV heads, capacity and dtype, "
            f"but they have shape {tuple(keys.shape)} in {keys.dtype} and {tuple(values.shape)} in "
            f"{values.dtype}."
        )
    if query.shape[0] != batch or query.shape[1] % kv_heads or query.shape[3] != head_dim:
        raise ValueError(
            f"[attend] The query must have shape [{batch}, a multiple of {kv_heads}, L, "
            f"{head_dim}] to read keys of shape {tuple(keys.shape)}, but it has shape "
            f"{tuple(query.shape)}."
        )
    _require("attend", "lengths", lengths, (batch, 2), torch.int32)
    devices = {"the lengths": lengths, "the exact keys": keys, "the exact values": values}
    _require_device("attend", query, devices)


def check_mask(query: Tensor, mask: Tensor | None, causal: bool) -> None:
    """Refuse a mask that is not broadcastable to the scores, or comes beside ``causal``."""
    if mask is None:
        return
    if causal:
        raise ValueError(
            "[attend] Either causal or a mask is possible, but both were given; put the causal "
            "pattern into the mask."
        )
    want = query.shape[:3]
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(have not in (1, n) for have, n in zip(shape, want, strict=False)):
        raise ValueError(
            f"[attend] A mask must be broadcastable to {(*want, 'S')} (batch, query heads, "
            f"queries, tokens), but it has shape {tuple(mask.shape)}."
        )
    if mask.dtype not in (torch.bool, *FLOATS):
        raise ValueError(
            f"[attend] A mask must be boolean or floating, but it is {mask.dtype}; cast it."
        )
    _require_device("attend", query, {"the mask": mask})


def check_lengths(lengths: Tensor, capacity: int, words: Tensor | int) -> None:
    """Refuse lengths that the buffers do not hold. Reads them, so it is for tensors of the host."""
    room = 0 if isinstance(words, int) else words.shape[2] * BLOCK
    for row, (packed, tokens) in enumerate(lengths.tolist()):
        if not (0 <= packed <= min(room, tokens) and tokens - packed <= capacity):
            raise ValueError(
                f"[attend] Lengths of a row must be packed tokens from 0 to {room} and, beside "
                f"them, at most {capacity} exact ones, but row {row} says {packed} packed of "
                f"{tokens} tokens."
            )


def _require(where: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(
            f"[{where}] The {name} must have shape {shape} and dtype {dtype}, but they have shape "
            f"{tuple(x.shape)} and dtype {x.dtype}; use the configuration that they were made with."
        )
    _require_contiguous(where, f"the {name}", x)


def _require_float(where: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(
            f"[{where}] {name} must be float16, bfloat16 or float32, but {dtype} came; cast them."
        )


def _require_contiguous(where: str, name: str, x: Tensor) -> None:
    # An empty tensor that comes from a file has strides of 0.
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise ValueError(
            f"[{where}] The last dimension of {name} must be contiguous, but its stride is "
            f"{x.stride(-1)}; call contiguous() first."
        )


def _require_device(where: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != like.device:
            raise ValueError(
                f"[{where}] All tensors must be on {like.device}, but {name} are on {x.device}; "
                f"move them with to({str(like.device)!r})."
            )
