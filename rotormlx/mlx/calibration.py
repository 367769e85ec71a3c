"""What a short text tells about a model's keys, values and queries, and how the codec uses it.

An error of a key matters as far as queries look at it, and a quantizer behind a rotation spreads
its error over all channels alike. So channels that queries look at are made larger before, and
those that vary without being looked at smaller. With K and Q the second moments of (centred) keys
and of queries of a KV head, the map T of keys that loses least has ``T^T T = Q # K^-1``, the
geometric mean of the two matrices, and any rotation may follow. Three transforms come near to it:

- ``scale``: the best diagonal T, the channel scale ``s_i = (K_ii / Q_ii)^(1/4)``: D numbers a head;
- ``klt``: all of it, ``T = L^(-1/4) U^T Q^(1/2)`` with ``Q^(1/2) K Q^(1/2) = U L U^T``: D² numbers;
- ``rotors``: the best diagonal behind a cascade of learned rotors, which takes U's place.

For values, whose errors reach the output as they are, Q is 1.

Source: docs/FORMAT.md, section 10; docs/CALIBRATION.md has what each of them is worth.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from rotormlx.codec.format import BLOCK, KEY, ROLES
from rotormlx.codec.rotation import rotation
from rotormlx.config import CALIBRATED, RotorConfig
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.quality import default_text
from rotormlx.mlx import hook
from rotormlx.mlx.cache.lists import leaves
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import Calibrated
from rotormlx.mlx.fingerprint import fingerprint, structure
from rotormlx.mlx.layer_bits import allotted, losses
from rotormlx.mlx.learned import fitted, learned_matrix, learned_size
from rotormlx.mlx.probe import compress
from rotormlx.report import Report
from rotormlx.storage import tensor_file
from rotormlx.storage.paths import cache_dir

Floats = NDArray[np.float64]
TRANSFORMS = ("scale", "rotors", "klt")
VERSION = "1"
_COUNT = re.compile("[0-9]{1,15}")
# Tokens that a calibration reads; more of them change little (docs/CALIBRATION.md).
TOKENS = 512
_CHUNK = 64
_LOSS = ".loss"
_SINK = RotorConfig().sink
# A second moment of few tokens is drawn towards its diagonal by so much, and no channel counts less
# than this share of the mean: directions that the text hardly showed must not be blown up.
_SHRINKAGE = 0.1
_FLOOR = 1 / 64**2


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
            see :func:`rotormlx.mlx.layer_bits.losses`.
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
        return any(name.endswith(_LOSS) for name in self.numbers)

    @property
    def without_losses(self) -> Calibration:
        """The same for equal bits in all layers."""
        kept = {name: array for name, array in self.numbers.items() if not name.endswith(_LOSS)}
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
        loss = np.array([[self.numbers[part + _LOSS][0] for part in pair] for pair in parts])
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


def calibrate(
    model: Module,
    tokenizer: Any,
    *,
    transform: str = "scale",
    text: str | None = None,
    tokens: int = TOKENS,
    layers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Read a text with the exact cache and see what a model's keys, values and queries are like.

    Args:
        model: What ``mlx_lm.load`` returned first.
        tokenizer: What it returned second.
        transform: One of ``TRANSFORMS``.
        text: The text, of which the last tokens are read; prose of CPython's documentation if None.
        tokens: How many of its tokens to read.
        layers: Whether to measure each layer too, so that bits go where they count. The text is
            read again twice a layer, in float32.
        progress: Told of every token read and, then, of every layer done, if given.

    Raises:
        ValueError: If the transform is unknown, the text too short, or the model has layers that
            cannot be told apart or predicts what is not finite.
    """
    if transform not in TRANSFORMS:
        raise ValueError(
            f"[calibration] A transform must be one of {', '.join(TRANSFORMS)}, but {transform!r} "
            "was given."
        )
    text = default_text() if text is None else text
    # A token of English is 4 or 5 characters; all of a long text would take long to encode.
    ids: list[int] = tokenizer.encode(text[-8 * tokens :])[-tokens:]
    least = max(tokens, _SINK + 2 * BLOCK)
    if len(ids) < least:
        raise ValueError(
            f"[calibration] A text of at least {least} tokens is required, but {len(ids)} came; "
            "give a longer one, or another --tokens."
        )
    tell = progress or (lambda n: None)
    numbers: dict[str, NDArray[np.float32]] = {}
    for layer, (queries, keys, values) in _moments(model, ids, tell).items():
        for role, seen_by, moment in ((KEY, queries, keys), (ROLES[1], None, values)):
            for name, array in _transformed(transform, moment, seen_by, layer, role).items():
                numbers[f"{layer}.{name}"] = array.astype(np.float32)
        tell(1)
    made = Calibration(transform, fingerprint(model), structure(model), numbers, len(ids))
    if layers:
        for layer, pair in zip(made.layers, losses(model, ids, made.layers, tell), strict=True):
            for role, loss in zip(ROLES, pair, strict=True):
                numbers[f"{layer}.{role}{_LOSS}"] = np.array([loss], np.float32)
    return made


