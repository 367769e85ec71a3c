"""Compressed caches for a whole model of transformers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from rotormlx.config import RotorConfig
from rotormlx.report import Report
from rotormlx.storage.calibration import Calibration, calibrated
from rotormlx.torch import attention
from rotormlx.torch.cache import RotorCache, is_compressed, layer_factory
from rotormlx.torch.fingerprint import weights
from rotormlx.torch.implementations import Implementations, restore, set_attention, takes_cache
from rotormlx.torch.parallel import check_heads, own_heads
from rotormlx.torch.probe import CACHE_NAMES, PREPARE, cache_name, own_cache, probe, self_attention

# Values of ``cache_implementation`` whose cache is replaced by a compressed one.
_PLAIN = (None, "dynamic", "static")
# ``generate`` takes this value, which older models have in their settings, for None.
_UNSET = "hybrid"


class CompressedCaches:
    """A hook that gives a model compressed caches where exact ones would be made.

    It replaces the model's ``_prepare_cache_for_generation``, and runs before the ``forward`` of
    the model and of its parts that take the same cache.

    Args:
        model: The model.
        report: The report of what is compressed.
        former: The attention functions that the model had before.
        calibration: The calibration of a calibrated configuration, else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        report: Report,
        former: Implementations,
        calibration: Calibration | None,
    ) -> None:
        self._model = model
        latents = any(layer.holds_latents for layer in report.layers)
        self._make = layer_factory(report.config, calibration, holds_latents=latents)
        self._compressed = [layer.index for layer in report.layers if layer.compressed]
        self._former = former
        self.cache_name = cache_name(model)
        self._hooks = _hooks_before(model, self)

    def remove(self) -> None:
        """Restore the model's own caches and attention."""
        for hook in self._hooks:
            hook.remove()
        restore(self._former)

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> None:
        """Let transformers prepare a cache, and replace a plain one by a compressed one."""
        given = model_kwargs.get(self.cache_name)
        if given is not None:
            self.check(given)
        elif generation_config.use_cache:
            _check_implementation(self._model, generation_config)
        own = getattr(type(self._model), PREPARE)
        own(self._model, generation_config, model_kwargs, *rest, **named)
        if given is None and generation_config.use_cache:
            made = model_kwargs.get(self.cache_name)
            model_kwargs[self.cache_name] = self._in_place_of(made)

    def new(self) -> Cache:
        """Return the cache for a call without one."""
        return self._in_place_of(own_cache(self._model))

    def check(self, given: Any) -> None:
        """Refuse a cache that is not compressed, or does not fit this kind of model."""
        wanted = "RotorCache(model.config)"
        inner = given
        if self._model.config.is_encoder_decoder:
            wanted = f"EncoderDecoderCache({wanted}, DynamicCache(config=model.config))"
            inner = getattr(given, "self_attention_cache", None)
        if not is_compressed(inner):
            raise ValueError(
                f"[apply] A cache for {type(self._model).__name__} must be compressed, but a "
                f"{type(given).__name__} was given; leave it out, pass {wanted}, or call "
                "rotormlx.torch.remove(model)."
            )

    def _in_place_of(self, made: Any) -> Cache:
        own = self_attention(made)
        if type(own) not in (DynamicCache, StaticCache):
            raise RuntimeError(
                f"[apply] transformers must make a DynamicCache named {self.cache_name}, but it "
                f"made a {type(made).__name__}, so nothing would be compressed; install another "
                "version, or call rotormlx.torch.remove(model)."
            )
        indices = [index for index in self._compressed if index < len(own.layers)]
        cache = RotorCache.in_place_of(own, indices, self._make)
        if isinstance(made, EncoderDecoderCache):
            return EncoderDecoderCache(cache, made.cross_attention_cache)
        return cache


