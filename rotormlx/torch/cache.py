"""A compressed cache for a whole model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from rotormlx.codec.rotation import check_head_dim
from rotormlx.config import RotorConfig
from rotormlx.storage.calibration import Calibration
from rotormlx.torch import attention
from rotormlx.torch.calibration import arrays_of
from rotormlx.torch.layer import RotorLayer


class RotorCache(Cache):
    """Keys and values of a model, compressed where they grow with the text.

    Pass it as ``cache`` (``past_key_values`` before transformers 5.24) to ``model.generate`` or to
    the model. Layers with full attention are compressed; sliding windows, linear attention and
    other layers keep the caches that transformers gives them.

    Args:
        config: ``model.config``; its attention must be ``rotormlx``, see
            :func:`rotormlx.torch.apply`.
        rotor_config: How keys and values are compressed; the default configuration if None.
        calibration: What :func:`rotormlx.torch.load_calibration` read for the model; the
            configuration becomes a calibrated one then.

    Raises:
        ValueError: If the model's attention is another, nothing in the model can be compressed, or
            a calibrated configuration comes without a calibration.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rotor_config: RotorConfig | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        _check_model_config(config)
        text = config.get_text_config(decoder=True)
        used = getattr(text, "_attn_implementation", None)
        if used != attention.NAME:
            raise ValueError(
                f"[RotorCache] The model's attention must be {attention.NAME!r}, but it is "
                f'{used!r}; call model.set_attn_implementation("{attention.NAME}") or '
                "rotormlx.torch.apply(model) first."
            )
        make = layer_factory(rotor_config or RotorConfig(), calibration)
        super().__init__(layers=compressed_layers(text, make))

    @property
    def rotor_config(self) -> RotorConfig | None:
        """The configuration of all compressed layers; None where they have bits of their own."""
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


def compressed_layers(text: PreTrainedConfig, make: Callable[[int], RotorLayer]) -> list[Any]:
    """Empty layers for a model: compressed ones for full attention, transformers' own elsewhere.

    Args:
        text: The configuration of the text model.
        make: Makes a compressed layer, by its index; see :func:`layer_factory`.

    Raises:
        ValueError: If no layer can be compressed, or one has a head_dim that the rotations lack.
    """
    own = DynamicCache(config=text).layers
    # Exactly this class: what derives from it keeps more than keys and values.
    grows = [type(layer) is DynamicLayer for layer in own]
    if not any(grows):
        has = ", ".join(sorted({type(layer).__name__ for layer in own})) or "nothing"
        raise ValueError(
            f"[RotorCache] {text.model_type} must have at least one layer with full attention to "
            f"be compressed, but all it has is {has}; use transformers' DynamicCache."
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"[RotorCache] {text.model_type} caps its attention scores, which compressed attention "
            "does not; use the model without rotormlx."
        )
    for head_dim in layer_dims(text)[1:]:
        check_head_dim(head_dim)
    layers = enumerate(zip(own, grows, strict=True))
    return [make(index) if grow else layer for index, (layer, grow) in layers]


def layer_factory(
    config: RotorConfig, calibration: Calibration | None
) -> Callable[[int], RotorLayer]:
    """A function that makes a compressed layer of a model, by its index.

    Raises:
        ValueError: If a calibrated configuration comes without a calibration; later, if that lacks
            a layer.
    """
    if calibration is None and not config.is_calibrated:
        return partial(RotorLayer, config)
    if not isinstance(calibration, Calibration):
        came = "none" if calibration is None else f"a {type(calibration).__name__}"
        raise ValueError(
            f"[RotorCache] A calibrated configuration needs its calibration, but {came} came; "
            "pass calibration=rotormlx.torch.load_calibration(path, model)."
        )
    own = calibration.by_layer(calibration.configured(config))

    def make(layer: int) -> RotorLayer:
        arrays = arrays_of(calibration, layer)  # refuses a layer that was not calibrated
        return RotorLayer(own(layer), layer, arrays)

    return make


def layer_dims(text: PreTrainedConfig) -> tuple[int, int, int]:
    """KV heads, key dimension and value dimension that a model's configuration tells."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "kv_lora_rank", None) is not None and hasattr(text, "qk_rope_head_dim"):
        # Multi-head latent attention caches expanded heads in transformers.
        return kv_heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return kv_heads, head_dim, head_dim


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


attention.register()
