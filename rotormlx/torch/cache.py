"""A compressed cache for a whole model of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from rotormlx.config import RotorConfig
from rotormlx.torch import attention
from rotormlx.torch.implementations import attention_of
from rotormlx.torch.layer import RotorLayer


class RotorCache(DynamicCache):
    """Keys and values of a model, compressed where they grow with the text.

    Pass it as ``cache`` (``past_key_values`` before transformers 5.24) to ``model.generate`` or to
    the model. Layers with full attention are compressed; sliding windows, linear attention and
    other layers keep the caches that transformers gives them.

    A configuration tells the kinds of layers only; :func:`rotormlx.torch.report` tries the model
    itself. What attention over compressed keys cannot do raises at the first step.

    Args:
        config: ``model.config``; its attention must be ``rotormlx``, see
            :func:`rotormlx.torch.apply`.
        rotor_config: How keys and values are compressed; the default configuration if None.

    Raises:
        ValueError: If the model's attention is another, nothing in the model can be compressed, or
            the configuration is a calibrated one.
    """

    def __init__(self, config: PreTrainedConfig, rotor_config: RotorConfig | None = None) -> None:
        _check_model_config(config)
        used = attention_of(config)
        if used != attention.NAME:
            raise ValueError(
                f"[RotorCache] The model's attention must be {attention.NAME!r}, but it is "
                f'{used!r}; call model.set_attn_implementation("{attention.NAME}") or '
                "rotormlx.torch.apply(model) first."
            )
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        if not (growing := growing_layers(layers)):
            raise ValueError(
                f"[RotorCache] {text.model_type} must have {nothing_to_compress(layers)}; use "
                "transformers' DynamicCache."
            )
        self._set(layers, growing, rotor_config or RotorConfig())

    @classmethod
    def in_place_of(
        cls, cache: DynamicCache, indices: Iterable[int], rotor_config: RotorConfig
    ) -> RotorCache:
        """A cache with the layers of an empty one, of which some are replaced by compressed ones.

        Args:
            cache: As transformers made it.
            indices: Which layers are replaced.
            rotor_config: How keys and values are compressed.

        Raises:
            ValueError: If the configuration is a calibrated one.
        """
        made = cls.__new__(cls)
        made._set(cache.layers, indices, rotor_config)
        return made

    def _set(self, layers: list[Any], indices: Iterable[int], config: RotorConfig) -> None:
        check_uncalibrated(config)
        self.rotor_config = config
        compressed: dict[int, Any] = {index: RotorLayer(config, index) for index in indices}
        Cache.__init__(self, layers=[compressed.get(i, x) for i, x in enumerate(layers)])

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
        """Bytes allocated over all layers, room for growth included."""
        return sum(_nbytes(layer) for layer in self.layers)

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as by every compressed layer."""
        self.rotor_layers[0].offload()

    prefetch = offload

    def __iter__(self) -> Iterator[NoReturn]:
        raise ValueError(
            "[RotorCache] Keys and values lie compressed, but were asked for as tensors, layer by "
            "layer; iterate over cache.layers, or use save_prompt_cache to store them."
        )


def growing_layers(layers: list[Any]) -> list[int]:
    """Indices of the layers that keep all tokens, and nothing but keys and values."""
    # Exactly this class: what derives from it keeps more, or less.
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def nothing_to_compress(layers: list[Any]) -> str:
    """What is required of layers none of which grows, and what they are."""
    has = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "nothing"
    return f"at least one layer with full attention to be compressed, but all it has is {has}"


def is_compressed(cache: Any) -> bool:
    """Whether a cache has compressed layers."""
    return any(isinstance(layer, RotorLayer) for layer in getattr(cache, "layers", ()))


def check_uncalibrated(config: RotorConfig) -> None:
    """Refuse calibrations, which are of MLX models."""
    if config.is_calibrated:
        raise ValueError(
            "[RotorCache] A configuration without a calibration is required, but "
            f"{config.to_json()} was given; calibrations are of MLX models."
        )


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
