"""Caches in files, the same files that mlx-lm's ``save_prompt_cache`` writes.

A cache saved on the MLX side is read here and the other way round, bit for bit. Compressed layers
are ``RotorKVCache`` there; sliding windows are ``RotatingKVCache``, whose tokens are put in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from rotormlx.codec.counts import Counts
from rotormlx.config import RotorConfig
from rotormlx.storage import cache_file
from rotormlx.storage.cache_fields import SINGLE, SavedCache
from rotormlx.storage.cache_rules import Shape
from rotormlx.storage.tensor_file import Array
from rotormlx.torch.cache import RotorCache
from rotormlx.torch.layer import RotorLayer

_SLIDING = "RotatingKVCache"
_DTYPES = {
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"},
    torch.int32: "U32",  # words: torch counts in signed integers
}

State = list[Any]


def save_prompt_cache(
    path: str | Path, cache: RotorCache, metadata: dict[str, str] | None = None
) -> None:
    """Write a cache as mlx-lm's ``save_prompt_cache`` writes it.

    The file appears whole or not at all: an interrupt, a full disk or a crash leaves what was there
    before. It has a checksum.

    Args:
        path: A ``.safetensors`` file, written anew.
        cache: All batch rows must have the same length and no padding.
        metadata: Strings to keep beside it.

    Raises:
        ValueError: If rows differ, or a layer is of a kind that the file cannot hold.
        OSError: If the disk is full, or the directory is read-only.

    Source: docs/FORMAT.md, section 8.
    """
    states = [_state_of(index, layer) for index, layer in enumerate(cache.layers)]
    classes, arrays = [name for name, _ in states], [state for _, state in states]
    cache_file.write(path, classes, arrays, metadata or {}, _tensor)


def load_prompt_cache(
    path: str | Path,
    config: PreTrainedConfig,
    rotor_config: RotorConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[RotorCache, dict[str, str]]:
    """Read a cache that MLX or torch has saved.

    Args:
        path: A ``.safetensors`` file.
        config: ``model.config`` of the model that is to use the cache.
        rotor_config: What the cache must have been made with; None takes what the file says.
        device: Where the tensors go.

    Returns:
        The cache, and the metadata that was saved with it.

    Raises:
        ValueError: If the file is no such cache, is damaged, of another format version, another
            configuration, or does not fit the model.

    Source: docs/FORMAT.md, section 8.
    """
    with cache_file.opened(path) as saved:
        shapes = [shape for _, shape in saved.shapes]
        cache = RotorCache(config, _config_of(path, shapes, rotor_config))
        _check_classes(path, saved.classes, cache)
        for index, shape in saved.shapes:
            _check_shape(index, shape, cache, config)
        states = saved.read(_array)
    for index, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        if isinstance(layer, RotorLayer):
            _fill(layer, state, torch.device(device))
        elif isinstance(layer, DynamicSlidingWindowLayer):
            _fill_sliding(index, layer, state, torch.device(device))
    _check_lengths(cache)
    return cache, saved.metadata


# ---- one layer ----------------------------------------------------------------------------------


def _state_of(index: int, layer: Any) -> tuple[str, State]:
    if isinstance(layer, RotorLayer):
        return SINGLE, state_of(layer)
    if type(layer) is DynamicSlidingWindowLayer:
        return _SLIDING, _sliding_state(layer)
    raise ValueError(
        f"[prompt cache] A file can hold compressed layers and sliding windows, but layer {index} "
        f"is a {type(layer).__name__}; keep this cache in memory."
    )


def state_of(layer: RotorLayer) -> State:
    """Everything a compressed layer holds, as ``RotorKVCache.state`` gives it on the MLX side."""
    if len({*zip(layer.padding, layer.packed, strict=True)}) > 1:
        raise ValueError(
            f"[prompt cache] All batch rows must have one length to be saved, but layer "
            f"{layer.layer} has rows of {layer.tokens} tokens; keep one row with "
            "cache.batch_select_indices first."
        )
    counts = replace(layer.rows[0]) if layer.stores else Counts()
    stores = tuple(store.saved(counts) for store in layer.stores or ())
    return list(SavedCache(layer.config, layer.layer, None, counts, stores).state)


def _config_of(path: str | Path, shapes: list[Shape], wanted: RotorConfig | None) -> RotorConfig:
    """The one configuration of a file."""
    configs = {shape.config for shape in shapes if shape.name == SINGLE}
    saved = next(iter(configs), None)
    if saved is None:
        raise ValueError(
            f"[prompt cache] A cache with compressed layers is required, but {path} holds only "
            f"{', '.join(sorted({shape.name for shape in shapes})) or 'nothing'}; make it with "
            "rotormlx."
        )
    if saved.is_calibrated:
        raise ValueError(
            "[prompt cache] A cache without a calibration is required, but this one was made with "
            "one; use it with mlx-lm."
        )
    if len(configs) > 1:
        raise _damaged("one configuration for all layers", sorted(map(str, configs)))
    if wanted not in (None, saved):
        raise ValueError(
            f"[prompt cache] The cache must have been made with {wanted.to_json()}, but {path} was "
            f"made with {saved.to_json()}; leave rotor_config out, or make it again."
        )
    return saved


def _check_classes(path: str | Path, classes: Sequence[str], cache: RotorCache) -> None:
    """Refuse a file whose layers are of other kinds than the model's."""
    if len(cache.layers) != len(classes):
        raise ValueError(
            f"[prompt cache] The model has {len(cache.layers)} layers, but the cache in {path} "
            f"{len(classes)}; use it with the model that it was made with."
        )
    names: dict[type, str] = {RotorLayer: SINGLE, DynamicSlidingWindowLayer: _SLIDING}
    for index, (layer, name) in enumerate(zip(cache.layers, classes, strict=True)):
        if names.get(type(layer)) != name:
            raise ValueError(
                f"[prompt cache] Layer {index} of the model has a {type(layer).__name__}, but "
                f"the cache in {path} has a {name} there; use it with the model that it was "
                "made with."
            )


