"""Caches in files, the same files that mlx-lm's ``save_prompt_cache`` writes.

A cache saved on the MLX side is read here and the other way round, bit for bit. Compressed layers
are ``RotorKVCache`` there; sliding windows are ``RotatingKVCache``, whose tokens are put in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from rotormlx.config import RotorConfig
from rotormlx.format import BLOCK, FORMAT_VERSION, KEY, VALUE, Packed
from rotormlx.torch.cache import RotorCache
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.ops import FLOATS
from rotormlx.torch.store import Store

_HEADER = 5  # format version, configuration, layer, tokens, packed tokens
_STORE = 5  # exact, words, scales, centres, channel scale
_COMPRESSED, _SLIDING = "RotorKVCache", "RotatingKVCache"

State = list[Any]


def save_prompt_cache(
    path: str | Path, cache: RotorCache, metadata: dict[str, str] | None = None
) -> None:
    """Write a cache as mlx-lm's ``save_prompt_cache`` writes it.

    Args:
        path: A ``.safetensors`` file, written anew.
        cache: All batch rows must have the same length and no padding.
        metadata: Strings to keep beside it.

    Raises:
        ValueError: If rows differ, or a layer is of a kind that the file cannot hold.

    Source: docs/FORMAT.md, section 8.
    """
    arrays: dict[str, Tensor] = {}
    facts = {f"0.{name}": text for name, text in (metadata or {}).items()} | {"2.0": ""}
    scalars = 0
    for index, layer in enumerate(cache.layers):
        name, state = _state_of(index, layer)
        facts[f"1.{index}"] = name
        for entry, value in enumerate(state):
            array, kind = _as_array(value)
            arrays[f"{index}.{entry}"] = array
            if kind is not None:
                scalars += 1
                facts[f"2.{scalars}.0"], facts[f"2.{scalars}.1"] = f"{index}.{entry}", kind
    save_file(arrays, str(path), facts)


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
    classes, states, metadata = _read(path)
    compressed = [s for c, s in zip(classes, states, strict=True) if c == _COMPRESSED]
    saved = _config_of(compressed[0]) if compressed else None
    if saved is None:
        raise ValueError(
            f"[prompt cache] A cache with compressed layers is required, but {path} holds only "
            f"{', '.join(sorted(set(classes))) or 'nothing'}; make it with rotormlx."
        )
    if rotor_config not in (None, saved):
        raise ValueError(
            f"[prompt cache] The cache must have been made with {rotor_config.to_json()}, but "
            f"{path} was made with {saved.to_json()}; leave rotor_config out, or make it again."
        )
    cache = RotorCache(config, saved)
    if len(cache.layers) != len(states):
        raise ValueError(
            f"[prompt cache] The model has {len(cache.layers)} layers, but the cache in {path} "
            f"{len(states)}; use it with the model that it was made with."
        )
    for index, (layer, name, state) in enumerate(zip(cache.layers, classes, states, strict=True)):
        if isinstance(layer, RotorLayer) and name == _COMPRESSED:
            _fill(layer, saved, state, torch.device(device))
        elif type(layer) is DynamicSlidingWindowLayer and name == _SLIDING:
            _fill_sliding(index, layer, state, torch.device(device))
        else:
            raise ValueError(
                f"[prompt cache] Layer {index} of the model has a {type(layer).__name__}, but the "
                f"cache in {path} has a {name} there; use it with the model it was made with."
            )
    _check_lengths(cache)
    return cache, metadata


# ---- one layer ----------------------------------------------------------------------------------


def _state_of(index: int, layer: Any) -> tuple[str, State]:
    if isinstance(layer, RotorLayer):
        return _COMPRESSED, state_of(layer)
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
    tokens, packed = (layer.tokens[0], layer.packed[0]) if layer.stores else (0, 0)
    state = [FORMAT_VERSION, layer.config.to_json(), layer.layer, tokens, packed]
    for store in layer.stores or ():
        state += store.state(tokens - packed, packed)
    return state


def _config_of(state: State) -> RotorConfig:
    if len(state) in (_HEADER + 2, _HEADER + 2 * _STORE + 2):
        raise ValueError(
            "[prompt cache] A cache without a limit of its size is required, but this one was made "
            "with max_kv_size; use it with mlx-lm."
        )
    if len(state) not in (_HEADER, _HEADER + 2 * _STORE):
        raise _damaged(f"{_HEADER} or {_HEADER + 2 * _STORE} entries a layer", len(state))
    version, config = state[:2]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"[prompt cache] This rotormlx reads format version {FORMAT_VERSION}, but the cache "
            f"has version {version}; make it again, or use the rotormlx that wrote it."
        )
    if not isinstance(config, str):
        raise _damaged("a configuration in JSON", config)
    return RotorConfig.from_json(config)


def _fill(layer: RotorLayer, config: RotorConfig, state: State, device: torch.device) -> None:
    if _config_of(state) != config:
        raise _damaged("one configuration for all layers", _config_of(state).to_json())
    index, tokens, packed = state[2:_HEADER]
    if any(type(n) is not int or n < 0 for n in (index, tokens, packed)):
        raise _damaged(
            "layer, tokens and packed tokens as integers from 0", (index, tokens, packed)
        )
    if index != layer.layer:
        raise _damaged(f"layer {layer.layer} at position {layer.layer}", f"layer {index}")
    if packed + (config.sink if packed else 0) > tokens or (len(state) == _HEADER and tokens):
        raise _damaged("counts that add up", (tokens, packed))
    if len(state) == _HEADER:
        return
    parts = (state[_HEADER : _HEADER + _STORE], state[_HEADER + _STORE :])
    exact = [part[0] for part in parts]
    for role, x in zip((KEY, VALUE), exact, strict=True):
        if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype not in FLOATS:
            raise _damaged(f"exact {role}s as a floating tensor of 4 dimensions", x)
    if exact[0].shape[:2] != exact[1].shape[:2]:
        raise _damaged("keys and values that agree in batch and KV heads", "others")
    layer.lazy_initialization(*(x.to(device) for x in exact))
    layer.length, layer.packed = tokens, [packed] * layer.batch_size
    for store, arrays in zip(layer.stores or (), parts, strict=True):
        _fill_store(store, arrays, tokens, packed)


def _fill_store(store: Store, arrays: State, tokens: int, packed: int) -> None:
    exact, words, scales, centres, channel_scale = arrays
    role, head_dim = store.codec.role, store.codec.head_dim
    batch, heads = store.exact.shape[:2]
    blocks = -(-packed // BLOCK)
    front = (batch, heads, blocks)

    def require(
        name: str, array: Any, shape: tuple[int, ...], dtype: torch.dtype, given: bool
    ) -> None:
        have = (tuple(array.shape), array.dtype) if isinstance(array, Tensor) else array
        want = (shape, dtype) if given else None
        if have != want:
            raise _damaged(f"{role} {name} of shape and dtype {want}", have)

    some = blocks > 0
    require("exact tokens", exact, (batch, heads, tokens - packed, head_dim), exact.dtype, True)
    require("words", words, (*front, *store.codec.words_shape), torch.uint32, some)
    require("scales", scales, (*front, BLOCK), torch.float16, some)
    require("centres", centres, (*front, head_dim), torch.float16, some and role == KEY)
    scaled = some and store.config.scales_channels
    require("channel scale", channel_scale, (heads, head_dim), torch.float32, scaled)

    device = store.exact.device
    batch_rows = range(batch)
    store.append(exact.to(device), [0 for _ in batch_rows], [exact.shape[2] for _ in batch_rows])
    if some:
        words = words.view(torch.int32)
        parts = (a if a is None else a.to(device) for a in (words, scales, centres))
        store.packed = Packed(*parts)
    store.channel_scale = None if channel_scale is None else channel_scale.to(device)


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
    if len(state) != 6:
        raise _damaged(f"6 entries for the sliding window of layer {index}", len(state))
    keys, values, offset, keep, window, place = state
    if (keep, window) != (0, layer.sliding_window):
        raise ValueError(
            f"[prompt cache] Layer {index} needs a window of {layer.sliding_window} tokens that "
            f"keeps none at its start, but the cache has {window} and keeps {keep}; use it with "
            "the model that it was made with."
        )
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


def _as_array(value: Any) -> tuple[Tensor, str | None]:
    """How mlx-lm writes an entry, and what it says about one that is no array."""
    if value is None:
        return torch.empty(0), "none"
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32), "scalar"
    if isinstance(value, str):
        return torch.tensor([ord(c) for c in value], dtype=torch.int32), "string"
    array = value.cpu().contiguous()
    return (array.view(torch.uint32) if array.dtype == torch.int32 else array), None


def _read(path: str | Path) -> tuple[list[str], list[State], dict[str, str]]:
    """Class names, states, and the metadata of the user."""
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"[prompt cache] A whole safetensors file is required, but {path} cannot be read: "
            f"{error}; check the path, or make it again."
        ) from error
    layers = sum(name.startswith("1.") for name in facts)
    classes = [facts.get(f"1.{index}", "") for index in range(layers)]
    kinds = {
        facts[name]: facts.get(f"{name[:-2]}.1")
        for name in facts
        if name.startswith("2.") and name.endswith(".0") and name.count(".") == 2
    }
    states: list[State] = []
    for index in range(layers):
        count = sum(name.startswith(f"{index}.") for name in arrays)
        names = [f"{index}.{entry}" for entry in range(count)]
        if not all(name in arrays for name in names):
            raise _damaged("entries that are numbered from 0", sorted(arrays))
        states.append([_from_array(arrays[name], kinds.get(name)) for name in names])
    if not states:
        raise ValueError(
            f"[prompt cache] A file of save_prompt_cache is required, but {path} is another "
            "safetensors file; check the path."
        )
    return classes, states, {k[2:]: text for k, text in facts.items() if k.startswith("0.")}


def _from_array(array: Tensor, kind: str | None) -> Any:
    if kind == "none":
        return None
    if kind == "scalar":
        return array.item()
    if kind == "string":
        return "".join(chr(i) for i in array.tolist())
    return array


def _damaged(required: str, came: object) -> ValueError:
    if isinstance(came, Tensor):
        came = (tuple(came.shape), came.dtype)
    return ValueError(
        f"[prompt cache] A saved cache must hold {required}, but it holds {came!r}; "
        "the file is damaged: make it again."
    )
