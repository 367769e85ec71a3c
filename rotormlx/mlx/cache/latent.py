"""Compressed caches of multi-head latent attention (MLA).

Such a model keeps one latent per token for all heads, key and value at once, and a RoPE part beside
it; to its cache they look like keys and values of one head. One packed copy of the latent serves as
both. Where the model reads the latent itself, as every prompt does, it gets arrays; in a decode
step it hands the latent to attention as it came, so that is a view, and nothing is decoded for it
but a tile at a time.

Shapes: B batch, L new tokens, S all tokens, R the latent's dimension, P that of the RoPE part.

Source: docs/MLA.md.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage.cache_fields import (
    DECODED_LATENT,
    DECODED_LATENT_BATCH,
    LATENT,
    LATENT_BATCH,
)

# What update_and_fetch returns: the latent, decoded or as a view, and the decoded RoPE part.
Fetched = tuple[mx.array | KVView, mx.array]


class LatentKVCache(RotorKVCache):
    """The latents and RoPE parts of one layer, compressed; arguments as :class:`RotorKVCache`.

    The latent has the bits of keys or of values, whichever are more, and the RoPE part 8.
    """

    kind = LATENT
    # Whether a decode step gets the latent as a view.
    hands_out_views: ClassVar[bool] = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append tokens.

        Args:
            keys: Latents, ``[B, 1, L, R]``, float16, bfloat16 or float32.
            values: RoPE parts, ``[B, 1, L, P]``, likewise.

        Returns:
            All latents, ``[B, 1, S, R]``: a view if L is 1 and they may be views, else an array;
            and all RoPE parts, an array ``[B, 1, S, P]``.

        Raises:
            ValueError: If a shape or dtype does not fit.
            MemoryError: If MLX's memory limit leaves no room for them.
        """
        return _fetched(self.append(keys, values), self.hands_out_views and keys.shape[2] == 1)


class DecodedLatentKVCache(LatentKVCache):
    """A :class:`LatentKVCache` that never hands out views.

    For models that pick tokens out of the latents in a decode step (sparse attention).
    """

    kind = DECODED_LATENT
    hands_out_views = False


class BatchLatentKVCache(BatchRotorKVCache):
    """The latents and RoPE parts of one layer for B sequences, compressed.

    Arguments are those of :class:`BatchRotorKVCache`.
    """

    kind = LATENT_BATCH
    _single = LatentKVCache
    hands_out_views: ClassVar[bool] = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append tokens; see :meth:`LatentKVCache.update_and_fetch`.

        S is that of the longest row; a shorter one ends in what a mask of :meth:`make_mask` hides.
        """
        return _fetched(self.append(keys, values), self.hands_out_views and keys.shape[2] == 1)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The attention mask for N new tokens: an array, since the model reads arrays itself."""
        return super().make_mask(N, window_size, return_array=True)


class BatchDecodedLatentKVCache(BatchLatentKVCache):
    """A :class:`BatchLatentKVCache` that never hands out views."""

    kind = DECODED_LATENT_BATCH
    _single = DecodedLatentKVCache
    hands_out_views = False


def _fetched(views: tuple[KVView, KVView], as_view: bool) -> Fetched:
    latents, rope = views
    return latents if as_view else decoded(latents), decoded(rope)


def decoded(view: KVView) -> mx.array:
    """All tokens that a view counts, in the order in which attention reads them.

    Returns:
        ``[B, K, S, D]`` in the view's dtype; rows with fewer tokens end in zeros.
    """
    if view.rows_differ:
        rows = [decoded(view.row(index)) for index in range(view.exact.shape[0])]
        return mx.concatenate([_widened(row, view.tokens) for row in rows])
    if view.packed is None or not view.packed_tokens:
        return view.exact[:, :, : view.tokens]
    packed = backend().decode(
        view.packed, view.codec, channel_scale=view.channel_scale, dtype=view.dtype
    )
    sink = min(view.sink, view.exact_tokens)
    exact = view.exact[:, :, : view.exact_tokens]
    parts = [exact[:, :, :sink], packed[:, :, : view.packed_tokens], exact[:, :, sink:]]
    return mx.concatenate(parts, axis=2)


def _widened(row: mx.array, tokens: int) -> mx.array:
    return mx.pad(row, [(0, 0), (0, 0), (0, tokens - row.shape[2]), (0, 0)])
