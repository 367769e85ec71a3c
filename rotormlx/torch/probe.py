"""A trial run of a model of transformers: what can be compressed, and does it reach attention?

A few tokens go through the model itself, weights and hooks included, so that a quantized, patched
or offloaded model is judged as it is; that takes as long as two tokens of text. Its attention
pretends, and its cache hands out handles that keep a record of whatever is done with them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from rotormlx.report import LayerReport
from rotormlx.torch import onlookers
from rotormlx.torch.cache import growing_layers, nothing_to_compress
from rotormlx.torch.implementations import another_attention
from rotormlx.torch.onlookers import ProbeCache, ProbeLayer, trial

# What transformers calls to make a cache for ``generate``.
PREPARE = "_prepare_cache_for_generation"
# What a model may call its cache; the second is the name of versions before 5.24.
CACHE_NAMES = ("cache", "past_key_values")
# Prefill and decode: some models take another path for a single token.
PROBE_TOKENS = (3, 1)


def probe(model: PreTrainedModel) -> tuple[LayerReport, ...]:
    """Run the model on a few tokens and see, layer by layer, what can be compressed.

    The model is as before afterwards.

    Args:
        model: What ``from_pretrained`` returned.

    Returns:
        One entry per cache, without bits, which a configuration gives; those of cross-attention
        follow those of self-attention.

    Raises:
        ValueError: If nothing can be compressed, or the model cannot do without its own attention.
    """
    caches = own_cache(model)
    own = self_attention(caches)
    if not (growing := growing_layers(own.layers)):
        raise refusal(model, f"it must have {nothing_to_compress(own.layers)}")
    layers = [ProbeLayer(i) if i in growing else layer for i, layer in enumerate(own.layers)]
    tried: Cache = ProbeCache(layers=layers)
    if isinstance(caches, EncoderDecoderCache):
        tried = EncoderDecoderCache(tried, caches.cross_attention_cache)
    with _prepared(model), trial() as refused:
        for tokens in PROBE_TOKENS:
            _step(model, tried, layers, tokens)
    if refused:
        raise refusal(model, refused[0])
    if all(reasons := [layer.reason for layer in _probes(layers)]):
        raise refusal(model, reasons[0])
    reports = [_layer_report(index, layer) for index, layer in enumerate(layers)]
    if isinstance(caches, EncoderDecoderCache):
        reports += _cross_reports(len(reports), caches.cross_attention_cache)
    return tuple(reports)


def cache_name(model: PreTrainedModel) -> str:
    """What the model's ``forward`` calls its cache.

    Raises:
        ValueError: If it takes no cache.
    """
    names = inspect.signature(type(model).forward).parameters
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise refusal(model, f"its forward must take a cache named {' or '.join(CACHE_NAMES)}")


def own_cache(model: PreTrainedModel) -> Any:
    """An empty cache as ``generate`` makes it for this model.

    Raises:
        ValueError: If it makes none, or one that is no plain ``DynamicCache``.
        RuntimeError: If the installed transformers makes its caches in another way.
    """
    name = cache_name(model)
    prepare = getattr(type(model), PREPARE, None)
    if not callable(prepare):
        raise RuntimeError(
            f"[apply] transformers must have {type(model).__name__}.{PREPARE}, but the installed "
            "one has not; use the model without rotormlx."
        )
    settings = copy.deepcopy(model.generation_config)
    settings.update(use_cache=True, cache_implementation=None, is_assistant=False)
    made: dict[str, Any] = {}
    # What an encoder gives; its length decides nothing about a cache that grows.
    try:
        prepare(model, settings, made, GenerationMode.GREEDY_SEARCH, 1, sum(PROBE_TOKENS))
    except Exception as error:  # what is wrong with a configuration shows in any way
        raise refusal(model, f"transformers must make its cache, but {brief(error)}") from error
    cache = made.get(name)
    own = self_attention(cache)
    if own is None:
        raise refusal(model, "generate must make its cache, but makes none for this model")
    if type(own) is not DynamicCache:
        raise refusal(model, f"its cache must be a DynamicCache, but it is a {type(own).__name__}")
    return cache


def self_attention(cache: Any) -> Any:
    """The part of a model's cache that grows with the text."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def refusal(model: PreTrainedModel, reason: str) -> ValueError:
    """What apply says of a model that it cannot compress."""
    return ValueError(
        f"[apply] {model.config.get_text_config(decoder=True).model_type} cannot be compressed: "
        f"{reason}; use the model without rotormlx."
    )


