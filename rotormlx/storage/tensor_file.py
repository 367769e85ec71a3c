"""Safetensors files: written atomically, and read without trust in their content.

The format is a length (8 bytes), a header (JSON: the position of each tensor, and a dictionary of
texts) and the tensors. The whole header is checked against the size of the file before anything is
allocated, and no name in it is ever looked up or used as a path.

Files written here have a checksum among their texts: the SHA-256 of the file with zeros in place of
the 64 digits of the checksum. Processors have instructions for SHA-256, so it runs at the speed of
a disk, and unlike a CRC of 32 bits it detects all damage. It is not a signature: anyone who forges
a file can also compute its checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# The default key of the checksum among the texts of a file.
CHECKSUM = "rotormlx_sha256"

# Name of a temporary file, in the directory of the file that it replaces. Files of this name that a
# killed process left can be deleted at any time.
PARTIAL = ".rotormlx-{token}.partial{suffix}"

# The dtypes of the format, except those below 8 bits, which are not used, and BF16, which numpy
# lacks.
_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}
DTYPE_NAMES = {dtype: name for name, dtype in _NUMPY.items()}
# Bytes per element.
ITEM_BYTES = {**{name: dtype.itemsize for name, dtype in _NUMPY.items()}, "BF16": 2}

# Parsed JSON may take 20 times its size in memory, so the size of the header is limited. The header
# of a cache of 100 layers has about 200 KB.
HEADER_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**31 - 1  # of one dimension: MLX counts in int32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80

Array = npt.NDArray[Any]


class Entry(NamedTuple):
    """The entry of a tensor in a header: its dtype (as the format names it), shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path, where: str = "files") -> Iterator[Path]:
    """Provide a temporary file that replaces ``path`` if the block ends without an error.

    The temporary file is first flushed to the disk. So ``path`` always holds either the complete
    old file or the complete new one, even after a crash at any moment. On an error, the temporary
    file is removed and the old file stays.

    Args:
        path: The file to make or to replace. A symbolic link is kept; the file it points to is
            replaced.
        where: The text in brackets at the start of an error message.

    Yields:
        The path to write to: an existing empty file with the same directory and suffix.

    Raises:
        ValueError: If ``path`` is in no existing directory, or exists and is not a file.
        OSError: If the file cannot be written, because the disk is full or the directory is
            read-only.
    """
    target = Path(os.path.realpath(path))
    is_new = not os.path.lexists(target)
    if not os.path.isdir(target.parent) or not (is_new or os.path.isfile(target)):
        raise ValueError(
            f"[{where}] A file in an existing directory is required, but {path} is "
            f"{'in none' if is_new else 'not a file'}; choose another path."
        )
    token = secrets.token_hex(8)
    temporary = target.with_name(PARTIAL.format(token=token, suffix=target.suffix))
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            if not is_new:
                temporary.chmod(target.stat().st_mode & 0o777)
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"[{where}] {path} could not be written: {error.strerror or error}; an existing file "
            "is unchanged. Free disk space, or choose another path.",
        ) from error
    # The new name is on the disk only after its directory is flushed. Some file systems do not
    # support this; the file is complete in any case.
    with suppress(OSError):
        _sync(target.parent)


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    *,
    where: str = "files",
) -> None:
    """Write arrays to a safetensors file with a checksum, atomically (:func:`atomic_path`).

    Args:
        path: The file to make or to replace.
        arrays: Arrays by name. A name has at most 200 letters, digits, ``_``, ``-`` and ``.``.
        metadata: Texts to store with the arrays.
        where: The text in brackets at the start of an error message.

    Raises:
        ValueError: If a name, a dtype or a text is not allowed, or ``path`` cannot be a file.
        OSError: If the disk is full, or the directory is read-only; the old file is unchanged.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], Callable[[], Array]]] = {}
    for name, array in arrays.items():
        dtype = DTYPE_NAMES.get(array.dtype)
        if dtype is None:
            raise ValueError(
                f"[{where}] An array must have one of the dtypes "
                f"{', '.join(map(str, DTYPE_NAMES))}, but {name} has {array.dtype}; convert it."
            )
        tensors[name] = (dtype, array.shape, partial(np.asarray, array))
    write_tensors(path, tensors, metadata, where=where)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], Callable[[], Array]]],
    metadata: Mapping[str, str] | None = None,
    *,
    where: str = "files",
    checksum: str = CHECKSUM,
) -> None:
    """Do the same as :func:`write_arrays`, but make each array only when it is written.

    Args:
        path: The file to make or to replace.
        tensors: By name: the dtype (as the format names it), the shape, and a function that returns
            the array. Only the bytes of the array are used, not its dtype.
        metadata: Texts to store with the arrays.
        where: The text in brackets at the start of an error message.
        checksum: The key of the checksum among the texts.

    Raises:
        ValueError: If a name, a dtype or a text is not allowed, or ``path`` cannot be a file.
        OSError: If the disk is full, or the directory is read-only; the old file is unchanged.
    """
    # Widest elements first, as other writers do, so that all tensors are aligned to their elements.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES.get(tensors[name][0], 0), name))
    entries: dict[str, Entry] = {}
    stop = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        start, stop = stop, stop + ITEM_BYTES.get(dtype, 0) * math.prod(shape)
        entries[name] = Entry(dtype, tuple(shape), start, stop)
    texts = dict(metadata or {})
    header = _header_bytes(entries, {**texts, checksum: _NO_DIGEST})
    # A header that a reader would refuse is not written.
    _Checking(where, str(path), "change it and save again").header(header[8:], stop)
    with atomic_path(path, where) as temporary, open(temporary, "wb") as file:
        file.write(header)
        digest = hashlib.sha256(header)
        for name in order:
            array = np.ascontiguousarray(tensors[name][2]())
            expected = entries[name].stop - entries[name].start
            if array.nbytes != expected:
                raise ValueError(
                    f"[{where}] {name} must have {expected} bytes, but it has {array.nbytes}; give "
                    "the shape and dtype of the array."
                )
            data = array.reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
            del array, data  # free it before the next one is made
        file.seek(0)
        file.write(_header_bytes(entries, {**texts, checksum: digest.hexdigest()}))


def _header_bytes(entries: Mapping[str, Entry], texts: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    for name, entry in entries.items():
        offsets = [entry.start, entry.stop]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ------------------------------------------------------------------------------------


class TensorFile:
    """An open file whose header was checked.

    Args:
        file: The file, opened for reading.
        header: The bytes before the first tensor.
        checksum: The key of the checksum among the texts, or a function that returns it for the
            texts.
        checking: Checks the header and makes errors.

    Attributes:
        entries: The tensors by name, in the order of the file.
        metadata: The texts, without the checksum.
        has_checksum: Whether the file has a checksum.
        names_checksum: Whether the file has an entry for a checksum, even an empty one.
    """

    def __init__(
        self,
        file: BufferedReader,
        header: bytes,
        checksum: str | Callable[[Mapping[str, str]], str],
        checking: _Checking,
    ) -> None:
        size = os.fstat(file.fileno()).st_size
        self.entries, self.metadata = checking.header(header[8:], size - len(header))
        self._file = file
        self._header = header
        self._checking = checking
        key = checksum if isinstance(checksum, str) else checksum(self.metadata)
        # mlx-lm writes an empty text where its own files of caches could have a checksum.
        self.names_checksum = key in self.metadata
        self._digest = self.metadata.pop(key, "")
        self.has_checksum = self._digest != ""
        if self.has_checksum and not _DIGEST.fullmatch(self._digest):
            raise self.error("have a checksum of 64 digits", f"it has {_shown(self._digest)}")

    def error(self, required: str, came: str) -> ValueError:
        """Return the error for content that is not as required."""
        return self._checking.error(required, came)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Yield every tensor in the order of the file; bfloat16 is returned as uint16.

        The checksum is compared after the last tensor, so do not use a tensor before that.

        Raises:
            ValueError: If the file ends early, a boolean is neither 0 nor 1, or the checksum does
                not match.
        """
        digest = None
        if self.has_checksum:
            zeros = _NO_DIGEST.encode()
            digest = hashlib.sha256(self._header.replace(self._digest.encode(), zeros))
        for name, entry in self.entries.items():
            array = self.read(entry)
            if digest is not None:
                digest.update(array.reshape(-1).view(np.uint8).data)
            yield name, array
            del array  # free it before the next one is read
        if digest is not None and digest.hexdigest() != self._digest:
            raise self.error("match its checksum", "its content was changed")

    def read(self, entry: Entry) -> Array:
        """Read one tensor without comparing the checksum; bfloat16 is returned as uint16.

        Raises:
            ValueError: If the file ends early, or a boolean is neither 0 nor 1.
        """
        array = np.empty(entry.shape, _NUMPY.get(entry.dtype, np.dtype("<u2")))
        data = array.reshape(-1).view(np.uint8)
        self._file.seek(len(self._header) + entry.start)
        if self._file.readinto(data.data) != data.nbytes:
            raise self.error("be complete", "it ends early")
        if entry.dtype == "BOOL" and data.max(initial=0) > 1:
            raise self.error("hold booleans as bytes of 0 and 1", "it holds other bytes")
        return array


