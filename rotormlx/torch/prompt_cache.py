"""Saving and loading of caches, in the same files that mlx-lm's ``save_prompt_cache`` writes.

Caches saved with MLX load here, and caches saved here load with MLX, bit for bit. In a file,
compressed layers are ``RotorKVCache`` and sliding windows are ``RotatingKVCache``. Tokens of a
sliding window are put in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from rotormlx.codec.counts import Counts
from rotormlx.config import RotorConfig
from rotormlx.storage import cache_file
from rotormlx.storage.cache_fields import (
    BATCH_SLIDING,
    CHUNKED,
    LAYOUTS,
    SLIDING,
    SavedBatch,
    SavedCache,
)
from rotormlx.storage.cache_file import SavedCaches
from rotormlx.storage.cache_rules import Shape
from rotormlx.storage.fingerprint import MODEL, check_file
from rotormlx.storage.tensor_file import Array
from rotormlx.torch.cache import RotorCache
from rotormlx.torch.fingerprint import fingerprint, weights
from rotormlx.torch.latent_layer import (
    RotorIndexedLatentLayer,
    RotorLatentLayer,
    latent_dim,
)
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.parallel import check_whole

_SLIDING = "RotatingKVCache"
_DTYPES = {
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"},
    torch.int32: "U32",  # words, which torch holds as signed integers
}

State = list[Any]


def save_prompt_cache(
    path: str | Path,
    model: PreTrainedModel,
    cache: RotorCache,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a cache to a file that only the same model can load, here or in MLX.

    The file has the format of mlx-lm's ``save_prompt_cache``, with a checksum and the model's
    fingerprint. A save either completes or leaves the old file: after an interrupt, a full disk or
    a crash, the path holds what it held before.

    Args:
        path: A ``.safetensors`` file; the suffix is appended if it is missing.
        model: The model that filled the cache.
        cache: The cache; all batch rows must have the same length and no padding.
        metadata: Strings to store with it.

    Raises:
        ValueError: If rows differ, a layer is of a kind that the file cannot hold, or the model is
            spread over ranks.
        OSError: If the disk is full, or the directory is read-only.

    Source: docs/FORMAT.md, section 8.
    """
    if not isinstance(cache, RotorCache):
        raise ValueError(
            f"[prompt cache] A RotorCache is required after the model, but a "
            f"{type(cache).__name__} was given; call save_prompt_cache(path, model, cache)."
        )
    check_whole(model)
    kept = {**(metadata or {}), MODEL: fingerprint(model).text}
    pairs = [_state_of(index, layer) for index, layer in enumerate(cache.layers)]
    classes, states = [name for name, _ in pairs], [state for _, state in pairs]
    cache_file.write(cache_file.with_suffix(path), classes, states, kept, _tensor)


def load_prompt_cache(
    path: str | Path, model: PreTrainedModel, *, device: torch.device | str | None = None
) -> tuple[RotorCache, dict[str, str]]:
    """Load a cache that MLX or torch has saved.

    The cache keeps the bits, rotation and calibration of the file, independent of the configuration
    given to :func:`rotormlx.torch.apply`.

    Args:
        path: A ``.safetensors`` file.
        model: The model that will use the cache; its attention must be ``rotormlx``.
        device: Device of the tensors; the device of the model if None.

    Returns:
        The cache, and the metadata that was saved with it.

    Raises:
        ValueError: If the file holds no such cache, is damaged, has another format version, or
            belongs to another model, or if the model is spread over ranks.

    Source: docs/FORMAT.md, section 8.
    """
    own = weights(model)
    check_whole(model)
    with cache_file.opened(path) as saved:
        cache = RotorCache(model.config)
        fit = _Fit(path, cache, model)
        fit.check(saved)
        check_file(path, saved.metadata, own, fit.text.model_type)
        states = saved.read(_array)
    device = torch.device(model.device if device is None else device)
    entries = zip(cache.layers, _layouts(saved), states, strict=True)
    for index, (layer, name, state) in enumerate(entries):
        if isinstance(layer, RotorLayer):
            _fill(layer, name, state, device)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            _fill_sliding(index, layer, state, fit, device)
    fit.check_lengths()
    return cache, saved.metadata


# ---- one layer ----------------------------------------------------------------------------------


def _state_of(index: int, layer: Any) -> tuple[str, State]:
    if isinstance(layer, RotorIndexedLatentLayer):
        raise ValueError(
            f"[prompt cache] A file can hold latents, but not the keys of the indexer in "
            f"layer {index}; keep this cache in memory."
        )
    if isinstance(layer, RotorLayer):
        return layer.kinds[len(layer.rows) > 1], state_of(layer)
    if type(layer) is DynamicSlidingWindowLayer:
        return _SLIDING, _sliding_state(layer)
    raise ValueError(
        f"[prompt cache] A file can hold compressed layers and sliding windows, but layer {index} "
        f"is a {type(layer).__name__}; keep this cache in memory."
    )


