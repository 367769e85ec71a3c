"""What a user may choose about a compressed cache."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

BITS = (2, 3, 4, 8)
ROTATIONS = ("cascade", "rotor3", "iso4", "planar2", "hadamard", "dense", "identity")
# Not generated from a seed but read from a calibration file, for each layer and KV head.
CALIBRATED = "calibrated"
CHANNEL_SCALES = ("none", "prefill", CALIBRATED)

# Bits of keys and of values, by names that are easy to remember; README.md has what each costs.
QUALITIES = {"high": (4, 4), "balanced": (3, 3), "small": (2, 2)}


@dataclass(frozen=True, eq=False)
class RotorConfig:
    """How keys and values are compressed.

    Two are equal if they compress alike: None for the channel scale is what it stands for.

    Args:
        key_bits: Bits of one key code: 2, 3, 4 or 8.
        value_bits: Bits of one value code: 2, 3, 4 or 8.
        rotation: One of ``cascade``, ``rotor3``, ``iso4``, ``planar2``, ``hadamard``, ``dense``,
            ``identity``; or ``calibrated``, a matrix for each KV head from a calibration file.
        channel_scale: ``"none"``, ``"prefill"`` (the root of the root mean square of each channel
            over the first packed block, then frozen), ``"calibrated"`` (from a calibration file),
            or None for ``prefill``, and ``none`` with a calibrated rotation. With None and the
            default rotation, :func:`rotormlx.load` takes the calibration that is kept for the
            model.
        sink: Tokens at the start of a sequence that stay exact (attention sinks).
        window: Most recent tokens that are always exact.
        seed: Selects the rotations; two caches agree only if their seeds do.

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
        """The configuration of a name: ``"high"``, ``"balanced"`` or ``"small"``.

        Args:
            quality: Selects the bits: 4, 3 or 2 for keys and values.
            **more: Other fields.

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
        """The fields in their order, with the channel scale that is used."""
        used = {"channel_scale": self.used_channel_scale}
        return tuple(used.get(f.name, getattr(self, f.name)) for f in fields(self))

    def difference(self, other: RotorConfig) -> tuple[str, object, object] | None:
        """The first field in which two differ, and its value in each; None if they are equal."""
        pairs = zip(self._meaning, other._meaning, strict=True)
        for field, (own, its) in zip(fields(self), pairs, strict=True):
            if own != its:
                return field.name, own, its
        return None

    @property
    def used_channel_scale(self) -> str:
        """The channel scale, where None stands for the default of the rotation."""
        if self.channel_scale is not None:
            return self.channel_scale
        return "none" if self.rotation == CALIBRATED else "prefill"

    def code_bits(self, role: str) -> int:
        """Bits of one code of this role, ``"key"`` or ``"value"``."""
        return self.key_bits if role == "key" else self.value_bits

    @property
    def scales_channels(self) -> bool:
        """Whether a channel scale is taken from the first packed block."""
        return self.used_channel_scale == "prefill"

    @property
    def is_calibrated(self) -> bool:
        """Whether what a calibration file holds is needed, scales or rotations."""
        return CALIBRATED in (self.rotation, self.channel_scale)

    def calibrated_shape(self, heads: int, head_dim: int) -> tuple[int, ...]:
        """What a calibrated configuration needs for a layer's keys or values: its shape."""
        return (heads, head_dim, head_dim) if self.rotation == CALIBRATED else (heads, head_dim)

    def takes_calibration_of(self, other: RotorConfig) -> bool:
        """Whether what a calibration gives another configuration is what this one needs."""
        return self.is_calibrated and (self.rotation, self.used_channel_scale) == (
            other.rotation,
            other.used_channel_scale,
        )

    @property
    def uncalibrated(self) -> RotorConfig:
        """The same, with the default rotation and scale in place of calibrated ones."""
        if not self.is_calibrated:
            return self
        return replace(self, rotation=ROTATIONS[0], channel_scale=None)

    @classmethod
    def from_text(cls, text: str) -> RotorConfig:
        """Read what a person writes: ``4``, ``k8v4``, ``balanced``, ``key_bits=4,value_bits=2``.

        Args:
            text: Bits of keys and values (``4``), bits of each (``k8v4``) or the name of a quality,
                once at most; and fields by name (``window=0``); separated by commas.

        Raises:
            ValueError: If it is something else, a field is given twice, or one is out of range.
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
        """The configuration as one line of JSON, the form it has inside a saved cache."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RotorConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not such a configuration.
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
    """The fields that one part of a configuration in text sets."""
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
