"""Says now and then how many kernels were compiled, to a person who waits for a first run."""

import sys
import threading
import time

import pytest

from tests.emulator import toolchain

# Seconds between two lines: on a terminal, and in a log.
INTERVALS = 15, 60


class Progress:
    """Counts what is new in the emulator's cache; all processes of a run compile into it.

    Test processes have capture on while a test runs, so a line is written between two tests. With
    xdist this process runs none and may write at any time.
    """

    def __init__(self, config: pytest.Config, interval: float) -> None:
        self._config, self._interval = config, interval
        self._before = self._said = self._compiled()
        self._next = time.monotonic() + interval
        self._ended = threading.Event()

    def pytest_sessionstart(self) -> None:
        if self._config.pluginmanager.hasplugin("dsession"):
            threading.Thread(target=self._watch, daemon=True).start()

    def pytest_runtest_logstart(self) -> None:
        self._say_if_due()

    def pytest_sessionfinish(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1):
            self._say_if_due()

    def _say_if_due(self) -> None:
        if time.monotonic() < self._next or self._ended.is_set():
            return
        self._next = time.monotonic() + self._interval
        compiled = self._compiled()
        if compiled > self._said:
            self._said = compiled
            writer = self._config.get_terminal_writer()
            if writer.width_of_current_line:
                writer.line()
            new = compiled - self._before
            writer.line(f"GPU kernels compiled so far: {new}; later runs find them.", flush=True)

    def _compiled(self) -> int:
        return sum(1 for _ in toolchain.cache_folder().glob("kernel-*.so"))


def show(config: pytest.Config) -> None:
    """Let the process that reports a run say so."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config, INTERVALS[not sys.stdout.isatty()]))
