"""The kernels encode, decode and rotor3 of every platform against the float64 reference.

They run on the device where it is there, else in the emulator. CUDA compiles one module for both
roles and all dtypes of a head_dim and width, for half a second, so it meets fewer combinations.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, TRELLIS_BITS
from rotormlx.config import ROTATIONS
from tests import emulator
from tests.support import vectors as shared_vectors
from tests.support.codec_cases import (
    DTYPES,
    HEAD_DIMS,
    check_any_words,
    check_badly_met_rows,
    check_centre_of_finite_rows,
    check_decode,
    check_encode,
    check_filled_up_path,
    check_own_scales_of_rows,
    check_rotor3,
    check_special_rows,
    check_tied_paths,
    check_ties,
    fills_up,
    made_codec,
    rows,
    scale_of_channels,
)

B, K, N = 2, 3, 2
metal = pytest.mark.parametrize("runner", ["metal"], indirect=True)
metal_and_cuda = pytest.mark.parametrize("runner", ["metal", "cuda"], indirect=True)


def on(*runners):
    """Lines of values of parameters, each for one platform: its name comes first."""
    return [
        pytest.param(name, *values, id="-".join(map(str, (name, *values))))
        for name, lines in runners
        for values in lines
    ]


# ---- shared vectors -----------------------------------------------------------------------------


@pytest.fixture(params=shared_vectors.CASES, ids=shared_vectors.name_of, scope="module")
def vectors(request):
    return shared_vectors.load_case(request.param)


@metal_and_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_encode_reproduces_every_bit(runner, vectors, role, bits, dtype):
    arrays, facts = vectors
    x = mx.array(arrays[f"{role}.input"]).astype(DTYPES[dtype])
    chosen = shared_vectors.codec_of(facts, bits, role)
    packed = runner.encode(x, chosen, scale=arrays.get(f"{role}.channel_scale"))
    shared_vectors.check_encoded(packed, arrays, role, bits)


@metal_and_cuda
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_decode_reproduces_the_vectors(runner, vectors, role, bits):
    arrays, facts = vectors
    packed = shared_vectors.packed_of(arrays, role, bits)
    chosen = shared_vectors.codec_of(facts, bits, role)
    packed = type(packed)(*(None if a is None else np.array(a) for a in packed))
    decoded = runner.decode(packed, chosen, scale=arrays.get(f"{role}.channel_scale"))
    shared_vectors.check_decoded(decoded, arrays, role, bits)


# ---- every rotation, head_dim, width and dtype --------------------------------------------------


@metal
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", [192, 256])
def test_encode_where_no_vectors_are(runner, head_dim, role, bits, dtype):
    """The shared vectors have the smaller head_dims in every combination."""
    chosen = made_codec("cascade", head_dim, bits, role)
    check_encode(runner, mx.array(rows((1, 1, BLOCK, head_dim))).astype(DTYPES[dtype]), chosen)


@metal
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_in_every_combination(runner, head_dim, role, bits, dtype):
    chosen = made_codec("cascade", head_dim, bits, role)
    packed = reference.encode(rows((1, 1, BLOCK, head_dim)), chosen)
    check_decode(runner, packed, chosen, dtype=dtype)


def metal_turns():
    """Each rotation meets each head_dim; bits, roles and dtypes take turns: every pair occurs."""
    turns = itertools.cycle(itertools.product(codebook.BITS, ROLES, DTYPES))
    for name, head_dim in itertools.product(ROTATIONS, (8, *HEAD_DIMS)):
        bits, role, dtype = next(turns)
        yield name, head_dim, bits, role, dtype, head_dim != 128


def cuda_turns():
    """Each rotation meets three head_dims, in both roles; widths and dtypes take turns."""
    turns = itertools.cycle(itertools.product(DTYPES, codebook.BITS))
    head_dims = itertools.cycle((*HEAD_DIMS, 8))
    for name, _ in itertools.product(ROTATIONS, range(3)):
        head_dim = next(head_dims)
        dtype, bits = next(turns)
        for role in ROLES:
            yield name, head_dim, bits, role, dtype, bits % 2 == 0


def mlx_cuda_turns():
    """The text of the kernels is that of CUDA: what MLX adds to it is called in each dtype."""
    for role in ROLES:
        yield "cascade", 80, 3, role, "bf16", True
        yield "rotor3", 64, 4, role, "f16", False
        yield "dense", 96, 8, role, "f32", False


@pytest.mark.parametrize(
    ("runner", "name", "head_dim", "bits", "role", "dtype", "scaled"),
    on(("metal", metal_turns()), ("cuda", cuda_turns()), ("mlx_cuda", mlx_cuda_turns())),
    indirect=["runner"],
)
def test_encode_and_decode_are_the_reference(runner, name, head_dim, bits, role, dtype, scaled):
    """Rows come as models give them, transposed; packed arrays go back among others."""
    chosen = made_codec(name, head_dim, bits, role)
    x = mx.array(rows((B, N * BLOCK, K, head_dim))).astype(DTYPES[dtype]).transpose(0, 2, 1, 3)
    scale = scale_of_channels(chosen, K) if scaled else None
    expected = check_encode(runner, x, chosen, scale=scale)
    check_decode(runner, expected, chosen, scale=scale, dtype=dtype)


@pytest.mark.parametrize("runner", ["mlx_cuda"], indirect=True)
def test_given_centres_give_the_same_words(runner):
    chosen = made_codec("cascade", 80, 3, KEY)
    x = mx.array(rows((B, K, BLOCK, 80)))
    packed = runner.encode(x, chosen)
    again = runner.encode(x, chosen, centres=packed.centres)
    assert np.array_equal(again.words, packed.words)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("runner", "order", "name", "head_dim"),
    on(
        (
            "metal",
            [
                (order, *codec)
                for order in (0, 1, 12345)
                for codec in (("cascade", 64), ("cascade", 112), ("dense", 96))
            ],
        ),
        ("cuda", [(1, "cascade", 80), (12345, "cascade", 80)]),
    ),
    indirect=["runner"],
)
def test_execution_order_does_not_matter(runner, order, name, head_dim, role):
    """Threads ascending, descending and at random: always the same bytes."""
    if runner.on_device:
        pytest.skip("about the emulator, which runs where no device is")
    chosen = made_codec(name, head_dim, 3, role)
    flat_codec = made_codec("rotor3", head_dim, 3, ROLES[1])
    x = mx.array(rows((1, 2, BLOCK, head_dim)))

    def bytes_written():
        packed = runner.encode(x, chosen)
        numbers = [runner.decode(packed, chosen)]
        numbers.append(runner.rotor3(x.reshape(-1, head_dim), flat_codec, seed=7, layer=3))
        return [None if a is None else np.array(a).tobytes() for a in (*packed, *numbers)]

    plain = bytes_written()
    with emulator.execution_order(order):
        assert bytes_written() == plain


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("runner", "name", "head_dim", "bits"),
    on(
        ("metal", [("cascade", 64, 4), ("dense", 80, 4), ("rotor3", 96, 4)]),
        ("cuda", [("cascade", 80, 3)]),
    ),
    indirect=["runner"],
)
def test_blocks_do_not_depend_on_their_company(runner, name, head_dim, bits, role):
    chosen = made_codec(name, head_dim, bits, role)
    x = mx.array(rows((B, K, 3 * BLOCK, head_dim)))
    whole = runner.encode(x, chosen)
    for b, k, n in ((0, 0, 0), (1, 2, 1), (0, 1, 2)):
        alone = runner.encode(x[b : b + 1, k : k + 1, n * BLOCK : (n + 1) * BLOCK], chosen)
        for part, among_others in zip(alone, whole, strict=True):
            assert part is None or np.array_equal(part[0, 0, 0], among_others[b, k, n])


@pytest.mark.parametrize("runner", ["cuda"], indirect=True)
@pytest.mark.parametrize("role", ROLES)
def test_batch_rows_may_have_channel_scales_of_their_own(runner, role):
    check_own_scales_of_rows(runner, role=role)


@pytest.mark.parametrize(
    ("runner", "bits"),
    on(("metal", [(bits,) for bits in codebook.BITS]), ("cuda", [(3,)])),
    indirect=["runner"],
)
def test_a_block_is_filled_up_with_the_centre_it_has(runner, bits):
    fills_up(runner, bits)


@pytest.mark.parametrize("start", [1, 2, 21, 63])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("runner", "bits"),
    on(("metal", [(2,), (3,)]), ("cuda", [(2,), (3,)]), ("mlx_cuda", [(3,)])),
    indirect=["runner"],
)
def test_a_path_goes_on_behind_tokens_that_are_kept(runner, bits, role, start):
    check_filled_up_path(runner, 80, bits, role, start)


@pytest.mark.parametrize("runner", ["metal", "cuda", "mlx_cuda"], indirect=True)
def test_without_a_state_a_path_begins_at_zero(runner):
    check_filled_up_path(runner, has_state=False)


@metal_and_cuda
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_any_words_are_decoded(runner, bits, role):
    check_any_words(runner, 80, bits, role)


# ---- special rows -------------------------------------------------------------------------------


@metal_and_cuda
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_special_rows(runner, bits, role):
    check_special_rows(runner, bits, role)


@pytest.mark.parametrize(
    ("runner", "bits"), on(("metal", [(4,)]), ("cuda", [(3,)])), indirect=["runner"]
)
def test_badly_met_rows(runner, bits):
    check_badly_met_rows(runner, bits)


@pytest.mark.parametrize(
    ("runner", "bits"), on(("metal", [(4,)]), ("cuda", [(3,)])), indirect=["runner"]
)
def test_centre_counts_finite_rows(runner, bits):
    check_centre_of_finite_rows(runner, bits)


@metal_and_cuda
@pytest.mark.parametrize("bits", [4, 8])
def test_ties_and_zeros(runner, bits):
    check_ties(runner, bits)


@metal_and_cuda
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_equal_paths(runner, bits, role):
    check_tied_paths(runner, bits, role)


# ---- the published method -----------------------------------------------------------------------

# Head_dims that leave a channel, a pair and nothing behind the threes.
OF_ROTOR3 = [(64, "f32"), (80, "f16"), (96, "bf16"), (128, "f32"), (128, "f16"), (128, "bf16")]


@pytest.mark.parametrize(
    ("runner", "head_dim", "dtype", "bits"),
    on(
        ("metal", [(*turn, bits) for turn in OF_ROTOR3 for bits in codebook.BITS]),
        ("cuda", [(*turn, bits) for turn, bits in zip(OF_ROTOR3, (2, 3, 4, 8, 4), strict=False)]),
    ),
    indirect=["runner"],
)
def test_rotor3_is_the_reference(runner, head_dim, dtype, bits):
    check_rotor3(runner, head_dim, bits, dtype)
