"""Calls of the operators with no rows, no queries, nothing to see, or a mask that is too short."""

import numpy as np
import pytest
import torch

import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.torch import torch_ops
from rotormlx.torch.torch_ops import AttendCall, KVView

CONFIG = RotorConfig()
DIMS = {KEY: 16, VALUE: 24}
CODECS = {role: codec(CONFIG, DIMS[role], layer=0, role=role) for role in ROLES}


@pytest.fixture(params=["native", "torch"], autouse=True)
def _path(request, monkeypatch):
    """Which implementation the operators of the CPU use."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_library, "missing", lambda: "this test wants torch operations")
    elif (reason := cpu_library.missing()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("batch", "heads", "blocks"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["B", "K", "N"]
)
def test_no_rows_are_coded_and_decoded(batch, heads, blocks, role):
    chosen, dim = CODECS[role], DIMS[role]
    packed = rt.encode(torch.zeros(batch, heads, blocks * BLOCK, dim), CONFIG, layer=0, role=role)
    assert packed.words.shape == (batch, heads, blocks, *chosen.words_shape)
    assert packed.scales.shape == (batch, heads, blocks, BLOCK)
    rows = rt.decode(packed, CONFIG, layer=0, role=role, head_dim=dim, dtype=torch.float16)
    assert (rows.shape, rows.dtype) == ((batch, heads, blocks * BLOCK, dim), torch.float16)


def attend(batch, heads, kv_heads, length, tokens, **options):
    views = [
        KVView(CODECS[role], torch.ones(batch, kv_heads, tokens, DIMS[role]), None, None)
        for role in ROLES
    ]
    query = torch.ones(batch, heads, length, DIMS[KEY])
    lengths = torch.tensor([(0, tokens)] * batch, dtype=torch.int32).reshape(-1, 2)
    return rt.attend(query, lengths, *views, CONFIG, layer=0, scale=1.0, **options)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length"),
    [(0, 4, 2, 3), (2, 0, 2, 3), (2, 0, 0, 3), (2, 4, 2, 0)],
    ids=["B", "H", "K", "L"],
)
@pytest.mark.parametrize("tokens", [5, 0])
def test_no_queries_get_an_empty_result(batch, heads, kv_heads, length, tokens):
    output = attend(batch, heads, kv_heads, length, tokens)
    assert output.shape == (batch, heads, length, DIMS[VALUE])


@pytest.mark.parametrize("logit", [None, 0.0, -np.inf])
@pytest.mark.parametrize("tokens", [5, 0])
def test_a_query_that_sees_nothing_gives_zero(tokens, logit):
    logits = None if logit is None else torch.full((4,), logit)
    hidden = torch.zeros(2, 1, 3, tokens, dtype=torch.bool)
    output = attend(2, 4, 2, 3, tokens, mask=hidden, sink_logits=logits)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_shorter_than_the_tokens_is_refused(columns, dtype):
    """Native code would read behind its end."""
    says = rf"\[attend\] A mask must have a column for each of 5 tokens.*\(2, 1, 3, {columns}\)"
    with pytest.raises(ValueError, match=says):
        attend(2, 4, 2, 3, 5, mask=torch.ones(2, 1, 3, columns, dtype=dtype))
    longer = attend(2, 4, 2, 3, 5, mask=torch.ones(2, 1, 3, 7, dtype=torch.bool))
    assert torch.equal(longer, attend(2, 4, 2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("columns", [2, 4])
def test_where_no_length_can_be_read_tokens_behind_the_mask_are_hidden(columns, dtype):
    """So do the kernels, and so do the operations that stand in for them on a device."""
    views = [KVView(CODECS[role], torch.randn(2, 2, 5, DIMS[role]), None, None) for role in ROLES]
    lengths = torch.tensor([(0, 5), (0, 3)], dtype=torch.int32)
    call = AttendCall(
        *(torch.randn(2, 4, 3, DIMS[KEY]), lengths, *views),
        **{"sink": 4, "scale": 1.0, "causal": False, "sink_logits": None},
        mask=torch.ones(2, 1, 3, columns, dtype=dtype),
    )
    hidden = False if dtype == torch.bool else -np.inf
    whole = torch.nn.functional.pad(call.mask, (0, 5 - columns), value=hidden)
    outputs = [torch_ops.attend(asked) for asked in (call, call._replace(mask=whole))]
    assert torch.equal(*outputs)
