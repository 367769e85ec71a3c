"""The schemes that a measurement compares, ours and others, by a short name.

A scheme is a name such as ``k4v4``, ``rotor3-k4v3``, ``affine-k8v8`` or ``kivi-k4v4:bare``: a
family, the bits of keys and values, and options. Rotations are rotormlx's own caches and ``affine``
is mlx-lm's; the other families are **simulated**: a cache that holds what the published codec would
give back, under the same rule of sink, blocks and window as ours, so that only the codec differs.
``bare`` takes sink and window away, which is how those codecs were published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache, create_attention_mask, make_prompt_cache
from numpy.typing import NDArray

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, VALUE
from rotormlx.codec.rotation import rotation
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.mlx import calibration
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.lists import leaves
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.calibration import TRANSFORMS
from rotormlx.mlx.integration import cache_factory
from rotormlx.mlx.probe import compress

Array = NDArray[np.float32]

GROUP = 64  # values that share a scale and an offset in the affine codecs
FLOAT16_BITS = 16
EXACT = "exact"
FAMILIES = (*ROTATIONS, "affine", "kivi", "turboquant", "rotorquant")
# mx.quantize has these.
AFFINE_BITS = (2, 3, 4, 6, 8)
_NAME = re.compile(r"(?:([a-z]+\d?)-)?k(\d)v(\d)(?::(.+))?")
GRAMMAR = (
    "[FAMILY-]kBITSvBITS[:OPTION,...] with a family of "
    f"{', '.join(FAMILIES)} and options sink=N, window=N, seed=N, scale=NAME, "
    "calibrated=TRANSFORM, layers, bare, qjl, centred"
)


class Simulation(Protocol):
    """A published codec: what comes back, and what it would take."""

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """What the codec gives back for whole blocks ``[B, K, N * 64, D]``."""

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """True bits a value, scales and offsets included."""


@dataclass(frozen=True)
class Kivi:
    """KIVI: minimum and step for each channel over 64 tokens (keys), for each token (values).

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.

    Source: Liu et al., KIVI, ICML 2024; float16 minimum and step.
    """

    key_bits: int
    value_bits: int

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        batch, heads, _, head_dim = x.shape
        if role == KEY:
            blocks = x.reshape(batch, heads, -1, BLOCK, head_dim)
            return _affine(blocks, self.key_bits, axis=-2).reshape(x.shape)
        groups = x.reshape(*x.shape[:-1], -1, group_size(head_dim))
        return _affine(groups, self.value_bits, axis=-1).reshape(x.shape)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        if role == KEY:
            return self.key_bits + 2 * FLOAT16_BITS / BLOCK
        return self.value_bits + 2 * FLOAT16_BITS / group_size(head_dim)


@dataclass(frozen=True)
class Affine:
    """mlx-lm's quantization: minimum and step for each group of channels of a token.

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.
    """

    key_bits: int
    value_bits: int

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        bits, size = self._bits(role), self._group_size(x.shape[-1])
        packed = mx.quantize(mx.array(x).astype(mx.float16), group_size=size, bits=bits)
        return np.array(mx.dequantize(*packed, group_size=size, bits=bits).astype(mx.float32))

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        return self._bits(role) + 2 * FLOAT16_BITS / self._group_size(head_dim)

    def _group_size(self, head_dim: int) -> int:
        # mx.quantize has groups of 32, 64 and 128.
        return GROUP if head_dim % GROUP == 0 else 32

    def _bits(self, role: str) -> int:
        return self.key_bits if role == KEY else self.value_bits


@dataclass(frozen=True)
class Turbo:
    """TurboQuant, and RotorQuant as published: norm, rotation, Lloyd-Max codebook, no centre.

    Args:
        key_bits: Bits of a key code, the sketch included.
        value_bits: Bits of a value code.
        rotation: Name of the rotation: ``dense`` is TurboQuant, ``rotor3`` RotorQuant.
        qjl: Whether the last bit of a key is the sign of a random projection of what the other
            bits left over (the published correction, which makes inner products unbiased).
        centred: Whether keys are centred by block, as ours are.
        seed: Selects the rotation and the projection.

    Source: Zandieh et al., TurboQuant, 2025, algorithms 1 and 2.
    """

    key_bits: int
    value_bits: int
    rotation: str = "dense"
    qjl: bool = False
    centred: bool = False
    seed: int = 0

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        centre = np.float32(0)
        blocks = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
        if self.centred and role == KEY:
            centre = blocks.mean(-2, keepdims=True).astype(np.float16).astype(np.float32)
        matrix = _matrix(self.rotation, x.shape[-1], self.seed, layer, role)
        coded = self._unit(blocks - centre, matrix, layer, role)
        return (coded + centre).reshape(x.shape).astype(np.float32)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        if role == VALUE:
            return self.value_bits + FLOAT16_BITS / head_dim
        norms = 2 if self.qjl else 1  # that of the vector, that of the residual
        centre = FLOAT16_BITS / BLOCK if self.centred else 0
        return self.key_bits + norms * FLOAT16_BITS / head_dim + centre

    def _unit(self, x: Array, matrix: Array, layer: int, role: str) -> Array:
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        unit: Any = x / np.where(norm == 0, 1, norm)
        sketched = self.qjl and role == KEY
        bits = self.key_bits - sketched if role == KEY else self.value_bits
        root = np.float32(np.sqrt(x.shape[-1]))
        level = nearest_level(unit @ matrix.T * root, bits)
        coded: Any = level @ matrix / root
        if sketched:
            residual = unit - coded
            size = np.linalg.norm(residual, axis=-1, keepdims=True)
            coded = coded + _as_float16(size) * sketch(residual, self.seed, layer)
        out: Array = _as_float16(norm) * coded
        return out


class SimulatedCache:
    """A cache that gives back what a simulated codec would, under our rule of sink and window.

    Args:
        codec: The codec.
        layer: Index of the layer; selects its rotations.
        sink: First tokens that stay exact.
        window: Latest tokens that stay exact.
    """

    def __init__(self, codec: Simulation, layer: int, *, sink: int = 4, window: int = 64) -> None:
        self.codec, self.layer, self.sink, self.window = codec, layer, sink, window
        self.offset = 0
        self.packed_tokens = 0
        self._arrays: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens ``[B, K, S, D]``; they are still exact in what is returned."""
        if self._arrays is not None:
            held = zip(self._arrays, (keys, values), strict=True)
            keys, values = (mx.concatenate(list(pair), axis=2) for pair in held)
        self._arrays = keys, values
        self.offset = keys.shape[2]
        start = self.sink + self.packed_tokens
        count = max(0, self.offset - start - self.window) // BLOCK * BLOCK
        if count:
            self._arrays = (
                self._coded(keys, KEY, start, count),
                self._coded(values, VALUE, start, count),
            )
            self.packed_tokens += count
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, what is coded as the codec gives it back."""
        if self._arrays is None:
            raise ValueError("[SimulatedCache] The cache is empty; append keys and values first.")
        return self._arrays

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The attention mask for N new tokens, as mlx-lm's growing cache makes it."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays, for ``mx.eval``."""
        return self._arrays or ()

    @property
    def bits_per_value(self) -> float:
        """True bits a value of the coded part, keys and values together."""
        keys, values = self.keys_and_values()
        dims = {KEY: keys.shape[-1], VALUE: values.shape[-1]}
        bits = sum(d * self.codec.bits_per_value(d, role) for role, d in dims.items())
        return bits / sum(dims.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the published codec would take, exact tokens included."""
        keys, values = self.keys_and_values()
        width = keys.shape[0] * keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        exact = (self.offset - self.packed_tokens) * keys.itemsize
        return round(width * (exact + self.packed_tokens * self.bits_per_value / 8))

    def _coded(self, x: mx.array, role: str, start: int, count: int) -> mx.array:
        part = np.array(x[:, :, start : start + count].astype(mx.float32))
        coded = mx.array(self.codec.decoded(part, layer=self.layer, role=role)).astype(x.dtype)
        return mx.concatenate([x[:, :, :start], coded, x[:, :, start + count :]], axis=2)


@dataclass(frozen=True)
class Scheme:
    """A way to keep a cache.

    Args:
        name: As it was written.
        make: The cache of a layer, by its index.
        config: Of a rotormlx cache; None for the others.
        transform: The calibration that it needs, see :mod:`rotormlx.mlx.calibration`, or None.
        layers: Whether layers get bits of their own, as the calibration has measured them.
    """

    name: str
    make: Callable[[int], Any]
    config: RotorConfig | None = None
    transform: str | None = None
    layers: bool = False

    def bound(self, model: Any) -> Scheme:
        """The scheme with the calibration of a model, if it needs one.

        Raises:
            ValueError: If the model has none.
        """
        if self.transform is None or self.config is None:
            return self
        found = calibration.find(model, self.transform)
        if found is None:
            raise ValueError(
                f"[scheme] {self.name} needs a calibration of this model, but none is kept; make "
                f"it: rotormlx calibrate MODEL --transform {self.transform}."
            )
        if not self.layers:
            found = found.without_losses
        elif not found.has_losses:
            raise ValueError(
                f"[scheme] {self.name} needs a calibration that has measured the layers, but the "
                "one of this model has not; make it: rotormlx calibrate MODEL --layers --transform "
                f"{self.transform}."
            )
        config = found.configured(self.config)
        return replace(self, config=config, make=cache_factory(config, found))

    def caches(self, model: Any) -> list[Any]:
        """Fresh caches for a model that has its own; what cannot be compressed stays as it is."""
        return compress(make_prompt_cache(model), self.make)


def scheme(name: str) -> Scheme:
    """Read the name of a scheme.

    Args:
        name: ``exact``, or ``[FAMILY-]kBITSvBITS[:OPTION,...]``. The family is ``cascade`` if none
            is given.

    Raises:
        ValueError: If the name is not of that form, or the family has no such bits or option.
    """
    if name == EXACT:
        return Scheme(name, lambda layer: KVCache())
    found = _NAME.fullmatch(name)
    if found is None or (found[1] or "cascade") not in FAMILIES:
        raise ValueError(f"[scheme] A scheme must be exact or {GRAMMAR}, but {name!r} was given.")
    family, bits = found[1] or "cascade", (int(found[2]), int(found[3]))
    options = _options(name, found[4])
    if family in ROTATIONS:
        return _rotor_scheme(name, family, bits, options)
    return _rival(name, family, bits, options)


def all_packed(name: str) -> str:
    """The scheme of that name without sink and window, unless it says what it has of them."""
    chosen = scheme(name)
    held = chosen.make(0)
    if not isinstance(held, (RotorKVCache, SimulatedCache)):
        return name
    has = re.search(r"sink=|window=|bare", name)
    return name if has else f"{name}{',' if ':' in name else ':'}bare"


def decoded(cache: Any) -> tuple[mx.array, mx.array]:
    """All keys and values as attention reads them, ``[B, K, S, D]``, whatever the cache."""
    keys, values = cache.keys_and_values()
    if isinstance(cache, QuantizedKVCache):
        size, bits = cache.group_size, cache.bits

        def back(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            return mx.dequantize(words, scales, biases, group_size=size, bits=bits)

        return back(*keys), back(*values)
    return _of_view(keys), _of_view(values)


def bits_per_value(caches: Sequence[Any]) -> float:
    """True bits of a compressed value, the mean over the layers; of any value in exact caches."""
    return float(np.mean([_bits(c) for _, _, c in leaves(caches) if _bits(c)]))


def used_bytes(caches: Sequence[Any]) -> int:
    """Bytes of the tokens that caches hold, without room for growth."""
    return sum(_used(cache) for _, _, cache in leaves(caches))


def compressed(caches: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The growing caches of a model, compressed or exact, with the index of their layer."""
    kinds = (RotorKVCache, SimulatedCache, QuantizedKVCache)
    for index, _, held in leaves(caches):
        if isinstance(held, kinds) or type(held) is KVCache:
            yield index, held


# ---- codecs -------------------------------------------------------------------------------------


def group_size(head_dim: int) -> int:
    """The largest divisor of head_dim up to 64."""
    return next(size for size in range(GROUP, 0, -1) if head_dim % size == 0)


def nearest_level(z: Array, bits: int) -> Array:
    """The nearest level of the Lloyd-Max codebook, 1 to 4 or 8 bits; the shape of z."""
    if bits == 1:
        magnitude = np.full(z.shape, np.sqrt(2 / np.pi), np.float32)
    else:
        index = np.searchsorted(codebook.boundaries(bits), np.abs(z), side="right")
        magnitude = codebook.magnitudes(bits)[index]
    return np.where(z < 0, -magnitude, magnitude)


def sketch(residual: Array, seed: int, layer: int) -> Array:
    """The vectors of norm 1 for which the signs of a random projection stand, on average.

    With S a normal D x D matrix, <q, sqrt(pi/2) / D S^T sign(S r)> is <q, r> / |r| on average
    over S: an estimate without bias from one bit a channel.
    """
    projection = _projection(residual.shape[-1], seed, layer)
    signs = np.where(residual @ projection.T < 0, np.float32(-1), np.float32(1))
    return np.float32(np.sqrt(np.pi / 2) / residual.shape[-1]) * (signs @ projection)


def _affine(x: Array, bits: int, *, axis: int) -> Array:
    low = _as_float16(x.min(axis, keepdims=True))
    step = _as_float16((x.max(axis, keepdims=True) - low) / (2**bits - 1))
    codes = np.round((x - low) / np.where(step == 0, 1, step)).clip(0, 2**bits - 1)
    return codes * step + low


def _as_float16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


@cache
def _matrix(name: str, head_dim: int, seed: int, layer: int, role: str) -> Array:
    chosen = rotation(name, head_dim, seed=seed, layer=layer, role=role)
    return chosen.matrix.astype(np.float32)


@cache
def _projection(head_dim: int, seed: int, layer: int) -> Array:
    rng = np.random.default_rng([seed, layer, head_dim])
    return rng.normal(size=(head_dim, head_dim)).astype(np.float32)


# ---- names --------------------------------------------------------------------------------------

_NUMBERS = ("sink", "window", "seed")
_FLAGS = ("bare", "qjl", "centred", "layers")


def _options(name: str, text: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for option in filter(None, (text or "").split(",")):
        key, equals, value = option.partition("=")
        if key in _NUMBERS and value.isdecimal():
            options[key] = int(value)
        elif key in ("scale", "calibrated") and value:
            options[key] = value
        elif key in _FLAGS and not equals:
            options[key] = True
        else:
            raise ValueError(
                f"[scheme] A scheme must be exact or {GRAMMAR}, but {name!r} has {option!r}."
            )
    if options.pop("bare", False):
        options |= {"sink": 0, "window": 0}
    return options


def _allow(name: str, options: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"[scheme] This family takes {', '.join(allowed)}, but {name!r} has "
            f"{', '.join(unknown)}; leave it out."
        )


def _rotor_scheme(name: str, family: str, bits: tuple[int, int], options: dict[str, Any]) -> Scheme:
    _allow(name, options, ("sink", "window", "seed", "scale", "calibrated", "layers"))
    scale, transform = options.pop("scale", None), options.pop("calibrated", None)
    layers = options.pop("layers", False)
    if layers and transform is None:
        raise ValueError(
            f"[scheme] Bits by layer come from a calibration, but {name!r} has none; add "
            f"calibrated={TRANSFORMS[0]}."
        )
    if transform is not None and (transform not in TRANSFORMS or family != "cascade" or scale):
        raise ValueError(
            f"[scheme] A calibrated scheme must have the cascade, no other scale, and a transform "
            f"of {', '.join(TRANSFORMS)}, but {name!r} was given."
        )
    config = RotorConfig(*bits, rotation=family, channel_scale=scale, **options)
    return Scheme(name, lambda layer: RotorKVCache(config, layer), config, transform, layers)


def _rival(name: str, family: str, bits: tuple[int, int], options: dict[str, Any]) -> Scheme:
    sink, window = options.pop("sink", None), options.pop("window", None)
    if family == "affine":
        _allow(name, options, ("sink", "window"))
        _check_bits(name, bits, AFFINE_BITS)
        if sink is None and window is None:
            if bits[0] != bits[1]:
                raise ValueError(
                    f"[scheme] mlx-lm's cache must have equal bits for keys and values, but "
                    f"{name!r} was given; add window=64 for a simulated one."
                )
            return Scheme(name, lambda layer: QuantizedKVCache(GROUP, bits[0]))
        codec: Simulation = Affine(*bits)
    elif family == "kivi":
        _allow(name, options, ("sink", "window"))
        _check_bits(name, bits, tuple(range(1, 9)))
        codec = Kivi(*bits)
    else:
        _allow(name, options, ("sink", "window", "seed", "qjl", "centred"))
        _check_bits(name, bits, (2, 3, 4) if options.get("qjl") else codebook.BITS)
        codec = Turbo(*bits, "dense" if family == "turboquant" else "rotor3", **options)
    rule = {"sink": 4 if sink is None else sink, "window": 64 if window is None else window}
    return Scheme(name, lambda layer: SimulatedCache(codec, layer, **rule))


def _check_bits(name: str, bits: tuple[int, int], choices: tuple[int, ...]) -> None:
    if not set(bits) <= set(choices):
        raise ValueError(
            f"[scheme] Bits must be of {', '.join(map(str, choices))} here, but {name!r} was given."
        )


# ---- sizes --------------------------------------------------------------------------------------


def _of_view(view: Any) -> mx.array:
    if not isinstance(view, KVView):
        return view
    if view.packed is None or not view.packed_tokens:
        return view.exact[:, :, : view.tokens]
    packed = backend().decode(view.packed, view.codec, channel_scale=view.channel_scale)
    exact = view.exact[:, :, : view.exact_tokens].astype(mx.float32)
    parts = [exact[:, :, : view.sink], packed[:, :, : view.packed_tokens], exact[:, :, view.sink :]]
    return mx.concatenate(parts, axis=2)


def _bits(cache: Any) -> float | None:
    if isinstance(cache, (RotorKVCache, SimulatedCache)):
        return cache.bits_per_value
    keys: Any = getattr(cache, "keys", None)
    if isinstance(cache, QuantizedKVCache):
        return float(cache.bits + 2 * 8 * keys[1].itemsize / cache.group_size)  # scale and bias
    if type(cache) is KVCache:
        return float(8 * keys.itemsize)
    return None


def _used(cache: Any) -> int:
    if isinstance(cache, RotorKVCache):
        return cache.used_bytes
    if not isinstance(cache, (KVCache, QuantizedKVCache)):
        return int(cache.nbytes)
    used: Any = cache.keys_and_values()  # type: ignore[no-untyped-call]
    found: Any = tree_flatten(used)
    return sum(leaf.nbytes for _, leaf in found if isinstance(leaf, mx.array))