# ---- a step -------------------------------------------------------------------------------------


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, not compiled, with an attention that pretends; then as it was.

    What a run may change comes back: attributes of modules, buffers, and the states of the random
    number generators. Buffers that are weights are not copied.
    """
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with (
        _kept_modules(model),
        another_attention(model, onlookers.NAME, cache_name(model)),
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


def _step(model: PreTrainedModel, cache: Cache, layers: list[Any], tokens: int) -> None:
    try:
        model(**_inputs(model, tokens), use_cache=True, **{cache_name(model): cache})
    except Exception as error:  # a model may do anything with what it gets, so anything may come
        reasons = [layer.reason for layer in _probes(layers) if layer.reason]
        before = f"{reasons[0]}, and then" if reasons else "it must run on a few tokens, but"
        raise refusal(model, f"{before} {brief(error)}") from error
    for layer in _probes(layers):
        layer.end_step()
        # A model that repeats layers appends copies of them; it will be given compressed ones.
        layers[layer.layer].note(layer.reason)


def _probes(layers: list[Any]) -> list[ProbeLayer]:
    return [layer for layer in layers if isinstance(layer, ProbeLayer)]


def _inputs(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    ids = torch.full((1, tokens), _plain_token(model), device=_device(model))
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if model.main_input_name == "input_ids":
        return {"input_ids": ids, "decoder_input_ids": ids}
    states = torch.zeros(1, 4, _encoder_width(model), dtype=model.dtype, device=ids.device)
    encoded = BaseModelOutput(last_hidden_state=states)
    encoded.attention_mask = None  # some models ask their encoder's output for it
    return {"encoder_outputs": encoded, "decoder_input_ids": ids}


def _plain_token(model: PreTrainedModel) -> int:
    """A token that stands for nothing but itself."""
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
    """Where the model takes its inputs; weights that accelerate moves lie elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)


def _encoder_width(model: PreTrainedModel) -> int:
    config = model.config
    for part in (getattr(config, "encoder", config), config.get_text_config(decoder=True)):
        if (width := getattr(part, "hidden_size", None)) is not None:
            return int(width)
    raise ValueError("the width of its encoder must be in the configuration, but is not")


# ---- what is said -------------------------------------------------------------------------------


def brief(error: Exception) -> str:
    """Kind and first sentence of an error."""
    first = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"


def _layer_report(index: int, layer: Any) -> LayerReport:
    name = type(layer).__name__
    if isinstance(layer, ProbeLayer):
        keys, values = layer.past or (torch.empty(0, 0, 0, 0),) * 2
        shape = _dims(keys, values)
        return LayerReport(
            index,
            DynamicLayer.__name__,
            not layer.reason,
            layer.reason,
            *shape,
            exact_bytes=keys.dtype.itemsize,
        )
    pair = getattr(layer, "keys", None), getattr(layer, "values", None)
    is_full = all(isinstance(x, Tensor) and x.ndim == 4 for x in pair)
    shape = _dims(*pair) if is_full else (0, 0, 0)
    limit = getattr(layer, "sliding_window", None)
    if isinstance(layer, DummyLayer):
        return LayerReport(index, name, False, "it holds nothing of its own")
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        state = sum(x.nbytes for x in tree_leaves(_states(layer)) if isinstance(x, Tensor))
        reason = "a state of constant size"
        reason += " beside keys and values" if is_full else ", no keys and values"
        return LayerReport(index, name, False, reason, *shape, max_tokens=limit, state_bytes=state)
    if limit is not None:
        reason = f"it never keeps more than {limit} tokens"
        return LayerReport(index, name, False, reason, *shape, max_tokens=limit)
    return LayerReport(index, name, False, "a kind of cache that rotormlx does not know", *shape)


def _states(layer: Any) -> dict[str, Any]:
    return {name: x for name, x in vars(layer).items() if "state" in name}


def _dims(keys: Any, values: Any) -> tuple[int, int, int]:
    return keys.shape[1], keys.shape[3], values.shape[3]


def _cross_reports(first: int, cross: Cache) -> list[LayerReport]:
    reason = "it holds what the encoder gave, which does not grow"
    return [
        LayerReport(first + i, f"{type(layer).__name__} of cross-attention", False, reason)
        for i, layer in enumerate(cross.layers)
    ]
