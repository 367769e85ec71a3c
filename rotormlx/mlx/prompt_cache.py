"""Prompt caches in files, checked for damage, format and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx.nn.layers.base import Module

from rotormlx.codec.counts import max_blocks
from rotormlx.mlx import hosts
from rotormlx.mlx.cache import files, windows
from rotormlx.mlx.cache.lists import compress_plain
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import same_calibrated
from rotormlx.mlx.fingerprint import fingerprint, weights
from rotormlx.mlx.host_caches import ATTRIBUTES, CHUNKED, GROWING, ROTATING, is_a, leaves
from rotormlx.mlx.integration import model_report
from rotormlx.mlx.probe import dims
from rotormlx.report import LayerReport, Report
from rotormlx.storage import cache_file
from rotormlx.storage import fingerprint as fingerprints
from rotormlx.storage.cache_fields import CHUNKED as CHUNKED_ROTOR
from rotormlx.storage.cache_fields import LAYOUTS, SINGLE, SLIDING
from rotormlx.storage.cache_file import SavedCaches
from rotormlx.storage.cache_rules import Shape
from rotormlx.storage.fingerprint import MODEL


def save_prompt_cache(
    path: str | Path, model: Module, caches: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Write caches to a file that only the same model can load.

    mlx-lm can read the file too. Its own ``save_prompt_cache`` writes the same layout, but without
    the model's fingerprint and a checksum. A save either completes or leaves the old file, even
    after an interrupt, a full disk or a crash.

    Args:
        path: A ``.safetensors`` file; the suffix is appended if it is missing.
        model: The model that filled the caches.
        caches: Its caches.
        metadata: Texts to store with them.

    Raises:
        ValueError: If a cache cannot be stored, or ``path`` is not a valid place for a file.
        OSError: If the disk is full, or the directory is read-only.
    """
    files.write(path, caches, {**(metadata or {}), MODEL: fingerprint(model).text})


def load_prompt_cache(path: str | Path, model: Module) -> tuple[list[Any], dict[str, str]]:
    """Read caches from a file for a compressed model, and compress plain caches in it.

    Compressed caches keep the bits, rotation and calibration of the file, whatever the arguments of
    :func:`rotormlx.apply` were. So they stay readable after a model is calibrated.

    The file is not trusted: its header, classes, configurations, shapes, counts and model are
    checked before any array is read. Reading takes no more memory than the size of the arrays.

    Args:
        path: A file written by :func:`save_prompt_cache` or by mlx-lm's function of that name.
        model: A model that was passed to :func:`rotormlx.apply`.

    Returns:
        The caches and the metadata.

    Raises:
        ValueError: If the file is missing, is damaged, has another format version, or belongs to
            another model.
    """
    report = model_report(model)
    with cache_file.opened(path) as saved:
        check_model(path, saved.metadata, model)
        caches = _read(path, saved, model, report)
    adopt_prompt_cache(path, model, caches)
    return caches, saved.metadata


def check_model(path: str | Path, metadata: dict[str, str], model: Module) -> None:
    """Refuse a file of a model with other weights; a file without a fingerprint passes."""
    fingerprints.check_file(path, metadata, weights(model), model_report(model).model_type)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Check the header of a file of caches, and read the texts in it.

    Raises:
        ValueError: If the file is missing or incomplete, or no prompt cache of this version.
    """
    with cache_file.opened(path) as saved:
        return saved.metadata


def read_prompt_cache(path: str | Path, model: Module) -> tuple[list[Any], dict[str, str]]:
    """Read caches without compressing plain ones and without reading weights of the model.

    Call :func:`check_model` and :func:`adopt_prompt_cache` next.
    """
    with cache_file.opened(path) as saved:
        return _read(path, saved, model, model_report(model)), saved.metadata


def _read(path: str | Path, saved: SavedCaches, model: Module, report: Report) -> list[Any]:
    host = hosts.of(model)
    _Fit(path, report).check(host.target(model).make_cache(), saved.shapes)
    return files.read(saved, host.caches)


def adopt_prompt_cache(path: str | Path, model: Module, caches: list[Any]) -> int:
    """Check that caches fit a compressed model, and convert them to its classes in place.

    Plain caches are compressed; a compressed one of another class keeps its bytes.

    Args:
        path: The file of the caches, for messages.
        model: A model that was passed to :func:`rotormlx.apply`.
        caches: The caches from :func:`read_prompt_cache`.

    Returns:
        The number of plain caches that were compressed.

    Raises:
        ValueError: If the caches belong to another model, or an empty one needs a calibration that
            the model does not have; ``caches`` is then unchanged.
    """
    fit = _Fit(path, model_report(model))
    shapes = [(index, _shape(cache)) for index, _, cache in leaves(caches)]
    fresh = hosts.of(model).target(model).make_cache()
    fit.check(fresh, shapes)
    fit.share_calibration(fresh, caches)
    return compress_plain(caches, (own for _, _, own in leaves(fresh)))


def report_of(model: Module, caches: list[Any]) -> Report:
    """Return the report of a model with these caches; its own if their settings are the same."""
    report = model_report(model)
    fresh = leaves(hosts.of(model).target(model).make_cache())
    triples = [
        (layer, own, held)
        for layer, (_, _, own), (_, _, held) in zip(
            report.layers, fresh, leaves(caches), strict=True
        )
    ]
    layers = tuple(_as_held(layer, held) for layer, _, held in triples)
    report = report if layers == report.layers else replace(report, layers=layers)
    pairs = [
        (layer.index, own, held)
        for layer, own, held in triples
        if isinstance(own, RotorKVCache) and isinstance(held, RotorKVCache)
    ]
    if all(
        own.config == held.config and same_calibrated(own.calibrated, held.calibrated)
        for _, own, held in pairs
    ):
        return report
    return report.with_configs({index: held.config for index, _, held in pairs})


def _as_held(layer: LayerReport, held: Any) -> LayerReport:
    """Return a layer's report if its window has another form in the file than in the model."""
    is_compressed = isinstance(held, RotorKVCache)
    if is_compressed == layer.compressed or layer.max_tokens is None:
        return layer
    if not is_compressed:
        return replace(layer, compressed=False, reason="its file holds it uncompressed")
    blocks = max_blocks(held.max_size, held.config)
    exact = layer.exact_bytes if held.keys is None else held.keys.itemsize
    made = replace(layer, compressed=True, reason="", max_blocks=blocks, exact_bytes=exact)
    return made.with_bits_of(held.config)


