"""Compile the library: ``python cpu_kernels/build.py`` puts it into the package beside this folder.

One source becomes one variant for every instruction set that is worth it; which one runs is
decided when the library is loaded. It needs a C++17 compiler (gcc 9 or clang 11, or newer) and
nothing else.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "rotormlx" / "librotormlx_cpu.so"

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    # Nobody reads errno or the flags of the floating-point unit.
    *("-fno-math-errno", "-fno-trapping-math"),
)
# What is compiled for every variant. Packed bytes must not depend on the variant, so encode rounds
# every operation as it is written.
PER_VARIANT = {"encode.cpp": "-ffp-contract=off", "attend.cpp": "-ffp-contract=fast"}
X86_VARIANTS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it failed."""


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that is there.

    Raises:
        CompilerError: If there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise CompilerError(f"no C++ compiler was found (looked for {', '.join(names)})")
    return found


def build(
    target: Path = TARGET,
    *,
    compiler: str | None = None,
    flags: Sequence[str] = (),
    machine: str | None = None,
) -> Path:
    """Compile the library.

    Args:
        target: The file to write.
        compiler: The C++ compiler; None for :func:`find_compiler`.
        flags: More flags, for compiling and linking.
        machine: What ``platform.machine()`` says of the processor to compile for; None for this.

    Returns:
        ``target``.

    Raises:
        CompilerError: If there is no compiler, or it failed.
    """
    compiler = compiler or find_compiler()
    x86 = (machine or platform.machine()) in ("x86_64", "AMD64")
    variants = {"baseline": (), **(X86_VARIANTS if x86 else {})}
    command = [compiler, *FLAGS, f"-I{HERE.parent / 'shared_kernels'}", *flags]
    has = [f"-DWITH_{name.upper()}" for name in variants if name != "baseline"]
    steps = [
        (f"{name}-{source}", [*command, *variant_flags, contract, f"-DVARIANT={name}"], source)
        for name, variant_flags in variants.items()
        for source, contract in PER_VARIANT.items()
    ]
    steps += [(source, [*command, *has], source) for source in ("library.cpp", "pool.cpp")]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = [Path(scratch, f"{name}.o") for name, _, _ in steps]
        done = threads.map(
            lambda step, out: _run([*step[1], "-c", str(HERE / step[2]), "-o", str(out)]),
            steps,
            objects,
        )
        list(done)
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = Path(scratch, "library.so")
        _run([compiler, "-shared", "-pthread", *flags, *map(str, objects), "-o", str(linked)])
        # Whole or not at all: a process may be loading the old one.
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(linked, staged)
        staged.replace(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


if __name__ == "__main__":
    try:
        print(build())
    except CompilerError as error:
        sys.exit(str(error))
