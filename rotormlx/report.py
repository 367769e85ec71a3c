"""Reports: which caches are compressed, which are left alone and why, and their memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK, codec
from rotormlx.codec.parts import ROPE_BITS, keys_and_values, latent_and_rope
from rotormlx.config import CALIBRATED, RotorConfig

FLOAT16_BYTES, FLOAT32_BYTES = 2, 4
# The printed form of a module on one line, such as "Stack( (block): ... )".
_LISTING = re.compile(r"(\w+)\( \(\w+\): .* \)")


@dataclass(frozen=True)
class LayerReport:
    """The report on one cache of a model.

    Args:
        index: Position in the model's list of caches.
        cache: Class of the model's own cache, with its place if it is one of several.
        compressed: Whether a compressed cache replaces it.
        reason: Why the cache is left alone, or why the fused attention does not read it.
        kv_heads: Number of KV heads; 0 if the cache holds no keys and values.
        head_dim_k: Dimension of a key.
        head_dim_v: Dimension of a value.
        key_bits: True bits per packed key coordinate, side data included.
        value_bits: True bits per packed value coordinate, side data included.
        exact_bytes: Bytes per coordinate in the sink and the tail.
        max_tokens: Largest number of tokens that a token sees, or that a cache left alone keeps;
            None for no limit.
        max_blocks: Largest number of packed blocks of a compressed sliding window; None for other
            caches.
        state_bytes: Bytes of a cache whose size does not depend on the tokens.
        holds_latents: Whether it holds latents and RoPE parts instead of keys and values (MLA).
        way: How the model reads a compressed cache without the fused attention; empty with it.
    """

    index: int
    cache: str
    compressed: bool
    reason: str = ""
    kv_heads: int = 0
    head_dim_k: int = 0
    head_dim_v: int = 0
    key_bits: float = 0.0
    value_bits: float = 0.0
    exact_bytes: int = FLOAT16_BYTES
    max_tokens: int | None = None
    max_blocks: int | None = None
    state_bytes: int = 0
    holds_latents: bool = False
    way: str = ""

    @property
    def is_window(self) -> bool:
        """Whether the cache is compressed and belongs to a sliding window or chunked attention."""
        return self.compressed and self.max_tokens is not None

    @property
    def values_per_token(self) -> int:
        """Coordinates per token, keys and values together."""
        return self.kv_heads * (self.head_dim_k + self.head_dim_v)

    @property
    def head_dims(self) -> str:
        """The head_dim as text; both, as in ``"192/128"``, if keys and values differ."""
        same = self.head_dim_k == self.head_dim_v
        return str(self.head_dim_k) if same else f"{self.head_dim_k}/{self.head_dim_v}"

    @property
    def packed_bits_per_token(self) -> float:
        """Bits per packed token, keys and values together."""
        return self.kv_heads * (self.head_dim_k * self.key_bits + self.head_dim_v * self.value_bits)

    @property
    def bits_per_value(self) -> float:
        """True bits per packed coordinate, the mean over keys and values."""
        return self.packed_bits_per_token / self.values_per_token

    def with_bits_of(self, config: RotorConfig) -> LayerReport:
        """Return the same report with the bits of a configuration."""
        parts = latent_and_rope if self.holds_latents else keys_and_values
        key_bits, value_bits = (
            codec(part.config, dim, layer=self.index, role=part.role).bits_per_value
            for part, dim in zip(
                parts(config.uncalibrated), (self.head_dim_k, self.head_dim_v), strict=True
            )
        )
        return replace(self, key_bits=key_bits, value_bits=value_bits)

    def float_bytes(self, tokens: int) -> int:
        """Return the bytes of ``tokens`` tokens in float16."""
        kept = tokens if self.max_tokens is None else min(tokens, self.max_tokens)
        return self.state_bytes + kept * self.values_per_token * FLOAT16_BYTES

    def compressed_bytes(self, tokens: int, config: RotorConfig) -> int:
        """Return the bytes of ``tokens`` tokens with rotormlx, sink and tail included."""
        if not self.compressed:
            return self.float_bytes(tokens)
        if self.is_window:
            config = config.uncalibrated
        if self.is_window and self.max_blocks is None and self.max_tokens is not None:
            tokens = min(tokens, self.max_tokens)  # chunked attention keeps at most one chunk
        packed = packed_tokens(tokens, config)
        exact = (tokens - packed) * self.values_per_token * self.exact_bytes
        if self.max_blocks is not None:
            packed = min(packed, self.max_blocks * BLOCK)
        scale = self.values_per_token * FLOAT32_BYTES if packed and config.scales_channels else 0
        return exact + round(packed * self.packed_bits_per_token / 8) + scale

    def __str__(self) -> str:
        if not self.compressed:
            return f"layer {self.index}: {self.cache} left alone, {self.reason}"
        shape = f"{self.kv_heads} KV heads, head_dim {self.head_dims}"
        if self.holds_latents:
            shape = (
                f"latent of {self.head_dim_k} and RoPE part of {self.head_dim_v}, "
                f"{self.packed_bits_per_token / 8:.0f} bytes per token instead of "
                f"{self.values_per_token * FLOAT16_BYTES}"
            )
        label = f"layer {self.index}: {self.cache} compressed"
        window = f", window of {self.max_tokens} tokens" if self.is_window else ""
        return (
            f"{label}, {shape}, {self.bits_per_value:.3f} bits per value{self.way_and_why}{window}"
        )

    @property
    def way_and_why(self) -> str:
        """How the model reads a compressed cache without the fused attention, and why."""
        return f", {self.way}, since {self.reason}" if self.way else ""


@dataclass(frozen=True)
class Report:
    """The result of :func:`rotormlx.apply`; ``print`` shows one line per layer.

    Args:
        config: How keys and values are compressed.
        model_type: mlx-lm's name of the architecture.
        layers: One entry per cache, in the model's order.
        layers_differ: Whether bits differ between layers.
        has_mean: Whether the bits of ``config`` are the mean over layers if layers differ.
    """

    config: RotorConfig
    model_type: str
    layers: tuple[LayerReport, ...]
    layers_differ: bool = False
    has_mean: bool = True

    def by_layer(self, config_of: Callable[[int], RotorConfig]) -> Report:
        """Return the same report with bits per layer; windows keep the bits of ``config``."""

        def own(layer: LayerReport) -> LayerReport:
            calibrated = layer.compressed and not layer.is_window
            return layer.with_bits_of(config_of(layer.index)) if calibrated else layer

        return replace(self, layers=tuple(map(own, self.layers)), layers_differ=True)

    def with_bits(self, key_bits: int, value_bits: int) -> Report:
        """Return the same report with these bits for every compressed layer, windows included."""
        config = replace(self.config.uncalibrated, key_bits=key_bits, value_bits=value_bits)
        layers = [
            layer.with_bits_of(config) if layer.compressed else layer for layer in self.layers
        ]
        return replace(self, config=config, layers=tuple(layers), layers_differ=False)

    def with_configs(self, own: Mapping[int, RotorConfig]) -> Report:
        """Return the same report with the configurations ``own``, keyed by layer index."""
        layers = tuple(
            layer.with_bits_of(own[layer.index]) if layer.index in own else layer
            for layer in self.layers
        )
        windows = {layer.index for layer in layers if layer.is_window}
        growing = [config for index, config in own.items() if index not in windows]
        first = next(iter(growing or own.values()), self.config)
        differ = len(set(growing)) > 1
        made = replace(self, config=first, layers=layers)
        return replace(made, layers_differ=differ, has_mean=not differ)

    @property
    def bits_per_value(self) -> float:
        """True bits per packed coordinate, over all compressed layers."""
        compressed = [layer for layer in self.layers if layer.compressed]
        bits = sum(layer.packed_bits_per_token for layer in compressed)
        return bits / sum(layer.values_per_token for layer in compressed)

    def float_bytes(self, tokens: int) -> int:
        """Return the cache bytes of ``tokens`` tokens in float16."""
        return sum(layer.float_bytes(tokens) for layer in self.layers)

    def compressed_bytes(self, tokens: int) -> int:
        """Return the cache bytes of ``tokens`` tokens with rotormlx.

        The sum includes packed and exact parts, but not the room that a cache keeps for growth.
        Layers left alone count as float16.
        """
        return sum(layer.compressed_bytes(tokens, self.config) for layer in self.layers)

    @property
    def summary(self) -> str:
        """One line that says how many caches are compressed, and with which settings."""
        count = sum(layer.compressed for layer in self.layers)
        return (
            f"{self.model_type}: {count} of {len(self.layers)} caches compressed, "
            f"{self._bits}{self._transform}, {self.bits_per_value:.3f} bits per value{self._ways}"
        )

    @property
    def _ways(self) -> str:
        counts = Counter(layer.way for layer in self.layers if layer.way)
        return "".join(f", {count} {way}" for way, count in counts.items())

    @property
    def _bits(self) -> str:
        if not self.has_mean:
            return "bits by layer, "
        average = "on average, by layer, " if self.layers_differ else ""
        if all(layer.holds_latents for layer in self.layers if layer.compressed):
            latent, _ = latent_and_rope(self.config)
            return f"latents at {latent.config.key_bits} bits, RoPE at {ROPE_BITS}, {average}"
        return f"K{self.config.key_bits} V{self.config.value_bits} {average}"

    @property
    def _transform(self) -> str:
        scale = self.config.channel_scale
        with_scale = (
            f" with {scale} channel scales" if scale not in (None, "none", "prefill") else ""
        )
        is_matrix = self.config.rotation == CALIBRATED
        return f"{self.config.rotation}{' rotations' if is_matrix else ''}{with_scale}"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), self.summary])


def packed_tokens(tokens: int, config: RotorConfig) -> int:
    """Return how many of ``tokens`` tokens are packed; the rest are sink and tail."""
    return Counts().blocks_after(tokens, config) * BLOCK


def megabytes(size: int) -> str:
    """Return a number of bytes as text, in decimal MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def brief(error: Exception) -> str:
    """Return the type and first sentence of an error; cut a printed module to its class name."""
    # Only the first sentence: a wrong argument to mx makes it list all signatures.
    text = _LISTING.sub(r"\1", " ".join(str(error).split()))
    first = text.split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"
