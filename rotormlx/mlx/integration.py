"""Compressed caches for a whole model, of whichever host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.mlx import calibration as calibration_file
from rotormlx.mlx import environment, hosts
from rotormlx.mlx.cache import windows
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.calibration import arrays_of
from rotormlx.mlx.fingerprint import weights
from rotormlx.mlx.probe import compress, probe
from rotormlx.report import Report
from rotormlx.storage.calibration import Calibration, calibrated

CacheMaker = Callable[[], list[Any]]
# A calibration, or the file of one.
GivenCalibration = Calibration | str | Path


class CompressedCaches:
    """Stands in for ``model.make_cache`` and makes compressed caches.

    Args:
        host: What the model is of.
        model: The part of it that makes caches; its own are the pattern.
        own: What ``make_cache`` the instance had, if it did not have its class's.
        config: How keys and values are compressed.
        report: What the model's caches become.
        calibration: Of a calibrated configuration, else None.
        sliding_windows: Whether they are to be compressed where they can be.
    """

    def __init__(
        self,
        host: hosts.Host,
        model: Module,
        own: CacheMaker | None,
        config: RotorConfig,
        report: Report,
        calibration: Calibration | None,
        sliding_windows: bool,
    ) -> None:
        self.host = host
        # Not the model itself: a cycle would keep its weights after the last use of the model.
        self.model = weakref.ref(model)
        self.own = own
        self.config = config
        self.report = report
        self.calibration = calibration
        self.sliding_windows = sliding_windows

    def __call__(self) -> list[Any]:
        """Make caches for one sequence."""
        return self.limited(None)

    def limited(self, max_kv_size: int | None) -> list[Any]:
        """Make caches that hold at most so many tokens.

        Raises:
            ValueError: If that has no room for sink, window and a block.
        """
        model = self.model()
        # A copy of a model outlives remove() of the model it was copied from.
        self.host.use(self if model is None else model)
        own = _own_caches(self.host, model, self.own)
        return _compressed(own, self.report, self.calibration, max_kv_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCaches:
        """A copy for the copy of the model that is being made."""
        model: Any = self.model()
        twin = memo.get(id(model), model)
        settings = self.config, self.report, self.calibration, self.sliding_windows
        return CompressedCaches(self.host, twin, self.own, *settings)


def apply(
    model: Module,
    config: RotorConfig | None = None,
    calibration: GivenCalibration | None = None,
    *,
    sliding_windows: bool = True,
) -> Report:
    """Make a model use compressed caches from now on.

    ``generate``, ``stream_generate`` and everything else of its host that asks the model for its
    caches gets them. Applying again replaces the configuration; caches made before keep theirs.

    Args:
        model: What ``mlx_lm.load`` or ``mlx_vlm.load`` returned first.
        config: How keys and values are compressed; the default configuration if None.
        calibration: What :func:`rotormlx.calibrate` made of this model, or its file; the
            configuration becomes a calibrated one then. A calibrated configuration without it takes
            the calibration that is kept for the model.
        sliding_windows: Whether sliding windows and chunked attention of at least 512 tokens are
            compressed too.

    Returns:
        What is compressed, layer by layer, and what is left alone and why.

    Raises:
        ValueError: If nothing in the model can be compressed, its attention does not go through
            its host's, or a calibration is missing or of another model; nothing is changed then.
        RuntimeError: If the installed host is not one that rotormlx can extend.
    """
    config = config or RotorConfig()
    host, target = _host_and_target(model)
    own = _own_attribute(target)
    report, made = _probe(host, target, own, config, calibration, sliding_windows)
    settings = report.config, report, made, sliding_windows
    target.make_cache = CompressedCaches(host, target, own, *settings)
    return report


def remove(model: Module) -> None:
    """Give a model its own caches back; without effect on one that has them.

    The host itself is restored when no compressed model of it remains.

    Args:
        model: A model that :func:`apply`, :func:`load` or :func:`make_prompt_cache` was given.
    """
    host, target = _host_and_target(model)
    maker = _maker(target)
    if maker is not None:
        del target.make_cache
        if maker.own is not None:
            target.make_cache = maker.own
    host.release(target)


def load(
    path_or_repo: str,
    config: RotorConfig | None = None,
    calibration: GivenCalibration | None = None,
    host: str | None = None,
    *,
    sliding_windows: bool = True,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Load a model and its tokenizer or processor, with compressed caches.

    Where ``rotormlx calibrate`` has kept a calibration of the model, it is used, unless the
    configuration names another rotation than the default or a channel scale (``"none"``, say).

    Args:
        path_or_repo: A directory, or the name of a repository, as in ``mlx_lm.load``.
        config: How keys and values are compressed; the default configuration if None.
        calibration: A calibration or its file, instead of the one that is kept for the model.
        host: ``"mlx-lm"`` or ``"mlx-vlm"``, which reads images too. None for mlx-lm, and for
            mlx-vlm where it is installed and mlx-lm does not know the type of the model.
        sliding_windows: As in :func:`apply`.
        **kwargs: Everything else that the ``load`` of the host takes.

    Returns:
        What the ``load`` of the host returns: ``(model, tokenizer)``, or ``(model, processor)``.

    Raises:
        ValueError: As :func:`apply`, before any weight is read unless there is a calibration; or
            if there is no such host.
        ImportError: If the host is not installed.
    """
    lazy = kwargs.pop("lazy", False)
    config = config or RotorConfig()
    with environment.off():
        loaded: tuple[Any, ...] = hosts.load(path_or_repo, host, **kwargs)
    model = loaded[0]
    apply_with = partial(apply, model, sliding_windows=sliding_windows)
    apply_with(config.uncalibrated)  # refuses before a calibration makes it read weights
    try:
        is_open = config.rotation == ROTATIONS[0] and config.channel_scale is None
        if calibration is None and is_open:
            calibration = calibration_file.find(model)
        if calibration is not None or config.is_calibrated:
            apply_with(config, calibration)
    except BaseException:
        remove(model)
        raise
    if not lazy:
        mx.eval(loaded[0].parameters())
    return loaded


