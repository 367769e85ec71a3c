"""Files for results: a path that cannot be written is refused before the work starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from rotormlx.cli.refusal import Refusal


def check_file(name: str, path: Path) -> None:
    """Refuse a path where no file can be created or replaced; create nothing.

    Args:
        name: The name of the command, for messages.
        path: The file, as the user named it.

    Raises:
        Refusal: If its folder is missing or read-only, or the path is not a file.
    """
    try:
        is_folder = not path.name or path.is_dir()
    except (OSError, ValueError) as error:
        raise _unwritable(name, path, error) from error
    if is_folder:
        raise Refusal(f"[{name}] The output must be a file, but {path} is a folder; name a file.")
    if os.path.lexists(path) and not path.exists():
        raise Refusal(f"[{name}] The output {path} is a broken link; choose another path.")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise Refusal(f"[{name}] The output {path} is read-only; choose another path.")
        return
    _try_folder(name, path.parent, path)


@contextmanager
def folder(name: str, path: Path) -> Iterator[Path]:
    """Make a folder for results; afterwards, remove the folders it made that are still empty.

    Args:
        name: The name of the command, for messages.
        path: The folder, as the user named it.

    Yields:
        The folder.

    Raises:
        Refusal: If the folder cannot be made, or no file can be written to it.
    """
    made: list[Path] = []
    try:
        try:
            made = [part for part in (path, *path.parents) if not part.exists()]
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise _unwritable(name, path, error) from error
        _try_folder(name, path, path)
        yield path
    finally:
        for own in made:
            if own.is_dir() and not any(own.iterdir()):
                own.rmdir()


@contextmanager
def lines(name: str, path: Path | None, source: Path) -> Iterator[Callable[[str], None]]:
    """Open a file and store each line as soon as it is written; the first replaces the old text.

    Args:
        name: The name of the command, for messages.
        path: The file, as the user named it; standard output if None.
        source: The file that the lines are made from.

    Yields:
        A function that writes a line.

    Raises:
        Refusal: If the file cannot be opened or written, or is the source itself.
    """
    if path is None:
        yield typer.echo
        return
    is_new = not os.path.lexists(path)
    try:
        file = path.open("a", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unwritable(name, path, error) from error
    if path.samefile(source):
        file.close()
        raise Refusal(f"[{name}] The output {path} is also the input; name another file.")
    written = 0

    def write(line: str) -> None:
        nonlocal written
        try:
            if not written and path.is_file():
                file.truncate(0)
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise _unwritable(name, path, error) from error
        written += 1

    try:
        with file:
            yield write
    finally:
        if is_new and not written:
            path.unlink(missing_ok=True)


def _unwritable(name: str, path: Path, error: Exception) -> Refusal:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Refusal(f"[{name}] The output {path} cannot be written: {why}; choose another path.")


def _try_folder(name: str, place: Path, path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        raise _unwritable(name, path, error) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically: after an interrupt it holds the old text or the new one."""
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
