"""Fingerprints of weights, used to refuse files that were made with another model.

mlx-lm and transformers load the same checkpoint under different names and in different dtypes and
layouts. So a fingerprint holds a few numbers per weight, from its diagonal, which stays the same if
axes are exchanged. Two fingerprints are compared on the weights whose names occur in both. They
agree if the numbers of one, rounded to the dtype of the other, are the numbers of the other.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The key of a file's metadata that holds the fingerprint of its model.
MODEL = "rotormlx_model"
HOSTS = ("mlx", "torch")
_VERSION = 1
_FIRST_LINE = f"rotormlx fingerprint {_VERSION} "
_SAMPLES = 4  # numbers per weight; the text of 5,000 weights must fit into the header of a file
_NAME = 200  # characters at most
_HEAD = "lm_head."
_LINE = re.compile(r"(\S{1,200}) ([0-9]{1,12}(?:x[0-9]{1,12}){0,7}) (i?)((?:[0-9a-f]{8}){1,4})")
_IN_LAYER = re.compile(r"[A-Za-z_]+\.[0-9]+\..*")
# The groups are a layer and a weight of all its experts (mlx-lm calls the experts switch_mlp).
_EXPERTS = re.compile(r"([A-Za-z_]+\.[0-9]+)\.(?:.*\.)?(?:experts|switch_mlp)\.(\w+?)(?:\.weight)?")
_LAYER = re.compile(r"[A-Za-z_]+\.[0-9]+(?=\.)")

Sizes = tuple[int, ...]


class Weight(NamedTuple):
    """The samples of one weight in a fingerprint.

    sizes: Dimensions of the weight, in ascending order.
    is_integer: Whether its numbers are integers, as in a quantized weight.
    digits: The 32 bits of each sampled number (float32 or integer), in hexadecimal.
    """

    sizes: Sizes
    is_integer: bool
    digits: str

    @property
    def values(self) -> NDArray[np.float64]:
        """The sampled numbers of a floating weight."""
        return np.frombuffer(bytes.fromhex(self.digits), ">f4").astype(np.float64)


@dataclass(frozen=True)
class Fingerprint:
    """Samples of a model's weights.

    Args:
        host: One of ``HOSTS``: the library whose names the weights have.
        weights: Samples by canonical name, see :func:`canonical_names`.
    """

    host: str
    weights: Mapping[str, Weight]

    @property
    def text(self) -> str:
        """The fingerprint as a text, the form that files contain."""
        return "\n".join([_FIRST_LINE + self.host, *self._lines])

    @property
    def digest(self) -> str:
        """A short hash of the names and samples."""
        return hashlib.sha256("\n".join(self._lines).encode()).hexdigest()[:16]

    @property
    def _lines(self) -> list[str]:
        return [
            f"{name} {'x'.join(map(str, weight.sizes))} {'i' * weight.is_integer}{weight.digits}"
            for name, weight in sorted(self.weights.items())
        ]

    @classmethod
    def from_text(cls, text: str) -> Fingerprint | None:
        """Parse :attr:`text`; return None for any other text, or for another version."""
        first, *lines = text.split("\n")
        host = first.removeprefix(_FIRST_LINE)
        matches = [_LINE.fullmatch(line) for line in lines]
        if first == host or host not in HOSTS or not all(matches):
            return None
        return cls(
            host,
            {
                name: Weight(tuple(map(int, sizes.split("x"))), bool(integer), digits)
                for name, sizes, integer, digits in (match.groups() for match in matches if match)
            },
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first difference of two models, in words; None if none is found."""
        common = sorted(self.weights.keys() & other.weights.keys())
        for name in common:
            a, b = self.weights[name], other.weights[name]
            if (a.sizes, a.is_integer) != (b.sizes, b.is_integer):
                return f"{name} has other sizes or another quantization"
            if not _agree(a, b, self.host != other.host):
                return f"{name} has other numbers"
        for name in sorted(self.weights.keys() ^ other.weights.keys()):
            # Hosts have different names, so a missing name is a difference only for an adapter.
            if self.host == other.host or "lora" in name.lower():
                return f"only one of them has {name!a:.80}"
        lacking = _layers(self.weights) | _layers(other.weights)
        lacking -= _layers(name for name in common if len(self.weights[name].sizes) > 1)
        if lacking or not common:
            where = f"in {min(lacking)} " if lacking else ""
            return (
                f"{where}no weight has the same name in mlx-lm and transformers, so they cannot "
                "be compared"
            )
        return None


