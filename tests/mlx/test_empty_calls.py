"""Calls with no rows, no queries or nothing to see, on every backend of this machine."""

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.view import KVView

DIMS = {KEY: 16, VALUE: 24}
CODECS = {role: codec(RotorConfig(), DIMS[role], layer=0, role=role) for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("batch", "heads", "blocks"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["B", "K", "N"]
)
def test_no_rows_are_coded_and_decoded(each_backend, batch, heads, blocks, role):
    chosen, dim = CODECS[role], DIMS[role]
    packed = backend().encode(mx.zeros((batch, heads, blocks * BLOCK, dim)), chosen)
    assert packed.words.shape == (batch, heads, blocks, *chosen.words_shape)
    assert packed.scales.shape == (batch, heads, blocks, BLOCK)
    assert role == VALUE or packed.centres.shape == (batch, heads, blocks, dim)
    rows = backend().decode(packed, chosen, dtype=mx.float16)
    assert (rows.shape, rows.dtype) == ((batch, heads, blocks * BLOCK, dim), mx.float16)


def views(batch, kv_heads, tokens):
    """Exact tokens alone."""
    return [
        KVView(
            CODECS[role], mx.ones((batch, kv_heads, tokens, DIMS[role])), None, None, 0, 0, tokens
        )
        for role in ROLES
    ]


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length"),
    [(0, 4, 2, 3), (2, 0, 2, 3), (2, 0, 0, 3), (2, 4, 2, 0)],
    ids=["B", "H", "K", "L"],
)
@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_no_queries_get_an_empty_result(each_backend, batch, heads, kv_heads, length, tokens, mask):
    if length > tokens:
        length = 0
    queries = mx.ones((batch, heads, length, DIMS[KEY]), mx.bfloat16)
    output = attend_view(queries, *views(batch, kv_heads, tokens), scale=1.0, mask=mask)
    assert output.shape == (batch, heads, length, DIMS[VALUE])
    assert output.dtype == mx.bfloat16


@pytest.mark.parametrize("logit", [None, 0.0, -np.inf])
def test_a_query_that_sees_nothing_gives_zero(each_backend, logit):
    logits = None if logit is None else mx.full((4,), logit)
    hidden = mx.zeros((2, 1, 3, 5), mx.bool_)
    output = attend_view(
        mx.ones((2, 4, 3, DIMS[KEY])), *views(2, 2, 5), scale=1.0, mask=hidden, sink_logits=logits
    )
    assert np.array_equal(np.array(output), np.zeros(output.shape))
