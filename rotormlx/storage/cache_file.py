"""Files with the states of caches, in the layout of mlx-lm's ``save_prompt_cache``.

Entry j of the state of cache i is the tensor ``i.j``; an entry of a list inside a state is the
tensor ``i.j.k``. The metadata holds the user's texts (``0.name``), the class of each cache
(``1.i``), and the tensors that represent numbers, texts and None (``2.m.0`` is the name of the
tensor and ``2.m.1`` its kind, from m = 1). ``2.0``, which mlx-lm writes empty and never reads,
holds the checksum of rotormlx.

A file's header is compared with the rules of its classes before an array is read. A class that is
not in these rules is never looked up, and every array must have the shape that follows from the
other entries.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rotormlx.storage import tensor_file
from rotormlx.storage.cache_rules import Shape, check
from rotormlx.storage.tensor_file import Array, TensorFile

WHERE = "prompt cache"
# The dtypes of a tensor that represents a number.
_SCALAR_DTYPES = ("I32", "I64", "F32", "BOOL")
_MOST_CHARACTERS = 2**16
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_PLACE = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{0,15}}")
_TEXTS = re.compile(rf"0\..*|1\.{_NUMBER}|2\.0|2\.{_NUMBER}\.[01]", re.DOTALL)

State = Any  # a list of states, or a leaf: an array, a number, a text, None


# ---- writing ------------------------------------------------------------------------------------


def misfit(path: str | Path, model_type: str, required: str, came: object) -> ValueError:
    """Return the error for a file of another model."""
    return ValueError(
        f"[prompt cache] The model {model_type} requires {required}, but {path} has {came}; use "
        "the file with the model that made it, or make it again."
    )


def with_suffix(path: str | Path) -> str:
    """Return the path with the suffix ``.safetensors``, which mlx-lm also appends if missing."""
    return f"{path}" if f"{path}".endswith(".safetensors") else f"{path}.safetensors"


def write(
    path: str | Path,
    classes: Sequence[str],
    states: Sequence[State],
    metadata: Mapping[str, str],
    tensor_of: Callable[[Any], tuple[str, tuple[int, ...], Callable[[], Array]]],
) -> None:
    """Write a file with a checksum, atomically.

    Args:
        path: The file to make or to replace.
        classes: The class of each cache.
        states: The state of each cache: a list of arrays, numbers, texts, None and lists of these.
        metadata: The user's texts.
        tensor_of: Function that returns the dtype (as the format names it), shape and content of an
            array.

    Raises:
        ValueError: If a state holds something else, or ``path`` cannot be a file.
        OSError: If the disk is full, or the directory is read-only; the old file is unchanged.
    """
    tensors = {}
    texts = {f"0.{name}": text for name, text in metadata.items()}
    texts |= {f"1.{index}": name for index, name in enumerate(classes)}
    kinds = 0
    for index, state in enumerate(states):
        for name, value in _flat(str(index), state):
            kind, array = _as_array(value)
            if kind is None:
                tensors[name] = tensor_of(value)
                continue
            kinds += 1
            texts |= {f"2.{kinds}.0": name, f"2.{kinds}.1": kind}
            dtype = tensor_file.DTYPE_NAMES[array.dtype]
            tensors[name] = (dtype, array.shape, array.copy)
    tensor_file.write_tensors(path, tensors, texts, where=WHERE, checksum="2.0")


def _flat(name: str, state: State) -> Iterator[tuple[str, Any]]:
    if not isinstance(state, (list, tuple)):
        yield name, state
        return
    for place, part in enumerate(state):
        yield from _flat(f"{name}.{place}", part)


def _as_array(value: Any) -> tuple[str | None, Array]:
    """Return the kind of a leaf, None for an array, and the array that mlx-lm writes for it."""
    if value is None:
        return "none", np.zeros(0, np.float32)
    if isinstance(value, bool):
        return "scalar", np.array(value)
    if isinstance(value, int):
        return "scalar", np.array(value, np.int32 if abs(value) < 2**31 else np.int64)
    if isinstance(value, float):
        return "scalar", np.array(value, np.float32)
    if isinstance(value, str):
        letters = np.array([ord(c) for c in value])
        return "string", letters.astype(np.int32 if value else np.float32)
    return None, np.zeros(0)


# ---- reading ------------------------------------------------------------------------------------


class SavedCaches:
    """A file of caches whose header was checked against the rules of its classes.

    Attributes:
        classes: The class of each cache.
        metadata: The user's texts.
        shapes: The index and shape of each cache, for comparison with a model. A list of caches has
            one entry per part, all with the index of the list.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._read_texts(file.metadata)
        self.shapes: list[tuple[int, Shape]] = []
        states = self._states(file.entries.__getitem__)
        for index, (name, state) in enumerate(zip(self.classes, states, strict=True)):
            for shape in check(name, state, file):
                self.shapes.append((index, shape))

    def _read_texts(self, texts: dict[str, str]) -> None:
        """Read the classes, the metadata and the values that are not arrays."""
        file = self._file
        if "1.0" not in texts:
            raise file.error("be a file of save_prompt_cache", "it is another safetensors file")
        if not file.names_checksum:
            raise file.error("have an entry 2.0 for a checksum, which may be empty", "it has none")
        for text in texts:
            if not _TEXTS.fullmatch(text):
                raise file.error("have the metadata of caches", f"it has {text[:80]!a}")
        self.metadata = {k[2:]: text for k, text in texts.items() if k.startswith("0.")}
        count = sum(name.startswith("1.") for name in texts)
        if any(f"1.{i}" not in texts for i in range(count)):
            raise file.error("number its classes from 0 without gaps", "it does not")
        self.classes = [texts[f"1.{i}"] for i in range(count)]
        self._values = dict(self._read_values(texts))

    def read(self, make: Callable[[Array, str], Any]) -> list[State]:
        """Read the states; ``make`` converts each array, given its dtype.

        Raises:
            ValueError: If the file ends early, or the checksum does not match.
        """
        arrays: dict[str, Any] = {}
        for name, array in self._file.tensors():
            if name not in self._values:
                arrays[name] = make(array, self._file.entries[name].dtype)
        return self._states(arrays.__getitem__)

    def _read_values(self, texts: dict[str, str]) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of each tensor that represents a number, a text or None."""
        file = self._file
        pairs = sum(name.startswith("2.") for name in texts) // 2
        wanted = {f"2.{m}.{part}" for m in range(1, pairs + 1) for part in (0, 1)}
        if wanted != {name for name in texts if name.startswith("2.")}:
            raise file.error(
                "number its scalars from 1, each with a name and a kind", "it does not"
            )
        seen = set()
        for m in range(1, pairs + 1):
            name, kind = texts[f"2.{m}.0"], texts[f"2.{m}.1"]
            entry = file.entries.get(name)
            if entry is None or name in seen:
                raise file.error("name each scalar once", f"it names {name[:80]!a}")
            fits = {
                "scalar": entry.shape == () and entry.dtype in _SCALAR_DTYPES,
                "string": (len(entry.shape) == 1 and entry.dtype == "I32") or entry.shape == (0,),
                "none": entry.shape == (0,),
            }
            if not fits.get(kind) or math.prod(entry.shape) > _MOST_CHARACTERS:
                raise file.error(
                    "mark its tensors correctly as scalar, string or none",
                    f"{name}, {entry.dtype} of shape {entry.shape}, is marked {kind[:80]!a}",
                )
            seen.add(name)
            yield name, _value(file.read(file.entries[name]), kind, file)

    def _states(self, leaf: Callable[[str], Any]) -> list[State]:
        """Return one state per class, from the names of the tensors."""
        root: dict[int, Any] = {}
        for name in self._file.entries:
            if not _PLACE.fullmatch(name):
                raise self._file.error("name its tensors by numbers", f"one is {name}")
            *branch, last = map(int, name.split("."))
            node = root
            for place in branch:
                node = node.setdefault(place, {})
                if type(node) is not dict:
                    raise self._file.error("name its tensors once", f"{name} is inside another")
            if last in node:
                raise self._file.error("name its tensors once", f"{name} holds others")
            node[last] = _Leaf(self._values[name] if name in self._values else leaf(name))
        states = self._listed(root)
        if len(states) != len(self.classes) or not all(type(s) is list for s in states):
            raise self._file.error(
                f"hold one state for each of its {len(self.classes)} caches",
                f"it holds {len(states)}",
            )
        return states

    def _listed(self, node: dict[int, Any]) -> list[State]:
        if node.keys() != set(range(len(node))):
            raise self._file.error("number its entries from 0", f"it has {sorted(node)[:8]}")
        return [
            child.value if type(child) is _Leaf else self._listed(child)
            for _, child in sorted(node.items())
        ]


class OldSavedCaches(SavedCaches):
    """A file of mlx-lm before 0.32, which holds only caches of mlx-lm's own classes.

    A state there consists of arrays and of texts. The metadata holds the texts of each cache
    (``0.i``, or a list of them), the user's texts (``1.name``) and the class of each cache
    (``2.i``). States are returned in the form that mlx-lm writes since 0.32.
    """

    def _read_texts(self, texts: dict[str, str]) -> None:
        self._values = {}
        self.metadata = {k[2:]: text for k, text in texts.items() if k.startswith("1.")}
        self.classes = [text for k, text in texts.items() if re.fullmatch(rf"2\.{_NUMBER}", k)]
        self._beside = [self._tree(texts, f"0.{i}") for i in range(len(self.classes))]

    def _tree(self, texts: dict[str, str], name: str) -> Any:
        """Return a text, or the list of the entries below its name."""
        if name in texts:
            return texts[name]
        count = len(
            {k[len(name) + 1 :].partition(".")[0] for k in texts if k.startswith(f"{name}.")}
        )
        return [self._tree(texts, f"{name}.{i}") for i in range(count)]

    def _states(self, leaf: Callable[[str], Any]) -> list[State]:
        states = super()._states(leaf)
        triples = zip(self.classes, states, self._beside, strict=True)
        return [self._as_written_now(*triple) for triple in triples]

    def _as_written_now(self, name: str, state: State, beside: Any) -> State:
        """Return the state of a cache as mlx-lm writes it since 0.32."""
        try:
            if name == "CacheList":
                names, texts = beside
                parts = zip(names, state, texts, strict=True)
                return [[self._as_written_now(*part), part[0]] for part in parts]
            if name == "ArraysCache":
                return [state, None, None]
            keys, values = state
            held = keys.shape[2]
            if name == "KVCache":
                return [keys, values, held]
            numbers = [int(text) for text in beside]
            if name == "RotatingKVCache":
                keep, size, offset, place = numbers
                return [keys, values, offset, keep, size, place]
            if name == "ChunkedKVCache":
                size, start = numbers
                return [keys, values, start + held, size, start]
        except (AttributeError, IndexError, TypeError, ValueError):
            raise self._file.error(f"hold a {name}", "it holds something else") from None
        raise self._file.error("hold caches of mlx-lm before 0.32", f"it has {name[:80]!a}")


class _Leaf(NamedTuple):
    """A wrapped value, which distinguishes an entry from a list of entries."""

    value: Any


def _value(array: Array, kind: str, file: TensorFile) -> Any:
    """Return the value that a tensor represents."""
    if kind == "none":
        return None
    if kind == "scalar":
        return array.item()
    try:
        return array.astype("<i4").tobytes().decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise file.error("hold characters in its texts", str(error.reason)) from error


def is_old_layout(texts: Mapping[str, str]) -> bool:
    """Whether a file has the layout of mlx-lm before 0.32."""
    return re.fullmatch(r"[A-Z]\w*", texts.get("2.0", "")) is not None


def _checksum_key(texts: Mapping[str, str]) -> str:
    """Return the metadata key of the checksum; empty for the old layout, which has none."""
    return "" if is_old_layout(texts) else "2.0"


@contextmanager
def opened(path: str | Path) -> Iterator[SavedCaches]:
    """Open a file of caches and check its header; no array is read yet.

    Raises:
        ValueError: If there is no such file, or it is damaged or not a file of caches.
    """
    with tensor_file.open_tensors(path, where=WHERE, checksum=_checksum_key) as file:
        yield OldSavedCaches(file) if is_old_layout(file.metadata) else SavedCaches(file)
