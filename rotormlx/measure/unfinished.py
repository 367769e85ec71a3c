"""Files of partial results, with which an interrupted run continues.

A file's name is a digest of everything that its contents depend on, so results for another model,
text, setting or version are never used. A file appears only when it is complete.
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
# The entry of a file that holds everything but the arrays, as JSON.
_FACTS = "facts"


@contextmanager
def folder(output: Path | None, name: str) -> Iterator[Path]:
    """Make a folder for partial results; delete it when the run is done, keep it if it ends early.

    Args:
        output: The folder for the results; None for a temporary folder that cannot be resumed.
        name: The name of the command.

    Yields:
        The folder.

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
            f"[{name}] The results so far must be written to {kept}, but the system reports: "
            f"{error.strerror}; free some space, or name another folder with --output."
        ) from error
    finally:
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()


def only(kept: Path, names: Sequence[str]) -> None:
    """Delete everything in a folder that has another name: it belongs to a different run."""
    for path in kept.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(**parts: Any) -> str:
    """Return a file name for results that depend on texts, numbers, bytes and lists of these."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:32]


def of_model(model: Any) -> str:
    """Return a digest of a model: its configuration and every weight."""
    found = hashlib.sha256(repr(getattr(model, "args", None)).encode())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, weight in sorted(parameters.items()):
        found.update(f"{name} {weight.dtype} {weight.shape}".encode())
        raw = weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight
        found.update(np.ascontiguousarray(np.array(raw)).tobytes())
    return found.hexdigest()


def of_scheme(chosen: Scheme, model: Any) -> str:
    """Return a digest of a scheme and of the calibration that it uses."""
    made = None if chosen.transform is None else calibration.find(model, chosen.transform)
    numbers = {} if made is None else made.numbers
    held = [(name, array.tobytes()) for name, array in sorted(numbers.items())]
    return digest(name=chosen.name, numbers=held)


def of_package() -> str:
    """Return a digest of the files of rotormlx; after an edit, everything is measured again."""
    found = hashlib.sha256()
    root = Path(rotormlx.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def write(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write arrays, and facts as JSON, to a file that appears only when it is complete."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays, **{_FACTS: np.array(json.dumps(facts))})  # type: ignore[arg-type]
    os.replace(part, path)


def read(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """Return what :func:`write` stored; None if there is no such file or it is damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            facts = facts_of(file)
            return {name: file[name] for name in file.files if name != _FACTS}, facts
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def facts_of(file: Any) -> dict[str, Any]:
    """Return the facts of an open file."""
    facts: dict[str, Any] = json.loads(str(file[_FACTS]))
    return facts
