"""Damaged files, by the thousand: each is loaded as it was written or refused in our words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import fuzz_files

ROOT = Path(__file__).parents[2]
CORPUS = sorted((ROOT / "tests" / "storage" / "corpus").glob("*.safetensors"))
FILES = 10_000
ATHERIS_SECONDS = 30


@pytest.fixture(autouse=True, scope="module")
def models():
    """Those that read the corpus are made once, and gone when this file is done."""
    yield
    fuzz_files.model_of.cache_clear()
    fuzz_files.torch_model.cache_clear()


def python(*arguments, cwd):
    """Run a module of the tests in a process of its own: it may crash, or hang and be ended."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_damaged_file_is_loaded_as_written_or_refused(tmp_path, figure):
    done = python("tests.support.fuzz_files", "--count", FILES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    came = json.loads(done.stdout)
    assert came["files"] == came["loaded"] + came["refused"] == FILES
    # Files that are valid all the same must be among them, or all would be refused for one reason.
    assert came["loaded"] > FILES // 50
    assert came["refused"] > FILES // 2
    # Twice the largest file, and JSON of one header, which takes up to 20 times its size.
    assert came["grown"] <= 2 * came["largest"] + 20 * 2**20
    figure(
        f"damaged files: {came['files']:,} tried, {came['refused']:,} refused, "
        f"{came['loaded']:,} loaded ({came['unchanged']:,} of them unchanged), memory grew by "
        f"{came['grown'] / 2**20:.1f} MiB"
    )


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_loaded_or_refused(path):
    taken = fuzz_files.load(fuzz_files.kind_of(path.read_bytes()), path)
    if path.stem.startswith("valid-"):
        assert taken[0]  # torch reads no cache with a limit


def test_the_corpus_has_all_kinds():
    assert {path.stem.partition("-")[0] for path in CORPUS} == {"valid", "of", "batch", "damaged"}


@pytest.mark.slow
def test_atheris_finds_nothing(tmp_path, figure):
    """Guided by coverage, for half a minute; it begins with the kept corpus."""
    pytest.importorskip("atheris", reason="atheris is not installed: it has wheels for Linux only")
    (tmp_path / "new").mkdir()
    done = python(
        "tests.storage.fuzz_loader",
        f"-max_total_time={ATHERIS_SECONDS}",
        tmp_path / "new",
        ROOT / "tests" / "storage" / "corpus",
        cwd=tmp_path,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    [runs] = re.findall(r"^Done (\d+) runs in", said, re.MULTILINE)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)
    assert int(runs) > 1000  # it did try
    assert int(covered[-1][0]) > int(covered[0][0])  # and was guided
    figure(
        f"atheris: {int(runs):,} files in {ATHERIS_SECONDS} s, coverage {covered[0][0]} -> "
        f"{covered[-1][0]}, features {covered[0][1]} -> {covered[-1][1]}, no finding"
    )


@pytest.mark.slow
def test_atheris_finds_an_input_that_takes_too_much(tmp_path):
    """However large the process is that starts the fuzzer: Linux hands its peak on."""
    pytest.importorskip("atheris", reason="atheris is not installed: it has wheels for Linux only")
    planted = """
import numpy as np
from tests.storage import fuzz_loader
load = fuzz_loader.fuzz_files.load
gigabytes = iter([0.5, 0.5, 1.5, 0.5])
def large(*args):
    size = next(gigabytes)
    print("load takes", size, flush=True)
    np.ones(int(size * 2**30), np.uint8)
    return load(*args)
fuzz_loader.fuzz_files.load = large
fuzz_loader.main()
"""
    (tmp_path / "planted.py").write_text(planted)
    starter = bytearray(b"1") * (5 * 2**29)
    done = python("planted", "-runs=4", CORPUS[0], cwd=tmp_path)
    del starter
    said = done.stdout + done.stderr
    assert done.returncode, said[-3000:]
    assert "MemoryError: peak memory must grow by at most 1024 MiB" in said
    assert re.findall(r"load takes (\S+)", said) == ["0.5", "0.5", "1.5"]
