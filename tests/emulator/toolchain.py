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
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

_COMPILER = "g++"
_COMMON = ("-std=c++17", "-fPIC", "-g1")
# Its functions are called at every access: they may be inlined, between files too.
_RUNTIME_FLAGS = (
    *(*_COMMON, "-O2", "-flto", "-fno-semantic-interposition", "-Wall", "-Wextra", "-Werror"),
)
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
# Without -fsanitize and without libraries: the runtime stands in for the sanitizers' library, is
# loaded first and brings those of C and C++. To look through them is most of the time of a link.
_KERNEL_LINK_FLAGS = ("-shared", "-nodefaultlibs")


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
    version = _version(_compiler())
    target = cache_folder() / f"runtime-{_digest([version, *flags], _files('runtime'))}.so"
    if not target.exists():
        sources = [str(path) for path in sorted((HERE / "runtime").glob("*.cpp"))]
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            linked = f"{scratch}/runtime.so"
            _run([_compiler(), *flags, "-shared", *sources, "-o", linked])
            os.replace(linked, target)
    # Kernels are loaded later and find the runtime's functions by name.
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


@dataclass(frozen=True)
class Prelude:
    """Headers that stand in front of every kernel of a language, compiled once.

    Attributes:
        header: The one that includes all others.
        include: More folders of headers.
        version: Of what lies in ``include``.
    """

    header: Path
    include: tuple[Path, ...] = ()
    version: str = ""

    @functools.cached_property
    def flags(self) -> tuple[str, ...]:
        """What the compiler needs to find the headers."""
        return tuple(f"-I{folder}" for folder in (self.header.parent, *self.include))

    @functools.cached_property
    def digest(self) -> str:
        """Of all that a kernel is compiled with, but for its text."""
        headers = [HERE / "runtime" / "emulator.h", *_files("msl"), *_files(self.header.parent)]
        tool = (_version(_compiler()), *_KERNEL_FLAGS, *_KERNEL_LINK_FLAGS)
        return _digest([*tool, self.header.name, self.version], headers)

    @property
    def compiled(self) -> Path:
        """A folder with the precompiled header."""
        folder = cache_folder() / f"prelude-{self.digest}"
        target = folder / f"{self.header.name}.gch"
        if not target.exists():
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source = Path(scratch, "prelude.hpp")
                source.write_text(f'#include "{self.header.name}"\n', encoding="utf-8")
                made = f"{scratch}/made.gch"
                command = [_compiler(), *_KERNEL_FLAGS, *self.flags, "-x", "c++-header"]
                _run([*command, str(source), "-o", made])
                os.replace(made, target)
        return folder


def module_of(text: str, prelude: Prelude) -> Path:
    """Where the shared object of a kernel's text lies or will lie."""
    return cache_folder() / f"kernel-{_digest([prelude.digest, text], [])}.so"


def kernel_module(text: str, prelude: Prelude) -> Path:
    """Compile the C++ text of a kernel to a shared object, or find it compiled."""
    target = module_of(text, prelude)
    if not target.exists():
        _compile_kernels(text, prelude, target)
    return target


def kernel_modules(texts: Mapping[str, str], prelude: Prelude) -> None:
    """Compile kernels into one shared object, found later as that of each of them.

    Args:
        texts: By the text of a kernel alone, its part of the one text; all parts in a row are
            compiled. Each kernel has an entry function of its own.
        prelude: Of all of them.
    """
    unit = "\n".join(texts.values())
    several = cache_folder() / f"kernels-{_digest([prelude.digest, unit], [])}.so"
    if not several.exists():
        _compile_kernels(unit, prelude, several)
    for text in texts:
        with tempfile.TemporaryDirectory(dir=several.parent) as scratch:
            link = Path(scratch, "link")
            link.symlink_to(several.name)
            os.replace(link, module_of(text, prelude))


def _compile_kernels(text: str, prelude: Prelude, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, made, linked = (Path(scratch, f"kernel.{end}") for end in ("cpp", "o", "so"))
        source.write_text(f'#include "{prelude.header.name}"\n{text}', encoding="utf-8")
        # The precompiled header is found first, and the header itself where it does not fit.
        flags = [*_KERNEL_FLAGS, f"-I{prelude.compiled}", *prelude.flags]
        _run([_compiler(), *flags, "-c", str(source), "-o", str(made)])
        _run([_compiler(), *_KERNEL_LINK_FLAGS, str(made), "-lgcc", "-o", str(linked)])
        os.replace(linked, target)


def source_place(module: Path, offset: int, source_names: Iterable[str]) -> int | None:
    """The line that the code before ``offset`` in a module was compiled from, in one of the texts
    of these names.
    """
    tool = shutil.which("addr2line")
    if tool is None:
        return None
    command = [tool, "-i", "-e", str(module), hex(offset - 1)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for frame in output.splitlines():  # innermost first: skip what was inlined from the shim
        file, _, line = frame.split(" ")[0].rpartition(":")
        if Path(file).name in source_names and line.isdigit():
            return int(line)
    return None


def missing() -> str | None:
    """Why nothing can be emulated here, or None if it can.

    Raises:
        ValueError: If $ROTORMLX_EMULATOR is neither ``off`` nor unset.
    """
    switch = os.environ.get("ROTORMLX_EMULATOR")
    if switch not in (None, "off"):
        raise ValueError(f"ROTORMLX_EMULATOR must be 'off' or unset, but is {switch!r}.")
    if switch == "off":
        return "ROTORMLX_EMULATOR=off"
    if sys.platform != "linux":  # a Mac's g++ is another compiler
        return "the emulator needs Linux"
    return None if shutil.which(_COMPILER) else "the emulator needs g++"


def _compiler() -> str:
    if reason := missing():
        raise CompilerMissingError(f"[emulator] Nothing can be emulated here: {reason}.")
    return require_compiler(_COMPILER, "Install g++ 12 or newer.")


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


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
