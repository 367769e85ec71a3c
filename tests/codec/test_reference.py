"""The reference codec against the words of docs/FORMAT.md."""

from itertools import product

import numpy as np
import pytest

from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, KEY, ROLES, TRELLIS_BITS, VALUE, Codec, codec
from rotormlx.codec.rotation import calibrated
from rotormlx.config import RotorConfig

SPECIAL_ROWS = (0, 7, 31, 63)
NEAREST_BITS = tuple(bits for bits in codebook.BITS if bits not in TRELLIS_BITS)


def make_codec(role, bits, head_dim=80, rotation="cascade"):
    return codec(RotorConfig(bits, bits, rotation), head_dim, layer=2, role=role)


def bit_address(role, bits, token, channel, head_dim):
    """Section 3: where bit ``b`` of a code lies, as (row, lane, bit) for each b."""
    i, lane = (channel, token) if role == KEY else (token, channel)
    axis = head_dim if role == KEY else BLOCK
    if bits != 3:
        first = i * bits
        return [(b // 32, lane, b % 32) for b in range(first, first + bits)]
    rows = -(-2 * axis // 32)
    low = [(b // 32, lane, b % 32) for b in (2 * i, 2 * i + 1)]
    return [*low, (rows + i // 32, lane, 4 * (i % 16 // 2) + 2 * (i // 16 % 2) + i % 2)]


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", [KEY, VALUE])
@pytest.mark.parametrize("head_dim", [8, 80, 112, 128])
def test_every_bit_has_its_address(role, bits, head_dim):
    chosen = make_codec(role, bits, head_dim)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (BLOCK, head_dim), dtype=np.uint32)
    words = np.zeros(chosen.words_shape, np.uint32)
    for token in range(BLOCK):
        for channel in range(head_dim):
            address = bit_address(role, bits, token, channel, head_dim)
            for b, (row, lane, bit) in enumerate(address):
                words[row, lane] |= np.uint32((codes[token, channel] >> b & 1) << bit)
    assert np.array_equal(reference.pack(codes, chosen), words)
    assert np.array_equal(reference.unpack(words, chosen), codes)


@pytest.mark.parametrize("tokens", [0, 1, 31, 37, 64])
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", [KEY, VALUE])
def test_kept_bits_are_those_of_the_first_tokens(role, bits, tokens):
    chosen = make_codec(role, bits)
    codes = np.zeros((BLOCK, 80), np.uint32)
    codes[:tokens] = 2**bits - 1
    everything = reference.pack(np.full_like(codes, 2**bits - 1), chosen)
    expected = reference.pack(codes, chosen)
    assert np.array_equal(everything & chosen.kept_bits(tokens), expected)
    assert np.array_equal(expected & chosen.kept_bits(tokens), expected)


def test_bits_per_value_are_true():
    """4 bits at D = 128: a key block is 64*128/2 + 128 + 256 bytes, a value block lacks the 256."""
    key, value = make_codec(KEY, 4, 128), make_codec(VALUE, 4, 128)
    assert (key.bits_per_value, value.bits_per_value) == (4.375, 4.125)
    # 3 bits, D = 80, keys: the plane of high bits fills 2.5 words and takes 3.
    assert make_codec(KEY, 3, 80).bits_per_value == 8 * ((5 + 3) * 64 * 4 + 128 + 160) / (64 * 80)


@pytest.mark.parametrize("bits", NEAREST_BITS)
def test_nearest_level_is_nearest(bits):
    z = np.random.default_rng(0).normal(size=4000) * 2
    levels = codebook.levels(bits).astype(np.float64)
    chosen = levels[reference.nearest(z, bits)]
    best = np.abs(z[:, None] - levels).min(1)
    # The boundaries are rounded to float32, so the loser may be 1e-7 nearer.
    assert np.all(np.abs(z - chosen) <= best + 1e-6)


@pytest.mark.parametrize("bits", NEAREST_BITS)
def test_ties_go_to_the_larger_magnitude(bits):
    limits = codebook.boundaries(bits).astype(np.float64)
    sign = 1 << (bits - 1)
    assert reference.nearest(limits, bits).tolist() == [i + 1 for i in range(len(limits))]
    assert reference.nearest(-limits, bits).tolist() == [sign + i + 1 for i in range(len(limits))]
    assert reference.nearest(np.array([0.0, -0.0]), bits).tolist() == [0, 0]


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("rotation", ["cascade", "rotor3", "dense"])
def test_a_decoded_row_has_no_bias(bits, rotation):
    """Its inner product with the row is that of the row with itself; of values a bit less."""
    x = np.random.default_rng(1).normal(size=(1, 2, BLOCK, 80))
    for role in ROLES:
        chosen = make_codec(role, bits, rotation=rotation)
        packed, centre = reference.encode(x, chosen), 0.0
        if role == KEY:
            centre = np.repeat(packed.centres.astype(np.float64), BLOCK, axis=2)
        coded, row = reference.decode(packed, chosen) - centre, x - centre
        ratio = (coded * row).sum(-1) / np.square(row).sum(-1) / chosen.shrink
        assert np.abs(ratio - 1).max() <= 2.0**-11 + 1e-6  # the scale is rounded to float16


@pytest.mark.parametrize("bits", codebook.BITS)
def test_no_scale_is_more_than_twice_the_size_of_its_row(bits):
    """A single large number meets its largest level badly."""
    chosen = codec(RotorConfig(bits, bits, "identity"), 1024, layer=0, role=VALUE)
    x = np.zeros((1, 1, BLOCK, 1024))
    x[..., 7] = 3.0
    scales = reference.encode(x, chosen).scales
    assert (scales == np.float16(chosen.shrink * 2 * 3.0 / 32)).all()


@pytest.mark.parametrize("bits", codebook.BITS)
def test_scores_less_their_noise_weigh_what_they_should(bits):
    """The softmax takes powers of e, whose mean must be right."""
    chosen = make_codec(KEY, bits)
    rng = np.random.default_rng(4)
    k, q = rng.normal(size=(1, 2, 40 * BLOCK, 80)), rng.normal(size=(1, 4, 30, 80))
    packed = reference.encode(k, chosen)
    scale = 2.0 * 80**-0.5
    noise = reference.score_noise(q, packed, chosen, scale=scale)
    exact, coded = (
        scale * q @ np.repeat(x, 2, axis=1).swapaxes(-1, -2)
        for x in (k, reference.decode(packed, chosen))
    )
    # 300,000 pairs, of which the keys repeat for 60 queries.
    found, uncorrected = (np.exp(x - exact).mean() for x in (coded - noise, coded))
    assert found == pytest.approx(1, abs=0.12 * noise.mean() + 2e-5)
    assert uncorrected > 1 + 0.8 * noise.mean()
    # Half the variance of normal noise.
    assert noise.mean() == pytest.approx(np.square(coded - exact).mean() / 2, rel=0.08)


def test_noise_follows_the_channel_scale_and_the_rotation():
    """It is the square of the query as the levels meet it, whatever lies between them."""
    plain = make_codec(KEY, 3, rotation="identity")
    scale = np.linspace(0.5, 2, 2 * 80).reshape(2, 80)
    turned = codec(RotorConfig(3, 3), 80, layer=1, role=KEY)
    rng = np.random.default_rng(3)
    packed = reference.encode(rng.normal(size=(1, 2, BLOCK, 80)), plain)
    q = rng.normal(size=(1, 4, 3, 80))
    expected = reference.score_noise(q * np.repeat(scale, 2, 0)[:, None], packed, plain, scale=0.1)
    for chosen in (plain, turned):  # an orthogonal rotation keeps the norm
        found = reference.score_noise(q, packed, chosen, scale=0.1, channel_scale=scale)
        assert np.allclose(found, expected, rtol=1e-9)
    matrix = rng.normal(size=(2, 80, 80))
    learned = Codec(KEY, 3, calibrated(matrix))
    inverse = np.linalg.inv(matrix)
    by_hand = np.stack([q[:, h] @ inverse[h // 2] for h in range(4)], axis=1)
    expected = reference.score_noise(by_hand, packed, plain, scale=0.1)
    assert np.allclose(reference.score_noise(q, packed, learned, scale=0.1), expected, rtol=1e-6)


def test_centre_takes_a_constant_away():
    """A constant of any size added to all keys changes the centre and nothing else."""
    chosen = make_codec(KEY, 4)
    x = np.round(np.random.default_rng(2).normal(size=(1, 1, BLOCK, 80)) * 32) / 32
    # On the float16 grid of 512 to 1023, so that the centre moves by exactly this.
    constant = np.where(np.arange(80) % 8 == 0, 640.0, 0.0)
    x -= reference.block_means(x).astype(np.float64)[:, :, None, :]
    plain, shifted = reference.encode(x, chosen), reference.encode(x + constant, chosen)
    assert np.array_equal(plain.words, shifted.words)
    assert np.array_equal(plain.scales, shifted.scales)
    assert np.array_equal(plain.centres.astype(float) + constant, shifted.centres.astype(float))


def test_channel_scale_is_undone():
    chosen = make_codec(VALUE, 8)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, BLOCK, 80)) * np.exp(rng.normal(size=80))
    scale = np.exp(rng.normal(size=(3, 80)))
    packed = reference.encode(x, chosen, channel_scale=scale)
    error = reference.decode(packed, chosen, channel_scale=scale) - x
    # 8 bits: 4e-5 of the variance, per scaled channel.
    assert np.all((error**2).mean((0, 2)) < 1e-4 * scale**2 * ((x / scale[:, None]) ** 2).mean())
    unscaled = reference.encode(x / scale[:, None], chosen)
    assert np.array_equal(unscaled.words, packed.words)


@pytest.mark.parametrize("role", [KEY, VALUE])
def test_prefill_scale_is_the_root_of_the_rms(role):
    chosen = make_codec(role, 4)
    x = np.random.default_rng(4).normal(size=(1, 2, BLOCK, 80)) * np.linspace(0.2, 5, 80) + 3
    x[:, 1, :, 5] = x[0, 1, 0, 5]
    scale = reference.prefill_scale(x, chosen)
    centred = x[0] - (x[0].mean(1, keepdims=True) if role == KEY else 0)
    sizes = np.sqrt(np.square(centred).mean(1))
    whole = np.sqrt(np.square(centred).mean((1, 2)))[:, None]
    expected = np.sqrt(sizes / whole)
    if role == KEY:
        expected[1, 5] = 1 / 8  # a constant channel has a floor
    # The centre is float16, hence the tolerance.
    assert np.allclose(scale, expected, rtol=1e-4)


def test_prefill_scale_lessens_the_error_of_unequal_channels():
    """Without it a row's error lies evenly on all channels; with it small channels have less."""
    chosen = codec(RotorConfig(4, 4, channel_scale="none"), 80, layer=2, role=VALUE)
    x = np.random.default_rng(4).normal(size=(1, 2, BLOCK, 80)) * np.geomspace(0.1, 3, 80)
    errors = []
    for scale in (None, reference.prefill_scale(x, chosen)):
        packed = reference.encode(x, chosen, channel_scale=scale)
        errors.append(np.square(reference.decode(packed, chosen, channel_scale=scale) - x).mean())
    sizes = np.sqrt(np.square(x[0]).mean(1))
    # Cauchy and Schwarz: the mean of the sizes, squared, over the mean of their squares.
    gain = (sizes.mean(1) ** 2 / np.square(sizes).mean(1)).mean()
    assert errors[1] / errors[0] == pytest.approx(gain, rel=0.05)


# ---- trellis codes ------------------------------------------------------------------------------


def all_paths(length, state=0):
    """Every path from a state: path bits ``[2^length, length]`` and the three before them."""
    paths = np.array(list(product((0, 1), repeat=length)))
    before = np.array([state >> 2 & 1, state >> 1 & 1, state & 1])
    return paths, np.concatenate([np.tile(before, (len(paths), 1)), paths], axis=1)


def subset_levels(bits):
    """The levels of each subset, ``[4, members]``, and the bits s and h of their codes."""
    m = codebook.trellis_levels(bits).astype(np.float64)[: 2**bits]
    rests = [(s, h) for s in (0, 1) for h in range(bits - 1)]
    level = [[(1 - 2 * s) * m[(c ^ 3 * s) + 4 * h] for s, h in rests] for c in range(4)]
    return np.array(level), np.array([2 * s + 4 * h for s, h in rests])


def cheapest(z, bits, state=0):
    """The codes of ``z [length]`` by trying every path, and each member of every subset.

    Of equal sums the one whose last state has the lowest number, then the one with the older path
    bits 0, from the end to the front: so docs/FORMAT.md breaks ties step by step.

    Returns:
        Codes, and the sum of every path, ascending.
    """
    level, rest = subset_levels(bits)
    error = (z[:, None, None] - level) ** 2  # [length, 4, members]
    paths, p = all_paths(len(z), state)
    c = p[:, 1:-2] + 2 * (p[:, 3:] ^ p[:, 2:-1] ^ p[:, :-3])
    at = np.arange(len(z))
    # In order: sums of float64 are those of the encoder then, and equal where it finds them equal.
    sums = np.add.accumulate(error.min(-1)[at, c], axis=1)[:, -1]
    last = p[:, -1] + 2 * p[:, -2] + 4 * p[:, -3]
    best = min(range(len(paths)), key=lambda k: (sums[k], last[k], *p[k, :-3][::-1]))
    return paths[best] + rest[error.argmin(-1)[at, c[best]]], np.sort(sums)


def halfway(bits, length, lanes, rng):
    """Numbers halfway between the levels of two paths: their sums are exact, and equal."""
    codes = rng.integers(0, 2**bits, (length, lanes), dtype=np.uint32)
    other = codes.copy()
    # The other path leaves and comes back, or goes elsewhere at the end.
    other[rng.integers(0, length, lanes), np.arange(lanes)] ^= 1
    table = codebook.trellis_levels(bits).astype(np.float64)
    level = table[trellis.level_codes(codes, bits)]
    index = trellis.level_codes(other & 1, bits)
    choices = subset_levels(bits)[0][index % 4 ^ 3 * (index >> bits)]
    near = np.abs(choices - level[..., None]).argmin(-1, keepdims=True)
    return (level + np.take_along_axis(choices, near, -1)[..., 0]) / 2


@pytest.mark.parametrize("state", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_the_path_is_the_cheapest_of_all(bits, state):
    length, lanes = 9, 40
    z = np.random.default_rng(state).normal(size=(length, lanes))
    behind = np.concatenate([np.zeros((4, lanes)), z])
    started = trellis.encode(behind, bits, start=4, state=np.full(lanes, state))
    assert not started[:4].any()
    for lane in range(lanes):
        assert started[4:, lane].tolist() == cheapest(z[:, lane], bits, state)[0].tolist()
    if state == 0:
        assert np.array_equal(trellis.encode(z, bits), started[4:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_of_equal_paths_the_page_says_which(bits, dtype):
    z = halfway(bits, 9, 200, np.random.default_rng(8))
    codes = trellis.encode(z.astype(dtype), bits)
    tied = 0
    for lane in range(z.shape[1]):
        expected, sums = cheapest(z[:, lane], bits)
        assert codes[:, lane].tolist() == expected.tolist()
        tied += sums[0] == sums[1]
    assert tied > 50


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_of_equal_levels_of_a_subset_the_page_says_which(bits):
    """One number after another that lies halfway between neighbours in a subset."""
    level, rest = subset_levels(bits)
    rng = np.random.default_rng(9)
    codes = rng.integers(0, 2**bits, (9, 400), dtype=np.uint32)
    index = trellis.level_codes(codes, bits)
    z = codebook.trellis_levels(bits).astype(np.float64)[index]
    c = (index % 4 ^ 3 * (index >> bits))[4]
    ascending = np.sort(level, axis=-1)[c]
    at = rng.integers(0, level.shape[1] - 1, 400)
    z[4] = (
        np.take_along_axis(ascending, at[:, None], 1)
        + np.take_along_axis(ascending, at[:, None] + 1, 1)
    )[:, 0] / 2
    found = trellis.encode(z, bits)
    tied = np.flatnonzero((found & 1 == codes & 1).all(0))
    assert len(tied) > 50
    for lane in tied:
        error = np.abs(z[4, lane] - level[c[lane]])
        assert np.sum(error == error.min()) == 2
        assert found[4, lane] >> 1 == rest[error.argmin()] >> 1


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_margins_are_what_the_next_path_costs_more(bits):
    z = np.random.default_rng(3).normal(size=(9, 20))
    _, margins = trellis.encode_with_margins(z, bits)
    for lane in range(20):
        best, second = np.sort(cheapest(z[:, lane], bits)[1])[:2]
        # Another path, or another level on the same one.
        assert margins[:, lane].min() <= second - best + 1e-12
        assert margins[:, lane].min() > 0


@pytest.mark.parametrize("kept", [1, 2, 3, 16, 18, 63])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_a_path_goes_on_where_kept_codes_end(bits, kept):
    """As if every path but the kept one had been forbidden for the tokens that keep their codes."""
    chosen = make_codec(VALUE, bits, 16)
    rng = np.random.default_rng(kept)
    old, new = rng.normal(size=(2, 1, 2, BLOCK, 16))
    packed = reference.encode(old, chosen)
    state = trellis.state_after(packed.words, kept)
    begun = reference.encode(new, chosen, start=kept, state=state)
    mask = chosen.kept_bits(kept)
    words = packed.words & mask | begun.words & ~mask

    # Numbers that are levels of the kept path force most channels onto it.
    codes = reference.unpack(packed.words, chosen)
    z = reference.levels(codes, chosen)
    rotated, norm = reference.rotate(new.reshape(z.shape), chosen)
    z[..., kept:, :] = (rotated * 4 / norm)[..., kept:, :]
    forced = trellis.encode(z, bits)
    same = (forced == codes)[..., :kept, :].all(-2)
    assert same.mean() > 0.2
    found = reference.unpack(words, chosen)
    assert np.array_equal(found[..., :kept, :], codes[..., :kept, :])
    assert np.array_equal(np.swapaxes(found, -1, -2)[same], np.swapaxes(forced, -1, -2)[same])
    decoded = reference.decode(packed._replace(words=words, scales=begun.scales), chosen)
    ratio = (decoded * new).sum(-1) / np.square(new).sum(-1)
    assert np.abs(ratio[..., kept:] / chosen.shrink - 1).max() <= 2.0**-11 + 1e-6


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_negated_numbers_have_negated_levels(bits):
    """Each subset negated is another. So is each path, from the state whose bits are the others."""
    z = np.random.default_rng(7).normal(size=(BLOCK, 50))
    table = codebook.trellis_levels(bits)

    def coded(z, state):
        codes = trellis.encode(z, bits, start=3, state=np.full(50, state))
        return table[trellis.level_codes(codes, bits, start=3, state=state)][3:]

    for state in range(trellis.STATES):
        assert np.array_equal(coded(-z, trellis.STATES - 1 - state), -coded(z, state))


# ---- special rows -------------------------------------------------------------------------------


def special(kind, head_dim=80):
    row = np.random.default_rng(5).normal(size=head_dim)
    match kind:
        case "zero":
            return np.zeros(head_dim)
        case "subnormal":
            # Too small for float16, while the norm by the levels of a row of zeros is not.
            return row * 2e-8 * np.sqrt(head_dim) / np.linalg.norm(row)
        case "nan":
            row[3] = np.nan
        case "inf":
            row[3] = -np.inf
        case "huge":
            return row * 1e6  # its scale is above the largest float16
    return row


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("kind", ["zero", "subnormal", "nan", "inf", "huge"])
@pytest.mark.parametrize("role", ROLES)
def test_special_rows(role, kind, bits):
    """Whatever a special row holds, its numbers z count as zeros, so no path knows of it."""
    chosen = make_codec(role, bits)
    centres = np.zeros((1, 1, 1, 80)) if role == KEY else None
    x = np.random.default_rng(6).normal(size=(1, 1, BLOCK, 80))
    x[0, 0, SPECIAL_ROWS, :] = 0
    zeroed = reference.encode(x, chosen, centres=centres)
    x[0, 0, SPECIAL_ROWS, :] = special(kind)
    packed = reference.encode(x, chosen, centres=centres)

    scales = packed.scales[0, 0, 0]
    decoded = reference.decode(packed, chosen)[0, 0]
    rows = np.isin(np.arange(BLOCK), SPECIAL_ROWS)
    if kind in ("zero", "subnormal"):
        assert not scales[rows].any()
        assert not decoded[rows].any()
    else:
        assert np.isnan(scales[rows]).all()
        assert np.isnan(decoded[rows]).all()
    assert np.array_equal(packed.words, zeroed.words)
    assert np.array_equal(scales[~rows], zeroed.scales[0, 0, 0][~rows])
    assert np.isfinite(scales[~rows]).all()
    # Zeros have codes of zero, where no other row shares in them.
    codes = reference.unpack(packed.words, chosen)[0, 0, 0]
    assert codes[~rows].any()
    assert not codes[rows].any() or (role == VALUE and chosen.has_trellis)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_broken_key_row_does_not_reach_the_centre(kind):
    chosen = make_codec(KEY, 4)
    x = np.random.default_rng(7).normal(size=(1, 1, BLOCK, 80)) + 2
    zeroed = x.copy()
    zeroed[0, 0, SPECIAL_ROWS, :] = 0
    x[0, 0, SPECIAL_ROWS, :] = special(kind)
    centres = reference.encode(x, chosen).centres
    assert np.array_equal(centres, reference.encode(zeroed, chosen).centres)
    decoded = reference.decode(reference.encode(x, chosen), chosen)[0, 0]
    assert np.array_equal(np.isnan(decoded).all(1), np.isin(np.arange(BLOCK), SPECIAL_ROWS))
    assert np.array_equal(np.isnan(decoded).any(1), np.isin(np.arange(BLOCK), SPECIAL_ROWS))


# ---- attention ----------------------------------------------------------------------------------


def test_attention_is_softmax_of_scores():
    """By hand: two tokens, scores 0 and log 3, a sink of weight 4."""
    q, k = [[[[1.0]]]], [[[[0.0], [np.log(3)]]]]
    v = [[[[10.0], [20.0]]]]
    out = reference.attend(q, k, v, scale=1.0)
    assert out.item() == pytest.approx(0.25 * 10 + 0.75 * 20)
    out = reference.attend(q, k, v, scale=1.0, sink_logits=np.log([4.0]))
    assert out.item() == pytest.approx((10 + 3 * 20) / 8)
    out = reference.attend(q, k, v, scale=1.0, mask=np.array([True, False]))
    assert out.item() == pytest.approx(10)
    out = reference.attend(q, k, v, scale=1.0, mask=np.array([False, False]))
    assert out.item() == 0


def test_causal_mask_is_aligned_to_the_end():
    rng = np.random.default_rng(8)
    q, k, v = (
        rng.normal(size=(1, 4, 3, 8)),
        rng.normal(size=(1, 2, 7, 8)),
        rng.normal(size=(1, 2, 7, 5)),
    )
    out = reference.attend(q, k, v, scale=0.3, mask="causal")
    for i in range(3):
        seen = slice(0, 7 - 2 + i)
        alone = reference.attend(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], scale=0.3)
        assert np.allclose(out[:, :, i : i + 1], alone)


@pytest.mark.parametrize(
    ("batch", "heads", "blocks"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["B", "K", "N"]
)
@pytest.mark.parametrize("role", ROLES)
def test_no_rows_are_coded_and_decoded(batch, heads, blocks, role):
    chosen = make_codec(role, 4, 16)
    packed = reference.encode(np.zeros((batch, heads, blocks * BLOCK, 16)), chosen)
    assert packed.words.shape == (batch, heads, blocks, *chosen.words_shape)
    assert reference.decode(packed, chosen).shape == (batch, heads, blocks * BLOCK, 16)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "tokens"),
    [(0, 4, 2, 3, 5), (2, 0, 0, 3, 5), (2, 4, 2, 0, 5), (2, 4, 2, 3, 0)],
    ids=["B", "H", "L", "S"],
)
@pytest.mark.parametrize("mask", [None, "causal"])
def test_attention_without_rows_or_tokens_is_empty_or_zero(
    batch, heads, kv_heads, length, tokens, mask
):
    kv = np.ones((batch, kv_heads, tokens, 16))
    out = reference.attend(np.ones((batch, heads, length, 16)), kv, kv, scale=1.0, mask=mask)
    assert out.shape == (batch, heads, length, 16)
    assert (out == (tokens > 0)).all()
