"""What is derived from a rotation is made once, and goes with it."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import rotation
from rotormlx.codec.derived import derived
from rotormlx.codec.format import BLOCK, KEY, Codec
from rotormlx.mlx.backends import available, backend


class Thing:
    """Something to derive from."""


def test_a_result_is_made_once_for_each_argument():
    made = []

    @derived
    def pair(thing, number, *, other=0):
        made.append((number, other))
        return number, other

    first, second = Thing(), Thing()
    for thing in (first, second, first):
        assert pair(thing, 1) == (1, 0)
        assert pair(thing, 1, other=2) == (1, 2)
    assert made == [(1, 0), (1, 2)] * 2
    pair.cache_clear()
    pair(first, 1)
    assert len(made) == 5


def test_results_go_with_their_object():
    class Large:
        pass

    @derived
    def large(thing):
        return Large()

    thing = Thing()
    seen = weakref.ref(large(thing))
    assert seen() is large(thing)
    del thing
    gc.collect()
    assert seen() is None


def test_one_content_is_one_calibrated_rotation():
    matrices = np.random.default_rng(0).normal(size=(2, 16, 16))
    first = rotation.calibrated(matrices)
    assert rotation.calibrated(matrices.copy()) is first
    assert rotation.calibrated(2 * matrices) is not first
    assert rotation.calibrated(matrices.reshape(1, 2, 16, 16)[0]) is first


@pytest.mark.parametrize("name", available())
def test_a_calibrated_rotation_goes_with_its_codec(name, monkeypatch):
    """Whatever a backend has derived from it; a model's are hundreds of megabytes."""
    monkeypatch.setenv("ROTORMLX_BACKEND", name)
    chosen = Codec(KEY, 4, rotation.calibrated(np.random.default_rng(1).normal(size=(2, 16, 16))))
    seen = weakref.ref(chosen.rotation)
    rows = mx.random.normal((1, 2, BLOCK, 16))
    packed = backend().encode(rows, chosen)
    mx.eval(backend().decode(packed, chosen))
    del chosen
    gc.collect()
    assert seen() is None
