"""Builds the CUDA kernels: one library for each configuration, compiled on first use and kept.

A library holds the launchers of ``cuda_kernels/`` and ``binding.cpp``, compiled for the head_dims,
bits and rotation of one configuration and for one kind of GPU. Its name is a hash of everything
that determines its content: the sources, the versions of torch and nvcc, the architecture and the
configuration.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels.source import cuda_header, folder
from rotormlx.storage.paths import cache_dir

_FOLDERS = ("cuda_kernels", "shared_kernels")
# Compiled in parallel.
SOURCES = ("launch_attend.cu", "launch_codec.cu", "launch_store.cu", "binding.cpp")
# nvcc's names for GPUs with instructions beyond those of their generation.
_OWN_ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a"}
_OLDEST = (8, 0)
# The file in the directory of a library that cpp_extension.load waits for.
_TORCH_LOCK = "lock"
# The flags of nvcc that torch sets before ours.
TORCH_FLAGS = cpp_extension.COMMON_NVCC_FLAGS


@dataclass(frozen=True)
class Configuration:
    """The configuration that a library is compiled for.

    Args:
        rotation: Name of the rotation.
        key_dim: head_dim of keys.
        value_dim: head_dim of values.
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.
        arch: nvcc's name for the architecture of the GPU, such as ``sm_90a``.
    """

    rotation: str
    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int
    arch: str

    @property
    def name(self) -> str:
        """Name of the library and of its operators' namespace: a hash of all inputs."""
        digest = hashlib.sha256()
        facts = [*sorted(asdict(self).items()), torch.__version__, nvcc_version()]
        texts = [path.read_bytes() for path in source_files()]
        headers = [text.encode() for _, text in sorted(self.headers().items())]
        for part in (repr(facts).encode(), *texts, *headers):
            digest.update(hashlib.sha256(part).digest())
        return f"rotormlx_cuda_{digest.hexdigest()[:16]}"

    @property
    def directory(self) -> Path:
        """The folder where the library is built and kept."""
        return cache_dir() / "cuda" / self.name

    def headers(self) -> dict[str, str]:
        """The generated headers, by file name."""
        config = RotorConfig(self.key_bits, self.value_bits, self.rotation)
        dims = ((KEY, self.key_dim), (VALUE, self.value_dim))
        return {
            f"{role}_rotation.h": cuda_header(codec(config, dim, layer=0, role=role))
            for role, dim in dims
        }

    def cuda_flags(self) -> list[str]:
        """Options of nvcc."""
        numbers = {
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "KEY_BITS": self.key_bits,
            "VALUE_BITS": self.value_bits,
        }
        defines = [f"-DROTORMLX_{name}={number}" for name, number in numbers.items()]
        # torch disables float16 conversions that the kernels need.
        allowed = [flag.replace("-D", "-U") for flag in TORCH_FLAGS if "CONVERSIONS" in flag]
        return ["-O3", f"-arch={self.arch}", *allowed, *defines]

    def cpp_flags(self) -> list[str]:
        """Options of the C++ compiler."""
        return ["-O2", f"-DROTORMLX_NAMESPACE={self.name}"]

    def include_paths(self) -> list[str]:
        """Folders of the headers, including the generated ones."""
        return [str(self.directory), str(folder("cuda_kernels"))]

    def write_headers(self) -> None:
        """Put the generated headers into :attr:`directory`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.headers().items():
            path = self.directory / name
            # An unchanged file keeps its time, so that nothing is compiled again.
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")


def build(configuration: Configuration, *, verbose: bool = False) -> Path:
    """Compile a configuration if it is not compiled yet, and load its operators.

    One process builds at a time; others wait for it. A killed build does not block others.

    Args:
        configuration: What to compile for.
        verbose: Show the compiler's commands and messages.

    Returns:
        The directory of the library; its operators are ``torch.ops.<configuration.name>``.

    Raises:
        RuntimeError: If a tool or the GPU is missing, or a compiler fails.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(f"[build] CUDA kernels cannot be built: {reason}.")
    directory = configuration.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The system releases this lock when a process dies.
    with FileLock(directory.with_suffix(".lock")):
        configuration.write_headers()
        # torch's own lock is a file that remains when a process dies.
        (directory / _TORCH_LOCK).unlink(missing_ok=True)
        _compile(configuration, verbose=verbose)
    return directory


def _compile(configuration: Configuration, *, verbose: bool) -> None:
    try:
        cpp_extension.load(
            name=configuration.name,
            sources=[str(folder("cuda_kernels") / name) for name in SOURCES],
            extra_cflags=configuration.cpp_flags(),
            extra_cuda_cflags=configuration.cuda_flags(),
            extra_include_paths=configuration.include_paths(),
            build_directory=str(configuration.directory),
            is_python_module=False,
            verbose=verbose,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"[build] The kernels of {', '.join(SOURCES)} must compile for {configuration.arch} "
            f"({torch.cuda.get_device_name()}), but they do not; rotormlx.torch.remove(model) "
            f"restores a model's own caches. The compiler says: {error}"
        ) from error


def missing() -> str | None:
    """Return the reason why this process cannot build and run CUDA kernels, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU; the CPU operators work without one"
    if torch.cuda.get_device_capability() < _OLDEST:
        return "the GPU is older than compute capability 8.0; the CPU operators work without one"
    tools = {
        "nvcc is neither on PATH nor in CUDA_HOME; install the CUDA toolkit": nvcc(),
        "there is no C++ compiler; install g++ or name one in CXX": shutil.which(
            os.environ.get("CXX", "c++")
        ),
        "there is no ninja; install it with pip": shutil.which("ninja"),
    }
    return next((reason for reason, path in tools.items() if path is None), None)


def architecture(capability: tuple[int, int]) -> str:
    """Return nvcc's name for a compute capability such as (9, 0)."""
    major, minor = capability
    return _OWN_ARCHITECTURES.get(capability, f"sm_{major}{minor}")


def nvcc() -> str | None:
    """Return the path of the CUDA compiler; like torch, look in CUDA_HOME first, then in PATH."""
    home = cpp_extension.CUDA_HOME
    in_home = None if home is None else shutil.which("nvcc", path=str(Path(home) / "bin"))
    return in_home or shutil.which("nvcc")


@cache
def nvcc_version() -> str:
    """Return the release of nvcc, such as ``13.0``; empty without nvcc."""
    path = nvcc()
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\S+),", done.stdout)
    return release[1] if release else done.stdout.strip()


def source_files() -> list[Path]:
    """Return the files that a library is compiled from, except the generated headers."""
    files = [path for name in _FOLDERS for path in folder(name).iterdir() if path.is_file()]
    return sorted(files, key=lambda path: (path.parent.name, path.name))
