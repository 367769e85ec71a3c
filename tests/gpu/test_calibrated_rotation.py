"""Rotations with a matrix for each KV head, through every backend, against the float64 reference.

Kernels for a GPU run on it where it is there, and in the emulator elsewhere.
"""

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import reference, rotation
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Codec, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.mlx.backends.cpu import CPUBackend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.view import KVView
from tests.support import noise
from tests.support.attend_cases import Launch
from tests.support.codec_cases import compare, unit_rows
from tests.support.runners import RUNNERS, BackendRunner

B, K, REPEATS, L, SINK, TAIL, N = 2, 3, 2, 5, 4, 17, 2
DIMS = {KEY: 64, VALUE: 80}


@pytest.fixture(params=["mlx", "cpu", "metal", "mlx_cuda", "cuda"], scope="module")
def runner(request):
    name = request.param
    if name == "cpu" and cpu_library.missing():
        pytest.skip(cpu_library.missing())
    if name in RUNNERS and (missing := RUNNERS[name].missing()):
        pytest.skip(missing)
    made = RUNNERS.get(name) or BackendRunner(name, {"mlx": MLXBackend, "cpu": CPUBackend}[name]())
    with made.kernels():
        yield made


def codec_of(role, bits=4):
    """Matrices that are far from orthogonal, and far from each other."""
    head_dim = DIMS[role]
    rng = np.random.default_rng(3)
    stretch = np.exp(rng.normal(size=(K, head_dim, 1)) * 0.4)
    rotated = np.linalg.qr(rng.normal(size=(K, head_dim, head_dim)))[0]
    return Codec(role, bits, rotation.calibrated(stretch * rotated))


def rows(role, blocks=N, seed=0):
    rng = np.random.default_rng(seed)
    shape = (B, K, blocks * BLOCK, DIMS[role])
    return (rng.normal(size=shape) + rng.normal(size=shape[-1]) * 3).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("role", ROLES)
def test_encode_and_decode_are_the_reference(runner, role, bits):
    chosen, x = codec_of(role, bits), rows(role)
    found = runner.encode(mx.array(x), chosen)
    expected = reference.encode(x, chosen, centres=found.centres)
    compare(found, expected, chosen, unit_rows(x, chosen, centres=found.centres))
    decoded = np.array(runner.decode(found, chosen))
    wanted = reference.decode(found, chosen)
    # 1e-5 for sums in float32, the bound of docs/FORMAT.md.
    assert np.abs(decoded - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("role", ROLES)
def test_the_reference_is_the_identity_behind_a_matrix(role):
    chosen, x = codec_of(role), rows(role).astype(np.float64)
    packed = reference.encode(x, chosen)
    centred = x.reshape(B, K, N, BLOCK, -1)
    if role == KEY:
        centred = centred - packed.centres[..., None, :]
    matrices = chosen.rotation.matrix[None, :, None, None]
    rotated = (matrices @ centred[..., None])[..., 0].reshape(x.shape)
    plain = codec(RotorConfig(rotation="identity"), DIMS[role], layer=0, role=role)
    zeros = None if role == VALUE else np.zeros_like(packed.centres)
    expected = reference.encode(rotated, plain, centres=zeros)
    assert np.array_equal(packed.words, expected.words)
    assert np.array_equal(packed.scales, expected.scales)
    back = (
        np.linalg.inv(matrices)
        @ reference.decode(expected, plain).reshape(centred.shape)[..., None]
    )
    wanted = back[..., 0] + (0 if role == VALUE else packed.centres[..., None, :])
    # Two ways to invert, in float64.
    assert np.allclose(reference.decode(packed, chosen), wanted.reshape(x.shape), rtol=1e-9)


@pytest.mark.parametrize(("length", "kernels"), [(1, 1), (1, 2), (L, 1)])
def test_attend_is_the_reference(runner, length, kernels):
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(B, K * REPEATS, length, DIMS[KEY])).astype(np.float32)
    views, vectors = [], []
    for role in ROLES:
        chosen, exact = codec_of(role), rows(role, seed=2)[:, :, : SINK + TAIL]
        packed = reference.encode(rows(role), chosen)
        arrays = Packed(*(None if a is None else mx.array(a) for a in packed))
        counts = SINK, N * BLOCK, N * BLOCK + SINK + TAIL
        views.append(KVView(chosen, mx.array(exact), arrays, None, *counts))
        parts = exact[:, :, :SINK], reference.decode(packed, chosen), exact[:, :, SINK:]
        vectors.append(np.concatenate(parts, axis=2))
    launch = Launch(kernels=kernels)
    options = {"scale": 0.05, "mask": "causal", "launch": launch}
    found = np.array(runner.attend(mx.array(queries), *views, **options))
    taken = noise.of_view(queries, views[0], 0.05)
    wanted = reference.attend(queries, *vectors, scale=0.05, noise=taken, mask="causal")
    # Sums in float32 of some hundred terms, and exponentials of scores of about 10.
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_equal_matrices_are_one_rotation():
    """What backends derive from a rotation is kept for each object, so there must be few."""
    matrix = np.random.default_rng(0).normal(size=(2, 16, 16))
    assert rotation.calibrated(matrix) is rotation.calibrated(matrix.copy())
    assert rotation.calibrated(matrix) is not rotation.calibrated(matrix[::-1])
