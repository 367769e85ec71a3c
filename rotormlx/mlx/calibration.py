"""Calibrations: what a model's cache needs to be compressed as well as can be, kept in a file.

:mod:`rotormlx.measure.calibrate` makes one from a short text.

Source: docs/FORMAT.md, section 10; docs/CALIBRATION.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from rotormlx.codec.format import KEY, ROLES
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.mlx.cache.store import Calibrated
from rotormlx.mlx.fingerprint import fingerprint, structure
from rotormlx.mlx.layer_bits import allotted
from rotormlx.mlx.learned import learned_matrix, learned_size
from rotormlx.report import Report
from rotormlx.storage import tensor_file
from rotormlx.storage.paths import cache_dir

TRANSFORMS = ("scale", "rotors", "klt")
VERSION = "1"
_COUNT = re.compile("[0-9]{1,15}")
LOSS = ".loss"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the layers of one model need to be compressed as well as can be.

    Args:
        transform: One of ``TRANSFORMS``.
        model: Fingerprint of the model's weights.
        structure: Name of the model's shapes, see :func:`rotormlx.mlx.fingerprint.structure`.
        numbers: By name what is kept, float32: ``LAYER.ROLE``, the channel scale ``[K, D]`` or the
            matrix ``[K, D, D]``; for ``rotors`` the scale, and ``LAYER.ROLE.rotors``, the
            coefficients ``[K, n]``. Where the layers were measured, ``LAYER.ROLE.loss`` ``[1]``,
            see :func:`rotormlx.measure.layer_losses.losses`.
        tokens: Tokens that were read.
    """

    transform: str
    model: str
    structure: str
    numbers: dict[str, NDArray[np.float32]]
    tokens: int

    def configured(self, config: RotorConfig) -> RotorConfig:
        """A configuration that uses this calibration and is otherwise the same."""
        if self.transform == "scale":
            return replace(config, channel_scale=CALIBRATED)
        return replace(config, rotation=CALIBRATED, channel_scale=None)

    @property
    def has_losses(self) -> bool:
        """Whether the layers were measured, so that bits go where they count."""
        return any(name.endswith(LOSS) for name in self.numbers)

    @property
    def without_losses(self) -> Calibration:
        """The same for equal bits in all layers."""
        kept = {name: array for name, array in self.numbers.items() if not name.endswith(LOSS)}
        return replace(self, numbers=kept)

    def by_layer(self, config: RotorConfig) -> Callable[[int], RotorConfig]:
        """The configuration of each layer; their bits have the mean of ``config``'s."""
        if not self.has_losses:
            return lambda layer: config
        bits = self._allotted((config.key_bits + config.value_bits) / 2)
        own = {
            layer: replace(config, key_bits=int(keys), value_bits=int(values))
            for layer, (keys, values) in zip(self.layers, bits, strict=True)
        }
        return lambda layer: own[layer]

    @cached_property
    def _allotted(self) -> Callable[[float], NDArray[np.int64]]:
        """Bits ``[layers, 2]`` of keys and values by their mean; each is found once."""
        parts = [[f"{layer}.{role}" for role in ROLES] for layer in self.layers]
        loss = np.array([[self.numbers[part + LOSS][0] for part in pair] for pair in parts])
        shapes = [[self.numbers[part].shape for part in pair] for pair in parts]
        sizes = np.array([[heads * d for heads, *_, d in pair] for pair in shapes], np.float64)
        return lru_cache(partial(allotted, loss.astype(np.float64), sizes))

    @property
    def layers(self) -> list[int]:
        """The indices of the layers."""
        return sorted({int(name.partition(".")[0]) for name in self.numbers})

    @property
    def numbers_a_head(self) -> int:
        """Numbers for the keys of one KV head of the first layer, and for its values: the mean."""
        numbers = self.without_losses.numbers
        first = [a for name, a in numbers.items() if name.startswith(f"{self.layers[0]}.")]
        return sum(a[0].size for a in first) // 2

    def of(self, layer: int) -> Calibrated:
        """What the cache of a layer takes."""
        return self._arrays[layer]

    def check(self, report: Report) -> None:
        """Refuse a calibration without the layers and shapes of a model.

        Raises:
            ValueError: If one is missing or has another shape.
        """
        config = self.configured(report.config)
        for layer in report.layers:
            if not layer.compressed:
                continue
            for role, head_dim in zip(ROLES, (layer.head_dim_k, layer.head_dim_v), strict=True):
                wanted = config.calibrated_shape(layer.kv_heads, head_dim)
                pair = self._arrays.get(layer.index)
                have = None if pair is None else pair[ROLES.index(role)].shape
                if have != wanted:
                    raise ValueError(
                        f"[calibration] The {role}s of layer {layer.index} must be calibrated with "
                        f"shape {wanted}, but the calibration has {have}; calibrate this model: "
                        "rotormlx calibrate MODEL."
                    )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that :func:`load` reads; it appears whole or not at all.

        Raises:
            ValueError: If ``path`` is no place for a file.
            OSError: If it cannot be written.

        Source: docs/FORMAT.md, section 10.
        """
        facts = {
            "version": VERSION,
            "transform": self.transform,
            "model": self.model,
            "structure": self.structure,
            "tokens": str(self.tokens),
        }
        tensor_file.write_arrays(path, self.numbers, facts, where="calibration")

    @cached_property
    def _arrays(self) -> dict[int, Calibrated]:
        """What each layer takes."""
        pairs: dict[int, list[mx.array]] = {}
        for layer in self.layers:
            for role in ROLES:
                array = self.numbers[f"{layer}.{role}"]
                if self.transform == "rotors":
                    rotors = self.numbers[f"{layer}.{role}.rotors"]
                    array = learned_matrix(rotors, array, layer, role).astype(np.float32)
                pairs.setdefault(layer, []).append(mx.array(array))
        return {layer: (keys, values) for layer, (keys, values) in pairs.items()}


def load(path: str | Path, model: Module) -> Calibration:
    """Read a calibration of a model.

    Raises:
        ValueError: If there is no such file, it is damaged, or it is of another model.

    Source: docs/FORMAT.md, section 10.
    """
    read = _read(path)
    if read.model != (own := fingerprint(model)):
        raise ValueError(
            f"[calibration] {path} must be of the model with fingerprint {own[:12]}, but it is of "
            f"another, with fingerprint {read.model[:12]!a}; calibrate this model: rotormlx "
            "calibrate MODEL."
        )
    return read


def find(model: Module, transform: str | None = None) -> Calibration | None:
    """The calibration that is kept for a model: that transform's, or the latest of any.

    Weights are read only where there is a file for a model of the same shapes.

    Raises:
        ValueError: If a file for this model is damaged.
    """
    directory = _directory(model)
    if not directory.is_dir():
        return None
    own = fingerprint(model)
    pattern = f"{own[:16]}-{transform or '*'}.safetensors"
    kept = sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime)
    return load(kept[-1], model) if kept else None


def required(model: Module, config: RotorConfig) -> Calibration:
    """The calibration that a calibrated configuration asks for.

    Raises:
        ValueError: If none is kept for the model.
    """
    transforms = TRANSFORMS[1:] if config.rotation == CALIBRATED else TRANSFORMS[:1]
    kept = [made for name in reversed(transforms) if (made := find(model, name))]
    if not kept:
        raise ValueError(
            f"[calibration] A calibration with the transform {' or '.join(transforms)} is "
            "required, but none is kept for this model; make one: rotormlx calibrate MODEL "
            f"--transform {transforms[-1]}."
        )
    return kept[0]


def default_path(model: Module, transform: str) -> Path:
    """Where the calibration of a model is kept and looked for."""
    return _directory(model) / f"{fingerprint(model)[:16]}-{transform}.safetensors"


def _directory(model: Module) -> Path:
    return cache_dir() / "calibrations" / structure(model)[:16]


# ---- files --------------------------------------------------------------------------------------


def _read(path: str | Path) -> Calibration:
    numbers, facts = tensor_file.read_arrays(path, where="calibration")
    fault = _fault_of_facts(facts) or _fault_of_numbers(numbers, facts["transform"])
    if fault is not None:
        raise ValueError(
            f"[calibration] {path} must {fault.required}, but {fault.came}; it is damaged, of "
            "another version or something else: calibrate the model again."
        )
    return Calibration(
        facts["transform"], facts["model"], facts["structure"], numbers, int(facts["tokens"])
    )


class _Fault(NamedTuple):
    """Why a file is no calibration."""

    required: str
    came: str


def _fault_of_facts(facts: dict[str, str]) -> _Fault | None:
    """What is wrong with the texts of a file."""
    if facts.get("version") != VERSION or facts.get("transform") not in TRANSFORMS:
        return _Fault(
            f"be a calibration of version {VERSION} with a transform of {', '.join(TRANSFORMS)}",
            f"it has version {facts.get('version')!a:.40} and {facts.get('transform')!a:.40}",
        )
    for fact in ("model", "structure", "tokens"):
        if fact not in facts or (fact == "tokens" and not _COUNT.fullmatch(facts[fact])):
            return _Fault(f"tell its {fact}", "it does not")
    return None


def _fault_of_numbers(numbers: dict[str, NDArray[np.float32]], transform: str) -> _Fault | None:
    """What is wrong with the arrays of a file."""
    parts = ("", ".rotors") if transform == "rotors" else ("",)
    layers = {name.partition(".")[0] for name in numbers}
    wanted = {f"{layer}.{role}{part}" for layer in layers for role in ROLES for part in parts}
    measured = {f"{layer}.{role}{LOSS}" for layer in layers for role in ROLES}
    is_complete = set(numbers) in (wanted, wanted | measured)
    if not layers or not is_complete or not all(layer.isdecimal() for layer in layers):
        return _Fault("name its arrays by layer and role", f"it has {sorted(numbers)[:4]}")
    for name, array in numbers.items():
        dimensions = 1 if name in measured else 3 if transform == "klt" else 2
        if array.dtype != np.float32 or array.ndim != dimensions or not np.isfinite(array).all():
            return _Fault(
                f"hold finite float32 numbers of {dimensions} dimensions",
                f"{name} is {array.dtype} of shape {array.shape}",
            )
        if name in measured:
            if array.shape != (1,) or array[0] < 0:
                return _Fault("hold a loss not below zero for each layer and role", f"not {name}")
        elif not _usable(transform, name, array, numbers):
            return _Fault("hold scales above zero and matrices that can be inverted", name)
    return None


def _usable(
    transform: str, name: str, array: NDArray[np.float32], numbers: dict[str, NDArray[np.float32]]
) -> bool:
    """Whether numbers of the right dtype and dimensions can be computed with."""
    if not array.size:
        return False
    if name.endswith(".rotors"):
        scale = numbers[name.removesuffix(".rotors")]
        if array.shape != (len(scale), learned_size(scale.shape[-1])):
            return False
        try:
            return bool(np.isfinite(learned_matrix(array, scale, 0, KEY)).all())
        except ValueError:  # no rotation has this head_dim
            return False
    if transform != "klt":
        return bool((array > 0).all())
    square = array.shape[1] == array.shape[2]
    return square and bool(np.isfinite(np.linalg.cond(array.astype(np.float64))).all())
