"""Compile the runtime and kernels with g++, and keep what was compiled.

Everything compiled lies in one folder, named by a hash of all that went into it, so nothing in it
is ever stale and it may be deleted at any time.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent

_COMPILER = "g++"
_COMMON = ("-std=c++17", "-fPIC", "-g1")
_RUNTIME_FLAGS = (*_COMMON, "-O2", "-Wall", "-Wextra", "-Werror")
_KERNEL_FLAGS = (
    *_COMMON,
    # No load is optimised away unchecked; and compiling is most of the time of a test.
    "-O0",
    # Calls a hook before every load and store, and where an index, a shift or a divisor is wrong.
    "-fsanitize=thread,bounds-strict,shift-exponent,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    # Round every operation, as written, and let pointers be cast between types, as kernels do.
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    # A thread's stack has 256 KiB.
    "-Werror=frame-larger-than=131072",
    # Kernels are full of attributes that only Metal knows.
    "-Wno-attributes",
)


class CompilerMissingError(RuntimeError):
    """A compiler that the emulator or its lint needs is not installed."""


def cache_folder() -> Path:
    """The folder of compiled objects: $ROTORMLX_EMULATOR_CACHE or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rotormlx-emulator"
    folder = Path(os.environ.get("ROTORMLX_EMULATOR_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_compiler(name: str, hint: str) -> str:
    """The path of a compiler, or an error that says how to get it."""
    path = shutil.which(name)
    if path is None:
        raise CompilerMissingError(f"[emulator] {name} is not installed. {hint}")
    return path


@functools.cache
def runtime_library() -> ctypes.CDLL:
    """The fiber runtime, built on first use.

    $ROTORMLX_EMULATOR_UCONTEXT=1 switches fibers as on machines other than x86-64, without the
    few lines of assembly.
    """
    portable = os.environ.get("ROTORMLX_EMULATOR_UCONTEXT") == "1"
    flags = [*_RUNTIME_FLAGS, *(["-DEMULATOR_UCONTEXT"] if portable else [])]
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    path = _build("runtime", flags, sources, inputs=_files("runtime"))
    # Kernels are loaded later and find the runtime's functions by name.
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def kernel_module(text: str, *, shim: Path, include: Sequence[Path] = ()) -> Path:
    """Compile the complete C++ text of a kernel to a shared object, or find it compiled.

    Args:
        text: C++ that defines ``emulator_entry``.
        shim: Folder of a front end's headers.
        include: More folders of headers, whose version ``text`` must name.
    """
    inputs = [HERE / "runtime" / "emulator.h", *_files(shim)]
    source = cache_folder() / f"kernel-{_digest([text], inputs)}.cpp"
    if not source.exists():
        _write_whole(source, text)
    flags = [*_KERNEL_FLAGS, *(f"-I{folder}" for folder in (shim, *include))]
    return _build("kernel", flags, [source], inputs=[source, *inputs])


def source_place(module: Path, offset: int, source_name: str) -> int | None:
    """The line of ``source_name`` that the code before ``offset`` in a module was compiled from."""
    tool = shutil.which("addr2line")
    if tool is None:
        return None
    command = [tool, "-i", "-e", str(module), hex(offset - 1)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for frame in output.splitlines():  # innermost first: skip what was inlined from the shim
        file, _, line = frame.split(" ")[0].rpartition(":")
        if Path(file).name == source_name and line.isdigit():
            return int(line)
    return None


def _build(kind: str, flags: Sequence[str], sources: Sequence[Path], inputs: list[Path]) -> Path:
    compiler = require_compiler(_COMPILER, "Install g++ 12 or newer.")
    target = cache_folder() / f"{kind}-{_digest([_version(compiler), *flags], inputs)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            objects = []
            for source in sources:
                objects.append(f"{scratch}/{source.stem}.o")
                _run([compiler, *flags, "-c", str(source), "-o", objects[-1]])
            # Linked without -fsanitize: the runtime stands in for the sanitizers' libraries.
            linked = f"{scratch}/linked.so"
            _run([compiler, "-shared", *objects, "-o", linked])
            os.replace(linked, target)
    return target


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"[emulator] {' '.join(command)} failed:\n{result.stderr[:8000]}")


def _files(folder: str | Path) -> list[Path]:
    return sorted(path for path in (HERE / folder).rglob("*") if path.is_file())


def _digest(texts: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for part in (*(text.encode() for text in texts), *(path.read_bytes() for path in files)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody, in another process either, ever sees half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
        scratch.write(text)
    os.replace(scratch.name, path)


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
