"""The rotations: orthogonal, deterministic, evenly distributed, and good at what they are for."""

from functools import cache

import numpy as np
import pytest

from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, TRELLIS_BITS, codec
from rotormlx.codec.random_stream import Sphere, Stream
from rotormlx.codec.rotation import check_head_dim, rotation
from rotormlx.config import ROTATIONS, RotorConfig

HEAD_DIMS = (8, 64, 80, 96, 112, 128, 192, 256)
OUTLIERS = 4

# parameters, sign bits, multiply-adds of one vector at D = 128, counted by hand:
#   cascade   three stages of 32 quaternion groups of 12 additions, 64 planes of 2; a sign a channel
#             and quaternion stage, one a plane
#   rotor3    42 rotors of 4 numbers and a plane of 1; 42 products 3x3 and one 2x2
#   hadamard  a butterfly is d log2 d additions
COSTS_128 = {
    "cascade": (0, 3 * 32 * 4 + 64, 3 * 32 * 12 + 64 * 2),
    "rotor3": (42 * 4 + 1, 0, 42 * 9 + 4),
    "iso4": (32 * 4, 0, 32 * 16),
    "planar2": (64, 0, 64 * 4),
    "hadamard": (0, 128, 128 * 7),
    "dense": (128 * 128, 0, 128 * 128),
    "identity": (0, 0, 0),
}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation_is_orthogonal(name, head_dim):
    m = rotation(name, head_dim, layer=3).matrix
    # float64: at most head_dim roundings of 1e-16 in a row.
    assert np.abs(m @ m.T - np.eye(head_dim)).max() < 1e-14


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ROTATIONS)
def test_stages_make_the_matrix(name, head_dim):
    chosen = rotation(name, head_dim, layer=1)
    x = np.random.default_rng(0).normal(size=(5, head_dim))
    rotated = x @ chosen.matrix.T if not chosen.stages else x
    for stage in chosen.stages:
        rotated = stage.apply(rotated)
    assert np.allclose(rotated, x @ chosen.matrix.T, atol=1e-13)
    if name != "identity":
        assert not np.allclose(rotated, x, atol=0.1)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cascade_mixes_every_channel_with_every_other(head_dim):
    for name in ("cascade", "hadamard"):
        size = np.abs(rotation(name, head_dim).matrix)
        assert size.min() > 0.2 / np.sqrt(head_dim)
        assert size.max() < 1.4 / np.sqrt(head_dim)


@pytest.mark.parametrize("name", ["cascade", "rotor3", "iso4", "planar2"])
def test_rotors_keep_orientation(name):
    assert np.linalg.det(rotation(name, 128).matrix) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(set(ROTATIONS) - {"identity"}))
def test_rotation_depends_on_every_argument(name):
    base = rotation(name, 64, seed=1, layer=2, role="key").matrix
    others = [
        rotation(name, 64, seed=2, layer=2, role="key"),
        rotation(name, 64, seed=1, layer=3, role="key"),
        rotation(name, 64, seed=1, layer=2, role="value"),
    ]
    assert all(np.abs(base - other.matrix).max() > 0.1 for other in others)
    assert len({o.matrix.tobytes() for o in others}) == 3


@pytest.mark.parametrize("name", ROTATIONS)
def test_costs_are_counted(name):
    chosen = rotation(name, 128)
    assert (chosen.parameters, chosen.sign_bits, chosen.multiply_adds) == COSTS_128[name]


def test_published_parameter_count_does_not_hold():
    """The paper says 372 numbers at d = 128; its 43 groups take 42 rotors and a plane."""
    assert rotation("rotor3", 128).parameters == 169


# ---- distribution -------------------------------------------------------------------------------


