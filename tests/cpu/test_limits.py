"""Calls of the CPU library at their limits: nothing to do, nothing seen, no threads to be had."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rotormlx.codec.format import KEY, VALUE, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library

pytestmark = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"no CPU library: {cpu_library.missing()}"
)

ROOT = Path(__file__).parents[2]
D, DV = 16, 24
KEYS = codec(RotorConfig(), D, layer=0, role=KEY)
VALUES = codec(RotorConfig(), DV, layer=0, role=VALUE)


def attend(batch, heads, kv_heads, length, tokens, sink_logits=None, mask=None):
    """Attention over exact tokens alone, written over sevens."""
    queries = np.ones((batch, heads, length, D), np.float32)
    output = np.full((batch, heads, length, DV), 7, np.float32)
    exact = tuple(np.ones((batch, kv_heads, tokens, dim), np.float32) for dim in (D, DV))
    nothing = Packed(None, None, None)
    blocks = tuple(cpu_library.Blocks(c, *nothing, None) for c in (KEYS, VALUES))
    cpu_library.attend(
        *(queries, output, *map(cpu_library.Source, exact, blocks), [(0, tokens)] * batch),
        **{"sink": 0, "scale": 1.0, "sink_logits": sink_logits, "mask": mask, "threads": 3},
    )
    return output


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "tokens"),
    [(0, 4, 2, 3, 5), (2, 0, 2, 3, 5), (2, 4, 2, 0, 5), (2, 0, 0, 3, 5)],
    ids=["batch", "query-heads", "queries", "heads"],
)
def test_a_call_without_rows_writes_nothing(batch, heads, kv_heads, length, tokens):
    assert attend(batch, heads, kv_heads, length, tokens).size == 0


@pytest.mark.parametrize("logit", [None, 0.0, -np.inf])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_query_that_sees_nothing_gives_zero(tokens, logit):
    sink_logits = None if logit is None else np.full(4, logit, np.float32)
    mask = np.zeros((2, 1, 3, tokens), np.bool_)
    assert (attend(2, 4, 2, 3, tokens, sink_logits, mask) == 0).all()


def test_rows_without_blocks_are_coded_and_decoded():
    for chosen in (KEYS, VALUES):
        rows = np.zeros((2, 3, 0, chosen.head_dim), np.float32)
        words = np.zeros((2, 3, 0, *chosen.words_shape), np.uint32)
        scales, centres = np.zeros((2, 3, 0, 64), np.float16), np.zeros((2, 3, 0, D), np.float16)
        blocks = cpu_library.Blocks(
            chosen, words, scales, centres if chosen.role == KEY else None, None
        )
        cpu_library.encode(rows, blocks, given_centres=False)
        cpu_library.decode(blocks, rows)


@pytest.mark.parametrize(
    ("text", "count"), [("3", 3), ("3,2", 3), ("0", None), ("-2", None), ("²", None), ("x", None)]
)
def test_threads_are_those_asked_for_or_the_cores(monkeypatch, text, count):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    cpu_library.thread_count.cache_clear()
    wanted = cpu_library.thread_count()
    monkeypatch.delenv("OMP_NUM_THREADS")
    cpu_library.thread_count.cache_clear()
    assert wanted == (count or cpu_library.thread_count())
    cpu_library.thread_count.cache_clear()


def test_absurdly_many_threads_are_bounded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9" * 30)
    cpu_library.thread_count.cache_clear()
    assert cpu_library.thread_count() == cpu_library.MAX_THREADS
    cpu_library.thread_count.cache_clear()


def many():
    """A call whose tasks keep three threads busy."""
    return attend(4, 8, 4, 64, 700)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_NPROC"), reason="needs RLIMIT_NPROC")
def test_threads_that_cannot_start_are_done_without():
    code = """
import os, resource
from tests.cpu import test_limits as t
expected = t.many()
# A forked process has none of its parent's threads, and may start none.
if os.fork() == 0:
    if os.geteuid() == 0:  # the limit does not bind root
        os.setgid(65534)
        os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os._exit(0 if (t.many() == expected).all() else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
