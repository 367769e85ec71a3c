"""The properties of tests/system/test_properties.py for the Metal and CUDA kernels, emulated.

Each codec and each kind of call is compiled for seconds, so a few are fixed here, and hypothesis
varies what they are given: kinds of rows, lengths, batches, masks, scales. Every kind of call is in
tests/gpu/test_encode_decode.py and tests/gpu/test_attend.py, with data of one kind.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotormlx.codec.format import KEY, ROLES, VALUE
from tests.support.bounds import BROKEN_KINDS, KINDS, WIDE_KINDS, examples
from tests.support.properties import (
    InMLX,
    attention_cases,
    check_attention,
    check_broken_row,
    check_heads,
    check_hidden_row,
    check_rows,
    row_cases,
)
from tests.support.runners import RUNNERS

pytestmark = pytest.mark.usefixtures("one_thread")

# The tensor cores take queries, levels and weights in float16: both factors of a product.
TENSOR_CORES = 2.0**-10


@pytest.fixture(scope="module", params=["metal", "cuda"])
def kernels(request):
    """The one implementation of this name."""
    runner = RUNNERS[request.param]
    if missing := runner.missing():
        pytest.skip(missing)
    if runner.on_device:
        pytest.skip("the device is here: its kernels are in test_properties")
    with runner.kernels():
        yield {runner.name: InMLX(runner.backend)}


# ---- rows ---------------------------------------------------------------------------------------

CODECS = [
    {"rotation": name, "head_dim": dim, "bits": bits, "role": role, "dtype": dtype}
    for name, dim, bits, role, dtype in (
        ("cascade", 64, 4, KEY, "f16"),
        ("rotor3", 80, 3, VALUE, "f32"),
        ("dense", 96, 2, KEY, "bf16"),
        ("hadamard", 128, 8, VALUE, "bf16"),
        ("planar2", 112, 3, KEY, "f32"),
    )
]


def cases_of(codecs, *groups, **more):
    """Rows of one of these codecs, of kinds of each group as often as of another.

    Each codec has a channel scale or none, always the same.
    """
    kind = st.one_of(*(st.sampled_from(sorted(group)) for group in groups))
    few = {
        "kinds": st.lists(kind, min_size=1, max_size=3).map(tuple),
        **{"batch": st.integers(1, 2), "heads": st.integers(1, 2), "blocks": st.integers(1, 2)},
    }
    return st.one_of(
        row_cases(
            KINDS,
            **few
            | {name: st.just(value) for name, value in chosen.items()}
            | {"scaled": st.just(chosen["role"] == VALUE or chosen["dtype"] == "f32")}
            | more,
        )
        for chosen in codecs
    )


@examples(40)
@given(case=cases_of(CODECS, KINDS, WIDE_KINDS, BROKEN_KINDS))
def test_rows_are_coded_by_the_format_and_decode_within_its_bound(kernels, case):
    check_rows(case, kernels)


@examples(20)
@given(
    case=cases_of(CODECS, KINDS),
    broken=st.sets(st.integers(0, 127), min_size=1, max_size=12),
    kind=st.sampled_from(sorted(BROKEN_KINDS)),
)
def test_a_broken_row_stays_alone(kernels, case, broken, kind):
    check_broken_row(case, broken, kind, kernels)


@examples(12)
@given(
    case=cases_of(CODECS[1::2], KINDS, batch=st.just(2), heads=st.just(3)),
    given_centres=st.booleans(),
)
def test_every_head_is_coded_by_itself(kernels, case, given_centres):
    check_heads(case, given_centres, kernels)


# ---- attention ----------------------------------------------------------------------------------

# Metal has a kernel for up to 8 query rows of a KV head and one for more; CUDA one on the tensor
# cores and one for float32. Each is called with masks of a kind.
BOOLEAN = ("boolean", "boolean of tokens", "boolean of queries", "boolean of rows", "nothing")
CALLS = [
    {
        **{"bits": bits, "head_dims": dims, "rotation": rotation, "dtype": dtype},
        **{"repeats": repeats, "length": length, "has_sink_logits": has_sink_logits, "mask": masks},
    }
    for bits, dims, rotation, dtype, repeats, length, has_sink_logits, masks in (
        ((4, 3), (64, 80), "cascade", "f16", 2, 3, False, BOOLEAN),
        ((3, 8), (80, 64), "rotor3", "f32", 3, 2, True, ("causal",)),
        ((2, 4), (96, 96), "dense", "bf16", 4, 5, True, ("additive", "additive of tokens")),
        ((8, 2), (64, 112), "hadamard", "f32", 2, 9, False, BOOLEAN),
    )
]


def calls_of(calls, **more):
    """One of these calls; each has a channel scale or none, always the same."""
    few = {
        "heads": st.integers(1, 2),
        "sizes": st.lists(
            st.tuples(st.integers(0, 2), st.integers(0, 63), st.integers(0, 40)),
            min_size=1,
            max_size=2,
        ).map(tuple),
    }
    return st.one_of(
        attention_cases(
            **few
            | {name: st.just(value) for name, value in call.items()}
            | {"mask": st.sampled_from(call["mask"]), "scaled": st.just(call["has_sink_logits"])}
            | more
        )
        for call in calls
    )


@examples(40)
@given(case=calls_of(CALLS))
def test_attention_is_that_over_decoded_rows(kernels, case):
    halves = "cuda" in kernels and case.dtype != "f32"
    check_attention(case, kernels, TENSOR_CORES if halves else 0.0)


@examples(20)
@given(
    case=calls_of(
        CALLS[::3],
        mask=st.sampled_from(("boolean", "boolean of rows")),
        sizes=st.tuples(st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(0, 40))),
        # Small scores: no weight is so small that it is zero in float32.
        kinds=st.sampled_from((("normal",), ("plateau",))),
    ),
    role=st.sampled_from(ROLES),
    packed=st.booleans(),
    place=st.integers(0, 2**16),
)
def test_a_broken_row_reaches_no_query_that_does_not_see_it(kernels, case, role, packed, place):
    check_hidden_row(case, role, packed, place, kernels)