@contextmanager
def open_tensors(
    path: str | Path,
    *,
    where: str = "files",
    checksum: str | Callable[[Mapping[str, str]], str] = CHECKSUM,
) -> Iterator[TensorFile]:
    """Open a safetensors file and check its header; no tensor is read yet.

    The checks cover the sizes of file and header, the header's form, names, dtypes and shapes, and
    that the tensors fill the rest of the file without gap or overlap.

    Args:
        path: The file.
        where: The text in brackets at the start of an error message.
        checksum: The key of the checksum among the texts, or a function that returns it for the
            texts.

    Yields:
        The open file. All reads use the same open file that was checked.

    Raises:
        ValueError: If there is no such file, it cannot be read, or it is damaged.
    """
    if not Path(path).is_file():  # checked before opening, because opening a pipe would wait
        raise ValueError(
            f"[{where}] An existing file is required, but {path} is not a file; check the path."
        )
    checking = _Checking(where, str(path), "it is damaged: make it again")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(start := file.read(8), "little")
            limit = min(status.st_size - 8, HEADER_BYTES)
            if not S_ISREG(status.st_mode) or not 2 <= length <= limit:
                raise checking.error(
                    f"have a safetensors header of 2 to {HEADER_BYTES} bytes",
                    f"the file has {status.st_size} bytes and its length field says {length}",
                )
            yield TensorFile(file, start + file.read(length), checksum, checking)
    except OSError as error:
        raise ValueError(
            f"[{where}] {path} could not be read: {error.strerror or error}; check the file."
        ) from error


