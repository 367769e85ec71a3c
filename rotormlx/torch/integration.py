"""Compressed caches for a whole model of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.report import LayerReport, Report
from rotormlx.storage.calibration import Calibration, calibrated
from rotormlx.torch import attention
from rotormlx.torch.cache import RotorCache, compressed_layers, layer_dims
from rotormlx.torch.exact import Name
from rotormlx.torch.fingerprint import weights
from rotormlx.torch.layer import RotorLayer

# What transformers calls to make a cache for ``generate``; ours stands before it on the instance.
_PREPARE = "_prepare_cache_for_generation"
# Where it puts the cache; the second is the name of versions before 5.24.
_CACHE_NAMES = ("cache", "past_key_values")


class CompressedCaches:
    """Stands before a model's ``_prepare_cache_for_generation`` and makes its cache compressed.

    Args:
        model: The model.
        config: How keys and values are compressed.
        former: The attention that the model had.
        calibration: Of a calibrated configuration, else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RotorConfig,
        former: str,
        calibration: Calibration | None,
    ) -> None:
        self.config = config
        self.former = former
        self.calibration = calibration
        self._own = getattr(type(model), _PREPARE).__get__(model)
        self._model_config = model.config

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> None:
        """Let transformers prepare a cache; a compressed one takes the place of a plain one."""
        before = {name: model_kwargs.get(name) for name in _CACHE_NAMES}
        self._own(generation_config, model_kwargs, *rest, **named)
        if generation_config.use_cache and not any(name in model_kwargs for name in _CACHE_NAMES):
            raise RuntimeError(
                f"[apply] transformers must name its cache {' or '.join(_CACHE_NAMES)}, but the "
                "installed one does not, so nothing would be compressed; install another version, "
                "or call rotormlx.torch.remove(model)."
            )
        for name, given in before.items():
            if given is None and type(model_kwargs.get(name)) is DynamicCache:
                model_kwargs[name] = self._compressed(generation_config)

    def _compressed(self, generation_config: Any) -> RotorCache:
        cache = RotorCache(self._model_config, self.config, self.calibration)
        # Sliding windows of an assistant must be able to go back; older versions cannot.
        if generation_config.is_assistant and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        return cache


def apply(
    model: PreTrainedModel,
    config: RotorConfig | None = None,
    calibration: Calibration | str | Path | None = None,
) -> Report:
    """Make a model of transformers use compressed caches from now on.

    Its attention becomes ``rotormlx``, and ``generate`` makes a :class:`RotorCache` where it would
    make a ``DynamicCache``. Applying again replaces the configuration.

    Args:
        model: What ``from_pretrained`` returned.
        config: How keys and values are compressed; the default configuration if None.
        calibration: A calibration of this model, or its file (of ``rotormlx calibrate``); the
            configuration becomes a calibrated one then. A calibrated configuration without it takes
            the calibration that is kept for the model.

    Returns:
        What is compressed, layer by layer, and what is left alone and why.

    Raises:
        ValueError: If nothing in the model can be compressed, its attention cannot be set, or a
            calibration is missing or of another model; nothing is changed then.
        RuntimeError: If the installed transformers makes its caches in another way.
    """
    config = config or RotorConfig()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"[apply] A model of transformers is required, but a {type(model).__name__} was given; "
            "pass what from_pretrained returned."
        )
    if not callable(getattr(type(model), _PREPARE, None)):
        raise RuntimeError(
            f"[apply] transformers must have {type(model).__name__}.{_PREPARE}, but the installed "
            "one has not; pass a RotorCache(model.config) to generate yourself."
        )
    made, used = report(model, config), None
    if calibration is not None or config.is_calibrated:
        made, used = calibrated(made, weights(model), calibration)
    maker = vars(model).get(_PREPARE)
    former = maker.former if isinstance(maker, CompressedCaches) else _attention_of(model)
    model.set_attn_implementation(Name(attention.NAME, former))
    if _attention_of(model) != attention.NAME:
        raise ValueError(
            f"[apply] {type(model).__name__} must let its attention be set, but does not; use the "
            "model without rotormlx."
        )
    vars(model)[_PREPARE] = CompressedCaches(model, made.config, former, used)
    return made


def remove(model: PreTrainedModel) -> None:
    """Give a model its own caches and attention back; without effect on one that has them."""
    maker = vars(model).pop(_PREPARE, None)
    if isinstance(maker, CompressedCaches):
        model.set_attn_implementation(maker.former)


def report(model: PreTrainedModel, config: RotorConfig | None = None) -> Report:
    """What would be compressed in a model, layer by layer, and what is left alone and why.

    Args:
        model: What ``from_pretrained`` returned.
        config: How keys and values would be compressed; the default configuration if None.

    Raises:
        ValueError: If nothing can be compressed.
    """
    config = config or RotorConfig()
    text = model.config.get_text_config(decoder=True)
    layers = compressed_layers(text, partial(RotorLayer, config))
    dims = layer_dims(text)
    dtype_bytes = model.dtype.itemsize
    reports = (_layer_report(i, layer, config, dims, dtype_bytes) for i, layer in enumerate(layers))
    return Report(config, text.model_type, tuple(reports))


def _layer_report(
    index: int, layer: Any, config: RotorConfig, dims: tuple[int, int, int], dtype_bytes: int
) -> LayerReport:
    name = type(layer).__name__
    _, key_dim, value_dim = dims
    if isinstance(layer, RotorLayer):
        bits = [
            codec(config.uncalibrated, dim, layer=index, role=role).bits_per_value
            for role, dim in ((KEY, key_dim), (VALUE, value_dim))
        ]
        return LayerReport(
            index,
            "DynamicLayer",
            True,
            "",
            *dims,
            key_bits=bits[0],
            value_bits=bits[1],
            exact_bytes=dtype_bytes,
        )
    limit = getattr(layer, "sliding_window", None)
    if limit is not None:
        reason = f"it never keeps more than {limit} tokens"
        return LayerReport(index, name, False, reason, *dims, max_tokens=limit)
    return LayerReport(index, name, False, "a kind of cache that rotormlx does not know")


def _attention_of(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)
