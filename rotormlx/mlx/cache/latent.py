"""Compressed caches of multi-head latent attention (MLA).

Such a model keeps a RoPE part and one latent per token, which is both key and value for all heads.
Its cache receives them as the keys and values of one head. One packed copy of the latent serves as
both. If the model reads the latent itself, as in every prompt, it gets arrays. In a decode step it
passes the latent to attention unchanged, so the latent is a view, of which one tile at a time is
decoded.

Shapes: B batch, L new tokens, S all tokens, R latent dimension, P dimension of the RoPE part.

Source: docs/MLA.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.decoded import begun_after
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.in_place import in_place
from rotormlx.storage.cache_fields import LATENT, LATENT_BATCH


class LatentKVCache(RotorKVCache):
    """The latents and RoPE parts of one layer, compressed; arguments as :class:`RotorKVCache`.

    ``update_and_fetch`` takes latents ``[B, 1, L, R]`` and RoPE parts ``[B, 1, L, P]`` and returns
    all of them, ``[B, 1, S, R]`` and ``[B, 1, S, P]``: arrays, but a view for latents if L is 1.
    The latent has the bits of keys or of values, whichever are more, and the RoPE part has 8.
    """

    kind = LATENT
    # Whether a decode step gets the latent as a view.
    hands_out_views: ClassVar[bool] = True

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, mx.array]:
        return _served(views, new, as_view=self.hands_out_views)


class DecodedLatentKVCache(LatentKVCache):
    """A :class:`LatentKVCache` that never hands out views.

    It is for models that select tokens from the latents in a decode step (sparse attention).
    """

    hands_out_views = False


class BatchLatentKVCache(BatchRotorKVCache):
    """The latents and RoPE parts of one layer for B sequences, compressed.

    The arguments are those of :class:`BatchRotorKVCache`, and the results those of
    :class:`LatentKVCache`. S is the length of the longest row. Arrays of a shorter row end in
    zeros, which the mask of :meth:`make_mask` hides.
    """

    kind = LATENT_BATCH
    _single = LatentKVCache
    hands_out_views: ClassVar[bool] = True

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, mx.array]:
        return _served(views, new, as_view=self.hands_out_views)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens as an array, since the model reads arrays."""
        return super().make_mask(N, window_size, return_array=True)


class BatchDecodedLatentKVCache(BatchLatentKVCache):
    """A :class:`BatchLatentKVCache` that never hands out views."""

    _single = DecodedLatentKVCache
    hands_out_views = False


def _served(
    views: tuple[KVView, KVView], new: Sequence[mx.array], *, as_view: bool
) -> tuple[Any, mx.array]:
    latents, rope = views
    is_step = bool(new) and new[0].shape[2] == 1
    of_rope = decoded(begun_after(new, rope))
    return latents if as_view and is_step else decoded(begun_after(new, latents)), of_rope


def decoded(view: KVView) -> mx.array:
    """Return all tokens of a view, in the order in which attention reads them.

    Returns:
        ``[B, K, S, D]`` in the view's dtype; rows with fewer tokens end in zeros.
    """
    if not view.rows_differ:
        return in_place(view, backend(), view.dtype)
    rows = [in_place(view.row(i), backend(), view.dtype) for i in range(len(view.lengths))]
    return mx.concatenate([_widened(row, view.tokens) for row in rows])


def _widened(row: mx.array, tokens: int) -> mx.array:
    return mx.pad(row, [(0, 0), (0, 0), (0, tokens - row.shape[2]), (0, 0)])
