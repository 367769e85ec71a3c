"""The fastest of several kernels: how it is found, and that it is found once on a device."""

import mlx.core as mx
import pytest

from rotormlx.mlx.backends import choices, kept
from rotormlx.mlx.backends.choices import RUNS, fastest
from rotormlx.mlx.backends.first_call import KernelError

NAME = "levels, 4 bits"


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a step says so."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(choices.time, "perf_counter", lambda: Clock.now)
    return Clock


@pytest.fixture
def findings(monkeypatch, tmp_path):
    """Those of a new process."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))

    def made():
        kept._findings.cache_clear()
        return kept.findings("metal")

    yield made
    kept._findings.cache_clear()


def ways_of(clock, **seconds):
    """Ways that take so long, and a list of those that ran."""
    ran = []

    def way(name, taken):
        def step():
            ran.append(name)
            if taken is None:
                raise KernelError(name, "it does not compile")
            clock.now += taken[min(ran.count(name) - 1, len(taken) - 1)]
            return mx.zeros(1)

        return step

    return {name: way(name, taken) for name, taken in seconds.items()}, ran


def test_the_fastest_way_is_chosen_and_kept(clock, findings):
    # The first run compiles, and the second was disturbed.
    ways, ran = ways_of(clock, table=[5], quad=[99, 90, 3], arithmetic=[4])
    assert fastest(findings(), NAME, ways) == "quad"
    assert ran == ["table", "quad", "arithmetic"] * RUNS
    ways, ran = ways_of(clock, table=[1], quad=[9], arithmetic=[9])
    assert fastest(findings(), NAME, ways) == "quad"
    assert ran == []
    assert findings().everything() == {NAME: "quad"}


def test_what_was_chosen_before_must_still_be_there(clock, findings):
    findings().keep(NAME, "abacus")
    ways, _ = ways_of(clock, table=[2], quad=[1])
    assert fastest(findings(), NAME, ways) == "quad"


def test_a_way_that_does_not_compile_is_left_out(clock, findings):
    ways, ran = ways_of(clock, table=[2], quad=None)
    assert fastest(findings(), NAME, ways) == "table"
    assert ran.count("quad") == 1


def test_the_first_way_is_taken_where_none_runs(clock, findings):
    ways, _ = ways_of(clock, table=None, quad=None)
    assert fastest(findings(), NAME, ways) == "table"
    assert findings().everything() == {}