def check_file(
    path: str | Path, metadata: Mapping[str, str], weights: Weights, model_type: str
) -> None:
    """Refuse a saved cache of other weights; a file without a fingerprint is accepted.

    Args:
        path: The file.
        metadata: Texts of the file.
        weights: Weights of the model that continues with the file.
        model_type: Name of the model in messages.

    Raises:
        ValueError: If the file belongs to another model, or its fingerprint cannot be read.
    """
    text = metadata.get(MODEL)
    if text is None:
        return
    made_with = Fingerprint.from_text(text)
    if made_with is None:
        raise ValueError(
            f"[prompt cache] {path} must name its model by a fingerprint of version {_VERSION}, "
            f"but it has {text!a:.40}; make the file again."
        )
    if (difference := made_with.difference(weights.fingerprint)) is not None:
        raise ValueError(
            f"[prompt cache] {path} must be of this {model_type}, but other weights made it "
            f"({difference}); use the model that made it, or make the file again."
        )


def _agree(a: Weight, b: Weight, between_hosts: bool) -> bool:
    """Whether two weights of the same sizes have the same numbers, regardless of their dtypes."""
    if a.digits == b.digits:
        return True
    if a.is_integer or len(a.digits) != len(b.digits):
        return False
    # mlx-lm adds 1 to the norms of some models when it loads them.
    shifts = (0, 1) if between_hosts and len(a.sizes) == 1 else (0,)
    return any(
        _is_rounded(x.values + shift, y.values) for shift in shifts for x, y in ((a, b), (b, a))
    )


def _is_rounded(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    """Whether y is x rounded to float32, float16 or bfloat16."""
    with np.errstate(over="ignore"):
        wide = x.astype(np.float32)
        return any(np.array_equal(y, z) for z in (wide, wide.astype(np.float16), _bfloat16(wide)))


def _bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to bfloat16, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _layers(names: Iterable[str]) -> set[str]:
    """Return the layers of these weights, such as ``layers.3``."""
    return {match[0] for name in names if (match := _LAYER.match(name))}


# ---- the weights of a model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The weights of a model that a fingerprint samples.

    Args:
        host: One of ``HOSTS``.
        shapes: Shape of each weight, by the host's name.
        sample: Function that takes, by name, the positions along every axis of a weight and returns
            the numbers there: float32 for a floating weight, else unsigned integers.
    """

    host: str
    shapes: Mapping[str, Sizes]
    sample: Callable[[Mapping[str, NDArray[np.int64]]], Mapping[str, NDArray[np.generic]]]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the model; computing it reads the weights."""
        names = canonical_names(name for name, shape in self.shapes.items() if 0 not in shape)
        numbers = self.sample({own: places_of(self.shapes[own]) for own in names.values()})
        weights = {name: _weight(self.shapes[own], numbers[own]) for name, own in names.items()}
        return Fingerprint(self.host, weights)

    def may_be(self, other: Fingerprint) -> bool:
        """Whether the shapes are the same as in a fingerprint; reads no weight."""
        names = canonical_names(self.shapes)
        return _layers(names) == _layers(other.weights) and all(
            _sizes(self.shapes[own]) == other.weights[name].sizes
            for name, own in names.items()
            if name in other.weights
        )


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Map canonical names, which all hosts share, to the names of this host.

    ``model.language_model.layers.3.mlp.up_proj.weight`` is ``layers.3.mlp.up_proj.weight``. Outside
    of layers, a canonical name is the last two parts. Weights of all experts are
    ``layers.3.experts.down_proj``. The result does not contain the head (no cache depends on it),
    weights of a list inside a layer (single experts, which other hosts stack), or names that are
    not unique.
    """
    chosen: dict[str, str] = {}
    twice = set()
    for own in names:
        inside = _IN_LAYER.search(own)
        name = inside[0] if inside else ".".join(own.split(".")[-2:])
        if experts := _EXPERTS.fullmatch(name):
            name = "{}.experts.{}".format(*experts.groups())
        is_listed = sum(part.isdecimal() for part in name.split(".")) > 1
        if len(name) > _NAME or is_listed or name.startswith(_HEAD):
            continue
        if name in chosen:
            twice.add(name)
        chosen[name] = own
    return {name: own for name, own in chosen.items() if name not in twice}


def places_of(shape: Sizes) -> NDArray[np.int64]:
    """Return positions on the diagonal, which are the same for every order of the axes."""
    last = min(_sizes(shape)) - 1
    return np.unique(np.arange(_SAMPLES) * last // (_SAMPLES - 1))


def _sizes(shape: Sizes) -> Sizes:
    """Return the dimensions in ascending order; (1,) for a scalar."""
    return tuple(sorted(shape)) or (1,)


def _weight(shape: Sizes, numbers: NDArray[np.generic]) -> Weight:
    is_integer = numbers.dtype != np.float32
    bits = numbers.astype(np.uint32) if is_integer else numbers.view(np.uint32)
    return Weight(_sizes(shape), is_integer, bits.astype(">u4").tobytes().hex())
