"""Layers of multi-head latent attention (MLA): one packed latent serves as key and value.

Models of transformers pass the latent and the RoPE part of a token to their cache in place of keys
and values. In every step, with any attention function, they expand what the cache returns to keys
and values of all heads. So the cache returns tensors: all tokens of one layer, decoded, which are
far smaller than the expanded ones. Left padding is stored like any token and hidden by the model's
mask.

Source: docs/MLA.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rotormlx.codec.format import BLOCK, Packed
from rotormlx.config import RotorConfig
from rotormlx.storage.cache_fields import LATENT, LATENT_BATCH
from rotormlx.torch import ops
from rotormlx.torch.handle import untraced
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.store import Calibrated
from rotormlx.torch.torch_ops import KVView


class RotorLatentLayer(RotorLayer):
    """The latents and RoPE parts of one layer, compressed.

    The latent has the larger of the bits of keys and values; the RoPE part has 8.

    Args:
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: None; there is no calibration of latents.

    Raises:
        ValueError: If the configuration is a calibrated one.
    """

    kinds = LATENT, LATENT_BATCH

    def __init__(
        self, config: RotorConfig, layer: int, calibrated: Calibrated | None = None
    ) -> None:
        if config.is_calibrated:
            raise ValueError(
                "[RotorCache] A calibration applies to keys and values, but this model keeps "
                f"latents in layer {layer}; leave the calibration out."
            )
        super().__init__(config, layer, calibrated)

    @untraced
    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens.

        Args:
            key_states: Latents, ``[B, 1, L, R]``, float16, bfloat16 or float32.
            value_states: RoPE parts, ``[B, 1, L, P]``, likewise.
            *args: Ignored, as by the caches of transformers.
            **kwargs: Ignored.

        Returns:
            All latents and RoPE parts, ``[B, 1, S, R]`` and ``[B, 1, S, P]``; the newest tokens are
            still exact.

        Raises:
            ValueError: If a shape, dtype or device does not fit, or the sequence gets too long.
        """
        handle, _ = super().update(key_states, value_states)
        view = handle.step.read(None)
        ((packed, tokens),) = set(view.counts)  # without padding, all rows have equal counts
        sink = self.config.sink
        return _decoded(view.keys, sink, packed, tokens), _decoded(
            view.values, sink, packed, tokens
        )

    def _check(self, keys: Tensor, values: Tensor) -> None:
        super()._check(keys, values)
        if not values.shape[-1]:
            raise ValueError(
                f"[RotorCache] Latents must come with a RoPE part, but layer {self.layer} has "
                "none; use the model without rotormlx."
            )


class RotorIndexedLatentLayer(RotorLatentLayer):
    """A :class:`RotorLatentLayer` with the exact keys of an indexer, which selects tokens.

    The counterpart of ``DynamicIndexedLayer`` in transformers.
    """

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        # ``[B, S, D]``, and for some models positions, ``[..., B, S]``.
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append keys of the indexer, ``[B, L, D]``, and return all, ``[B, S, D]``."""
        held = self.indexer_keys
        new = indexer_key_states
        self.indexer_keys = new if held is None else torch.cat([held, new], dim=1)
        return self.indexer_keys

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end; see :meth:`RotorLayer.crop`."""
        super().crop(tokens_to_remove)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, : self.length]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., : self.length]

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep these batch rows, in this order; takes any index of a tensor's rows."""
        super().batch_select_indices(indices)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[indices]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., indices, :]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including room for growth and the indexer's keys."""
        parts = (self.indexer_keys, self.indexer_position_ids)
        return super().nbytes + sum(part.nbytes for part in parts if part is not None)


def latent_dim(config: PreTrainedConfig) -> int | None:
    """Return the dimension of the latents of a model with this configuration; None without any."""
    rank = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None)
    return rank if type(rank) is int and rank > 0 else None


def _decoded(view: KVView, sink: int, packed_tokens: int, tokens: int) -> Tensor:
    """Return all tokens, ``[B, 1, S, D]``, in the dtype of the exact ones."""
    exact = view.exact[:, :, : tokens - packed_tokens]
    if view.packed is None or not packed_tokens:
        return exact
    blocks = -(-packed_tokens // BLOCK)
    packed = Packed(*(None if a is None else a[:, :, :blocks] for a in view.packed))
    whole = ops.decode_fitting(
        packed, view.codec, channel_scale=view.channel_scale, dtype=exact.dtype
    )
    return torch.cat([exact[:, :, :sink], whole[:, :, :packed_tokens], exact[:, :, sink:]], dim=2)
