"""One layer of a compressed cache with the interface that transformers expects.

A sequence has three parts, in order: the sink (first tokens, exact), packed blocks of 64 tokens,
and the tail (exact). In a batch, every row has its own lengths: left padding never enters the
cache, so a row holds the same bytes as it would alone.

``update`` returns handles instead of tensors. The registered attention function receives them and
passes on how many tokens of each row are padding. Then the new tokens are stored, a view is taken
in which they are still exact, and they are packed. A model that does not use that attention
function gets an error with a clear message at its first use of a handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import KEY, VALUE
from rotormlx.codec.limits import check_tokens
from rotormlx.config import RotorConfig
from rotormlx.storage.cache_fields import BATCH, SINGLE, parts
from rotormlx.torch.dtypes import FLOATS, autocast_dtype
from rotormlx.torch.handle import ADVICE, KVHandle, untraced
from rotormlx.torch.store import Calibrated, Store, groups, lengths_on, new_store
from rotormlx.torch.torch_ops import KVView


class LayerView(NamedTuple):
    """A view of a layer for attention.

    keys, values: Exact and packed tokens; the newest ones are still exact.
    counts: Packed tokens and all tokens of each row.
    lengths: The counts as int32 ``[B, 2]`` on the device of the tokens.
    padding: Positions before the first token of each row.
    """

    keys: KVView
    values: KVView
    counts: tuple[tuple[int, int], ...]
    lengths: Tensor
    padding: tuple[int, ...]


class Step:
    """The new keys and values of one call of a layer, until attention asks for them."""

    def __init__(self, layer: RotorLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        if keys.requires_grad or values.requires_grad:
            # A copy of a cache in the middle of a step does not need the graph.
            keys, values = keys.detach(), values.detach()
        self.new: tuple[Tensor, Tensor] | None = (keys, values)
        self.view: LayerView | None = None

    def read(self, padding: Sequence[int] | None) -> LayerView:
        """Store the new tokens, once, and return a view of everything.

        Args:
            padding: Positions before the first token of each row; None if the mask does not tell.
        """
        if self.view is None and self.new is not None:
            (keys, values), self.new = self.new, None
            self.view = self.layer.store(keys, values, padding)
        if self.view is None:
            raise RuntimeError(
                "[RotorCache] The keys of this step were discarded; run the model again."
            )
        return self.view


class RotorLayer(CacheLayerMixin):
    """The compressed keys and values of one layer.

    Args:
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: The arrays of a calibrated configuration for keys and values: channel scales,
            float32 ``[K, D]``, or rotations, float32 ``[K, D, D]``. Else None.

    Source: docs/FORMAT.md, section 8.
    """

    # Its class names in files, for one row and for several rows. They determine its two stores.
    kinds = SINGLE, BATCH
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self, config: RotorConfig, layer: int, calibrated: Calibrated | None = None
    ) -> None:
        # The constructor of the base class is not called, because it sets keys and values.
        self.config = config
        self.layer = layer
        self.calibrated = calibrated
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0  # positions, left padding included
        self.padding: list[int] = []
        self.rows: list[Counts] = []  # without padding and tokens not stored yet
        self.stores: tuple[Store, Store] | None = None
        self.is_initialized = False
        # Whether any keys or values so far required a gradient.
        self.requires_grad = False
        # transformers tests for this attribute; an empty cache must not have it.
        vars(self).pop("batch_size", None)
        # Shapes, dtypes and devices of the latest keys and values that passed the check.
        self._fitting: tuple[Any, ...] | None = None
        self._step: Step | None = None

    # ---- transformers' contract -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers for keys and values of these shapes and dtypes."""
        self.batch_size = key_states.shape[0]
        self.padding = [0] * self.batch_size
        self.rows = [Counts() for _ in range(self.batch_size)]
        first, second = parts(self.kinds[0], self.config)
        self.stores = (
            new_store(first.config, self.layer, first.role, key_states, self.calibrated),
            new_store(second.config, self.layer, second.role, value_states, self.calibrated),
        )
        self.is_initialized = True

    @untraced
    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Take new tokens.

        Args:
            key_states: ``[B, K, L, D]``, float16, bfloat16 or float32.
            value_states: ``[B, K, L, Dv]``, likewise.
            *args: Ignored, as by the caches of transformers.
            **kwargs: Ignored.

        Returns:
            Handles for the attention function.

        Raises:
            ValueError: If a shape, dtype or device does not fit, or the sequence gets too long.
            RuntimeError: If the previous tokens never reached rotormlx's attention.
        """
        if self._step is not None:
            raise RuntimeError(
                f"[RotorCache] The keys of the previous step never reached attention in layer "
                f"{self.layer}; {ADVICE}, and use a new cache."
            )
        facts = (
            *(key_states.shape, key_states.dtype, key_states.device),
            *(value_states.shape, value_states.dtype, value_states.device),
        )
        if facts != self._fitting:
            self._check(key_states, value_states)
        dtype = autocast_dtype(key_states.device)
        if dtype is not None:
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        check_tokens("RotorCache", self.length + key_states.shape[2])
        if not self.length:
            self.lazy_initialization(key_states, value_states)
        self._fitting = facts
        if torch.is_grad_enabled():
            self.requires_grad |= key_states.requires_grad or value_states.requires_grad
        self.length += key_states.shape[2]
        self._step = step = Step(self, key_states, value_states)
        return (
            KVHandle(step, KEY, self.layer, key_states, self.length),
            KVHandle(step, VALUE, self.layer, value_states, self.length),
        )

    def get_seq_length(self) -> int:
        """Positions so far, left padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask for ``query_length`` new tokens, and the position of the first."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum length."""
        return -1

    # The name before transformers 5.10.
    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end, as specified in docs/FORMAT.md, section 8.

        Removal from the tail is exact. A packed block that loses tokens keeps its centre and its
        rows, but counts fewer of them; it is refilled later with the same centre.

        Args:
            tokens_to_remove: Number of tokens to remove, negated; a positive number means how many
                to keep.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.length)
        removed = min(-tokens_to_remove, self.length)
        if self.stores is None or not removed:
            return
        self.length -= removed
        self.padding = [min(padding, self.length) for padding in self.padding]
        for row in self.rows:
            row.trim(removed, self.config)
        self._forget_unused()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these batch rows, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep these batch rows, in this order; takes any index of a tensor's rows."""
        if self.stores is None:
            return
        picked = torch.arange(self.batch_size)[_on_host(indices)]
        for store in self.stores:
            store.select(picked)
        rows = picked.tolist()
        self.padding = [self.padding[row] for row in rows]
        self.rows = [replace(self.rows[row]) for row in rows]
        self.batch_size = len(rows)
        self._forget_unused()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        if self.stores is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> NoReturn:
        """Refuse: compressed layers stay on their device."""
        raise ValueError(
            "[RotorCache] A compressed cache cannot be offloaded, but offloading was requested; "
            "make the cache without it."
        )

    # Nothing can be fetched back, because nothing is offloaded.
    prefetch = offload

    @property
    def keys(self) -> None:  # type: ignore[override]
        """None while nothing is stored, as in other caches; later, reading it raises an error.

        Raises:
            ValueError: If keys are stored, because they are compressed.
        """
        return self._no_tensor("keys")

    @property
    def values(self) -> None:  # type: ignore[override]
        """None while nothing is stored; see :attr:`keys`."""
        return self._no_tensor("values")

    def _no_tensor(self, role: str) -> None:
        if self.is_initialized:
            raise ValueError(
                f"[RotorCache] The {role} of layer {self.layer} were read as a tensor, but they "
                "are stored compressed; nbytes gives their size, save_prompt_cache stores them, "
                "and the model's attention reads them."
            )

    # ---- beyond the contract --------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether there are new tokens that attention has not asked for."""
        return self._step is not None

    @property
    def tokens(self) -> list[int]:
        """Tokens of each row, without padding."""
        self.settle()
        return [row.tokens for row in self.rows]

    @property
    def packed(self) -> list[int]:
        """Packed tokens of each row."""
        self.settle()
        return [row.packed for row in self.rows]

    @property
    def packed_tokens(self) -> int:
        """Tokens that every row holds packed."""
        return min(self.packed, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including room for growth."""
        return sum(store.nbytes for store in self.stores or ())

    def settle(self) -> None:
        """Do nothing: the counts of this layer are always on the host."""

    def store(self, keys: Tensor, values: Tensor, padding: Sequence[int] | None) -> LayerView:
        """Append tokens, take a view, and pack; called once per step by the attention function.

        After any exception, including an interrupt, the layer is as before the step.
        """
        if self.stores is None:
            raise ValueError("[RotorCache] The cache was reset during a step; run it again.")
        before = self.stores
        try:
            return self._store(before, keys, values, padding)
        except BaseException:
            if self.stores is before:
                vars(self).update(length=self.length - keys.shape[2], _step=None)
            raise

    def _store(
        self,
        before: tuple[Store, Store],
        keys: Tensor,
        values: Tensor,
        padding: Sequence[int] | None,
    ) -> LayerView:
        row_padding = self.padding
        if padding is not None:
            # A row that holds tokens keeps its padding: positions before them are not stored.
            row_padding = [
                old if row.tokens else min(new, self.length)
                for old, new, row in zip(row_padding, padding, self.rows, strict=True)
            ]
        length, config = self.length, self.config
        rows, spans, counts, room, fills = [], [], [], 0, 0
        for old, padded in zip(self.rows, row_padding, strict=True):
            packed = old.packed
            row = Counts(length - padded, packed)
            exact = length - padded - packed
            rows.append(row)
            spans.append((old.tokens - packed, exact))
            counts.append((packed, row.tokens))
            room, fills = max(room, exact), fills + row.packable(config)
        stores = before
        if fills or room > before[0].exact.shape[2]:
            # Twins share buffers; only places behind the counted tokens are written.
            stores = before[0].twin(), before[1].twin()
        key_store, value_store = stores
        places = [*groups(spans)] if len(spans) > 1 else [(slice(None), spans[0])]
        key_store.append(keys, places, room)
        value_store.append(values, places, room)
        of_rows = tuple(counts)
        lengths = lengths_on(key_store.exact.device, of_rows)
        view = LayerView(key_store.view, value_store.view, of_rows, lengths, tuple(row_padding))
        if fills:
            self._pack(stores, rows)
        # A single update, so that no interrupt can leave the layer half changed.
        vars(self).update(stores=stores, padding=row_padding, rows=rows, _step=None)
        return view

    def _pack(self, stores: tuple[Store, Store], rows: Sequence[Counts]) -> None:
        """Pack tokens of the tails beyond the window; rows with equal counts share one call."""
        sink, exact = self.config.sink, [row.exact for row in rows]
        done = [0] * len(rows)
        while any(counts := [row.packable(self.config) for row in rows]):
            facts = zip(counts, (row.packed for row in rows), done, strict=True)
            for alike, (count, packed, before) in groups(facts):
                for store in stores if count else ():
                    store.pack(alike, sink + before, count, packed)
            for row, count in zip(rows, counts, strict=True):
                row.add_packed(count)
            done = [before + count for before, count in zip(done, counts, strict=True)]
        for store in stores:
            store.drop(exact, done)

    def _forget_unused(self) -> None:
        """Drop packed blocks and the channel scale once no row counts packed tokens."""
        if not any(row.packed for row in self.rows):
            for store in self.stores or ():
                store.forget_packed()

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for role, x in ((KEY, keys), (VALUE, values)):
            if x.ndim != 4 or x.dtype not in FLOATS or x.shape[:3] != keys.shape[:3]:
                raise ValueError(
                    f"[RotorCache] Keys and values must have shape [B, K, L, head_dim], equal up "
                    f"to head_dim, and be float16, bfloat16 or float32, but the {role}s have shape "
                    f"{tuple(x.shape)} and dtype {x.dtype} beside keys of {tuple(keys.shape)}."
                )
            if x.device != keys.device:
                raise ValueError(
                    f"[RotorCache] Keys and values must be on one device, but the keys are on "
                    f"{keys.device} and the values on {x.device}."
                )
        stores = self.stores if self.stores and self.length else ()
        for store, x in zip(stores, (keys, values), strict=False):
            batch, heads, _, head_dim = store.exact.shape
            if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
                raise ValueError(
                    f"[RotorCache] This cache holds {store.codec.role}s of shape [{batch}, "
                    f"{heads}, S, {head_dim}] in layer {self.layer}, but {tuple(x.shape)} was "
                    "appended; use a new cache."
                )
            if x.device != store.exact.device:
                raise ValueError(
                    f"[RotorCache] This cache is on {store.exact.device}, but {store.codec.role}s "
                    f"on {x.device} were appended; use a new cache."
                )


def _on_host(indices: Any) -> Any:
    return indices.cpu() if isinstance(indices, Tensor) else indices
