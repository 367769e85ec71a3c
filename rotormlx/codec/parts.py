"""The two parts of a layer's cache and their codecs: keys and values, or latent and RoPE.

Models with multi-head latent attention (MLA) keep one vector per token for all heads, the latent,
which is key and value at once, and beside it the part of the key that carries the position (RoPE).
The latent is coded once, as a key: by block of 64 tokens around its centre.

Source: docs/MLA.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from rotormlx.codec.rotation import KEY, VALUE
from rotormlx.config import RotorConfig

# Bits of the RoPE part, whatever the latent has: as good as exact, for half the bytes.
ROPE_BITS = 8


class Part(NamedTuple):
    """One of the two parts.

    name: What it is, in the plural where there is one per KV head.
    role: The role that it is coded as, ``"key"`` or ``"value"``.
    config: A configuration whose ``code_bits(role)`` are its bits.
    """

    name: str
    role: str
    config: RotorConfig


def keys_and_values(config: RotorConfig) -> tuple[Part, Part]:
    """Return the parts of ordinary attention."""
    return Part("keys", KEY, config), Part("values", VALUE, config)


def latent_and_rope(config: RotorConfig) -> tuple[Part, Part]:
    """Return the parts of MLA; a latent has the larger of the bits of keys and values."""
    latent = replace(config, key_bits=max(config.key_bits, config.value_bits))
    return Part("latents", KEY, latent), Part(
        "RoPE parts", KEY, replace(config, key_bits=ROPE_BITS)
    )
