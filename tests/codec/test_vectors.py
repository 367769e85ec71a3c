"""The shared test vectors: they are what the script makes, and the MLX path reproduces them."""

import json

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, FORMAT_VERSION, ROLES
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from scripts import make_vectors
from tests.support.vectors import (
    CASES,
    channel_scale,
    check_decoded,
    check_encoded,
    codec_of,
    load_case,
    name_of,
    packed_of,
    views_of,
)


@pytest.fixture(params=CASES, ids=name_of)
def vectors(request):
    return request.param, *load_case(request.param)


@pytest.mark.slow
def test_files_are_what_the_script_makes(vectors):
    case, arrays, facts = vectors
    made, metadata = make_vectors.make(case)
    assert json.loads(metadata["rotormlx"]) == facts
    assert facts["format_version"] == FORMAT_VERSION
    assert made.keys() == arrays.keys()
    for name, array in made.items():
        assert array.dtype == arrays[name].dtype, name
        if array.dtype == np.float32:
            # Float64 sums in numpy may be ordered by the processor's vector width.
            assert np.allclose(array, arrays[name], rtol=1e-6, atol=1e-7), name
        else:
            assert np.array_equal(array, arrays[name]), name


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_encode_reproduces_every_bit(vectors, role, bits, dtype):
    _, arrays, facts = vectors
    x = mx.array(arrays[f"{role}.input"]).astype(dtype)
    packed = backend().encode(
        x, codec_of(facts, bits, role), channel_scale=channel_scale(arrays, role)
    )
    check_encoded(packed, arrays, role, bits)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("role", ROLES)
def test_prefill_scale_is_reproduced(vectors, role):
    _, arrays, facts = vectors
    first = mx.array(arrays[f"{role}.input"][:, :, :BLOCK])
    found = backend().prefill_scale(first, codec_of(facts, 4, role))
    assert np.allclose(np.array(found), arrays[f"{role}.prefill"], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_decode_reproduces_the_vectors(vectors, role, bits):
    _, arrays, facts = vectors
    decoded = backend().decode(
        packed_of(arrays, role, bits),
        codec_of(facts, bits, role),
        channel_scale=channel_scale(arrays, role),
    )
    check_decoded(decoded, arrays, role, bits)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("bits", codebook.BITS)
def test_attend_reproduces_the_outputs(vectors, bits):
    _, arrays, facts = vectors
    views = views_of(arrays, facts, bits)
    scale = facts["head_dim"] ** -0.5
    output = attend_view(mx.array(arrays["query"]), *views, scale=scale, mask="causal")
    expected = arrays[f"output.{bits}"]
    assert np.abs(np.array(output) - expected).max() <= 1e-5 * np.abs(expected).max()
