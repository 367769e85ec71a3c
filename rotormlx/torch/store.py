"""The buffers of one layer: exact tokens and packed blocks; every batch row has its own lengths."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rotormlx.codec import rotation, trellis
from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK, ROLES, Codec, Packed, codec
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.storage.cache_fields import SavedStore
from rotormlx.torch import ops
from rotormlx.torch.torch_ops import KVView, scale_of_rows

# Rows of equal lengths are handled together; a slice stands for all rows.
Rows = slice | list[int]
Places = Sequence[tuple[Rows, tuple[int, ...]]]
# Channel scales or matrices of a calibration, for the keys and the values of a layer.
Calibrated = tuple[Tensor, Tensor]


class Store:
    """The keys or the values of one layer: exact tokens in one buffer, packed blocks in others.

    The layer tracks lengths; methods receive them. A buffer that is part of a :class:`KVView` is
    only written after the tokens counted at that time, or replaced.

    Args:
        codec: Codec of the packed tokens.
        config: Configuration; sets sink and window.
        layer: Index of the layer.
        like: Tensor that gives batch, KV heads, dtype and device.
        calibrated: For a calibrated configuration, the channel scale, float32 ``[K, D]``, or the
            rotations, float32 ``[K, D, D]``, on the device; else None.
    """

    def __init__(
        self,
        codec: Codec,
        config: RotorConfig,
        layer: int,
        like: Tensor,
        calibrated: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.config = config
        self.layer = layer
        self.capacity = config.sink + config.window + BLOCK
        self.exact = zeros(like, (*like.shape[:2], self.capacity, codec.head_dim))
        self.calibrated = calibrated
        self._view: KVView | None = None  # the latest view, valid while its buffers are the store's
        self.packed: Packed | None = None
        self.channel_scale: Tensor | None = None
        self.forget_packed()

    @property
    def view(self) -> KVView:
        """The view that attention reads; it stays valid while tokens are appended and packed."""
        view = self._view
        if (
            view is None
            or view.exact is not self.exact
            or view.packed is not self.packed
            or view.channel_scale is not self.channel_scale
        ):
            view = KVView(self.codec, self.exact, self.packed, self.channel_scale)
            self._view = view
        return view

    def twin(self) -> Store:
        """Return a store that shares the buffers; writes go only after the counted tokens."""
        return copy.copy(self)

    def append(self, x: Tensor, places: Places, exact_tokens: int) -> None:
        """Write the last tokens of each row of ``x`` after its exact ones.

        Args:
            x: New tokens, ``[B, K, L, D]``.
            places: For each group of rows, its numbers of exact tokens before and after.
            exact_tokens: The largest number of exact tokens of a row afterwards.
        """
        if exact_tokens > self.exact.shape[2]:
            wider = zeros(self.exact, (*x.shape[:2], exact_tokens, x.shape[3]))
            wider[:, :, : self.exact.shape[2]] = self.exact
            self.exact = wider
        for rows, (start, stop) in places:
            if count := stop - start:
                new = x if count == x.shape[2] else x.narrow(2, x.shape[2] - count, count)
                there = self.exact.narrow(2, start, count)
                if isinstance(rows, slice):
                    there.copy_(new)
                else:
                    there[rows] = new[rows].to(there.dtype)

    def pack(self, rows: Rows, start: int, count: int, packed_tokens: int) -> None:
        """Encode the ``count`` exact tokens from ``start`` on; they stay in the exact buffer."""
        x = self.exact[rows, :, start : start + count]
        block, filled = divmod(packed_tokens, BLOCK)
        if filled:
            self._fill_up(rows, x, block, filled)
            return
        if self.config.scales_channels and not packed_tokens:
            self._take_scale(rows, x[:, :, :BLOCK])
        self._write(rows, self._encode(rows, x), block)

    def drop(self, exact_tokens: Sequence[int], packed_now: Sequence[int]) -> None:
        """Close the gap that packing has left after the sink, in a new buffer."""
        sink = self.config.sink
        need = max(have - gone for have, gone in zip(exact_tokens, packed_now, strict=True))
        shape = (*self.exact.shape[:2], max(self.capacity, need), self.codec.head_dim)
        kept = zeros(self.exact, shape)
        for rows, (have, gone) in groups(zip(exact_tokens, packed_now, strict=True)):
            kept[rows, :, :sink] = self.exact[rows, :, :sink]
            if have > sink:
                tail = self.exact[rows, :, sink + gone : have]
                kept[rows, :, sink : have - gone] = tail
        self.exact = kept

    def forget_packed(self) -> None:
        """Remove all packed blocks."""
        self.packed = None
        self.channel_scale = None if self.config.rotation == CALIBRATED else self.calibrated

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        rows = rows.to(self.exact.device)
        with torch.inference_mode(False):
            self.exact = self.exact.index_select(0, rows)
            if self.packed is not None:
                parts = (None if a is None else a.index_select(0, rows) for a in self.packed)
                self.packed = Packed(*parts)
            if self.channel_scale is not None and self.calibrated is None:
                self.channel_scale = self.channel_scale.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including room for growth."""
        own_scale = self.channel_scale if self.calibrated is None else None
        parts = [self.exact, own_scale, *(self.packed or ())]
        return sum(a.nbytes for a in parts if a is not None)

    def saved(self, counts: Counts, *, single: bool) -> SavedStore:
        """Return the arrays cut to these counts; ``single`` if the file holds one row."""
        packed = Packed(None, None, None)
        if self.packed is not None:
            packed = Packed(*(a if a is None else a[:, :, : counts.blocks] for a in self.packed))
        scale = self.channel_scale if self.calibrated is None else self.calibrated
        if single and self.calibrated is None and scale is not None:
            scale = scale[0]
        return SavedStore(self.exact[:, :, : counts.exact], *packed, scale)

    def fill(self, saved: SavedStore) -> None:
        """Fill an empty store with the result of :meth:`saved`; the arrays are already checked."""
        device = self.exact.device
        exact = saved.exact.to(device)
        packed = (saved.words, saved.scales, saved.centres)
        room = max(0, min(self.capacity - exact.shape[2], exact.shape[2]))
        with torch.inference_mode(False):
            self.exact = torch.nn.functional.pad(exact, (0, 0, 0, room))
        if saved.words is not None:
            self.packed = Packed(*(a if a is None else a.to(device) for a in packed))
        if saved.channel_scale is not None and self.calibrated is None:
            scale = saved.channel_scale.to(device)
            by_row = scale if scale.ndim == 3 else scale.expand(len(exact), -1, -1)
            with torch.inference_mode(False):
                self.channel_scale = by_row.clone()

    def _take_scale(self, rows: Rows, block: Tensor) -> None:
        """Give rows the channel scale of their first block."""
        if self.channel_scale is None:
            shape = (*self.exact.shape[:2], self.codec.head_dim)
            self.channel_scale = zeros(self.exact, shape, torch.float32).fill_(1.0)
        self.channel_scale[rows] = ops.prefill_scale(
            block, self.config, layer=self.layer, role=self.codec.role
        )

    def _encode(
        self,
        rows: Rows,
        x: Tensor,
        centres: Tensor | None = None,
        start: int = 0,
        state: Tensor | None = None,
    ) -> Packed:
        return ops.encode(
            x,
            self.config,
            layer=self.layer,
            role=self.codec.role,
            channel_scale=scale_of_rows(self.channel_scale, rows),
            centres=centres,
            rotation=self.codec.rotation,
            start=start,
            state=state,
        )

    def _fill_up(self, rows: Rows, x: Tensor, block: int, filled: int) -> None:
        """Complete a block of ``filled`` tokens; its centre and its trellis paths continue."""
        if self.packed is None:
            raise ValueError("[RotorCache] There is no packed block to fill up.")
        last = Packed(*(None if a is None else a[rows, :, block : block + 1] for a in self.packed))
        x = torch.nn.functional.pad(x, (0, 0, filled, 0))
        state = trellis.state_after(last.words, filled) if self.codec.has_state else None
        new = self._encode(rows, x, last.centres, filled, state)
        kept = torch.from_numpy(self.codec.kept_bits(filled).view("int32")).to(x.device)
        words = (last.words & kept) | (new.words & ~kept)
        is_kept = torch.arange(BLOCK, device=x.device) < filled
        scales = torch.where(is_kept, last.scales, new.scales)
        self._write(rows, Packed(words, scales, last.centres), block)

    def _write(self, rows: Rows, new: Packed, block: int) -> None:
        """Write blocks at position ``block``; blocks from there on are no longer used."""
        stop = block + new.scales.shape[2]
        if self.packed is None or stop > self.packed.scales.shape[2]:
            # One 32nd more room than needed, so that a long cache is rarely copied.
            blocks = stop + max(4, stop // 32)
            before = self.packed or Packed(None, None, None)
            pairs = zip(before, new, strict=True)
            self.packed = Packed(*(self._wider(a, b, blocks) for a, b in pairs))
        for buffer, part in zip(self.packed, new, strict=True):
            if buffer is not None:
                buffer[rows, :, block:stop] = part

    def _wider(self, before: Tensor | None, new: Tensor | None, blocks: int) -> Tensor | None:
        if new is None:
            return None
        wider = zeros(new, (*self.exact.shape[:2], blocks, *new.shape[3:]))
        if before is not None:
            wider[:, :, : before.shape[2]] = before
        return wider


def zeros(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return a buffer of zeros on the device of a tensor, in its dtype unless one is given.

    It is made outside inference mode: a tensor made within cannot be written outside of it, and a
    cache may be used in both.
    """
    with torch.inference_mode(False):
        return torch.zeros(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def groups(facts: Iterable[tuple[int, ...]]) -> Iterator[tuple[Rows, tuple[int, ...]]]:
    """Group batch rows by equal facts; yield the rows and the facts of each group."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, fact in enumerate(facts):
        alike[fact].append(row)
    for fact, rows in alike.items():
        yield (slice(None) if len(alike) == 1 else rows), fact


@lru_cache(maxsize=16)
def lengths_on(device: torch.device, rows: tuple[tuple[int, int], ...]) -> Tensor:
    """Return packed and all tokens of each row, int32 ``[B, 2]``; all layers of a step share it."""
    on_gpu = device.type == "cuda"
    # Pinned memory, so that the host does not wait for the device.
    made = torch.tensor(rows, dtype=torch.int32, pin_memory=on_gpu)
    return made.to(device, non_blocking=on_gpu)


def new_store(
    config: RotorConfig, layer: int, role: str, like: Tensor, calibrated: Calibrated | None = None
) -> Store:
    """Make an empty store for keys or values of the shape of ``like``, ``[B, K, S, D]``.

    Raises:
        ValueError: If the rotations do not support head_dim, or the calibrated arrays are
            missing or do not fit.
    """
    _, heads, _, head_dim = like.shape
    if not config.is_calibrated:
        return Store(codec(config, head_dim, layer=layer, role=role), config, layer, like)
    wanted = config.calibrated_shape(heads, head_dim)
    own = None if calibrated is None else calibrated[ROLES.index(role)]
    if own is None or tuple(own.shape) != wanted:
        have = "none" if own is None else f"{tuple(own.shape)}"
        raise ValueError(
            f"[RotorCache] A calibrated cache needs an array {wanted} for the {role}s of layer "
            f"{layer}, but {have} was given; use rotormlx.torch.apply(model, calibration=...), or "
            "calibrate this model: rotormlx calibrate MODEL."
        )
    if config.rotation == CALIBRATED:
        chosen = Codec(role, config.code_bits(role), rotation.calibrated(own.cpu().numpy()))
    else:
        chosen = codec(config, head_dim, layer=layer, role=role)
    return Store(chosen, config, layer, like, own.to(like.device))
