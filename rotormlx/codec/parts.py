"""The two parts of a layer's cache and their codecs: keys and values, or latent and RoPE.

Models with multi-head latent attention (MLA) keep two vectors per token for all heads: the latent,
which is both key and value, and the part of the key that carries the position (RoPE). The latent is
coded once, as a key: in blocks of 64 tokens, each relative to its centre.

Source: docs/MLA.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from rotormlx.codec.rotation import KEY, VALUE
from rotormlx.config import RotorConfig

# Bits of the RoPE part at every setting: nearly exact, at half the bytes.
ROPE_BITS = 8


class Part(NamedTuple):
    """One of the two parts of a layer's cache.

    name: Name in messages, in the plural.
    role: The role that it is coded as, ``"key"`` or ``"value"``.
    config: A configuration whose ``code_bits(role)`` are the bits of this part.
    """

    name: str
    role: str
    config: RotorConfig


def keys_and_values(config: RotorConfig) -> tuple[Part, Part]:
    """Return the parts of ordinary attention."""
    return Part("keys", KEY, config), Part("values", VALUE, config)


def latent_and_rope(config: RotorConfig) -> tuple[Part, Part]:
    """Return the parts of MLA; the latent gets the larger of ``key_bits`` and ``value_bits``."""
    latent = replace(config, key_bits=max(config.key_bits, config.value_bits))
    return Part("latents", KEY, latent), Part(
        "RoPE parts", KEY, replace(config, key_bits=ROPE_BITS)
    )
