"""A trial run of a model of transformers: it finds out which layers can be compressed.

A few tokens run through the model itself, including weights and hooks, so that a quantized, patched
or offloaded model is tested as it is. That takes as long as two tokens of text. The cache is a
compressed one; attention reads from it, but computes nothing.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from rotormlx.codec.rotation import check_head_dim
from rotormlx.config import RotorConfig
from rotormlx.report import LayerReport, brief
from rotormlx.torch.attention import checked
from rotormlx.torch.cache import (
    RotorCache,
    growing_layers,
    layer_factory,
    nothing_to_compress,
)
from rotormlx.torch.exact import causality, check_options
from rotormlx.torch.handle import KVHandle
from rotormlx.torch.implementations import another_attention
from rotormlx.torch.latent_layer import RotorLatentLayer, latent_dim
from rotormlx.torch.layer import RotorLayer

# The method of transformers that makes a cache for ``generate``.
PREPARE = "_prepare_cache_for_generation"
# Names of the cache parameter of a model; the second is used by versions before 5.24.
CACHE_NAMES = ("cache", "past_key_values")
# Tokens of a prefill and a decode step: some models have another path for a single token.
PROBE_TOKENS = (3, 1)
# Classes whose ``generate`` reads keys and values, which a trial of ``forward`` does not show.
_READERS = ("WhisperGenerationMixin",)
# The attention function that computes nothing.
_PRETENDING = "rotormlx_probe"


def probe(model: PreTrainedModel) -> tuple[LayerReport, ...]:
    """Run the model on a few tokens and report, layer by layer, what can be compressed.

    The model is unchanged afterwards.

    Args:
        model: What ``from_pretrained`` returned.

    Returns:
        One entry per cache, without bits, which come from a configuration. Entries of
        cross-attention follow those of self-attention.

    Raises:
        ValueError: If nothing can be compressed, or the model uses keys and values in a way that a
            compressed cache does not support.
    """
    if any(kind.__name__ in _READERS for kind in type(model).__mro__):
        reason = "its generate reads keys and values, which a compressed cache does not give out"
        raise _refusal(model, reason)
    caches = own_cache(model)
    own = self_attention(caches)
    latents = latent_dim(model.config) is not None
    if not (growing := growing_layers(own.layers, holds_latents=latents)):
        raise _refusal(model, nothing_to_compress(own.layers))
    make = layer_factory(RotorConfig(), None, holds_latents=latents)
    cache: Cache = RotorCache.in_place_of(own, growing, make)
    layers = cache.layers
    if isinstance(caches, EncoderDecoderCache):
        cache = EncoderDecoderCache(cache, caches.cross_attention_cache)
    with _prepared(model, None if latents else _PRETENDING):
        for tokens in PROBE_TOKENS:
            _step(model, cache, tokens)
    for index, layer in enumerate(layers):
        if isinstance(layer, RotorLayer) and layer.is_waiting:
            reason = f"layer {index} updates its cache, but does not call the attention function"
            raise _refusal(model, reason)
    reports = [_layer_report(index, layer) for index, layer in enumerate(layers)]
    if not any(report.compressed for report in reports):
        raise _refusal(model, reports[growing[0]].reason)
    if isinstance(caches, EncoderDecoderCache):
        reports += _cross_reports(len(reports), caches.cross_attention_cache)
    return tuple(reports)


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache parameter of the model's ``forward``.

    Raises:
        ValueError: If it takes no cache.
    """
    names = inspect.signature(type(model).forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise _refusal(model, f"its forward has no parameter {' or '.join(CACHE_NAMES)}")


def own_cache(model: PreTrainedModel) -> Any:
    """Return an empty cache as ``generate`` makes it for this model.

    Raises:
        ValueError: If it makes none, or one that is not a plain ``DynamicCache``.
        RuntimeError: If the installed transformers makes its caches in another way.
    """
    name = cache_name(model)
    prepare = getattr(type(model), PREPARE, None)
    if not callable(prepare):
        raise RuntimeError(
            f"[apply] transformers must have {type(model).__name__}.{PREPARE}, but the installed "
            "version does not; use the model without rotormlx."
        )
    settings = copy.deepcopy(model.generation_config)
    settings.update(use_cache=True, cache_implementation=None, is_assistant=False)
    made: dict[str, Any] = {}
    try:
        prepare(model, settings, made, GenerationMode.GREEDY_SEARCH, 1, sum(PROBE_TOKENS))
    except Exception as error:  # a bad configuration may raise any exception
        raise _refusal(model, f"transformers cannot make its cache ({brief(error)})") from error
    cache = made.get(name)
    own = self_attention(cache)
    if own is None:
        raise _refusal(model, "generate makes no cache for it that could be replaced")
    if type(own) is not DynamicCache:
        raise _refusal(model, f"its cache must be a DynamicCache, but it is a {type(own).__name__}")
    return cache


def self_attention(cache: Any) -> Any:
    """Return the part of a model's cache that grows with the text."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"[apply] {model.config.get_text_config(decoder=True).model_type} cannot be compressed: "
        f"{reason}; use the model without rotormlx."
    )


# ---- a step -------------------------------------------------------------------------------------


@contextmanager
def _prepared(model: PreTrainedModel, attention: str | None) -> Iterator[None]:
    """Put the model into evaluation mode, not compiled, with another attention function if given.

    Afterwards everything that a run may change is restored: attributes of modules, buffers, and the
    states of the random number generators. Buffers that are weights are not copied.
    """
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with (
        _kept_modules(model),
        nullcontext()
        if attention is None
        else another_attention(model, attention, cache_name(model)),
        torch.random.fork_rng(devices=cuda),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model.eval()
        yield


@contextmanager
def _kept_modules(model: PreTrainedModel) -> Iterator[None]:
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    copies = [
        (buffer, buffer.clone())
        for module, _, buffers in kept
        for name, buffer in buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    ]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, copy_of_it in copies:
                buffer.copy_(copy_of_it)


def _step(model: PreTrainedModel, cache: Cache, tokens: int) -> None:
    try:
        model(**_inputs(model, tokens), use_cache=True, **{cache_name(model): cache})
    except Exception as error:  # a model may raise any exception
        label, _, message = str(error).partition("] ")
        # Keep what is required and what was given; the refusal adds what to do.
        reason = message.partition(";")[0].rstrip(".")
        if not label.startswith("[") or not reason:
            reason = f"its trial run on a few tokens fails ({brief(error)})"
        raise _refusal(model, reason[0].lower() + reason[1:]) from error


def _inputs(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    ids = torch.full((1, tokens), _plain_token(model), device=_device(model))
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if model.main_input_name == "input_ids":
        return {"input_ids": ids, "decoder_input_ids": ids}
    states = torch.zeros(1, 4, _encoder_width(model), dtype=model.dtype, device=ids.device)
    encoded = BaseModelOutput(last_hidden_state=states)
    encoded.attention_mask = None  # some models read this attribute
    return {"encoder_outputs": encoded, "decoder_input_ids": ids}


def _plain_token(model: PreTrainedModel) -> int:
    """Return a token without a special meaning."""
    special: set[int] = set()

    def collect(settings: dict[Any, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                collect(value)
            elif str(name).endswith(("token_id", "token_index")):
                special.update(v for v in (value if isinstance(value, list) else [value]) if v)

    collect(model.config.to_dict())
    return next(token for token in range(3, 1000) if token not in special)


def _device(model: PreTrainedModel) -> torch.device:
    """Return the device of the model's inputs; accelerate may keep weights on another one."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)


def _encoder_width(model: PreTrainedModel) -> int:
    config = model.config
    for part in (getattr(config, "encoder", config), config.get_text_config(decoder=True)):
        if (width := getattr(part, "hidden_size", None)) is not None:
            return int(width)
    raise ValueError("the configuration must give the width of the encoder, but it does not")


# ---- attention that computes nothing ------------------------------------------------------------


def _pretend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Check the arguments as attention would, and return zeros in the shape of its output."""
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        if kwargs.get("s_aux") is not None:
            check_head_dim(value.shape[-1])
            check_options(module, dropout, kwargs)
    else:
        causal = causality(module, is_causal)
        keys = checked(module, query, key, value, attention_mask, dropout, causal, kwargs)
        keys.step.read(None)
    batch, heads, tokens = query.shape[:3]
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_PRETENDING, _pretend)
AttentionMaskInterface.register(_PRETENDING, sdpa_mask)


# ---- reports ------------------------------------------------------------------------------------


def _layer_report(index: int, layer: Any) -> LayerReport:
    if isinstance(layer, RotorLayer):
        if layer.stores is None:
            reason = "no token of the text passed through it"
            return LayerReport(index, DynamicLayer.__name__, False, reason)
        keys, values = (store.exact for store in layer.stores)
        shape, size = _dims(keys, values), keys.dtype.itemsize
        return LayerReport(
            index,
            DynamicLayer.__name__,
            True,
            "",
            *shape,
            exact_bytes=size,
            holds_latents=isinstance(layer, RotorLatentLayer),
        )
    name = type(layer).__name__
    pair = getattr(layer, "keys", None), getattr(layer, "values", None)
    is_full = all(isinstance(x, Tensor) and x.ndim == 4 for x in pair)
    shape = _dims(*pair) if is_full else (0, 0, 0)
    limit = getattr(layer, "sliding_window", None)
    if name == "DummyLayer":  # unknown to older versions of transformers
        return LayerReport(index, name, False, "it holds no keys and values of its own")
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        state = sum(x.nbytes for x in tree_leaves(_states(layer)) if isinstance(x, Tensor))
        reason = "it holds a state of constant size "
        reason += "besides keys and values" if is_full else "instead of keys and values"
        return LayerReport(index, name, False, reason, *shape, max_tokens=limit, state_bytes=state)
    if limit is not None:
        reason = f"it never keeps more than {limit} tokens"
        return LayerReport(index, name, False, reason, *shape, max_tokens=limit)
    return LayerReport(index, name, False, "rotormlx does not support this kind of cache", *shape)


def _states(layer: Any) -> dict[str, Any]:
    return {name: x for name, x in vars(layer).items() if "state" in name}


def _dims(keys: Any, values: Any) -> tuple[int, int, int]:
    return keys.shape[1], keys.shape[3], values.shape[3]


def _cross_reports(first: int, cross: Cache) -> list[LayerReport]:
    reason = "it holds keys and values of the encoder's output, which do not grow"
    return [
        LayerReport(first + i, f"{type(layer).__name__} of cross-attention", False, reason)
        for i, layer in enumerate(cross.layers)
    ]
