"""A compressed cache for a whole model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from rotormlx.config import RotorConfig
from rotormlx.storage.calibration import Calibration
from rotormlx.torch import attention
from rotormlx.torch.calibration import arrays_of
from rotormlx.torch.implementations import attention_of
from rotormlx.torch.latent_layer import (
    RotorIndexedLatentLayer,
    RotorLatentLayer,
    latent_dim,
)
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.static_layer import RotorStaticLayer
from rotormlx.torch.store import Calibrated

# Makes a compressed layer by its index, in place of an empty one of transformers.
LayerFactory = Callable[[int, Any], RotorLayer]
# A class that transformers does not export: a growing layer with the keys of an indexer.
_INDEXED = "DynamicIndexedLayer"


class RotorCache(DynamicCache):
    """Keys and values of a model, compressed where they grow with the text.

    Pass it as ``cache`` (``past_key_values`` before transformers 5.24) to ``model.generate`` or to
    the model. Layers with full attention are compressed; sliding windows, linear attention and
    other layers keep the caches that transformers gives them.

    The kinds of layers come from the configuration alone; :func:`rotormlx.torch.report` runs the
    model itself. If the model asks for something that compressed attention does not support, the
    first step raises an error.

    Args:
        config: ``model.config``; its attention must be ``rotormlx``, see
            :func:`rotormlx.torch.apply`.
        rotor_config: How keys and values are compressed; the default configuration if None.
        calibration: What :func:`rotormlx.torch.load_calibration` read for the model; the
            configuration becomes a calibrated one then.
        max_cache_len: Maximum number of positions of a sequence, including padding. With it,
            buffers are allocated once and stay in place, for ``torch.compile`` and CUDA graphs, and
            sliding windows are transformers' static ones. None for a cache that grows.

    Raises:
        ValueError: If the model has another attention, nothing in the model can be compressed, or
            a calibrated configuration comes without a calibration.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rotor_config: RotorConfig | None = None,
        calibration: Calibration | None = None,
        *,
        max_cache_len: int | None = None,
    ) -> None:
        _check_model_config(config)
        used, holds_latents = attention_of(config), latent_dim(config) is not None
        if used != attention.NAME and not holds_latents:
            raise ValueError(
                f"[RotorCache] The model's attention must be {attention.NAME!r}, but it is "
                f'{used!r}; call model.set_attn_implementation("{attention.NAME}") or '
                "rotormlx.torch.apply(model) first."
            )
        text = config.get_text_config(decoder=True)
        exact = (
            DynamicCache(config=text)
            if max_cache_len is None
            else StaticCache(config=text, max_cache_len=max_cache_len)
        )
        layers = exact.layers
        if not (growing := growing_layers(layers, holds_latents=holds_latents)):
            raise ValueError(
                f"[RotorCache] {text.model_type} cannot be compressed: "
                f"{nothing_to_compress(layers)}; use transformers' DynamicCache."
            )
        make = layer_factory(
            rotor_config or RotorConfig(), calibration, holds_latents=holds_latents
        )
        self._set(layers, growing, make)

    @classmethod
    def in_place_of(
        cls, cache: DynamicCache | StaticCache, indices: Iterable[int], make: LayerFactory
    ) -> RotorCache:
        """Return an empty cache in which compressed layers replace some of the layers.

        Args:
            cache: The cache that transformers made.
            indices: Indices of the layers to replace.
            make: Function that makes a layer; see :func:`layer_factory`.
        """
        made = cls.__new__(cls)
        made._set(cache.layers, indices, make)
        return made

    def _set(self, layers: list[Any], indices: Iterable[int], make: LayerFactory) -> None:
        compressed: dict[int, Any] = {index: make(index, layers[index]) for index in indices}
        Cache.__init__(self, layers=[compressed.get(i, x) for i, x in enumerate(layers)])

    @property
    def rotor_config(self) -> RotorConfig | None:
        """The configuration of all compressed layers; None if their bits differ."""
        configs = {layer.config for layer in self.rotor_layers}
        return configs.pop() if len(configs) == 1 else None

    @property
    def rotor_layers(self) -> list[RotorLayer]:
        """The compressed layers."""
        return [layer for layer in self.layers if isinstance(layer, RotorLayer)]

    @property
    def packed_tokens(self) -> int:
        """Tokens that every compressed layer and batch row holds packed."""
        return min(layer.packed_tokens for layer in self.rotor_layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated over all layers, including room for growth."""
        return sum(_nbytes(layer) for layer in self.layers)

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: compressed layers cannot be offloaded."""
        self.rotor_layers[0].offload()

    prefetch = offload

    def __iter__(self) -> Iterator[NoReturn]:
        raise ValueError(
            "[RotorCache] Iteration over the cache reads keys and values as tensors, but they are "
            "stored compressed; iterate over cache.layers, or use save_prompt_cache to store them."
        )


def growing_layers(layers: list[Any], *, holds_latents: bool = False) -> list[int]:
    """Return the indices of layers that keep all tokens, and only keys and values.

    Args:
        layers: Empty layers that transformers made.
        holds_latents: Whether they hold latents (MLA); then they may also hold the keys of an
            indexer.
    """
    # Exactly these classes: their subclasses keep more, or less.
    plain = (DynamicLayer, StaticLayer)
    return [
        index
        for index, layer in enumerate(layers)
        if type(layer) in plain or (holds_latents and type(layer).__name__ == _INDEXED)
    ]


def nothing_to_compress(layers: list[Any]) -> str:
    """Return the reason for refusing a model whose layers are all of other kinds."""
    kinds = sorted({type(layer).__name__ for layer in layers})
    has = f"only {', '.join(kinds)}" if kinds else "none"
    return f"only plain full-attention layers can be compressed, but the model has {has}"


def is_compressed(cache: Any) -> bool:
    """Return whether a cache has compressed layers."""
    return any(isinstance(layer, RotorLayer) for layer in getattr(cache, "layers", ()))


def layer_factory(
    config: RotorConfig, calibration: Calibration | None, *, holds_latents: bool = False
) -> LayerFactory:
    """Return a function that makes a compressed layer of a model.

    Args:
        config: How to compress.
        calibration: The calibration of a calibrated configuration, else None.
        holds_latents: Whether the model keeps latents (MLA) in place of keys and values.

    Raises:
        ValueError: If a calibrated configuration comes without a calibration, or with one and the
            model keeps latents; later, if the calibration lacks a layer, or a layer of latents
            would be a static one.
    """
    if holds_latents:
        return partial(_latent_layer, config)
    if calibration is None and not config.is_calibrated:
        return partial(_layer, config, None)
    if not isinstance(calibration, Calibration):
        came = "none" if calibration is None else f"a {type(calibration).__name__}"
        raise ValueError(
            f"[RotorCache] A calibrated configuration needs its calibration, but {came} was given; "
            "pass calibration=rotormlx.torch.load_calibration(path, model)."
        )
    own = calibration.by_layer(calibration.configured(config))

    def make(layer: int, like: Any = None) -> RotorLayer:
        arrays = arrays_of(calibration, layer)  # refuses a layer that was not calibrated
        return _layer(own(layer), arrays, layer, like)

    return make


def _latent_layer(config: RotorConfig, layer: int, like: Any) -> RotorLayer:
    if isinstance(like, StaticLayer):
        raise ValueError(
            "[RotorCache] Compressed latents must be in a cache that grows, but a static one was "
            "requested; leave cache_implementation and max_cache_len out."
        )
    kind = RotorIndexedLatentLayer if type(like).__name__ == _INDEXED else RotorLatentLayer
    return kind(config, layer)


def _layer(
    config: RotorConfig, arrays: Calibrated | None, layer: int, like: Any = None
) -> RotorLayer:
    max_cache_len = getattr(like, "max_cache_len", None)
    if max_cache_len is None:
        return RotorLayer(config, layer, arrays)
    return RotorStaticLayer(config, layer, arrays, max_cache_len=max_cache_len)


def _check_model_config(config: object) -> None:
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"[RotorCache] The model's configuration is required first, but a "
            f"{type(config).__name__} was given; use RotorCache(model.config, RotorConfig(...))."
        )


def _nbytes(layer: Any) -> int:
    if isinstance(layer, RotorLayer):
        return layer.nbytes
    parts = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(part.nbytes for part in parts if part is not None)
