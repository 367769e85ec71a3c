"""Calibrations: channel scales or matrices computed for one model and stored in a file.

:mod:`rotormlx.measure.calibrate` makes a calibration from a short text; caches of every host can
use it.

Source: docs/FORMAT.md, section 11; docs/CALIBRATION.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rotormlx.codec import rotation
from rotormlx.codec.format import KEY, ROLES
from rotormlx.codec.layer_bits import allotted
from rotormlx.codec.learned_rotors import learned_matrix, learned_size
from rotormlx.codec.rotation import Rotation
from rotormlx.config import CALIBRATED, ROTATIONS, RotorConfig
from rotormlx.report import Report
from rotormlx.storage import tensor_file
from rotormlx.storage.fingerprint import MODEL, Fingerprint, Weights
from rotormlx.storage.paths import cache_dir

TRANSFORMS = ("scale", "rotors", "klt")
VERSION = "2"
_COUNT = re.compile("[0-9]{1,15}")
LOSS = ".loss"
_WHERE = "calibration"

Float32s = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Channel scales or matrices for the layers of one model.

    Args:
        transform: One of ``TRANSFORMS``.
        model: Fingerprint of the model's weights.
        numbers: The stored float32 arrays by name. ``LAYER.ROLE`` is the channel scale ``[K, D]``
            (for ``scale`` and ``rotors``) or the matrix ``[K, D, D]`` (for ``klt``).
            ``LAYER.ROLE.rotors`` holds the coefficients ``[K, n]`` for ``rotors``.
            ``LAYER.ROLE.loss`` ``[1]`` exists if the layers were measured, see
            :func:`rotormlx.measure.layer_losses.losses`.
        tokens: Number of tokens that the calibration read.
        is_share: Whether it covers only a share of the model's KV heads, see :meth:`share`.
    """

    transform: str
    model: Fingerprint
    numbers: dict[str, Float32s]
    tokens: int
    is_share: bool = False

    def configured(self, config: RotorConfig, source: str | Path = "A calibration") -> RotorConfig:
        """Return the same configuration, but with this calibration.

        Args:
            config: The configuration. Its bits, sink and window are kept, and its rotation too if
                the calibration has only scales.
            source: Name of the calibration in messages.

        Raises:
            ValueError: If the configuration sets a field that the calibration also sets.
        """
        if self.transform == "scale":
            made = replace(config, channel_scale=CALIBRATED)
        else:
            made = replace(config, rotation=CALIBRATED, channel_scale=None, seed=0)
        for field, asked, default, own in (
            ("rotation", config.rotation, ROTATIONS[0], made.rotation),
            ("seed", config.seed, 0, made.seed),
            ("channel_scale", config.channel_scale, None, made.used_channel_scale),
        ):
            if asked not in (default, own):
                raise ValueError(
                    f"[calibration] {source} brings its own "
                    f"{field if field != 'seed' else 'rotation'}, but {field} {asked!r} was given; "
                    "leave one of them out."
                )
        return made

    @property
    def has_losses(self) -> bool:
        """Whether the layers were measured, so that bits can be chosen per layer."""
        return any(name.endswith(LOSS) for name in self.numbers)

    @property
    def without_losses(self) -> Calibration:
        """The same calibration without losses, so that all layers have equal bits."""
        kept = {name: array for name, array in self.numbers.items() if not name.endswith(LOSS)}
        return replace(self, numbers=kept)

    def share(self, place: int, shares: int) -> Calibration:
        """Return the calibration for one of several equal shares of the KV heads.

        A calibration that already is a share returns itself.

        Args:
            place: Index of the share, counted from 0.
            shares: Number of shares.
        """
        if shares == 1 or self.is_share:
            return self
        kept = {}
        for name, array in self.numbers.items():
            heads = len(array) // shares
            own = slice(place * heads, (place + 1) * heads)
            kept[name] = array if name.endswith(LOSS) else array[own]
        return replace(self, numbers=kept, is_share=True)

    def by_layer(self, config: RotorConfig) -> Callable[[int], RotorConfig]:
        """Return a function of the layer index that gives the configuration of the layer.

        The mean of the bits over all values is at most the mean of the bits of ``config``.
        """
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
        """A cached function from a mean to the bits ``[layers, 2]`` of keys and values."""
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
        """Count of stored numbers per KV head: the mean of the first layer's keys and values."""
        numbers = self.without_losses.numbers
        first = [a for name, a in numbers.items() if name.startswith(f"{self.layers[0]}.")]
        return sum(a[0].size for a in first) // 2

    def of(self, layer: int) -> tuple[Float32s, Float32s]:
        """Return the channel scales ``[K, D]`` or matrices ``[K, D, D]`` of a layer.

        Returns:
            The array for keys and the array for values.

        Raises:
            ValueError: If this layer was not calibrated.
        """
        if layer not in self._arrays:
            raise ValueError(
                f"[calibration] Layer {layer} must be calibrated, but the calibration has "
                f"{len(self._arrays)} other layers; calibrate this model: rotormlx calibrate MODEL."
            )
        pair = self._arrays[layer]
        if self.transform != "scale" and layer not in self._rotations:
            self._rotations[layer] = tuple(map(rotation.calibrated, pair))
        return pair

    def check(self, report: Report) -> None:
        """Refuse a calibration without the layers and shapes of a model.

        Raises:
            ValueError: If a layer is missing or has another shape.
        """
        config = self.configured(report.config)
        for layer in report.layers:
            if not layer.compressed or layer.is_window:
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

    def check_model(self, weights: Weights, path: str | Path | None = None) -> None:
        """Refuse the calibration of another model.

        Args:
            weights: Weights of the model that uses the calibration.
            path: The file of the calibration, if it was read from one.

        Raises:
            ValueError: If the calibration was made with other weights.
        """
        difference = self.model.difference(weights.fingerprint)
        if difference is not None:
            raise ValueError(
                f"[calibration] {path or 'A calibration'} must be of this model, but it is of "
                f"another ({difference}); calibrate this model: rotormlx calibrate MODEL."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that :func:`load` reads, atomically.

        Raises:
            ValueError: If ``path`` is in no existing directory, or exists and is not a file.
            OSError: If the file cannot be written.

        Source: docs/FORMAT.md, section 11.
        """
        facts = {
            "version": VERSION,
            "transform": self.transform,
            MODEL: self.model.text,
            "tokens": str(self.tokens),
        }
        tensor_file.write_arrays(path, self.numbers, facts, where=_WHERE)

    @cached_property
    def _arrays(self) -> dict[int, tuple[Float32s, Float32s]]:
        """The arrays of each layer, for keys and for values."""
        keys, values = ({n: self._array(n, role) for n in self.layers} for role in ROLES)
        return {layer: (keys[layer], values[layer]) for layer in self.layers}

    @cached_property
    def _rotations(self) -> dict[int, tuple[Rotation, ...]]:
        """The rotations in use, kept so that data derived from them is not lost with a cache."""
        return {}

    def _array(self, layer: int, role: str) -> Float32s:
        array = self.numbers[f"{layer}.{role}"]
        if self.transform != "rotors":
            return array
        rotors = self.numbers[f"{layer}.{role}.rotors"]
        return learned_matrix(rotors, array, layer, role).astype(np.float32)


# ---- for a model --------------------------------------------------------------------------------


def calibrated(
    report: Report,
    weights: Weights,
    given: Calibration | str | Path | None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Report, Calibration]:
    """Find and check the calibration of a model.

    Args:
        report: Report on the model, with the requested configuration.
        weights: Weights of the model.
        given: A calibration or its file; None for the one that is stored for the model.
        share: Index and number of the shares of KV heads, see :meth:`Calibration.share`.

    Returns:
        The report with the configuration and the bits of each layer; and the calibration.

    Raises:
        ValueError: If the calibration is missing or belongs to another model, or if the model keeps
            latents.
    """
    if any(layer.holds_latents for layer in report.layers):
        raise ValueError(
            f"[calibration] A calibration must be of keys and values, but {report.model_type} "
            "keeps latents; leave the calibration out."
        )
    if isinstance(given, (str, Path)):
        made = load(given, weights)
    elif given is None:
        made = required(weights, report.config)
    elif isinstance(given, Calibration):
        made = given
    else:
        raise ValueError(
            f"[calibration] calibration must be a Calibration or its file, but a "
            f"{type(given).__name__} was given; rotormlx calibrate MODEL makes a file."
        )
    source = given if isinstance(given, (str, Path)) else f"The {made.transform} calibration"
    report = replace(report, config=made.configured(report.config, source))
    if made is given:
        made.check_model(weights)
    made = made.share(*share)
    made.check(report)
    if made.has_losses:
        report = report.by_layer(made.by_layer(report.config))
    return report, made


def load(path: str | Path, weights: Weights) -> Calibration:
    """Read the calibration of a model from a file.

    Raises:
        ValueError: If there is no such file, it is damaged, or it belongs to another model.

    Source: docs/FORMAT.md, section 11.
    """
    made = _read(path)
    made.check_model(weights, path)
    return made


def find(weights: Weights, transform: str | None = None) -> Calibration | None:
    """Return the stored calibration of a model: with this transform, or the latest with any.

    Weights are read only if there is a file for a model with the same shapes.

    Raises:
        ValueError: If a file for this model is damaged.
    """
    for path in _kept(transform):
        if _is_of(path, weights):
            return load(path, weights)
    return None


def required(weights: Weights, config: RotorConfig) -> Calibration:
    """Return the calibration that a calibrated configuration needs.

    Raises:
        ValueError: If none is stored for the model.
    """
    transforms = TRANSFORMS[1:] if config.rotation == CALIBRATED else TRANSFORMS[:1]
    kept = [made for name in reversed(transforms) if (made := find(weights, name))]
    if not kept:
        raise ValueError(
            f"[calibration] A calibration with the transform {' or '.join(transforms)} is "
            "required, but none is kept for this model; make one: rotormlx calibrate MODEL "
            f"--transform {transforms[-1]}."
        )
    return kept[0]


def default_path(weights: Weights, transform: str) -> Path:
    """Return the path where the calibration of a model is stored."""
    return _folder() / f"{weights.fingerprint.digest}-{transform}.safetensors"


def _folder() -> Path:
    return cache_dir() / "calibrations"


def _kept(transform: str | None) -> Iterator[Path]:
    """Yield the stored files, the latest first."""
    names = [*_folder().glob(f"[0-9a-f]*-{transform or '*'}.safetensors")]
    yield from sorted(names, key=lambda path: path.stat().st_mtime, reverse=True)


def _is_of(path: Path, weights: Weights) -> bool:
    """Whether a stored file belongs to this model, judged without its arrays.

    A file that cannot be read is judged by its name, which contains the digest of its model.
    """
    try:
        with tensor_file.open_tensors(path, where=_WHERE) as file:
            model = Fingerprint.from_text(file.metadata.get(MODEL, ""))
    except ValueError:
        model = None
    if model is None:
        return path.name.startswith(weights.fingerprint.digest)
    return weights.may_be(model) and model.difference(weights.fingerprint) is None


# ---- files --------------------------------------------------------------------------------------


def _read(path: str | Path) -> Calibration:
    numbers, facts = tensor_file.read_arrays(path, where=_WHERE)
    fault = _fault_of_facts(facts) or _fault_of_numbers(numbers, facts["transform"])
    model = Fingerprint.from_text(facts.get(MODEL, ""))
    if fault is None and model is not None:
        return Calibration(facts["transform"], model, numbers, int(facts["tokens"]))
    required, came = fault or _Fault("name its model", "it does not")
    raise ValueError(
        f"[calibration] {path} must {required}, but {came}; it is damaged, of another version or "
        "not a calibration: calibrate the model again."
    )


class _Fault(NamedTuple):
    """The reason why a file is not a calibration."""

    required: str
    came: str


def _fault_of_facts(facts: dict[str, str]) -> _Fault | None:
    """Return the first fault in the texts of a file."""
    if facts.get("version") != VERSION or facts.get("transform") not in TRANSFORMS:
        return _Fault(
            f"be a calibration of version {VERSION} with a transform of {', '.join(TRANSFORMS)}",
            f"it has version {facts.get('version')!a:.40} and {facts.get('transform')!a:.40}",
        )
    if not _COUNT.fullmatch(facts.get("tokens", "")):
        return _Fault("give its number of tokens", "it does not")
    return None


def _fault_of_numbers(numbers: dict[str, Float32s], transform: str) -> _Fault | None:
    """Return the first fault in the arrays of a file."""
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
                return _Fault(
                    "hold a loss not below zero for each layer and role", f"{name} is invalid"
                )
        elif not _usable(transform, name, array, numbers):
            return _Fault(
                "hold scales above zero and matrices that can be inverted", f"{name} is invalid"
            )
    return None


def _usable(transform: str, name: str, array: Float32s, numbers: dict[str, Float32s]) -> bool:
    """Whether numbers of the right dtype and dimensions are valid scales, rotors or matrices."""
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
