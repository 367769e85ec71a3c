"""The CUDA build without a GPU: its key, its command, and what is said when it cannot be."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from rotormlx.codec.format import BLOCK, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import build, cuda, torch_ops
from rotormlx.torch.__main__ import app
from rotormlx.torch.build import Configuration

CHOSEN = Configuration("cascade", 64, 80, 4, 3, "sm_90a")
CONFIG = RotorConfig(4, 3)


# ---- the key and the command --------------------------------------------------------------------


def test_a_library_has_a_name_of_its_own(monkeypatch, tmp_path):
    """Everything that decides what is in it counts: numbers, versions, architecture, texts."""
    names = {CHOSEN.name}
    for change in (
        {"rotation": "rotor3"},
        {"key_dim": 128},
        {"value_dim": 64},
        {"key_bits": 8},
        {"value_bits": 4},
        {"arch": "sm_80"},
    ):
        names.add(Configuration(**{**vars(CHOSEN), **change}).name)
    assert len(names) == 7
    assert CHOSEN.name == Configuration(**vars(CHOSEN)).name
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        names.add(CHOSEN.name)
    with monkeypatch.context() as patch:
        patch.setattr(build, "nvcc_version", lambda: "99.0")
        names.add(CHOSEN.name)
    for folder in ("cuda_kernels", "shared_kernels"):
        shutil.copytree(build.folder(folder), tmp_path / folder)
    monkeypatch.setattr(build, "folder", lambda name: tmp_path / name)
    assert CHOSEN.name in names
    with open(tmp_path / "shared_kernels" / "levels.h", "a") as file:
        file.write("\n")
    names.add(CHOSEN.name)
    assert len(names) == 10
    assert all(name.isidentifier() for name in names)


def test_libraries_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    assert CHOSEN.directory == tmp_path / "cuda" / CHOSEN.name
    CHOSEN.write_headers()
    path = CHOSEN.directory / "key_rotation.h"
    assert "namespace key_rotation" in path.read_text()
    assert "namespace value_rotation" in (CHOSEN.directory / "value_rotation.h").read_text()
    os.utime(path, (1, 1))
    CHOSEN.write_headers()
    assert path.stat().st_mtime == 1  # nothing is compiled again


def test_architectures_have_nvccs_names():
    pairs = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100a"}
    for capability, name in pairs.items():
        assert build.architecture(capability) == name


def test_the_build_asks_torch_for_exactly_this(monkeypatch, tmp_path):
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "missing", lambda: None)
    asked = {}
    monkeypatch.setattr(build.cpp_extension, "load", lambda **kwargs: asked.update(kwargs))
    assert build.build(CHOSEN) == tmp_path / "cuda" / CHOSEN.name
    assert asked["name"] == CHOSEN.name
    assert asked["build_directory"] == str(CHOSEN.directory)
    assert asked["is_python_module"] is False
    assert [Path(source).exists() for source in asked["sources"]] == [True] * 4
    assert asked["extra_cuda_cflags"] == [
        *("-O3", "-arch=sm_90a"),
        *("-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
        *("-DROTORMLX_KEY_DIM=64", "-DROTORMLX_VALUE_DIM=80"),
        *("-DROTORMLX_KEY_BITS=4", "-DROTORMLX_VALUE_BITS=3"),
    ]
    assert f"-DROTORMLX_NAMESPACE={CHOSEN.name}" in asked["extra_cflags"]
    assert (Path(asked["extra_include_paths"][0]) / "value_rotation.h").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "output"), [("launch_codec.cu", "-c"), ("launch_attend.cu", "-ptx")]
)
def test_nvcc_compiles_the_launchers(monkeypatch, tmp_path, source, output):
    """Sources and generated headers are complete: the build's flags for sm_90a.

    One goes to an object; for the other, which takes long, PTX is enough.
    """
    if build.nvcc() is None:
        pytest.skip("nvcc is not installed")
    assert source in build.SOURCES
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    CHOSEN.write_headers()
    paths = [f"-I{path}" for path in CHOSEN.include_paths()]
    # torch adds the standard and -fPIC by itself. What is fast does not matter here.
    flags = [*CHOSEN.cuda_flags()[1:], "-Xptxas", "-O0", "-std=c++20", "-Xcompiler", "-fPIC"]
    command = [build.nvcc(), *flags, *paths, output, str(build.folder("cuda_kernels") / source)]
    made = tmp_path / "made"
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if output == "-ptx":
        assert ".target sm_90a" in made.read_text()
        assert "attend_merge" in made.read_text()
        return
    names = subprocess.run(
        ["nm", "--defined-only", str(made)], capture_output=True, text=True, check=True
    ).stdout
    assert " T rotormlx_encode\n" in names
    assert " T rotormlx_decode\n" in names


@pytest.mark.slow
def test_a_killed_build_keeps_none_waiting(tmp_path):
    """Killed while the compiler runs, it leaves torch's lock behind; the next one compiles anew."""
    compiler = tmp_path / "c++"
    compiler.write_text(f"""#!/bin/sh
case " $* " in
  *" -c "*) touch {tmp_path}/compiling; exec sleep 300 ;;
  *) exec c++ "$@" ;;
esac
""")
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "tests.support.tiny_build", str(tmp_path)]
    environment = {**os.environ, "ROTORMLX_CACHE": str(tmp_path)}
    with subprocess.Popen(
        command, env={**environment, "CXX": str(compiler)}, start_new_session=True
    ) as killed:
        while not (tmp_path / "compiling").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        os.killpg(killed.pid, signal.SIGKILL)
    (directory,) = (path for path in (tmp_path / "cuda").iterdir() if path.is_dir())
    assert (directory / "lock").exists()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "built: 7\n", done.stderr


