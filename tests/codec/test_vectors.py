"""The shared test vectors: they are what the script makes, and the MLX path reproduces them."""

import json

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import tensor_file
from scripts import make_vectors

CASES = make_vectors.CASES


def load(case):
    path = make_vectors.DIRECTORY / case.file_name
    arrays, texts = tensor_file.read_arrays(path, where="test vectors", checksum_required=False)
    return arrays, json.loads(texts["rotormlx"])


@pytest.fixture(params=CASES, ids=lambda case: case.file_name.split(".")[0])
def vectors(request):
    return request.param, *load(request.param)


def codec_of(facts, bits, role):
    config = RotorConfig(bits, bits, facts["rotation"], seed=facts["seed"])
    return codec(config, facts["head_dim"], layer=facts["layer"], role=role)


def channel_scale(arrays, role):
    scale = arrays.get(f"{role}.channel_scale")
    return None if scale is None else mx.array(scale)


def packed_of(arrays, role, bits):
    centres = mx.array(arrays["key.centres"]) if role == KEY else None
    words, scales = (mx.array(arrays[f"{role}.{part}.{bits}"]) for part in ("words", "scales"))
    return Packed(words, scales, centres)


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
    assert np.array_equal(np.array(packed.words), arrays[f"{role}.words.{bits}"])
    assert np.array_equal(np.array(packed.scales), arrays[f"{role}.scales.{bits}"])
    if role == KEY:
        assert np.array_equal(np.array(packed.centres), arrays["key.centres"])


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
    expected = arrays[f"{role}.decoded.{bits}"]
    decoded = backend().decode(
        packed_of(arrays, role, bits),
        codec_of(facts, bits, role),
        channel_scale=channel_scale(arrays, role),
    )
    decoded = np.array(decoded)[:, :, : expected.shape[2]]
    # The bound of docs/FORMAT.md, section 9.
    assert np.abs(decoded - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("bits", codebook.BITS)
def test_attend_reproduces_the_outputs(vectors, bits):
    _, arrays, facts = vectors
    views = []
    for role in ROLES:
        packed = packed_of(arrays, role, bits)
        packed_tokens = packed.scales.shape[2] * BLOCK - facts["missing"]
        exact = mx.array(arrays[f"{role}.exact"]).astype(mx.float32)
        views.append(
            KVView(
                codec_of(facts, bits, role),
                exact,
                packed,
                channel_scale(arrays, role),
                facts["sink"],
                packed_tokens,
                packed_tokens + exact.shape[2],
            )
        )
    scale = facts["head_dim"] ** -0.5
    output = attend_view(mx.array(arrays["query"]), *views, scale=scale, mask="causal")
    expected = arrays[f"output.{bits}"]
    assert np.abs(np.array(output) - expected).max() <= 1e-5 * np.abs(expected).max()