def test_stream_is_splitmix64():
    """Known answers, computed apart with Python integers from the published constants."""
    mask = 2**64 - 1

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    key = 0
    for word in (3, 2**63 - 1):
        key = mix((key + 0x9E3779B97F4A7C15 & mask) ^ word)
    expected = [mix(key + i * 0x9E3779B97F4A7C15 & mask) for i in (1, 2, 3)]
    assert Stream(3, 2**63 - 1).integers(3).tolist() == expected
    # SplitMix64 with state 0, as published by its author.
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("dimension", [2, 3, 4, 7, 8])
def test_sphere_is_even(dimension):
    """Second and fourth moments of a coordinate: 1/n and 3/(n(n+2)), within 5 standard errors."""
    count = 20_000
    sphere = Sphere(9, dimension, pairs=count * ((dimension + 1) // 2))
    points = np.stack([sphere.point(dimension) for _ in range(count)])
    assert np.allclose((points**2).sum(1), 1)
    for power, expected in ((2, 1 / dimension), (4, 3 / (dimension * (dimension + 2)))):
        terms = points**power
        error = terms.std(0) / np.sqrt(count)
        assert np.all(np.abs(terms.mean(0) - expected) < 5 * error)
    assert np.all(np.abs(points.mean(0)) < 5 * points.std(0) / np.sqrt(count))


def test_dense_is_even():
    """Every entry of a Haar matrix has the moments of a point of the sphere."""
    count, d = 400, 16
    entries = np.stack([rotation("dense", d, seed=s).matrix for s in range(count)])
    for power, expected in ((1, 0), (2, 1 / d), (4, 3 / (d * (d + 2)))):
        terms = entries**power
        error = terms.std(0) / np.sqrt(count)
        # 256 entries: 5 standard errors are missed by chance once in 7,000 runs.
        assert np.all(np.abs(terms.mean(0) - expected) < 5 * error)


# ---- distortion ---------------------------------------------------------------------------------


def distortion(x, name, bits, *, seed=0):
    """Mean squared error of coded vectors, relative to their mean square."""
    chosen = codec(RotorConfig(bits, bits, name, seed=seed), x.shape[-1], layer=0, role="value")
    decoded = reference.decode(reference.encode(x, chosen), chosen)
    return ((decoded - x) ** 2).sum() / (x**2).sum()


def coordinates(d, bits):
    """A coordinate of the unit sphere times sqrt d, its level, and how often both come together."""
    if bits not in TRELLIS_BITS:
        z = np.linspace(-np.sqrt(d), np.sqrt(d), 1_000_001)
        density = np.maximum(1 - z * z / d, 0) ** ((d - 3) / 2)
        level = codebook.levels(bits).astype(np.float64)[reference.nearest(z, bits)]
        return z, level, density / density.sum()
    # Paths of values run along tokens: of each of their rows one coordinate is enough.
    rng = np.random.default_rng(3)
    z = rng.normal(size=(BLOCK, 8000))
    z *= np.sqrt(d / (z * z + rng.chisquare(d - 1, z.shape)))
    z /= np.sqrt(np.mean(z * z))  # 1 on the sphere; a sample's deviation would count fortyfold
    table = codebook.trellis_levels(bits).astype(np.float64)
    return z, table[trellis.level_codes(trellis.encode(z, bits), bits)], 1 / z.size


@cache
def sphere_distortion(d, bits):
    """Distortion of the code on the unit sphere, from one coordinate.

    With z the coordinate times sqrt d, c its level, a = E[cz], b = E[cc]: 1 - a²/b is the squared
    distance of the vector from the nearest multiple of its code where that is the same multiple,
    a/b, for every vector; its own takes away the variance of c (z - c a/b) over d b besides. So
    much is the squared sine of the angle between both. A value decodes to t times the multiple of
    its code that has no bias, which is off by 1 - 2 t + (t / cos)².
    """
    z, level, density = coordinates(d, bits)
    a, b = (density * level * z).sum(), (density * level**2).sum()
    residual = level * (z - level * a / b)
    variance = (density * residual**2).sum() - (density * residual).sum() ** 2
    squared_sine = 1 - a * a / b - variance / (d * b)
    t = codebook.VALUE_SHRINK[bits]
    return 1 - 2 * t + t * t / (1 - squared_sine)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ROTATIONS)
def test_distortion_of_unit_vectors_is_the_theory(name, bits):
    d = 128
    x = np.random.default_rng(1).normal(size=(1, 1, 64 * 64, d))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    # 2 % is the promise; half a million coordinates are sure to 0.4 %.
    assert distortion(x, name, bits) == pytest.approx(sphere_distortion(d, bits), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS[1:])
def test_cascade_handles_outlier_channels_like_dense(head_dim):
    """Four channels ten times as large: at most 10 % more error than the dense rotation."""
    rng = np.random.default_rng(2)
    errors = {"cascade": [], "dense": [], "rotor3": []}
    for seed in range(8):
        x = rng.normal(size=(1, 1, 256, head_dim))
        x[..., rng.choice(head_dim, OUTLIERS, replace=False)] *= 10
        for name, found in errors.items():
            found.append(distortion(x, name, 4, seed=seed))
    assert np.mean(errors["cascade"]) < 1.1 * np.mean(errors["dense"])
    assert np.mean(errors["rotor3"]) > 2 * np.mean(errors["dense"]), "one stage cannot"


# ---- refusal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [0, 4, 60, 88, 100, 104, 2048])
def test_impossible_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim must be .* but {head_dim} was given"):
        check_head_dim(head_dim)


@pytest.mark.parametrize(
    "arguments",
    [{"name": "spin"}, {"role": "query"}, {"layer": -1}],
    ids=["name", "role", "layer"],
)
def test_unknown_rotation_is_refused(arguments):
    with pytest.raises(ValueError, match=r"^\[rotation\] A rotation needs a name of cascade"):
        rotation(**{"name": "cascade", "head_dim": 64, **arguments})