def test_a_build_waits_for_one_that_runs(monkeypatch, tmp_path):
    """Two processes never compile into one directory at once."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "missing", lambda: None)
    compiled = threading.Event()
    monkeypatch.setattr(build, "_compile", lambda *_, **__: compiled.set())
    CHOSEN.directory.mkdir(parents=True)
    with FileLock(CHOSEN.directory.with_suffix(".lock")):
        waiting = threading.Thread(target=build.build, args=[CHOSEN])
        waiting.start()
        # Long enough for a build that does not wait.
        assert not compiled.wait(0.5)
    waiting.join(60)
    assert compiled.is_set()


# ---- what is missing ----------------------------------------------------------------------------


@pytest.fixture
def cuda_machine(monkeypatch):
    """A machine that lacks nothing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    return monkeypatch


def test_nothing_is_missing_on_a_cuda_machine(cuda_machine):
    assert build.missing() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.version, "cuda", None), "built without CUDA; install a CUDA build of torch"),
        ((torch.cuda, "is_available", lambda: False), "torch finds no CUDA GPU"),
        ((torch.cuda, "get_device_capability", lambda *_: (7, 5)), "older than compute capability"),
        ((build, "nvcc", lambda: None), "nvcc is neither on PATH nor in CUDA_HOME"),
        ((shutil, "which", lambda name, **_: "x" if "nv" in name else None), "no C++ compiler"),
        ((shutil, "which", lambda name, **_: "x" if name != "ninja" else None), "no ninja"),
    ],
    ids=["torch", "gpu", "old", "nvcc", "c++", "ninja"],
)
def test_what_is_missing_is_said(cuda_machine, change, message):
    cuda_machine.setattr(*change)
    assert message in build.missing()
    with pytest.raises(RuntimeError, match=r"\[build\] CUDA kernels cannot be built: "):
        build.build(CHOSEN)


@pytest.mark.slow
def test_the_build_command_says_what_is_missing():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    command = [sys.executable, "-m", "rotormlx.torch", "build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is built without CUDA; install a CUDA build of torch" in done.stderr
    done = CliRunner().invoke(app, ["build", "--key-bits", "5"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "key_bits must be one of 2, 3, 4, 8, but 5 was given" in done.stderr


def test_without_a_compiler_cuda_tensors_take_torch_operations(monkeypatch):
    """And that is said once."""
    cuda._can_compile.cache_clear()
    monkeypatch.setattr(build, "missing", lambda: "nvcc is not there")
    chosen = codec(CONFIG, 64, layer=1, role="key")
    x = torch.randn(1, 2, BLOCK, 64)
    with pytest.warns(UserWarning, match="uses torch operations, which are slower: nvcc is not"):
        packed = cuda.encode(x, chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = cuda.decode(packed, chosen, dtype=torch.float32)
    cuda._can_compile.cache_clear()
    assert torch.equal(packed.words, torch_ops.encode(x, chosen).words)
    assert torch.equal(decoded, torch_ops.decode(packed, chosen, dtype=torch.float32))
