"""The schemes that a measurement compares, rotormlx's and others, by a short name.

A name such as ``k4v4``, ``rotor3-k4v3``, ``affine-k8v8`` or ``kivi-k4v4:bare`` consists of a
family, the bits of keys and values, and options. The rotations are rotormlx's own caches, and
``affine`` is mlx-lm's; the other families are simulated (``RIVALS``). ``bare`` removes sink and
window, as most of the simulated codecs were published.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from rotormlx.config import BITS, ROTATIONS, RotorConfig
from rotormlx.measure.baselines import GROUP, Affine, Kivi, SimulatedCache, Simulation, Turbo
from rotormlx.measure.exl3 import Exl3
from rotormlx.measure.kvarn import KVarN
from rotormlx.measure.nvfp4 import Nvfp4
from rotormlx.mlx import calibration
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.integration import cache_factory, examine
from rotormlx.mlx.probe import compress
from rotormlx.storage.calibration import TRANSFORMS


@dataclass(frozen=True)
class Rival:
    """A family of simulated codecs.

    Args:
        make: Makes the codec from the bits of keys and values, and options.
        bits: The allowed numbers of bits.
        options: Names of the options besides sink, window and bare.
    """

    make: Callable[..., Simulation]
    bits: tuple[int, ...]
    options: tuple[str, ...] = ()


EXACT = "exact"
_TURBO = ("seed", "qjl", "centred")
RIVALS = {
    "kivi": Rival(Kivi, tuple(range(1, 9))),
    "turboquant": Rival(partial(Turbo, rotation="dense"), BITS, _TURBO),
    "rotorquant": Rival(partial(Turbo, rotation="rotor3"), BITS, _TURBO),
    "kvarn": Rival(KVarN, (2, 3, 4), ("group",)),
    "exl3": Rival(Exl3, tuple(range(2, 9)), ("compander",)),
    "nvfp4": Rival(lambda key_bits, value_bits: Nvfp4(), (4,)),
}
FAMILIES = (*ROTATIONS, "affine", *RIVALS)
# The numbers of bits that mx.quantize supports.
AFFINE_BITS = (2, 3, 4, 6, 8)
_NAME = re.compile(r"(?:([a-z]+\d?)-)?k(\d)v(\d)(?::(.+))?")
GRAMMAR = (
    "[FAMILY-]kBITSvBITS[:OPTION,...] with a family of "
    f"{', '.join(FAMILIES)} and options sink=N, window=N, seed=N, scale=NAME, "
    "calibrated=TRANSFORM, layers, bare, qjl, centred, group=N, compander"
)
_NUMBERS = ("sink", "window", "seed", "group")
_FLAGS = ("bare", "qjl", "centred", "layers", "compander")


@dataclass(frozen=True)
class Scheme:
    """A kind of cache with its settings.

    Args:
        name: The name as the user wrote it.
        make: Makes the cache of a layer from the layer's index.
        config: Configuration of a rotormlx cache; None for other caches.
        transform: Transform of the calibration that the scheme needs, see
            :mod:`rotormlx.mlx.calibration`; None if it needs none.
        layers: Whether the calibration sets the bits of each layer.
    """

    name: str
    make: Callable[[int], Any]
    config: RotorConfig | None = None
    transform: str | None = None
    layers: bool = False

    def bound(self, model: Any) -> Scheme:
        """Return the scheme with the calibration of a model, if it needs one.

        Raises:
            ValueError: If there is no such calibration of the model.
        """
        if self.transform is None or self.config is None:
            return self
        made = calibration.find(model, self.transform)
        if made is None:
            raise ValueError(
                f"[scheme] {self.name} needs a calibration of this model, but none is stored; make "
                f"one: rotormlx calibrate MODEL --transform {self.transform}."
            )
        if not self.layers:
            made = made.without_losses
        elif not made.has_losses:
            raise ValueError(
                f"[scheme] {self.name} needs a calibration with measured layers, but that of this "
                "model has none; make one: rotormlx calibrate MODEL --layers --transform "
                f"{self.transform}."
            )
        config = made.configured(self.config)
        return replace(self, config=config, make=cache_factory(config, made))

    def caches(self, model: Any) -> list[Any]:
        """Return empty caches for a model; those that cannot be compressed are the model's own."""
        report = None if self.config is None else examine(model, self.config)
        return compress(make_prompt_cache(model), self.make, report)


def scheme(name: str) -> Scheme:
    """Parse the name of a scheme.

    Args:
        name: ``exact``, or ``[FAMILY-]kBITSvBITS[:OPTION,...]``. The family is ``cascade`` if none
            is given.

    Raises:
        ValueError: If the name does not have this form, or the family lacks the bits or an option.
    """
    if name == EXACT:
        return Scheme(name, lambda layer: KVCache())
    parts = _NAME.fullmatch(name)
    if parts is None or (parts[1] or "cascade") not in FAMILIES:
        raise ValueError(f"[scheme] A scheme must be exact or {GRAMMAR}, but {name!r} was given.")
    family, bits = parts[1] or "cascade", (int(parts[2]), int(parts[3]))
    options = _options(name, parts[4])
    if family in ROTATIONS:
        return _rotor_scheme(name, family, bits, options)
    return _baseline(name, family, bits, options)


def all_packed(name: str) -> str:
    """Return the name with ``bare``, unless the name sets sink or window or the cache has none."""
    chosen = scheme(name)
    held = chosen.make(0)
    if not isinstance(held, (RotorKVCache, SimulatedCache)):
        return name
    has = re.search(r"sink=|window=|bare", name)
    return name if has else f"{name}{',' if ':' in name else ':'}bare"


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
            f"[scheme] This family accepts {', '.join(allowed)}, but {name!r} has "
            f"{', '.join(unknown)}; leave it out."
        )


def _rotor_scheme(name: str, family: str, bits: tuple[int, int], options: dict[str, Any]) -> Scheme:
    _allow(name, options, ("sink", "window", "seed", "scale", "calibrated", "layers"))
    scale, transform = options.pop("scale", None), options.pop("calibrated", None)
    layers = options.pop("layers", False)
    if layers and transform is None:
        raise ValueError(
            f"[scheme] Bits by layer need a calibration, but {name!r} has none; add "
            f"calibrated={TRANSFORMS[0]}."
        )
    if transform is not None and (transform not in TRANSFORMS or family != "cascade" or scale):
        raise ValueError(
            f"[scheme] A calibrated scheme must have the rotation cascade, no scale, and one of "
            f"the transforms {', '.join(TRANSFORMS)}, but {name!r} was given."
        )
    config = RotorConfig(*bits, rotation=family, channel_scale=scale, **options)
    return Scheme(name, lambda layer: RotorKVCache(config, layer), config, transform, layers)


def _baseline(name: str, family: str, bits: tuple[int, int], options: dict[str, Any]) -> Scheme:
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
    else:
        rival = RIVALS[family]
        _allow(name, options, ("sink", "window", *rival.options))
        _check_bits(name, bits, (2, 3, 4) if options.get("qjl") else rival.bits)
        codec = rival.make(*bits, **options)
    rule = {"sink": 4 if sink is None else sink, "window": 64 if window is None else window}
    return Scheme(name, lambda layer: SimulatedCache(codec, layer, **rule))


def _check_bits(name: str, bits: tuple[int, int], choices: tuple[int, ...]) -> None:
    if not set(bits) <= set(choices):
        wanted = f"{'one of ' if choices[1:] else ''}{', '.join(map(str, choices))}"
        raise ValueError(f"[scheme] Bits must be {wanted} here, but {name!r} was given.")
