"""The ways in which a compressed cache can serve a model, best first."""

from __future__ import annotations

from dataclasses import dataclass

from rotormlx.mlx.cache.decoded import DecodedRotorKVCache
from rotormlx.mlx.cache.latent import DecodedLatentKVCache, LatentKVCache
from rotormlx.mlx.cache.single import RotorKVCache


@dataclass(frozen=True)
class Way:
    """A way in which a compressed cache serves a model.

    A way suits a cache if the model runs with it in a trial (rotormlx/mlx/probe.py). The class
    raises a ValueError for keys and values that it does not support.

    Args:
        name: Its name in reports; empty for the first way.
        cache: The class that holds the tokens.
        hands_out_handles: Whether ``update_and_fetch`` returns handles, which must reach our
            attention unchanged, keys together with their values.
    """

    name: str
    cache: type[RotorKVCache]
    hands_out_handles: bool


FUSED = Way("", RotorKVCache, hands_out_handles=True)
DECODED = Way("decoded for the model's own attention", DecodedRotorKVCache, hands_out_handles=False)
WAYS = (FUSED, DECODED)
# Ways for caches that hold latents (MLA), which rotormlx/mlx/latent_probe.py finds.
LATENT = Way("read packed in decode steps", LatentKVCache, hands_out_handles=False)
DECODED_LATENT = Way("decoded in every step", DecodedLatentKVCache, hands_out_handles=False)


def named(name: str) -> Way:
    """Return the way of this name."""
    return next(way for way in (*WAYS, LATENT, DECODED_LATENT) if way.name == name)
