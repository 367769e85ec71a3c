"""The configuration of a compressed cache."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

BITS = (2, 3, 4, 8)
ROTATIONS = ("cascade", "rotor3", "iso4", "planar2", "hadamard", "dense", "identity")
# A rotation or channel scale from a calibration file, for each layer and KV head; the rotations
# above are generated from the seed.
CALIBRATED = "calibrated"
CHANNEL_SCALES = ("none", "prefill", CALIBRATED)

# Bits of keys and of values by the name of a quality; README.md lists what each costs.
QUALITIES = {"high": (4, 4), "balanced": (3, 3), "small": (2, 2)}


@dataclass(frozen=True, eq=False)
class RotorConfig:
    """The configuration of a compressed cache: how keys and values are compressed.

    Two configurations are equal if they compress in the same way; a field of None equals the
    default that it stands for.

    Args:
        key_bits: Bits per key code: 2, 3, 4 or 8.
        value_bits: Bits per value code: 2, 3, 4 or 8.
        rotation: One of ``cascade``, ``rotor3``, ``iso4``, ``planar2``, ``hadamard``, ``dense``,
            ``identity``; or ``calibrated``, one matrix per KV head from a calibration file.
        channel_scale: ``"none"``, ``"prefill"`` (the root of the root mean square of each channel
            over the first packed block, then frozen) or ``"calibrated"`` (from a calibration
            file). None stands for ``"none"`` with a calibrated rotation and for ``"prefill"``
            otherwise. With None and the default rotation, :func:`rotormlx.load` takes the
            calibration stored for the model.
        sink: Number of tokens at the start of a sequence that stay exact (attention sinks).
        window: Number of most recent tokens that are always exact.
        seed: Seed of the rotations; caches with different seeds are not compatible.

    Raises:
        ValueError: If a field is out of range.

    Source: docs/FORMAT.md, section 2.
    """

    key_bits: int = 4
    value_bits: int = 4
    rotation: str = "cascade"
    channel_scale: str | None = None
    sink: int = 4
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            _require_choice(name, getattr(self, name), BITS)
        _require_choice("rotation", self.rotation, (*ROTATIONS, CALIBRATED))
        if self.channel_scale is not None:
            _require_choice("channel_scale", self.channel_scale, CHANNEL_SCALES)
        if self.rotation == CALIBRATED and self.channel_scale not in (None, "none"):
            raise ValueError(
                "[RotorConfig] A calibrated rotation holds the channel scale, but channel_scale "
                f"{self.channel_scale!r} was given; leave it out."
            )
        for name, limit in (("sink", 2**20), ("window", 2**20), ("seed", 2**63)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < limit:
                raise ValueError(
                    f"[RotorConfig] {name} must be an integer from 0 to {limit - 1}, "
                    f"but {value!r} was given; leave it out for the default."
                )

    @classmethod
    def of_quality(cls, quality: str, **more: Any) -> RotorConfig:
        """Return the configuration of a quality: ``"high"``, ``"balanced"`` or ``"small"``.

        Args:
            quality: Name of the quality; keys and values then have 4, 3 or 2 bits.
            **more: Other fields of the configuration.

        Raises:
            ValueError: If there is no such name, or a field is out of range.
        """
        _require_choice("quality", quality, tuple(QUALITIES))
        key_bits, value_bits = QUALITIES[quality]
        return cls(**{"key_bits": key_bits, "value_bits": value_bits, **more})

    def __eq__(self, other: object) -> bool:
        return self._meaning == other._meaning if isinstance(other, RotorConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._meaning)

    @cached_property
    def _meaning(self) -> tuple[object, ...]:
        """The fields in order, with the channel scale in use."""
        used = {"channel_scale": self.used_channel_scale}
        return tuple(used.get(f.name, getattr(self, f.name)) for f in fields(self))

    def difference(self, other: RotorConfig) -> tuple[str, object, object] | None:
        """Return the first field that differs, with both values; None if they are equal."""
        pairs = zip(self._meaning, other._meaning, strict=True)
        for field, (own, its) in zip(fields(self), pairs, strict=True):
            if own != its:
                return field.name, own, its
        return None

    @property
    def used_channel_scale(self) -> str:
        """The channel scale in use: None is replaced by the default of the rotation."""
        if self.channel_scale is not None:
            return self.channel_scale
        return "none" if self.rotation == CALIBRATED else "prefill"

    def code_bits(self, role: str) -> int:
        """Return the bits per code of a role, ``"key"`` or ``"value"``."""
        return self.key_bits if role == "key" else self.value_bits

    @property
    def scales_channels(self) -> bool:
        """Whether a channel scale is taken from the first packed block."""
        return self.used_channel_scale == "prefill"

    @property
    def is_calibrated(self) -> bool:
        """Whether a calibration is needed, for channel scales or for rotations."""
        return CALIBRATED in (self.rotation, self.channel_scale)

    def calibrated_shape(self, heads: int, head_dim: int) -> tuple[int, ...]:
        """Return the shape of a layer's calibrated array, for keys or for values."""
        return (heads, head_dim, head_dim) if self.rotation == CALIBRATED else (heads, head_dim)

    def takes_calibration_of(self, other: RotorConfig) -> bool:
        """Whether a calibration for ``other`` also serves this configuration."""
        return self.is_calibrated and (self.rotation, self.used_channel_scale) == (
            other.rotation,
            other.used_channel_scale,
        )

    @property
    def uncalibrated(self) -> RotorConfig:
        """The configuration; with the default rotation and channel scale if it is calibrated."""
        if not self.is_calibrated:
            return self
        return replace(self, rotation=ROTATIONS[0], channel_scale=None)

    @classmethod
    def from_text(cls, text: str) -> RotorConfig:
        """Parse a short text: ``4``, ``k8v4``, ``balanced``, ``key_bits=4,value_bits=2``.

        Args:
            text: Parts separated by commas. At most one part gives the bits: of keys and values
                together (``4``), of each (``k8v4``), or by the name of a quality. Every other part
                sets a field by name (``window=0``).

        Raises:
            ValueError: If a part has another form, or a field is given twice or out of range.
        """
        given: dict[str, Any] = {}
        for part in (part.strip() for part in text.split(",")):
            for name, value in _fields_of(part).items():
                if name in given:
                    raise ValueError(
                        f"[RotorConfig] Every field may be given once, but {text!r} gives {name} "
                        "twice; leave one out."
                    )
                given[name] = value
        return cls(**given)

    def to_json(self) -> str:
        """Return the configuration as one line of JSON, the form that saved caches contain."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RotorConfig:
        """Parse the text that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not a configuration in this form.
        """
        names = {f.name for f in fields(cls)}
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"[RotorConfig] A configuration must be JSON, but {text[:40]!r} is not; "
                "the file is damaged: make it again."
            ) from error
        if not isinstance(values, dict) or set(values) != names:
            wrong = sorted(names ^ set(values)) if isinstance(values, dict) else sorted(names)
            raise ValueError(
                f"[RotorConfig] A configuration must have exactly the fields {sorted(names)}, "
                f"but {wrong[0][:40]!a} is missing or unknown; the file is damaged or of another "
                "version: make it again."
            )
        return cls(**values)


def _fields_of(part: str) -> dict[str, Any]:
    """Return the fields that one part of a configuration text sets."""
    name, equals, value = (side.strip() for side in part.partition("="))
    kinds = {f.name: f.type for f in fields(RotorConfig)}
    if equals and name in kinds:
        return {name: int(value) if kinds[name] == "int" and value.isdecimal() else value}
    if part in QUALITIES:
        return dict(zip(("key_bits", "value_bits"), QUALITIES[part], strict=True))
    if bits := re.fullmatch(r"(?:k(\d+)v(\d+)|(\d+))", part.lower()):
        key_bits, value_bits, both = bits.groups()
        return {"key_bits": int(both or key_bits), "value_bits": int(both or value_bits)}
    raise ValueError(
        f"[RotorConfig] Bits (4 or k8v4), a quality ({', '.join(QUALITIES)}) or a field "
        f"({', '.join(kinds)}) with its value are required, but {part!r} was given; "
        "write 4, or key_bits=4,value_bits=2."
    )


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or isinstance(value, (bool, float)):
        raise ValueError(
            f"[RotorConfig] {name} must be one of {', '.join(map(str, choices))}, "
            f"but {value!r} was given."
        )