def state_of(layer: RotorLayer) -> State:
    """Return everything that a compressed layer holds, in the order of the MLX cache's state.

    That is ``RotorKVCache.state`` for one row, and ``BatchRotorKVCache.state`` for a batch.
    """
    layer.settle()
    if len({*zip(layer.padding, layer.packed, strict=True)}) > 1:
        raise ValueError(
            f"[prompt cache] All batch rows must have one length to be saved, but layer "
            f"{layer.layer} has rows of {layer.tokens} tokens; keep one row with "
            "cache.batch_select_indices first."
        )
    rows = layer.rows if layer.stores else [Counts()]
    single = len(rows) == 1
    stores = tuple(store.saved(rows[0], single=single) for store in layer.stores or ())
    if single:
        return list(SavedCache(layer.config, layer.layer, None, replace(rows[0]), stores).state)
    table = np.array([(row.tokens, row.packed, 0) for row in rows], np.int32)
    return list(SavedBatch(layer.config, layer.layer, None, table, stores).state)


class _Fit(NamedTuple):
    """Checks of whether a file fits a model.

    path: The file.
    cache: An empty cache of the model.
    model: The model.
    """

    path: str | Path
    cache: RotorCache
    model: PreTrainedModel

    @property
    def text(self) -> PreTrainedConfig:
        """The configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    def check(self, saved: SavedCaches) -> None:
        """Refuse a file whose layers differ from the model's in kind or shape."""
        layers, classes = self.cache.layers, _layouts(saved)
        if len(layers) != len(classes):
            raise self.misfit(f"{len(layers)} layers", f"{len(classes)}")
        names: dict[type, tuple[str, ...]] = {
            RotorLayer: RotorLayer.kinds,
            RotorLatentLayer: RotorLatentLayer.kinds,
            DynamicSlidingWindowLayer: (_SLIDING,),
        }
        if windows := {SLIDING, BATCH_SLIDING, CHUNKED}.intersection(classes):
            raise ValueError(
                f"[prompt cache] {self.path} holds compressed windows ({min(windows)}), which "
                "torch caches do not have; make it with sliding_windows=False."
            )
        for index, (layer, name) in enumerate(zip(layers, classes, strict=True)):
            if name not in names.get(type(layer), ()):
                raise self.misfit(f"a {type(layer).__name__} in layer {index}", f"a {name}")
        for index, shape in saved.shapes:
            self._check_shape(index, shape)

    def check_lengths(self) -> None:
        """Refuse layers whose lengths differ."""
        lengths = {self.cache.get_seq_length(index) for index in range(len(self.cache.layers))}
        if len(lengths) > 1:
            raise self._damaged("one number of tokens in all layers", sorted(lengths))

    def _check_shape(self, index: int, shape: Shape) -> None:
        if shape.layer not in (None, index):
            raise self._damaged(f"layer {index} at position {index}", f"layer {shape.layer}")
        if shape.limited:
            raise ValueError(
                f"[prompt cache] {self.path} was made with max_kv_size, which torch caches do not "
                "have; use it with mlx-lm."
            )
        layer = self.cache.layers[index]
        if isinstance(layer, DynamicSlidingWindowLayer) and shape.window != layer.sliding_window:
            raise self.misfit(
                f"a window of {layer.sliding_window} tokens in layer {index}", shape.window
            )
        head_dims = _head_dims(self.text)
        if shape.dims is not None and not set(shape.dims[1:]) <= head_dims:
            raise self.misfit(
                f"vectors of {' or '.join(map(str, sorted(head_dims)))} dimensions in layer "
                f"{index}",
                f"{shape.dims[1]} and {shape.dims[2]}",
            )
        if shape.config is not None and shape.config.is_calibrated and shape.dims is None:
            raise ValueError(
                f"[prompt cache] {self.path} must hold tokens, whose calibration comes with them, "
                "but it is empty; make a new RotorCache with the calibration."
            )

    def misfit(self, required: str, came: object) -> ValueError:
        """Return the error for a file that does not fit the model."""
        return cache_file.misfit(self.path, self.text.model_type, required, came)

    def _damaged(self, required: str, came: object) -> ValueError:
        return ValueError(
            f"[prompt cache] {self.path} must hold {required}, but it holds {came!r}; it is "
            "damaged: make it again."
        )


def _layouts(saved: SavedCaches) -> list[str]:
    """Return the class of each cache; classes that differ only in MLX's attention count as one."""
    return [LAYOUTS.get(name, name) for name in saved.classes]