def _check_shape(index: int, shape: Shape, cache: RotorCache, config: PreTrainedConfig) -> None:
    """Refuse what does not fit a layer of the model."""
    if shape.name == SINGLE and shape.layer != index:
        raise _damaged(f"layer {index} at position {index}", f"layer {shape.layer}")
    if shape.limited:
        raise ValueError(
            "[prompt cache] A cache without a limit of its size is required, but this one was made "
            "with max_kv_size; use it with mlx-lm."
        )
    layer = cache.layers[index]
    if isinstance(layer, DynamicSlidingWindowLayer) and shape.window != layer.sliding_window:
        raise _misfit(f"a window of {layer.sliding_window} tokens in layer {index}", shape.window)
    if shape.dims is not None and not set(shape.dims[1:]) <= _head_dims(config):
        raise _misfit(
            f"vectors of {' or '.join(map(str, sorted(_head_dims(config))))} dimensions in layer "
            f"{index}",
            f"{shape.dims[1]} and {shape.dims[2]}",
        )


def _head_dims(config: PreTrainedConfig) -> set[int]:
    """What a vector of this model may have as dimensions."""
    text = config.get_text_config()
    named = set(_named_dims(text.to_dict()))
    heads, hidden = getattr(text, "num_attention_heads", 0), getattr(text, "hidden_size", 0)
    if heads and hidden:
        named.add(hidden // heads)
    # Where a part of a vector is turned by position, the parts have names, and not the whole.
    return named | {a + b for a in named for b in named if a != b}


def _named_dims(settings: dict[Any, Any]) -> Iterator[int]:
    """Also those of single layers."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _named_dims(value)
        elif str(name).endswith("head_dim") and type(value) is int:
            yield value


def _fill(layer: RotorLayer, state: State, device: torch.device) -> None:
    saved = SavedCache.named(state, layer.config)
    if not saved.counts.tokens:
        return  # an empty layer: of which batch, the next tokens tell
    # No row yet: buffers are as large as a window, which only the file tells.
    layer.lazy_initialization(*(store.exact[:0].to(device) for store in saved.stores))
    layer.batch_size = saved.stores[0].exact.shape[0]
    layer.length, layer.padding = saved.counts.tokens, [0] * layer.batch_size
    layer.rows = [replace(saved.counts) for _ in range(layer.batch_size)]
    for store, arrays in zip(layer.stores or (), saved.stores, strict=True):
        store.fill(arrays)


def _sliding_state(layer: DynamicSlidingWindowLayer) -> State:
    """As ``RotatingKVCache.state``: keys, values, offset, keep, size, next place."""
    window, offset = layer.sliding_window, layer.cumulative_length
    if not layer.is_initialized:
        return [None, None, 0, 0, window, 0]
    keys, values = (x[:, :, -window + 1 :] for x in _tensors(layer))
    if offset >= window:
        # A full ring has one place more, the oldest, which is written next and never read.
        keys, values = (torch.cat([x[:, :, :1], x], dim=2) for x in (keys, values))
    return [keys, values, offset, 0, window, keys.shape[2]]


def _fill_sliding(
    index: int, layer: DynamicSlidingWindowLayer, state: State, device: torch.device
) -> None:
    keys, values, offset, keep, window, place = state
    if keep:
        raise _misfit(f"a window without kept tokens in layer {index}", f"{keep} kept tokens")
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
    """The tokens of a ring, oldest first."""
    if place == x.shape[2]:
        return x
    if place < offset:
        return torch.cat([x[:, :, place:], x[:, :, :place]], dim=2)
    return x[:, :, :place]


def _check_lengths(cache: RotorCache) -> None:
    lengths = {cache.get_seq_length(index) for index in range(len(cache.layers))}
    if len(lengths) > 1:
        raise _damaged("one number of tokens in all layers", sorted(lengths))


# ---- the file -----------------------------------------------------------------------------------


def _tensor(tensor: Tensor) -> tuple[str, tuple[int, ...], Callable[[], Array]]:
    """Dtype, shape and bytes of a tensor, which are made when their turn comes."""

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


def _misfit(required: str, came: object) -> ValueError:
    return ValueError(
        f"[prompt cache] The model requires {required}, but the cache has {came}; use it with the "
        "model that it was made with."
    )


def _damaged(required: str, came: object) -> ValueError:
    return ValueError(
        f"[prompt cache] A saved cache must hold {required}, but it holds {came!r}; "
        "the file is damaged: make it again."
    )