def _alike(want: Any, shape: Shape) -> set[str]:
    """Return the classes, compressed and plain, that a file may have for this cache."""
    name = LAYOUTS.get(type(want).__name__, type(want).__name__)
    if name in (ROTATING, SLIDING):
        # With a limit below the window, the layer has an ordinary cache with that limit.
        return {ROTATING, SLIDING} | ({SINGLE} if shape.limited else set())
    if name in (CHUNKED, CHUNKED_ROTOR):
        return {CHUNKED, CHUNKED_ROTOR}
    return {name, GROWING} if name == SINGLE else {name}


def _shape(cache: Any) -> Shape:
    """Return the properties of a cache that must fit a model."""
    name, window = type(cache).__name__, windows.size(cache)
    if isinstance(cache, RotorKVCache):
        limited = cache.max_size is not None
        layout = LAYOUTS.get(name, name)
        return Shape(layout, cache.config, cache.layer, limited, window, dims(cache))
    return Shape(name, window=window, dims=dims(cache) if is_a(cache, *ATTRIBUTES) else None)


class _Fit(NamedTuple):
    """Checks that caches match those that a model makes.

    path: The file of the caches, for messages.
    report: The report of the model.
    """

    path: str | Path
    report: Report

    def check(self, wanted: list[Any], shapes: Sequence[tuple[int, Shape]]) -> None:
        """Refuse caches whose shapes do not match the wanted caches."""
        expected = list(leaves(wanted))
        if len(shapes) != len(expected):
            raise self._mismatch(f"{len(expected)} caches", f"{len(shapes)}")
        for layer, (index, _, want), (place, shape) in zip(
            self.report.layers, expected, shapes, strict=True
        ):
            if place != index:
                raise self._mismatch(f"layer {index} in its place", f"a cache of layer {place}")
            self._check_layer(layer, index, want, shape)

    def _check_layer(self, layer: LayerReport, index: int, want: Any, shape: Shape) -> None:
        if shape.name not in _alike(want, shape):
            raise self._mismatch(f"{layer.cache} in layer {index}", shape.name)
        if shape.layer is not None and shape.layer != index:
            raise self._mismatch(f"layer {index} at position {index}", f"layer {shape.layer}")
        if shape.window is not None and shape.window != windows.size(want):
            raise self._mismatch(
                f"a window of {windows.size(want)} tokens in layer {index}", str(shape.window)
            )
        came = shape.dims
        if came is not None and came != (layer.kv_heads, layer.head_dim_k, layer.head_dim_v):
            raise self._mismatch(
                f"{layer.kv_heads} KV heads of {layer.head_dim_k} and {layer.head_dim_v} "
                f"dimensions in layer {index}",
                f"{came[0]} of {came[1]} and {came[2]}",
            )

    def share_calibration(self, fresh: list[Any], caches: list[Any]) -> None:
        """Share the model's calibration with empty caches and with those that have an equal one.

        Another cache that holds tokens keeps the calibration with which they were coded.
        """
        pairs = [
            (own, cache)
            for (_, _, own), (_, _, cache) in zip(leaves(fresh), leaves(caches), strict=True)
            if isinstance(own, RotorKVCache) and isinstance(cache, RotorKVCache)
        ]
        for own, cache in pairs:
            lacks = cache.config.is_calibrated and cache.empty()
            if lacks and not cache.config.takes_calibration_of(own.config):
                raise ValueError(
                    f"[prompt cache] {self.path} holds no tokens, so its calibration must come "
                    f"from the model, but this {self.report.model_type} has another or none; "
                    "apply that calibration first, or make the file again."
                )
        for own, cache in pairs:
            if cache.config.takes_calibration_of(own.config) and (
                cache.empty() or same_calibrated(own.calibrated, cache.calibrated)
            ):
                cache.calibrated = own.calibrated

    def _mismatch(self, wanted: str, came: str) -> ValueError:
        return cache_file.misfit(self.path, self.report.model_type, wanted, came)
