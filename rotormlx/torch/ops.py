"""The operators ``torch.ops.rotormlx.{encode, decode, attend}``.

They are ordinary torch operators. ``torch.compile`` traces them without a graph break, and CUDA
graphs can replay them, because shapes alone determine the launches: kernels read the number of
tokens from ``lengths`` on the device.

Words are int32 tensors with the bits of the format's uint32. A layer's codec (rotation, seed,
layer, bits) is passed as plain numbers and strings; tables are made once per device and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Codec, Packed, codec
from rotormlx.codec.rotation import Rotation, reference_to, referred
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.torch import checks, cuda, native, torch_ops
from rotormlx.torch.torch_ops import AttendCall, KVView

torch.library.define(
    "rotormlx::encode",
    "(Tensor x, Tensor? centres, Tensor? channel_scale, Tensor? state=None, *, str role, int bits, "
    "str rotation, int seed, int layer, int start=0) -> "
    "(Tensor words, Tensor scales, Tensor centres)",
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
    "bool causal, str? value_rotation=None) -> Tensor",
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
    rotation: Rotation | None = None,
    start: int = 0,
    state: Tensor | None = None,
) -> Packed:
    """Compress whole blocks of keys or values.

    Args:
        x: ``[B, K, N * 64, D]``, float16, bfloat16 or float32.
        config: Fixes the rotation, the seed and the bits of a code.
        layer: Index of the layer; selects the rotation.
        role: ``"key"`` (centred per block) or ``"value"``.
        channel_scale: float32 ``[K, D]`` or ``[B, K, D]``, positive; None for 1.
        centres: float16 ``[B, K, N, D]``; None for the means of the blocks. Keys only.
        rotation: The rotation of a calibrated configuration, see
            :func:`rotormlx.codec.rotation.calibrated`; else None.
        start: Number of tokens at the start of the block that are coded already; the output for
            them has no meaning. If it is not 0, there is one block.
        state: State of the trellis codes of values after those tokens, int32 ``[B, K, N, D]``; see
            :func:`rotormlx.codec.trellis.state_after`.

    Returns:
        Packed words (int32), scales and centres; docs/FORMAT.md gives each shape.

    Raises:
        ValueError: If a shape, dtype, stride or device does not fit, or a gradient would be lost.

    Source: docs/FORMAT.md, section 5.
    """
    words, scales, means = torch.ops.rotormlx.encode(
        x,
        centres,
        channel_scale,
        state,
        role=role,
        layer=layer,
        start=start,
        **_facts(config, role, rotation),
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
    rotation: Rotation | None = None,
) -> Tensor:
    """Decode packed blocks to vectors.

    Args:
        packed: Words, scales and centres from :func:`encode`.
        config: The configuration they were coded with.
        head_dim: Dimension of the vectors, D.
        layer: The layer they were coded for.
        role: ``"key"`` or ``"value"``.
        channel_scale: float32 ``[K, D]`` or ``[B, K, D]``, positive; None for 1.
        dtype: Dtype of the returned vectors.
        rotation: See :func:`encode`.

    Returns:
        The vectors, ``[B, K, N * 64, D]``.

    Raises:
        ValueError: If a shape, dtype, stride or device does not fit, or a gradient would be lost.

    Source: docs/FORMAT.md, section 6.
    """
    return torch.ops.rotormlx.decode(
        *packed,
        channel_scale,
        role=role,
        head_dim=head_dim,
        layer=layer,
        dtype=dtype,
        **_facts(config, role, rotation),
    )


def attend(
    query: Tensor,
    lengths: Tensor,
    keys: KVView,
    values: KVView,
    config: RotorConfig,
    *,
    layer: int,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend over a partly packed cache.

    Args:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32; head h reads KV head ``h * K // H``.
        lengths: int32 ``[B, 2]`` on the device of the query: packed tokens and all tokens of each
            batch row. Buffers may be longer.
        keys: Exact and packed keys, ``[B, K, ...]``.
        values: Exact and packed values, ``[B, K, ...]``.
        config: The configuration they were coded with.
        layer: The layer they were coded for.
        scale: Factor of the scores.
        causal: Whether the last query of a row sees all tokens of the row, and each query before it
            one fewer.
        mask: Boolean (True: visible) or additive, broadcastable to ``[B, H, L, S]``; its columns
            are the tokens of each row. Must be None if ``causal``.
        sink_logits: Attention-sink logits ``[H]``: a score in the softmax that has no value.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of the query; zero for a query that sees nothing.

    Raises:
        ValueError: If a shape, dtype, stride, device, length or the mask does not fit, or a
            gradient would be lost.

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
        rotation=rotation_name(config, keys.codec.rotation),
        seed=config.seed,
        layer=layer,
        sink=config.sink,
        scale=scale,
        causal=causal,
        value_rotation=rotation_name(config, values.codec.rotation),
    )


def attend_fitting(call: AttendCall) -> Tensor:
    """Attend as :func:`attend` does, for parts that are known to fit (a cache's own buffers).

    Nothing is checked, and the call cannot be traced.
    """
    implementation = _ATTEND.get(call.query.device.type, torch_ops.attend)
    return implementation(call) if call.query.numel() else fake_attend(call)


def encode_fitting(x: Tensor, codec: Codec, **options: Any) -> Packed:
    """Encode as :func:`torch_ops.encode` does, without checks; cannot be traced."""
    return _ENCODE.get(x.device.type, torch_ops.encode)(x, codec, **options)


def decode_fitting(packed: Packed, codec: Codec, **options: Any) -> Tensor:
    """Decode as :func:`torch_ops.decode` does, without checks; cannot be traced."""
    implementation = _DECODE.get(packed.words.device.type, torch_ops.decode)
    return implementation(packed, codec, **options)


def prefill_scale(x: Tensor, config: RotorConfig, *, layer: int, role: str) -> Tensor:
    """Compute the channel scale ``prefill`` from a first block.

    Args:
        x: Keys or values of the first block, ``[B, K, 64, D]``.
        config: Fixes the rotation.
        layer: Index of the layer.
        role: ``"key"`` or ``"value"``.

    Returns:
        The channel scale, float32 ``[B, K, D]``.

    Raises:
        ValueError: If a shape, dtype or stride does not fit, or a gradient would be lost.

    Source: docs/FORMAT.md, section 5.
    """
    checks.require_no_gradient("prefill_scale", x=x)
    checks.check_first_block(x, role)
    chosen = codec(config, x.shape[-1], layer=layer, role=role)
    return torch_ops.prefill_scale(x, chosen)


def _facts(config: RotorConfig, role: str, rotation: Rotation | None) -> dict[str, Any]:
    return {
        "bits": config.code_bits(role),
        "rotation": rotation_name(config, rotation),
        "seed": config.seed,
    }


def rotation_name(config: RotorConfig, rotation: Rotation | None) -> str:
    """Return the string that stands for a rotation: its name, or a reference to an object."""
    if config.rotation != CALIBRATED or rotation is None:
        return config.rotation
    return reference_to(rotation)


# ---- implementations per device -----------------------------------------------------------------

# From raw keys or values, their codec, channel scale and given centres to packed blocks.
Encode = Callable[..., Packed]


def _encode_with(implementation: Encode) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def encode(
        x: Tensor,
        centres: Tensor | None,
        channel_scale: Tensor | None,
        state: Tensor | None = None,
        *,
        role: str,
        start: int = 0,
        **coding: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        checks.require_no_gradient("encode", x=x, centres=centres, channel_scale=channel_scale)
        checks.require_vectors("encode", **{f"{role}s": x})
        chosen = codec_of(x.shape[-1], role, **coding)
        checks.check_rows(x, chosen)
        checks.check_packed("encode", x, chosen, Packed(None, None, centres), channel_scale)
        checks.check_path(x, chosen, start, state)
        run = implementation if x.numel() else _fake_encode
        packed = run(
            x, chosen, channel_scale=channel_scale, centres=centres, start=start, state=state
        )
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
        head_dim: int,
        dtype: torch.dtype,
        **coding: Any,
    ) -> Tensor:
        checks.require_no_gradient(
            "decode", scales=scales, centres=centres, channel_scale=channel_scale
        )
        chosen = codec_of(head_dim, role, **coding)
        checks.require_float("decode", "The decoded vectors", dtype)
        if role == KEY and centres is None:
            raise ValueError(
                "[decode] Packed keys must have centres, but none were given; pass what encode "
                "returned."
            )
        packed = Packed(words, scales, centres)
        checks.check_packed("decode", words, chosen, packed, channel_scale)
        run = implementation if scales.numel() else _fake_decode
        return run(packed, chosen, channel_scale=channel_scale, dtype=dtype)

    return decode


def _attend_with(
    implementation: Callable[[AttendCall], Tensor], *, reads_lengths: bool
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
        sink: int,
        scale: float,
        causal: bool,
        value_rotation: str | None = None,
        **coding: Any,
    ) -> Tensor:
        checks.require_no_gradient(
            "attend",
            query=query,
            exact_keys=key_exact,
            key_scales=key_scales,
            key_centres=key_centres,
            key_channel_scale=key_channel_scale,
            exact_values=value_exact,
            value_scales=value_scales,
            value_channel_scale=value_channel_scale,
            mask=mask,
            sink_logits=sink_logits,
        )
        checks.require_vectors(
            "attend", query=query, exact_keys=key_exact, exact_values=value_exact
        )
        keys, values = views_of(
            (key_exact, _packed(key_words, key_scales, key_centres), key_channel_scale),
            (value_exact, _packed(value_words, value_scales, None), value_channel_scale),
            bits=(key_bits, value_bits),
            rotations=(rotation, value_rotation or rotation),
            **coding,
        )
        call = AttendCall(query, lengths, keys, values, sink, scale, causal, mask, sink_logits)
        checks.check_call(call)
        if reads_lengths:
            checks.check_lengths(call)
        return implementation(call) if query.numel() else fake_attend(call)

    return attend


def views_of(
    *sources: tuple[Tensor, Packed | None, Tensor | None],
    bits: tuple[int, int],
    rotations: tuple[str, str],
    **coding: Any,
) -> tuple[KVView, KVView]:
    """Make views of keys and values from exact tokens, packed tokens and channel scale."""
    keys, values = (
        KVView(codec_of(x[0].shape[-1], role, bits=width, rotation=name, **coding), *x)
        for x, role, width, name in zip(sources, ROLES, bits, rotations, strict=True)
    )
    return keys, values


def codec_of(head_dim: int, role: str, *, bits: int, rotation: str, seed: int, layer: int) -> Codec:
    """Return the codec for plain numbers and the name of a rotation."""
    if role not in ROLES:
        raise ValueError(f"[codec] role must be 'key' or 'value', but {role!r} was given.")
    if (calibrated := referred(rotation)) is not None:
        if calibrated.head_dim != head_dim:
            raise ValueError(
                f"[codec] The {role}s must have the head_dim of their calibrated rotation, "
                f"{calibrated.head_dim}, but it is {head_dim}; use this layer's rotation."
            )
        return Codec(
            role, bits, calibrated
        )  # not cached, so that its matrices are freed with their last cache
    # During tracing, a dimension is not a plain integer.
    return _named_codec(int(head_dim), role, bits, rotation, seed, layer)


@lru_cache(maxsize=1024)
def _named_codec(
    head_dim: int, role: str, bits: int, rotation: str, seed: int, layer: int
) -> Codec:
    return codec(RotorConfig(bits, bits, rotation, seed=seed), head_dim, layer=layer, role=role)


def _packed(words: Tensor | None, scales: Tensor | None, centres: Tensor | None) -> Packed | None:
    if words is None and scales is None and centres is None:
        return None
    return Packed(words, scales, centres)


# Results with the right shapes and dtypes only: for tracing, and for empty results.


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


def fake_attend(call: AttendCall) -> Tensor:
    """Return an output of the right shape and dtype, with undefined numbers."""
    return call.query.new_empty(call.output_shape)


_ENCODE = {"cpu": native.encode, "cuda": cuda.encode}
_DECODE = {"cpu": native.decode, "cuda": cuda.decode}
_ATTEND = {"cpu": native.attend, "cuda": cuda.attend}

torch.library.impl("rotormlx::encode", "cpu", _encode_with(native.encode))
torch.library.impl("rotormlx::decode", "cpu", _decode_with(native.decode))
torch.library.impl("rotormlx::attend", "cpu", _attend_with(native.attend, reads_lengths=True))
torch.library.impl("rotormlx::encode", "cuda", _encode_with(cuda.encode))
torch.library.impl("rotormlx::decode", "cuda", _decode_with(cuda.decode))
torch.library.impl("rotormlx::attend", "cuda", _attend_with(cuda.attend, reads_lengths=False))
torch.library.register_fake("rotormlx::encode", _encode_with(_fake_encode))
torch.library.register_fake("rotormlx::decode", _decode_with(_fake_decode))
torch.library.register_fake("rotormlx::attend", _attend_with(fake_attend, reads_lengths=False))