def _head_dims(text: PreTrainedConfig) -> set[int]:
    """Return all dimensions that a vector of this model may have."""
    named = set(_named_dims(text.to_dict()))
    if (latent := latent_dim(text)) is not None:
        named.add(latent)
    heads, hidden = getattr(text, "num_attention_heads", 0), getattr(text, "hidden_size", 0)
    if heads and hidden:
        named.add(hidden // heads)
    # If only a part of a vector gets RoPE, the configuration names the parts, not their sum.
    return named | {a + b for a in named for b in named if a != b}


def _named_dims(settings: dict[Any, Any]) -> Iterator[int]:
    """Yield all head_dims in the settings, including those of single layers."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _named_dims(value)
        elif str(name).endswith("head_dim") and type(value) is int:
            yield value


def _fill(layer: RotorLayer, name: str, state: State, device: torch.device) -> None:
    """Fill a layer with a saved state and the configuration it was saved with."""
    layer.config = RotorConfig.from_json(state[1])
    if name == layer.kinds[1]:
        batch = SavedBatch.named(state, layer.config)
        calibrated, stores = batch.calibrated, batch.stores
        rows = [Counts(tokens, packed) for tokens, packed, _ in batch.table.tolist()]
        if len({(row.tokens, row.packed) for row in rows}) > 1:
            raise ValueError(
                "[prompt cache] All batch rows of a file must have one length to be read by torch, "
                f"but they have {[row.tokens for row in rows]} tokens; save each row in its own "
                "file with mlx-lm."
            )
    else:
        saved = SavedCache.named(state, layer.config)
        calibrated, stores = saved.calibrated, saved.stores
        rows = [replace(saved.counts) for _ in range(len(stores[0].exact) if stores else 1)]
    layer.calibrated = calibrated
    if not any(row.tokens for row in rows):
        return  # an empty layer; the next tokens determine its batch size
    # Zero rows, so that nothing is allocated for a window whose size only the file gives.
    layer.lazy_initialization(*(store.exact[:0].to(device) for store in stores))
    layer.batch_size, layer.rows = len(rows), rows
    layer.length, layer.padding = rows[0].tokens, [0] * len(rows)
    for store, arrays in zip(layer.stores or (), stores, strict=True):
        store.fill(arrays)


def _sliding_state(layer: DynamicSlidingWindowLayer) -> State:
    """Return ``RotatingKVCache.state``: keys, values, offset, keep, size, next place."""
    window, offset = layer.sliding_window, layer.cumulative_length
    if not layer.is_initialized:
        return [None, None, 0, 0, window, 0]
    keys, values = (x[:, :, -window + 1 :] for x in _tensors(layer))
    if offset >= window:
        # A full ring has one more place, the oldest, which is overwritten next and never read.
        keys, values = (torch.cat([x[:, :, :1], x], dim=2) for x in (keys, values))
    return [keys, values, offset, 0, window, keys.shape[2]]


def _fill_sliding(
    index: int, layer: DynamicSlidingWindowLayer, state: State, fit: _Fit, device: torch.device
) -> None:
    keys, values, offset, keep, window, place = state
    if keep:
        raise fit.misfit(f"a window without kept tokens in layer {index}", f"{keep} kept tokens")
    if keys is None:
        return
    ordered = (_in_order(x, offset, place) for x in (keys, values))
    keys, values = (x[:, :, -window + 1 :].to(device).contiguous() for x in ordered)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, offset


def _tensors(layer: DynamicSlidingWindowLayer) -> tuple[Tensor, Tensor]:
    if layer.keys is None or layer.values is None:
        raise ValueError("[prompt cache] A sliding window must hold tokens, but it holds none.")
    return layer.keys, layer.values


def _in_order(x: Tensor, offset: int, place: int) -> Tensor:
    """Return the tokens of a ring, oldest first."""
    if place == x.shape[2]:
        return x
    if place < offset:
        return torch.cat([x[:, :, place:], x[:, :, :place]], dim=2)
    return x[:, :, :place]


# ---- the file -----------------------------------------------------------------------------------


def _tensor(tensor: Tensor | Array) -> tuple[str, tuple[int, ...], Callable[[], Array]]:
    """Return dtype, shape and a function that makes the array when it is written."""
    if not isinstance(tensor, Tensor):  # the counts of a batch
        return "I32", tensor.shape, tensor.copy

    def give() -> Array:
        array = tensor.detach().cpu().contiguous()
        return (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()

    return _DTYPES[tensor.dtype], tuple(tensor.shape), give


def _array(array: Array, dtype: str) -> Tensor:
    if dtype == "U32":
        return torch.from_numpy(array.view("int32"))
    if dtype == "BF16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