def make_prompt_cache(
    model: Module,
    config: RotorConfig | None = None,
    max_kv_size: int | None = None,
    *,
    sliding_windows: bool | None = None,
) -> list[Any]:
    """Make compressed caches for one conversation, to be passed as ``prompt_cache=``.

    The model's own setting stays what it is, so a model may run with and without.

    Args:
        model: What ``mlx_lm.load`` returned first.
        config: How keys and values are compressed; the model's configuration if None, and the
            default one if the model has none.
        max_kv_size: The most tokens that a compressed cache holds; None for no limit. Beyond it
            the oldest packed block goes, the sink stays, and positions keep growing.
        sliding_windows: As in :func:`apply`; None for the model's own setting.

    Returns:
        One cache a layer, compressed where it can be.

    Raises:
        ValueError: As :func:`apply`, or if ``max_kv_size`` is too small for sink, window and a
            block.
    """
    host, target = _host_and_target(model)
    maker = _maker(target)
    if sliding_windows is None:
        sliding_windows = maker is None or maker.sliding_windows
    if maker is not None:
        config = config or maker.config
        if (config, sliding_windows) == (maker.config, maker.sliding_windows):
            return maker.limited(max_kv_size)
    own = _own_attribute(target)
    report, calibration = _probe(host, target, own, config or RotorConfig(), None, sliding_windows)
    return _compressed(_own_caches(host, target, own), report, calibration, max_kv_size)


def _compressed(
    own: list[Any], report: Report, calibration: Calibration | None, max_kv_size: int | None
) -> list[Any]:
    """A model's own caches, those compressed that its report says."""
    make = cache_factory(report.config, calibration, max_kv_size)
    return compress(own, make, report, windows.maker(report.config, max_kv_size))


def cache_factory(
    config: RotorConfig, calibration: Calibration | None, max_kv_size: int | None = None
) -> Callable[[int], RotorKVCache]:
    """What makes the compressed cache of a layer, by its index."""
    if calibration is None:
        return lambda layer: RotorKVCache(config, layer, max_kv_size)
    of, own = partial(arrays_of, calibration), calibration.by_layer(config)
    return lambda layer: RotorKVCache(own(layer), layer, max_kv_size, of(layer))


def examine(model: Module, config: RotorConfig) -> Report:
    """What :func:`apply` would report of a configuration without a calibration; nothing is changed.

    Raises:
        ValueError: As :func:`apply`.
        RuntimeError: As :func:`apply`.
    """
    host, target = _host_and_target(model)
    with host.in_place():
        return probe(target, _own_caches(host, target, _own_attribute(target)), config)


def model_report(model: Module) -> Report:
    """The report of the latest :func:`apply`.

    Raises:
        ValueError: If the model does not use compressed caches.
    """
    maker = _maker(_host_and_target(model)[1])
    if maker is None:
        raise ValueError(
            "[model_report] A model with compressed caches is required, but this one has its own; "
            "call rotormlx.apply(model) first."
        )
    return maker.report


def _host_and_target(model: Module) -> tuple[hosts.Host, Module]:
    """What a model is of, and the part of it that makes caches."""
    host = hosts.of(model)
    return host, host.target(model)


def _maker(target: Module) -> CompressedCaches | None:
    maker = vars(target).get("make_cache")
    return maker if isinstance(maker, CompressedCaches) else None


def _probe(
    host: hosts.Host,
    target: Module,
    own: CacheMaker | None,
    config: RotorConfig,
    given: GivenCalibration | None,
    sliding_windows: bool,
) -> tuple[Report, Calibration | None]:
    """Probe a model and see to its calibration; it uses its host's change from now on."""
    with host.in_place():
        caches = _own_caches(host, target, own)
        report = probe(target, caches, config, sliding_windows=sliding_windows)
        made = None
        if given is not None or config.is_calibrated:
            report, made = calibrated(report, weights(target), given)
        host.use(target)
    return report, made


def _own_attribute(target: Module) -> CacheMaker | None:
    """The ``make_cache`` of the instance, without rotormlx, if it has another than its class."""
    maker = _maker(target)
    return maker.own if maker else vars(target).get("make_cache")


def _own_caches(host: hosts.Host, target: Any, own: CacheMaker | None) -> list[Any]:
    """The caches that a model uses by itself, whether it is compressed now or not."""
    return host.own_caches(target) if own is None else list(own())