def read_arrays(
    path: str | Path, *, where: str = "files", checksum_required: bool = True
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a file that :func:`write_arrays` wrote.

    Args:
        path: The file.
        where: The text in brackets at the start of an error message.
        checksum_required: Whether a file without a checksum is refused.

    Returns:
        The arrays by name, and the texts without the checksum.

    Raises:
        ValueError: If there is no such file, or it is damaged.
    """
    with open_tensors(path, where=where) as file:
        if checksum_required and not file.has_checksum:
            raise file.error(f"have a checksum named {CHECKSUM}", "it has none")
        for name, entry in file.entries.items():
            if entry.dtype not in _NUMPY:
                raise file.error("hold dtypes of numpy", f"{name} is {entry.dtype}")
        return dict(file.tensors()), file.metadata


class _Checking(NamedTuple):
    """A check of a file's header, with the texts of its errors.

    where: The text in brackets at the start of an error message.
    path: The file.
    advice: The last part of an error message: what to do.
    """

    where: str
    path: str
    advice: str

    def error(self, required: str, came: str) -> ValueError:
        return ValueError(f"[{self.where}] {self.path} must {required}, but {came}; {self.advice}.")

    def header(self, text: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the tensors, in the order in which they fill ``size`` bytes, and the metadata."""
        if len(text) > HEADER_BYTES:
            raise self.error(
                f"have a header of at most {HEADER_BYTES} bytes", f"it has {len(text)}"
            )
        try:
            # Decoded as UTF-8 here, because json would guess the encoding of bytes.
            fields = json.loads(text.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.error("have a safetensors header in JSON", _shown(str(error))) from error
        if type(fields) is not dict:
            raise self.error("have a JSON object as header", f"it has {_shown(fields)}")
        texts = fields.pop("__metadata__", None)
        if texts is None:  # MLX writes null if there are no texts
            texts = {}
        if type(texts) is not dict or not all(_is_text(t) for pair in texts.items() for t in pair):
            raise self.error("have texts as metadata", f"it has {_shown(texts)}")
        entries = [(name, self.entry(name, field)) for name, field in fields.items()]
        # Several tensors may start at the same byte if they are empty.
        entries.sort(key=lambda item: (item[1].start, item[1].stop))
        end = 0
        for name, entry in entries:
            if entry.start != end:
                raise self.error(
                    "hold its tensors without gap or overlap",
                    f"{name} starts at byte {entry.start} and the one before it ends at {end}",
                )
            end = entry.stop
        if end != size:
            raise self.error(f"have {end} bytes of tensors", f"it has {size}")
        return dict(entries), texts

    def entry(self, name: str, field: Any) -> Entry:
        """Return the entry of one tensor in a header."""
        if not _NAME.fullmatch(name):
            raise self.error(
                "name its tensors with letters, digits, _, - and .", f"one is {_shown(name)}"
            )
        if type(field) is not dict or field.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.error(
                f"give dtype, shape and data_offsets of {name}", f"it gives {_shown(field)}"
            )
        dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
        if type(dtype) is not str or dtype not in ITEM_BYTES:
            raise self.error(
                f"give {name} a dtype of {', '.join(ITEM_BYTES)}", f"it gives {_shown(dtype)}"
            )
        if (
            not _are_integers(shape)
            or len(shape) > _MAX_DIMENSIONS
            # An empty tensor must not have sizes whose product overflows either.
            or math.prod(n or 1 for n in shape) > max(_MAX_SIZE, math.prod(shape))
            or max(shape, default=0) > _MAX_SIZE
        ):
            raise self.error(
                f"give {name} at most {_MAX_DIMENSIONS} dimensions below 2^31",
                f"it gives {_shown(shape)}",
            )
        if not _are_integers(offsets) or len(offsets) != 2:
            raise self.error(f"give {name} a first byte and an end", f"it gives {_shown(offsets)}")
        start, stop = offsets
        expected = ITEM_BYTES[dtype] * math.prod(shape)
        if stop - start != expected:
            raise self.error(
                f"hold {expected} bytes of {name}, {dtype} of shape {shape}",
                f"it holds {_shown(stop - start)}",
            )
        return Entry(dtype, tuple(shape), start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _are_integers(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _is_text(text: Any) -> bool:
    """Whether a text can be encoded; JSON may contain halves of surrogate pairs."""
    return type(text) is str and not any("\ud800" <= c <= "\udfff" for c in text)


def _shown(value: Any) -> str:
    """Return a value from a file as a short text that is safe to print."""
    return _BRIEF.repr(value).encode("ascii", "backslashreplace").decode()
