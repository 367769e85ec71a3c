"""Compressed caches for a whole model of any host."""

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
# A calibration, or its file.
GivenCalibration = Calibration | str | Path


class CompressedCaches:
    """A replacement of ``model.make_cache`` that makes compressed caches.

    Args:
        host: The host of the model.
        model: The part of the model that makes caches.
        own: The ``make_cache`` that the instance had before; None if only its class has one.
        config: The compression settings.
        report: The report on the model's caches.
        calibration: The calibration of a calibrated configuration, else None.
        sliding_windows: Whether sliding windows are compressed if possible.
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
        # A weak reference, because a cycle would keep the weights after the last use of the model.
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
        """Make caches that hold at most ``max_kv_size`` tokens.

        Raises:
            ValueError: If ``max_kv_size`` has no room for sink, window and a block.
        """
        model = self.model()
        # Registered again, because a copy of a model may outlive remove() of the original.
        self.host.use(self if model is None else model)
        own = _own_caches(self.host, model, self.own)
        return _compressed(own, self.report, self.calibration, max_kv_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCaches:
        """Return a copy for a copy of the model."""
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
    """Make a model use compressed caches.

    ``generate``, ``stream_generate`` and all other functions of its host that make caches then get
    compressed ones. Applying again replaces the configuration; existing caches keep theirs.

    Args:
        model: The first item that ``mlx_lm.load`` or ``mlx_vlm.load`` returned.
        config: The compression settings; the default configuration if None.
        calibration: A calibration of this model from :func:`rotormlx.calibrate`, or its file; the
            configuration then becomes a calibrated one. Without it, a calibrated configuration
            takes the calibration stored for the model.
        sliding_windows: Whether sliding windows and chunked attention of at least 512 tokens are
            compressed too.

    Returns:
        A report on every layer: compressed, or left alone with the reason.

    Raises:
        ValueError: If nothing in the model can be compressed, if its attention does not use its
            host's function, or if a calibration is missing or of another model. Nothing is then
            changed.
        RuntimeError: If rotormlx cannot extend the installed version of the host.
    """
    config = config or RotorConfig()
    host, target = _host_and_target(model)
    own = _own_attribute(target)
    report, made = _probe(host, target, own, config, calibration, sliding_windows)
    settings = report.config, report, made, sliding_windows
    target.make_cache = CompressedCaches(host, target, own, *settings)
    return report


def remove(model: Module) -> None:
    """Restore a model's own caches; do nothing if it uses them already.

    The host itself is restored when no compressed model of this host remains.

    Args:
        model: A model that was passed to :func:`apply` or :func:`make_prompt_cache`, or came from
            :func:`load`.
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

    If ``rotormlx calibrate`` has stored a calibration of the model, it is used, unless the
    configuration names a rotation other than the default, or a channel scale.

    Args:
        path_or_repo: A directory, or the name of a repository, as in ``mlx_lm.load``.
        config: The compression settings; the default configuration if None.
        calibration: A calibration or its file, instead of the one stored for the model.
        host: ``"mlx-lm"``, or ``"mlx-vlm"`` for models that read images. None for mlx-lm, or for
            mlx-vlm if it is installed and mlx-lm does not support the model type.
        sliding_windows: As in :func:`apply`.
        **kwargs: Other arguments of the host's ``load``.

    Returns:
        The result of the host's ``load``: ``(model, tokenizer)`` or ``(model, processor)``.

    Raises:
        ValueError: In the cases of :func:`apply`, before any weights are read unless there is a
            calibration; or if ``host`` is unknown.
        ImportError: If the host is not installed.
    """
    lazy = kwargs.pop("lazy", False)
    config = config or RotorConfig()
    with environment.off():
        loaded: tuple[Any, ...] = hosts.load(path_or_repo, host, **kwargs)
    model = loaded[0]
    apply_with = partial(apply, model, sliding_windows=sliding_windows)
    apply_with(config.uncalibrated)  # refuses a model before a calibration reads its weights
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
    """Make compressed caches for one conversation, to pass as ``prompt_cache=``.

    The model's own setting does not change, so a model can run with and without them.

    Args:
        model: The first item that ``mlx_lm.load`` returned.
        config: The compression settings; the model's configuration if None, and the
            default one if the model has none.
        max_kv_size: The most tokens that a compressed cache holds; None for no limit. Beyond it,
            the oldest packed block is dropped, the sink stays, and positions keep growing.
        sliding_windows: As in :func:`apply`; None for the model's own setting.

    Returns:
        One cache per layer, compressed where possible.

    Raises:
        ValueError: In the cases of :func:`apply`, or if ``max_kv_size`` is too small for sink,
            window and a block.
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
    """Return a model's caches, compressed as its report says."""
    make = cache_factory(report.config, calibration, max_kv_size)
    return compress(own, make, report, windows.maker(report.config, max_kv_size))


def cache_factory(
    config: RotorConfig, calibration: Calibration | None, max_kv_size: int | None = None
) -> Callable[[int], RotorKVCache]:
    """Return a function that makes the compressed cache of a layer, by its index."""
    if calibration is None:
        return lambda layer: RotorKVCache(config, layer, max_kv_size)
    of, own = partial(arrays_of, calibration), calibration.by_layer(config)
    return lambda layer: RotorKVCache(own(layer), layer, max_kv_size, of(layer))


def examine(model: Module, config: RotorConfig) -> Report:
    """Return the report that :func:`apply` would give without a calibration; change nothing.

    Raises:
        ValueError: In the cases of :func:`apply`.
        RuntimeError: In the cases of :func:`apply`.
    """
    host, target = _host_and_target(model)
    with host.in_place():
        return probe(target, _own_caches(host, target, _own_attribute(target)), config)


def model_report(model: Module) -> Report:
    """Return the report of the latest :func:`apply`.

    Raises:
        ValueError: If the model does not use compressed caches.
    """
    maker = _maker(_host_and_target(model)[1])
    if maker is None:
        raise ValueError(
            "[model_report] A model with compressed caches is required, but this one uses its own; "
            "call rotormlx.apply(model) first."
        )
    return maker.report


def _host_and_target(model: Module) -> tuple[hosts.Host, Module]:
    """Return the host of a model, and the part of the model that makes caches."""
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
    """Probe a model, find its calibration, and register it as a user of its host's change."""
    with host.in_place():
        caches = _own_caches(host, target, own)
        report = probe(target, caches, config, sliding_windows=sliding_windows)
        made = None
        if given is not None or config.is_calibrated:
            report, made = calibrated(report, weights(target), given)
        host.use(target)
    return report, made


def _own_attribute(target: Module) -> CacheMaker | None:
    """Return the instance's own ``make_cache`` without rotormlx; None if it has none."""
    maker = _maker(target)
    return maker.own if maker else vars(target).get("make_cache")


def _own_caches(host: hosts.Host, target: Any, own: CacheMaker | None) -> list[Any]:
    """Return the caches that a model makes without rotormlx, even if it is compressed now."""
    return host.own_caches(target) if own is None else list(own())