def load(path: str | Path, model: Module) -> Calibration:
    """Read a calibration of a model.

    Raises:
        ValueError: If there is no such file, it is damaged, or it is of another model.

    Source: docs/FORMAT.md, section 10.
    """
    found = _read(path)
    if found.model != (own := fingerprint(model)):
        raise ValueError(
            f"[calibration] {path} must be of the model with fingerprint {own[:12]}, but it is of "
            f"another, with fingerprint {found.model[:12]!a}; calibrate this model: rotormlx "
            "calibrate MODEL."
        )
    return found


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
    found = [made for name in reversed(transforms) if (made := find(model, name))]
    if not found:
        raise ValueError(
            f"[calibration] A calibration with the transform {' or '.join(transforms)} is "
            "required, but none is kept for this model; make one: rotormlx calibrate MODEL "
            f"--transform {transforms[-1]}."
        )
    return found[0]


def default_path(model: Module, transform: str) -> Path:
    """Where the calibration of a model is kept and looked for."""
    return _directory(model) / f"{fingerprint(model)[:16]}-{transform}.safetensors"


def _directory(model: Module) -> Path:
    return cache_dir() / "calibrations" / structure(model)[:16]


# ---- what the text shows ------------------------------------------------------------------------


@dataclass
class _Sum:
    """A second moment under way, ``[K, D, D]``."""

    total: Floats | float = 0.0
    rows: int = 0

    def add(self, x: Floats) -> None:
        """Rows ``[K, n, D]``."""
        self.total = self.total + np.swapaxes(x, 1, 2) @ x
        self.rows += x.shape[1]

    @property
    def mean(self) -> Floats:
        out: Floats = np.asarray(self.total) / self.rows
        return out


def _moments(
    model: Any, ids: list[int], tell: Callable[[int], None]
) -> dict[int, tuple[Floats, Floats, Floats]]:
    """Second moments of queries, centred keys and values of each layer, ``[K, D, D]``."""
    exact = RotorConfig(window=len(ids))  # nothing is packed
    caches = compress(make_prompt_cache(model), lambda layer: RotorKVCache(exact, layer))
    held = {i: cache for i, _, cache in leaves(caches) if isinstance(cache, RotorKVCache)}
    if len(held) < sum(isinstance(cache, RotorKVCache) for _, _, cache in leaves(caches)):
        raise ValueError(
            "[calibration] A layer must have one growing cache, but one of this model has several; "
            "use it without a calibration."
        )
    queries: dict[int, _Sum] = {}
    with hook.in_place(), numpy_linear(), hook.record_attention() as attended:
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            model(mx.array(part)[None], cache=caches)
            for q, keys, _ in attended:
                per_head = q[0].astype(mx.float32).reshape(keys.shape[1], -1, q.shape[-1])
                rows = np.array(per_head, np.float64)
                queries.setdefault(id(keys.codec), _Sum()).add(rows)
            attended.clear()
            mx.eval([cache.state for cache in held.values()])
            tell(len(part))
    found = {}
    for layer, cache in held.items():
        keys, values = cache.keys_and_values()
        found[layer] = queries[id(keys.codec)].mean, _moment(keys), _moment(values)
    return found


def _moment(view: Any) -> Floats:
    """Of whole blocks behind the sink, as the codec meets them: keys less their centre."""
    blocks = (view.tokens - _SINK) // BLOCK
    rows = view.exact[0, :, _SINK : _SINK + blocks * BLOCK].astype(mx.float32)
    x = np.array(rows, np.float64).reshape(rows.shape[0], blocks, BLOCK, -1)
    if view.codec.role == KEY:
        x = x - x.mean(2, keepdims=True)
    seen = _Sum()
    seen.add(x.reshape(*rows.shape))
    return seen.mean


# ---- transforms ---------------------------------------------------------------------------------


