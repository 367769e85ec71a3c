"""What a run has measured so far, in files, so that an interrupted run goes on where it was.

A file's name is a digest of all that its contents depend on, so contents that belong to another
model, text, setting or version are never found. A file appears whole, when all of it is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

import rotormlx
from rotormlx.measure.schemes import Scheme
from rotormlx.mlx import calibration

Arrays = dict[str, NDArray[Any]]
# Of all that a number is made of, what is not an array.
_FACTS = "facts"


@contextmanager
def folder(output: Path | None, name: str) -> Iterator[Path]:
    """Where a run keeps what it has measured; gone when the run is done, left if it is ended early.

    Args:
        output: Where the results go; None for a temporary folder, from which nothing is resumed.
        name: Of the command.

    Raises:
        RuntimeError: If a file cannot be written.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    kept = output / f"{name}-unfinished"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        shutil.rmtree(kept)
    except OSError as error:
        raise RuntimeError(
            f"[{name}] What was measured so far must be written to {kept}, but the system says: "
            f"{error.strerror}; make room, or name another folder with --output."
        ) from error
    finally:
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()


def only(kept: Path, names: Sequence[str]) -> None:
    """Delete what is in a folder under other names: of a run that asked for something else."""
    for path in kept.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(**parts: Any) -> str:
    """A name for what depends on some texts, numbers, bytes, and lists of them."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:32]


def of_model(model: Any) -> str:
    """Digest of a model: every weight, and how it computes."""
    found = hashlib.sha256(repr(getattr(model, "args", None)).encode())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in sorted(parameters.items()):
        found.update(f"{name} {weight.dtype} {weight.shape}".encode())
        raw = weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight
        found.update(np.ascontiguousarray(np.array(raw)).tobytes())
    return found.hexdigest()


def of_scheme(chosen: Scheme, model: Any) -> str:
    """Digest of a scheme, with the calibration that it uses."""
    made = None if chosen.transform is None else calibration.find(model, chosen.transform)
    numbers = {} if made is None else made.numbers
    held = [(name, array.tobytes()) for name, array in sorted(numbers.items())]
    return digest(name=chosen.name, numbers=held)


def of_package() -> str:
    """Digest of the files of rotormlx: an edited one measures anew."""
    found = hashlib.sha256()
    root = Path(rotormlx.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def write(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Keep arrays and what JSON can say beside them; the file appears at once, or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays, **{_FACTS: np.array(json.dumps(facts))})  # type: ignore[arg-type]
    os.replace(part, path)


def read(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """What :func:`write` kept; None if there is no such file, or it is damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            facts = facts_of(file)
            return {name: file[name] for name in file.files if name != _FACTS}, facts
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def facts_of(file: Any) -> dict[str, Any]:
    """What lies beside the arrays of an open file."""
    facts: dict[str, Any] = json.loads(str(file[_FACTS]))
    return facts