class _BeforeForward:
    """A hook that passes a compressed cache to a call without one, and refuses an exact cache.

    Args:
        caches: Object that makes and checks caches.
        names: Parameter names of the ``forward`` that is called.
    """

    def __init__(self, caches: CompressedCaches, names: list[str]) -> None:
        self._caches = caches
        self._names = names

    def __call__(
        self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the changed arguments of ``forward``; None to leave them as they are."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        # The older name counts too; transformers translates it later.
        given = [named[name] for name in CACHE_NAMES if named.get(name) is not None]
        for cache in given:
            self._caches.check(cache)
        if given or not _caches_by_default(part, named.get("use_cache")):
            return None
        name = self._caches.cache_name
        place = self._names.index(name)
        if place < len(args):
            return (*args[:place], self._caches.new(), *args[place + 1 :]), kwargs
        return args, kwargs | {name: self._caches.new()}


def _hooks_before(model: PreTrainedModel, caches: CompressedCaches) -> list[RemovableHandle]:
    """Add hooks to the model, and to parts that take its cache and would make their own."""
    text = model.config.get_text_config(decoder=True)
    hooks = []
    for part in model.modules():
        if (
            isinstance(part, PreTrainedModel)
            and takes_cache(part, caches.cache_name)
            and (part is model or part.config.get_text_config(decoder=True) is text)
        ):
            names = list(inspect.signature(type(part).forward).parameters)[1:]
            before = _BeforeForward(caches, names)
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
    return hooks


def _caches_by_default(part: PreTrainedModel, asked: bool | None) -> bool:
    """Return whether a part of a model makes and uses a cache if it is given none."""
    if asked is None and not torch.is_grad_enabled():
        # With gradients enabled, a call without use_cache is training and stays unchanged.
        asked = getattr(part.config.get_text_config(decoder=True), "use_cache", False)
    return bool(asked)


def _check_implementation(model: PreTrainedModel, generation_config: Any) -> None:
    """Refuse to generate with a cache of another kind."""
    asked = getattr(generation_config, "cache_implementation", None)
    if asked not in _PLAIN:
        raise ValueError(
            f"[apply] {type(model).__name__} must generate with cache_implementation=None or "
            f"'static' to be compressed, but {asked!r} is set; leave it out, set it to None in "
            "model.generation_config, or call rotormlx.torch.remove(model)."
        )


def apply(
    model: PreTrainedModel,
    config: RotorConfig | None = None,
    calibration: Calibration | str | Path | None = None,
) -> Report:
    """Make a model of transformers use compressed caches from now on.

    The model is run on a few tokens to find out what can be compressed. Then the attention of its
    text part becomes ``rotormlx``, and it gets a :class:`RotorCache` where ``generate``, or a call
    without a cache, would make a ``DynamicCache``; any other cache is refused. Applying again
    replaces the configuration.

    Args:
        model: What ``from_pretrained`` returned.
        config: How keys and values are compressed; the default configuration if None.
        calibration: A calibration of this model, or its file (from ``rotormlx calibrate``); the
            configuration then becomes a calibrated one. A calibrated configuration without this
            argument uses the calibration that is stored for the model.

    Returns:
        The report: what is compressed, layer by layer, and what is left exact and why.

    Raises:
        ValueError: If nothing in the model can be compressed, its attention cannot be set, or a
            calibration is missing or belongs to another model; nothing is changed then.
        RuntimeError: If the installed transformers makes its caches in another way.
    """
    made, used = report(model, config), None
    if calibration is not None or made.config.is_calibrated:
        made, used = calibrated(made, weights(model), calibration, own_heads(model))
    remove(model)
    # A model that keeps latents gets tensors, so any attention of its own works.
    latents = any(layer.holds_latents for layer in made.layers)
    former = [] if latents else set_attention(model, attention.NAME, cache_name(model))
    vars(model)[PREPARE] = CompressedCaches(model, made, former, used)
    return made


def remove(model: PreTrainedModel) -> None:
    """Restore a model's own caches and attention; does nothing if they are in place."""
    caches = vars(model).pop(PREPARE, None)
    if isinstance(caches, CompressedCaches):
        caches.remove()


def report(model: PreTrainedModel, config: RotorConfig | None = None) -> Report:
    """Report, layer by layer, what would be compressed in a model, and why other layers stay exact.

    The model runs on a few tokens and is unchanged afterwards.

    Args:
        model: What ``from_pretrained`` returned.
        config: How keys and values would be compressed; the default configuration if None.

    Raises:
        ValueError: If nothing can be compressed.
        RuntimeError: If the installed transformers makes its caches in another way.
    """
    config = config or RotorConfig()
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ValueError(
            f"[apply] A model of transformers that can generate is required, but a "
            f"{type(model).__name__} was given; pass what "
            "AutoModelForCausalLM.from_pretrained returned."
        )
    if model.generation_config.use_cache is False:
        raise ValueError(
            f"[apply] {type(model).__name__} must generate with a cache to have it compressed, but "
            "model.generation_config.use_cache is False; set it to True."
        )
    if model.generation_config.cache_implementation != _UNSET:
        _check_implementation(model, model.generation_config)
    check_heads(model)
    layers = tuple(
        layer.with_bits_of(config) if layer.compressed else layer for layer in probe(model)
    )
    return Report(config, model.config.get_text_config(decoder=True).model_type, layers)