def _transformed(
    transform: str, moment: Floats, seen_by: Floats | None, layer: int, role: str
) -> dict[str, Floats]:
    """What is kept for one layer and role, by name."""
    moment = _steady(moment)
    metric = np.broadcast_to(np.eye(moment.shape[-1]), moment.shape)
    if seen_by is not None:
        metric = _steady(seen_by)
    if transform == "scale":
        return {role: channel_scale(moment, metric)}
    if transform == "klt":
        mix = rotation("cascade", moment.shape[-1], layer=layer, role=role).matrix
        return {role: mix @ klt(moment, metric)}
    coefficients, turned = fitted(moment, metric)
    back = np.swapaxes(turned, -1, -2)
    scale = channel_scale(turned @ moment @ back, turned @ metric @ back)
    return {role: scale, f"{role}.rotors": coefficients}


def channel_scale(moment: Floats, metric: Floats) -> Floats:
    """The best channel scales, ``[K, D]``, of geometric mean 1, for moments ``[K, D, D]``."""
    of_keys, of_queries = (np.diagonal(m, axis1=-2, axis2=-1) for m in (moment, metric))
    scale = (of_keys / of_queries) ** 0.25
    out: Floats = scale / np.exp(np.log(scale).mean(-1, keepdims=True))
    return out


def klt(moment: Floats, metric: Floats) -> Floats:
    """The best matrices, ``[K, D, D]``, of determinant ±1, for moments ``[K, D, D]``."""
    root = _power(metric, 0.5)
    size, basis = np.linalg.eigh(root @ moment @ root)
    small = size[..., -1:] * 1e-12
    size = np.maximum(size, small)
    matrix = size[..., None] ** -0.25 * (np.swapaxes(basis, -1, -2) @ root)
    _, logarithm = np.linalg.slogdet(matrix)
    out: Floats = matrix / np.exp(logarithm / matrix.shape[-1])[..., None, None]
    return out


def _power(symmetric: Floats, exponent: float) -> Floats:
    size, basis = np.linalg.eigh(symmetric)
    out: Floats = (basis * size[..., None, :] ** exponent) @ np.swapaxes(basis, -1, -2)
    return out


def _steady(moment: Floats) -> Floats:
    """A moment that few tokens cannot lead astray; 1 for a head with nothing, or with NaN."""
    identity = np.eye(moment.shape[-1])
    mean = np.trace(moment, axis1=-2, axis2=-1)[:, None, None] / len(identity)
    is_right = np.isfinite(moment).all((-2, -1), keepdims=True) & (mean > 0)
    moment = np.where(is_right, moment, identity)
    diagonal = moment * identity
    floored = np.maximum(diagonal, np.where(is_right, mean, 1.0) * _FLOOR * identity)
    out: Floats = (1 - _SHRINKAGE) * (moment - diagonal) + floored
    return out


# ---- files --------------------------------------------------------------------------------------


def _read(path: str | Path) -> Calibration:
    numbers, facts = tensor_file.read_arrays(path, where="calibration")

    def wrong(required: str, came: object) -> ValueError:
        return ValueError(
            f"[calibration] {path} must {required}, but {came}; it is damaged, of another version "
            "or something else: calibrate the model again."
        )

    if facts.get("version") != VERSION or facts.get("transform") not in TRANSFORMS:
        raise wrong(
            f"be a calibration of version {VERSION} with a transform of {', '.join(TRANSFORMS)}",
            f"it has version {facts.get('version')!a:.40} and {facts.get('transform')!a:.40}",
        )
    transform = facts["transform"]
    for fact in ("model", "structure", "tokens"):
        if fact not in facts or (fact == "tokens" and not _COUNT.fullmatch(facts[fact])):
            raise wrong(f"tell its {fact}", "it does not")
    parts = ("", ".rotors") if transform == "rotors" else ("",)
    layers = {name.partition(".")[0] for name in numbers}
    wanted = {f"{layer}.{role}{part}" for layer in layers for role in ROLES for part in parts}
    measured = {f"{layer}.{role}{_LOSS}" for layer in layers for role in ROLES}
    right = set(numbers) in (wanted, wanted | measured)
    if not layers or not right or not all(layer.isdecimal() for layer in layers):
        raise wrong("name its arrays by layer and role", f"it has {sorted(numbers)[:4]}")
    for name, array in numbers.items():
        dimensions = 1 if name in measured else 3 if transform == "klt" else 2
        if array.dtype != np.float32 or array.ndim != dimensions or not np.isfinite(array).all():
            raise wrong(
                f"hold finite float32 numbers of {dimensions} dimensions",
                f"{name} is {array.dtype} of shape {array.shape}",
            )
        if name in measured:
            if array.shape != (1,) or array[0] < 0:
                raise wrong("hold a loss not below zero for each layer and role", f"not {name}")
        elif not _usable(transform, name, array, numbers):
            raise wrong("hold scales above zero and matrices that can be inverted", name)
    return Calibration(transform, facts["model"], facts["structure"], numbers, int(facts["tokens"]))


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
