"""A compressed layer in buffers of a fixed place and size, for CUDA graphs and ``torch.compile``.

Prompts are handled as in :class:`RotorLayer`, with lengths on the host. A step of one token is the
operator ``rotormlx::step``, which reads and advances lengths on the device. Nothing depends on the
number of tokens, so one graph serves every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK, KEY, VALUE, Packed
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.torch import checks, ops
from rotormlx.torch.dtypes import autocast_dtype
from rotormlx.torch.handle import KVHandle
from rotormlx.torch.layer import LayerView, RotorLayer
from rotormlx.torch.step import step_fitting
from rotormlx.torch.store import Calibrated, Store, zeros
from rotormlx.torch.store_step import Step
from rotormlx.torch.torch_ops import AttendCall, KVView

# Maximum number of new tokens in a step of the operator.
_STEP = BLOCK


class DeviceStep:
    """The new keys and values of a step, held until attention reads them."""

    def __init__(self, layer: RotorStaticLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float, sink_logits: Tensor | None
    ) -> Tensor:
        """Store the tokens and attend to everything, ``[B, H, L, Dv]``; see ``rotormlx::step``."""
        layer = self.layer
        if mask is not None and mask.shape[-1] > 1:
            # Columns are positions; a row's tokens start after its padding.
            columns = torch.arange(mask.shape[-1], device=mask.device) + layer.row_padding[:, None]
            index = columns.clamp(max=mask.shape[-1] - 1)[:, None, None, :]
            mask = mask.expand(len(query), -1, -1, -1)
            mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
        if torch.compiler.is_dynamo_compiling():
            return self._traced(query, mask, scale, sink_logits)
        sink, window = layer.config.sink, layer.config.window
        call = AttendCall(
            query, layer.lengths, *layer.views, sink, scale, mask is None, mask, sink_logits
        )
        new, own_scale = (self.keys, self.values), layer.config.scales_channels
        stored = Step(new, layer.lengths, layer.counter, *layer.views, sink, window, own_scale)
        if mask is not None or sink_logits is not None:
            checks.check_call(call)
        return step_fitting(stored, call)

    def _traced(
        self, query: Tensor, mask: Tensor | None, scale: float, sink_logits: Tensor | None
    ) -> Tensor:
        """Do the same as a single operator in a graph."""
        layer = self.layer
        made: Tensor = torch.ops.rotormlx.step(
            query,
            self.keys,
            self.values,
            layer.lengths,
            layer.counter,
            *layer.buffers,
            mask,
            sink_logits,
            scale=scale,
            **layer.facts,
        )
        return made


class RotorStaticLayer(RotorLayer):
    """The compressed keys and values of one layer, preallocated.

    Args:
        config: How to compress.
        layer: Index of the layer in the model; selects its rotations.
        calibrated: Calibrated arrays as for :class:`RotorLayer`, or None.
        max_cache_len: Maximum number of positions of a sequence, including padding.

    Source: docs/FORMAT.md, section 8.
    """

    is_compileable = True
    # On the device: packed tokens and all tokens of each row, int32 [B, 2]; see Step, int32 [B];
    # positions before the first token of each row, int64 [B]; positions so far, int64 [].
    lengths: Tensor
    counter: Tensor
    row_padding: Tensor
    positions: Tensor
    # The operator's arguments for keys and values: exact, words, scales, centres (of keys), channel
    # scale.
    buffers: tuple[Tensor | None, ...] = ()
    facts: dict[str, Any]
    # Views of the same buffers for attention.
    views: tuple[KVView, KVView]

    def __init__(
        self,
        config: RotorConfig,
        layer: int,
        calibrated: Calibrated | None = None,
        *,
        max_cache_len: int,
    ) -> None:
        self.max_cache_len = max_cache_len
        super().__init__(config, layer, calibrated)

    def reset(self) -> None:
        """Forget everything; buffers keep their place."""
        super().reset()
        self.is_on_device = False

    # ---- transformers' contract -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers for keys and values of these shapes."""
        # The operator takes keys and values in one dtype, that of the output.
        super().lazy_initialization(key_states.to(value_states.dtype), value_states)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Take new tokens; see :meth:`RotorLayer.update`.

        A single token after a prompt is stored on the device. Whether there is room is checked for
        prompts and on a CPU only.
        """
        if not (self.is_on_device and key_states.shape[2] == 1):
            self.settle()
            self._check_room(key_states.shape[2])
            return super().update(key_states, value_states, *args, **kwargs)
        dtype = autocast_dtype(key_states.device) or value_states.dtype
        keys, values = key_states.to(dtype), value_states.to(dtype)
        self.positions.add_(1)
        step = DeviceStep(self, keys, values)
        return (
            KVHandle(step, KEY, self.layer, keys, self.max_cache_len),
            KVHandle(step, VALUE, self.layer, values, self.max_cache_len),
        )

    def store(self, keys: Tensor, values: Tensor, padding: Sequence[int] | None) -> LayerView:
        """Store as :meth:`RotorLayer.store` does, then copy the lengths to the device."""
        view = super().store(keys, values, padding)
        self._to_device()
        return view

    def get_seq_length(self) -> Any:
        """Return the positions so far, including left padding; a tensor after a prompt."""
        return self.positions if self.is_on_device else self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's columns for ``query_length`` new tokens, and the first position."""
        if self.is_on_device and query_length == 1:
            return self.max_cache_len, 0
        return int(self.get_seq_length()) + query_length, 0

    def get_max_length(self) -> int:
        """Return the maximum number of positions of a sequence."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end; see :meth:`RotorLayer.crop`."""
        self.settle()
        super().crop(tokens_to_remove)
        self._to_device()

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep these batch rows; see :meth:`RotorLayer.batch_select_indices`."""
        self.settle()
        super().batch_select_indices(indices)
        self._to_device()

    # ---- host and device ------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.buffers if x is not None)

    def settle(self) -> None:
        """Read the lengths back from the device, and pack full blocks."""
        if not self.is_on_device:
            return
        self.length = int(self.positions)
        counts = self.lengths.tolist()
        self.rows = [Counts(tokens, packed) for packed, tokens in counts]
        key_store, value_store = cast(tuple[Store, Store], self.stores)
        for place, store in enumerate((key_store, value_store)):
            store.exact = self.views[place].exact.clone()
            self._share(store, place)
        if any(row.packable(self.config) for row in self.rows):
            rows = [replace(row) for row in self.rows]
            stores = key_store.twin(), value_store.twin()
            self._pack(stores, rows)
            self.stores, self.rows = stores, rows
            self._to_device()

    def _check_room(self, new_tokens: int) -> None:
        if self.length + new_tokens > self.max_cache_len:
            raise ValueError(
                f"[RotorCache] A static cache must have room for its tokens, but {new_tokens} more "
                f"came to {self.length} of {self.max_cache_len}; make it with a larger "
                "max_cache_len."
            )

    def _to_device(self) -> None:
        """Copy the tokens and lengths of the host into the buffers.

        The operator packs whole blocks only. If a crop has left a partial block, steps run on the
        host until it is full.
        """
        self.is_on_device = False
        if self.stores is None or any(row.packed % BLOCK for row in self.rows):
            return
        if not self._fits():
            self._allocate()
        for place, (store, view) in enumerate(zip(self.stores, self.views, strict=True)):
            count = max(row.exact for row in self.rows)
            view.exact[:, :, :count] = store.exact[:, :, :count]
            if store.packed is not None:
                blocks = max(row.blocks for row in self.rows)
                for buffer, part in zip(cast(Packed, view.packed), store.packed, strict=True):
                    if buffer is not None and buffer is not part:
                        buffer[:, :, :blocks] = part[:, :, :blocks]
            if view.channel_scale is not None and store.channel_scale is not None:
                view.channel_scale.copy_(store.channel_scale)
            self._share(store, place)
        device = self.lengths.device
        counts = [(row.packed, row.tokens) for row in self.rows]
        self.lengths.copy_(torch.tensor(counts, dtype=torch.int32, device=device))
        self.row_padding.copy_(torch.tensor(self.padding, device=device))
        self.positions.fill_(self.length)
        self.is_on_device = True

    def _share(self, store: Store, place: int) -> None:
        """Let a store of the host share the packed blocks of the device.

        Exact tokens are not shared: attention may still read the store's when the device's change.
        """
        view = self.views[place]
        used = any(row.packed for row in self.rows)
        store.packed = view.packed if used else None
        if self.config.scales_channels:
            store.channel_scale = view.channel_scale if used else None

    def _fits(self) -> bool:
        """Return whether the buffers fit this batch, dtype and device."""
        if not self.buffers:
            return False
        stores = cast(tuple[Store, Store], self.stores)
        for store, view in zip(stores, self.views, strict=True):
            exact, there = store.exact, view.exact
            alike = exact.shape[:2] == there.shape[:2] and exact.shape[3] == there.shape[3]
            if not alike or (exact.dtype, exact.device) != (there.dtype, there.device):
                return False
        return True

    def _allocate(self) -> None:
        """Make the buffers, and collect the operator's other arguments."""
        config, stores = self.config, cast(tuple[Store, Store], self.stores)
        blocks = max(1, -(-(self.max_cache_len - config.sink) // BLOCK))
        capacity = config.sink + config.window + BLOCK - 1 + _STEP

        def view_of(store: Store) -> KVView:
            exact, codec = store.exact, store.codec
            front = tuple(exact.shape[:2])
            words = zeros(exact, (*front, blocks, *codec.words_shape), torch.int32)
            scales = zeros(exact, (*front, blocks, BLOCK), torch.float16)
            centres = None
            if codec.role == KEY:
                centres = zeros(exact, (*front, blocks, codec.head_dim), torch.float16)
            scale = None if config.rotation == CALIBRATED else store.calibrated
            if config.scales_channels:
                scale = zeros(exact, (*front, codec.head_dim), torch.float32).fill_(1.0)
            room = zeros(exact, (*front, capacity, codec.head_dim))
            return KVView(codec, room, Packed(words, scales, centres), scale)

        self.views = key_view, value_view = view_of(stores[0]), view_of(stores[1])
        self.buffers = (
            *(key_view.exact, *cast(Packed, key_view.packed), key_view.channel_scale),
            *(value_view.exact, *cast(Packed, value_view.packed)[:2], value_view.channel_scale),
        )
        exact = key_view.exact
        self.lengths = zeros(exact, (len(self.rows), 2), torch.int32)
        self.counter = zeros(exact, (len(self.rows),), torch.int32)
        self.row_padding = zeros(exact, (len(self.rows),), torch.int64)
        self.positions = zeros(exact, (), torch.int64)
        key_codec, value_codec = (store.codec for store in stores)
        self.facts = {
            "key_bits": config.key_bits,
            "value_bits": config.value_bits,
            "rotation": ops.rotation_name(config, key_codec.rotation),
            "value_rotation": ops.rotation_name(config, value_codec.rotation),
            "seed": config.seed,
            "layer": self.layer,
            "sink": config.sink,
            "window": config.window,
            "own_scale": config.scales_channels,
        }
        state = (self.lengths, self.counter, self.row_padding, self.positions)
        for x in (*self.buffers, *state):
            if x is not None:
                # Otherwise a CUDA graph would copy them before every step.
                torch._dynamo.mark_static_address(x)
