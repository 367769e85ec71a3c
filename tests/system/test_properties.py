"""What holds for every shape, dtype, width, rotation, length, mask and kind of number, everywhere.

tests/support/bounds.py derives the bounds. By default the examples are always the same ones;
ROTORMLX_EXAMPLES=20 tries twenty times as many, others each time.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotormlx.codec import reference
from rotormlx.codec.format import ROLES
from tests.support.bounds import (
    BROKEN_KINDS,
    KINDS,
    WIDE_KINDS,
    attention_error,
    examples,
)
from tests.support.properties import (
    ALIKE,
    IMPLEMENTATIONS,
    attention_cases,
    bits_of,
    check_attention,
    check_broken_row,
    check_heads,
    check_hidden_row,
    check_rows,
    prefill_scales,
    query_norm,
    row_cases,
    row_errors,
    sums_error,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@examples(120)
@given(case=row_cases(KINDS | WIDE_KINDS | BROKEN_KINDS))
def test_rows_are_coded_by_the_format_and_decode_within_its_bound(case):
    """Every word, scale and centre, and every decoded row, of every implementation."""
    written = check_rows(case, IMPLEMENTATIONS)
    if case.rotation != "dense":
        for name in ALIKE[1:]:
            for a, b in zip(written[ALIKE[0]], written[name], strict=True):
                assert (a is b is None) or bits_of(a) == bits_of(b), name


@examples(60)
@given(
    case=row_cases(KINDS),
    broken=st.sets(st.integers(0, 191), min_size=1, max_size=12),
    kind=st.sampled_from(sorted(BROKEN_KINDS)),
)
def test_a_broken_row_stays_alone(case, broken, kind):
    """A row with a NaN or an infinity changes no byte of another, and the centre as zeros would."""
    check_broken_row(case, broken, kind, IMPLEMENTATIONS)


@examples(40)
@given(
    case=row_cases(KINDS, batch=st.just(2), heads=st.just(3), scaled=st.just(True)),
    given_centres=st.booleans(),
)
def test_every_head_is_coded_by_itself(case, given_centres):
    """A block of one head and batch row has the bytes it has among others, given centres or not."""
    check_heads(case, given_centres, IMPLEMENTATIONS)


@examples(40)
@given(case=row_cases(KINDS | BROKEN_KINDS, blocks=st.just(1)))
def test_the_prefill_scale_is_that_of_the_format(case):
    """Of each head by itself; 1 where a row is not finite or all are zero."""
    x, _ = case.make()
    expected = prefill_scales(x[0].astype(np.float64), case.role)
    for name, implementation in IMPLEMENTATIONS.items():
        found = implementation.prefill_scale(x, case.codec)
        # Sums of 64 and of D squares in float32.
        assert np.any(np.abs(found - expected) <= 1e-5 * expected, axis=0).all(), name


@examples(100)
@given(case=attention_cases())
def test_attention_is_that_over_decoded_rows(case):
    """The same softmax over the same vectors, whatever is packed, hidden, ragged or grouped."""
    check_attention(case, IMPLEMENTATIONS)


@examples(60)
@given(case=attention_cases(dtype=st.just("f32")))
def test_attention_is_off_by_no_more_than_the_codes_imply(case):
    """Against exact attention over the vectors that were packed."""
    sequences, originals = case.make()
    q, mask, sink_logits = case.queries(), case.make_mask(), case.sink_logits()
    given = {"scale": case.scale, "sink_logits": sink_logits}
    found = {
        name: implementation.attend(q, case.dtype, sequences, mask=mask, **given)
        for name, implementation in IMPLEMENTATIONS.items()
    }
    worst = [row_errors(s, x) for s, x in zip(sequences, originals, strict=True)]
    for b in range(len(case.sizes)):
        keys, values = (s.of_row(b, x) for s, x in zip(sequences, originals, strict=True))
        own = case.mask_of(mask, b)
        expected = reference.attend(q[b : b + 1], keys[None], values[None], mask=own, **given)[0]
        score = case.scale * query_norm(case, sequences[0], q[b]) * worst[0]
        score += sequences[0].noise(b, q[b : b + 1], case.scale).max()
        largest = 1.0 if sequences[1].scale is None else float(sequences[1].scale.max())
        bound = attention_error(values.reshape(-1, values.shape[-1]), score, largest * worst[1])
        bound += sums_error(case, sequences, b, q, (keys, values))
        for name, out in found.items():
            error = np.linalg.norm(out[b] - expected, axis=-1).max()
            # Twice: float32 sums are off in every channel, and decoded values are a little longer.
            assert error <= bound + 2 * sums_error(case, sequences, b, q, (keys, values)), name


@examples(40)
@given(
    case=attention_cases(
        mask=st.sampled_from(("boolean", "boolean of rows", "causal")),
        sizes=st.tuples(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 90))),
        length=st.integers(2, 9),
        # Small scores: no weight is so small that it is zero in float32.
        kinds=st.sampled_from((("normal",), ("plateau",))),
    ),
    role=st.sampled_from(ROLES),
    packed=st.booleans(),
    place=st.integers(0, 2**16),
)
def test_a_broken_row_reaches_no_query_that_does_not_see_it(case, role, packed, place):
    """A NaN in a packed row, or in an exact key: who does not see it answers bit for bit as if it
    were zero, who sees it with a NaN.

    (An exact value times a weight of zero is a NaN, here as in MLX's and torch's own attention.)
    """
    check_hidden_row(case, role, packed, place, IMPLEMENTATIONS)
