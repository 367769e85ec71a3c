"""Metal kernels with one change in their text: some check fails each time, in the emulator."""

from dataclasses import replace

import pytest

from rotormlx.codec.format import KEY, VALUE
from rotormlx.kernels import source
from tests import emulator
from tests.support.attend_cases import Case, Launch, problem
from tests.support.codec_cases import (
    check_any_words,
    check_badly_met_rows,
    check_centre_of_finite_rows,
    check_filled_up_path,
    check_rotor3,
    check_special_rows,
    check_tied_paths,
    check_ties,
    decodes,
    encodes,
    fills_up,
    made_codec,
)
from tests.support.mutations import Mutation, attends, each, of
from tests.support.runners import METAL, launches_of

pytestmark = [
    pytest.mark.mutation,
    pytest.mark.skipif(METAL.on_device, reason="about the emulator, which runs where no Metal is"),
    pytest.mark.skipif(METAL.missing() is not None, reason=str(METAL.missing())),
]
metal = pytest.mark.parametrize("runner", ["metal"], indirect=True)


# ---- encode, decode and rotor3 ------------------------------------------------------------------


def barrier_mutations():
    """Each barrier deleted; each for no memory."""
    for place in ("sums written", "codes written"):
        barrier = f"threadgroup_barrier(mem_flags::mem_threadgroup);  // {place}"
        yield barrier, "", of(encodes, bits=4)
        yield barrier, "threadgroup_barrier(mem_flags::mem_none);", of(encodes, bits=4)
    for place in ("no numbers are in use", "the numbers are there", "the codes are there"):
        yield f"MEET();  // {place}", "", encodes
        yield f"MEET();  // {place}", "threadgroup_barrier(mem_flags::mem_none);", encodes


# Longer than a function should be: it is a table.
def bound_mutations():
    """Each bound shifted by one, or to where a nearby one stands."""
    threes = of(encodes, "rotor3", 80)
    dense = of(encodes, "dense", 80)
    wide = of(encodes, "cascade", 128)
    return [
        ("(D + LANES * HELD - 1)", "D", threes),
        ("|| channel < D;", "|| channel < D - 1;", threes),
        ("|| channel < D;", "|| channel < D + 1;", threes),
        ("|| channel < D;", "|| channel < D - 1;", check_rotor3),
        ("|| channel < D;", "|| channel < D + 1;", check_rotor3),
        (
            "p < CHANNELS; ++p) {\n    const uint c = lane",
            "p < CHANNELS - 1; ++p) {\n    const uint c = lane",
            encodes,
        ),
        (
            "row < ROWS; ++row) {\n      const float x = rows",
            "row < ROWS - 1; ++row) {\n      const float x = rows",
            encodes,
        ),
        (
            "m < RADIX; ++m) {\n        rotated =",
            "m < RADIX - 1; ++m) {\n        rotated =",
            encodes,
        ),
        ("m < RADIX; ++m) {\n      weights", "m < RADIX - 1; ++m) {\n      weights", encodes),
        ("m < N; ++m", "m < N - 1; ++m", wide),
        ("r < N; ++r) x[r]", "r < N - 1; ++r) x[r]", wide),
        ("g < CHANNELS / RADIX", "g < CHANNELS / RADIX - 1", wide),
        ("g < CHANNELS / RADIX", "g < CHANNELS / RADIX + 1", wide),
        ("row < ROWS; ++row) {\n    thread", "row < ROWS - 1; ++row) {\n    thread", wide),
        ("r < RADIX; ++r) of_row", "r < RADIX - 1; ++r) of_row", wide),
        ("p < CHANNELS / HELD;", "p < CHANNELS / HELD - 1;", threes),
        ("place < FIRST + GROUPS", "place < FIRST + GROUPS - 1", threes),
        ("place < FIRST + GROUPS", "place < FIRST + GROUPS + 1", threes),
        ("place >= FIRST", "place > FIRST", threes),
        ("row < ROWS; ++row) {\n        Block", "row < ROWS - 1; ++row) {\n        Block", threes),
        ("m < LANES; ++m", "m < LANES - 1; ++m", dense),
        ("q < CHANNELS; ++q", "q < CHANNELS - 1; ++q", dense),
        (
            "p < CHANNELS; ++p) {\n    for (uint m",
            "p < CHANNELS - 1; ++p) {\n    for (uint m",
            dense,
        ),
        (
            "p < CHANNELS; ++p) square_sum",
            "p < CHANNELS - 1; ++p) square_sum",
            encodes,
        ),
        (
            "p < LaneRow<D, LANES, HELD>::CHANNELS; ++p) {\n    code",
            "p < LaneRow<D, LANES, HELD>::CHANNELS - 1; ++p) {\n    code",
            of(encodes, bits=4),
        ),
        ("p < CHANNELS; ++p) broken", "p < CHANNELS - 1; ++p) broken", check_centre_of_finite_rows),
        ("p < CHANNELS; ++p) sum[p] = fma", "p < CHANNELS - 1; ++p) sum[p] = fma", encodes),
        (
            "p < CHANNELS; ++p) {\n    for (ushort",
            "p < CHANNELS - 1; ++p) {\n    for (ushort",
            encodes,
        ),
        ("mask < 32", "mask < 16", encodes),
        ("worker % (32 / LANES) == 0", "worker == 0", encodes),
        ("worker % (32 / LANES) == 0", "true", encodes),
        ("s < SIMDGROUPS; ++s", "s < SIMDGROUPS - 1; ++s", encodes),
        ("s < SIMDGROUPS; ++s", "s < SIMDGROUPS + 1; ++s", encodes),
        ("if (worker == 0) centres", "if (worker == 1 && lane > 0) centres", encodes),
        (
            "r < ROWS; ++r) {\n    device const T* row",
            "r < ROWS - 1; ++r) {\n    device const T* row",
            encodes,
        ),
        (
            "r < ROWS; ++r) {\n    device const T* row",
            "r < ROWS + 1; ++r) {\n    device const T* row",
            encodes,
        ),
        ("r < ROWS; ++r) {\n    bool broken", "r < ROWS - 1; ++r) {\n    bool broken", encodes),
        ("r < ROWS; ++r) {\n        rows", "r < ROWS - 1; ++r) {\n        rows", encodes),
        (
            "r < ROWS; ++r) {\n      uint code",
            "r < ROWS - 1; ++r) {\n      uint code",
            of(encodes, bits=4),
        ),
        (
            "r < ROWS; ++r) {\n      uint code",
            "r < ROWS + 1; ++r) {\n      uint code",
            of(encodes, bits=4),
        ),
        (
            "r < ROWS; ++r) {\n      float along",
            "r < ROWS - 1; ++r) {\n      float along",
            encodes,
        ),
        ("r < ROWS; ++r) norms", "r < ROWS - 1; ++r) norms", encodes),
        ("r < ROWS; ++r) {\n    if (lane", "r < ROWS - 1; ++r) {\n    if (lane", encodes),
        (
            "r < ROWS; ++r) {\n    const uint token",
            "r < ROWS - 1; ++r) {\n    const uint token",
            decodes,
        ),
        (
            "r < ROWS; ++r) {\n        const float number",
            "r < ROWS - 1; ++r) {\n        const float number",
            decodes,
        ),
        (
            "r < ROWS; ++r) {\n        const float number",
            "r < ROWS + 1; ++r) {\n        const float number",
            decodes,
        ),
        ("worker + r * WORKERS", "worker + r * (WORKERS - 1)", encodes),
        ("worker + r * WORKERS", "worker + r * (WORKERS + 1)", decodes),
        ("if (lane == 0) scales", "if (true) scales", encodes),
        ("i < WORD_ROWS * WORD_LANES", "i < WORD_ROWS * WORD_LANES - 1", encodes),
        ("i < WORD_ROWS * WORD_LANES", "i < WORD_ROWS * WORD_LANES + 1", encodes),
        ("f < 32 / FIELD && i + f < COUNT", "f < 32 / FIELD - 1 && i + f < COUNT", encodes),
        ("f < 32 / FIELD && i + f < COUNT", "f < 32 / FIELD", of(encodes, head_dim=40)),
        ("f < 32 / FIELD && i + f < COUNT", "f < 32 / FIELD && i + f < COUNT - 1", encodes),
        ("f < 32 && i + f < COUNT", "f < 31 && i + f < COUNT", encodes),
        ("f < 32 && i + f < COUNT", "f < 32", encodes),
        ("f < 32 && i + f < COUNT", "f < 32 && i + f < COUNT - 1", encodes),
        ("row >= FIRST_ROWS", "row >= FIRST_ROWS - 1", encodes),
        ("row >= FIRST_ROWS", "row > FIRST_ROWS", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 2; mask > 1", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", check_centre_of_finite_rows),
        ("&& at < count", "&& at < count - 1", check_rotor3),
        ("&& at < count", "", check_rotor3),
        ("long(count) - 1", "long(count)", check_rotor3),
    ]


# Each block type with the line that does the work, and where it occurs.
BLOCKS = {
    "Left": ("return sign_at(BACK ? 0xAC60u : 0x5390u, r, m) * rotor[m];", ("cascade", 64)),
    "Plane": ("return sign_at(BACK ? 0x20u : 0x10u, r, m) * plane[m];", ("planar2", 64)),
    "Walsh4": ("return sign_at(0x0AC6u, r, m) * 0.5f;", ("hadamard", 64)),
    "Walsh2": ("return sign_at(0x02u, r, m) * 0.707106781f;", ("hadamard", 128)),
    "Signs": ("return sign[0];", ("hadamard", 64)),
    "Sandwich": ("const float x = v[0]", ("rotor3", 64)),
    "Odd3": ("const float sum = 0.666666667f", ("cascade", 96)),
    "Odd5": ("for (uint i = 0; i < RADIX; ++i) sum = fma", ("cascade", 80)),
    "Odd7": ("const float y = 0.445902914f;", ("cascade", 112)),
}


def stage_mutations():
    """Each kind of block, each stage and the matrix replaced by the identity, both ways."""
    for name, (line, where) in BLOCKS.items():
        same = ""
        if line.startswith("return"):
            same = " 1.0f" if name == "Signs" else " m == 0 ? 1.0f : 0.0f"
        yield line, f"return{same}; {line}", of(encodes, *where, scaled=False)
        yield line, f"if (BACK) return{same}; {line}", of(decodes, *where)
    for name, head_dim in (("cascade", 64), ("rotor3", 64), ("planar2", 64), ("cascade", 112)):
        yield "BACK ?", "false ?", of(decodes, name, head_dim)
    for old, new, where in (
        ("0x5390u", "0x5380u", ("cascade", 64)),
        ("0x5390u", "0x3590u", ("cascade", 64)),
        ("0x0AC6u", "0x0AC4u", ("hadamard", 64)),
        ("0x02u", "0x00u", ("hadamard", 128)),
        ("m * STRIDE", "m", ("cascade", 64)),
        ("lane / STRIDE % RADIX", "lane % RADIX", ("cascade", 64)),
        ("* STRIDE + c % STRIDE;", "* STRIDE;", ("cascade", 64)),
        ("g / STEP * (RADIX * STEP) + g % STEP", "g * RADIX", ("cascade", 128)),
        ("(g * LANES + lane) * Block", "(g * LANES) * Block", ("cascade", 128)),
        ("(place - FIRST) * Block", "place * Block", ("rotor3", 80)),
    ):
        yield old, new, of(encodes, *where, scaled=False)
    for name, head_dim in (("cascade", 128), ("cascade", 280), ("rotor3", 80), ("hadamard", 192)):
        lines = source.rotation_text(made_codec(name, head_dim, 4, VALUE).rotation)
        for line in lines.splitlines():
            if line.startswith("  rotate_"):
                more = {} if "true>" in line else {"scaled": False}
                check = decodes if "true>" in line else encodes
                yield line, "", of(check, name, head_dim, 4, VALUE, **more)
    for check in (encodes, decodes):
        yield "rows[i] = sums[i];", ";", of(check, "dense")
    yield "rotate_rows<LANES, 1>(row, coefficients, lane);\n\n", "\n\n", check_rotor3
    yield "unrotate_rows<LANES, 1>(row, coefficients, lane);", "", check_rotor3


def scale_mutations():
    """Each scale and centre dropped; roundings to what is stored left out."""
    return [
        (" / channel_factor", "", encodes),
        ("(rows[r * CHANNELS + p] - centre)", "rows[r * CHANNELS + p]", encodes),
        ("centre = float(rounded)", "centre = mean", of(encodes, bits=8)),
        ("clamp(mean, -65504.0f, 65504.0f)", "mean", check_centre_of_finite_rows),
        ("row[p] * factor", "row[p]", encodes),
        ("row[p] * factor", "row[p]", check_rotor3),
        ("sqrt(float(D)) / norm", "1.0f / norm", encodes),
        ("(along > least ? along : least)", "along", check_badly_met_rows),
        ("(along > least ? along : least)", "least", encodes),
        ("norm * (shrink * sqrt(float(D)))", "norm * shrink", encodes),
        ("norm * (shrink * sqrt(float(D)))", "norm * sqrt(float(D))", of(encodes, role=VALUE)),
        ("? 1.0f : value_shrink(BITS)", "? value_shrink(BITS) : 1.0f", of(encodes, bits=4)),
        ("number = scale * level", "number = level", decodes),
        ("row[p] = scale * level", "row[p] = level", check_rotor3),
        (
            "fma(rows[r * CHANNELS + p], channel_factor, centre)",
            "rows[r * CHANNELS + p] + centre",
            decodes,
        ),
        (
            "fma(rows[r * CHANNELS + p], channel_factor, centre)",
            "rows[r * CHANNELS + p] * channel_factor",
            decodes,
        ),
        ("place.z * centres_strides[0]", "place.y * centres_strides[0]", fills_up),
        ("place.y * channel_scale_strides[0]", "0 * channel_scale_strides[0]", encodes),
        ("place.y * channel_scale_strides[0]", "0 * channel_scale_strides[0]", decodes),
    ]


def rule_mutations():
    """Ties, the sign of zero, special rows, planes."""
    special = of(check_special_rows, 4, VALUE)
    return [
        ("size >= left", "size > left", of(check_ties, 4)),
        ("size >= boundaries", "size > boundaries", of(check_ties, 8)),
        ("? left[i + step] : left[i]", "? left[i] : left[i]", of(encodes, bits=4)),
        ("z < 0.0f ?", "z <= 0.0f ?", of(check_ties, 4)),
        ("z < 0.0f ?", "z > 0.0f ?", of(encodes, bits=4)),
        (
            "UNROLL\n    for (uint step = 1u << (BITS - 2)",
            "UNROLL\n    for (uint step = 1u << (BITS - 3)",
            of(encodes, bits=4),
        ),
        (
            "else {\n    for (uint step = 1u << (BITS - 2)",
            "else {\n    for (uint step = 1u << (BITS - 3)",
            of(encodes, bits=8),
        ),
        ("is_finite(size) && scale < 65520.0f ?", "true ?", special),
        ("size == 0.0f) return", "false) return", special),
        ("return half(norm / sqrt(float(D)));", "return half(norm);", special),
        ("special ? 0.0f : row", "row", of(check_special_rows, 3, VALUE)),
        ("scale < 65520.0f", "true", special),
        ("scale < 65520.0f", "scale < 65504.0f", special),
        ("if (!lane_any<LANES>(broken))", "if (true)", check_centre_of_finite_rows),
        ("if (!lane_any<LANES>(broken))", "if (!broken)", check_centre_of_finite_rows),
        ("weight = 1.0f / BLOCK", "weight = 1.0f", encodes),
        (">> 2) & 1u) <<", ">> 1) & 1u) <<", encodes),
        ("f % 16 / 2 * 4 + f / 16 * 2 + f % 2", "f", encodes),
        ("(row - FIRST_ROWS) *", "row *", encodes),
        ("<< (f * FIELD)", "<< f", encodes),
        ("* row_stride] >> (row % 2 * 2)", "* row_stride]", decodes),
        ("WordRows<BITS, COUNT>::FIRST + row / 2", "row / 2", decodes),
    ]


def trellis_mutations():
    """Words to indices; the path that is found, and its way into the codes."""
    two, three = of(check_any_words, bits=2), of(check_any_words, bits=3)
    filled, tied = check_filled_up_path, of(check_tied_paths, 3, VALUE)
    of_values = of(encodes, role=VALUE)
    yield "row > 0) before = words", "row > 1) before = words", three
    for old, new in (
        ("path << 4", "path << 2"),
        ("last >> 28", "last >> 26"),
        ("(last >> 30)", "0u"),
        ("path << 6", "path << 4"),
        ("(last >> 26)", "0u"),
        ("path ^ ((path << 2)", "((path << 2)"),
        ("(first ^ sign)", "first"),
        ("(second ^ sign)", "second"),
        ("(low >> 2) & 0x33333333u", "(low >> 2) & 0x33333331u"),
        ("(field % 2 == 0 ? word.even : word.odd)", "word.even"),
        ("field / 2 * 4", "field / 2 * 2"),
    ):
        yield old, new, two
        yield old, new, three
    yield "((word & 0x22222222u) << 1)", "0u", two
    yield "((word & 0x88888888u) >> 1)", "0u", two
    yield "((word & 0x22222222u) << 2)", "0u", three
    yield "((high & 0x11111111u) << 2)", "0u", three
    yield "(word & 0x88888888u) | (", "(", three
    yield "((high & 0x22222222u) << 1)", "0u", three
    yield "return MAGNITUDES_2[index]", "return MAGNITUDES_2[index ^ 1u]", two
    yield "return MAGNITUDES_3[index]", "return MAGNITUDES_3[index ^ 1u]", three
    for old, new in (
        ("c ^ (3u * sign)", "c"),
        ("+ 4u * high;", ";"),
        ("3u * side, cost", "side, cost"),
        ("2u - side, cost", "2u, cost"),
        ("cost[1 - i % 2]", "cost[i % 2]"),
        ("there = got[i / 2]", "there = kept[i / 2]"),
        ("sign | (high << 1)", "high | (sign << 1)"),
        ("member << (8 + 2 * c)", "member << 8"),
        ("(choices >> (subset * 2u + 8u))", "(choices >> 8u)"),
        ("0xF0u * side", "0u"),
        ("(1u << state_at(i, side))", "(1u << i)"),
        ("sums[i] = min(here, there)", "sums[i] = here"),
        ("? 0.0f : 1e30f", "? 0.0f : 0.0f"),
        ("side == 0 ? even : odd", "even"),
        ("shuffle_xor(side == 0 ? odd : even", "shuffle_xor(odd"),
        ("all[state_at(i, 1)]", "all[7 - i]"),
        ("entering_subset(state) ^ (far << 1)", "entering_subset(state)"),
        ("(state >> 1) | (far << 2)", "state >> 1"),
        ("return code | (index << 4)", "return code | (code << 4)"),
        ("(subset ^ (sign * 3u))", "subset"),
        ("state = sums[t] < least", "state = sums[t] < sums[0]"),
        ("if (is_one) numbers[i + side] = choices;", ""),
        ("MEET_LANES();  // both have read what is replaced", ""),
        ("MEET_LANES();  // the choices are there", ""),
        ("codes[(i - 1) * step]", "codes[i - 1]"),
    ):
        yield old, new, of_values
    for old, new in (
        ("distance < cost ? Bits{}", "distance <= cost ? Bits{}"),
        ("bits_of_float(here) - side;", "bits_of_float(here) - 1;"),
    ):
        yield old, new, tied
    of_rows = of(check_tied_paths, 3, KEY)
    yield "sums[t] < least ? Bits{}", "sums[t] <= least ? Bits{}", of_rows
    yield "bits_of_float(here) - side;", "bits_of_float(here);", of_rows
    for old, new in (
        ("state == state_at(i, side) ?", "state_at(i, side) == 0 ?"),
        ("uint i = start & ~1u;", "uint i = start;"),
        ("if (i < start) begin_half_path(state, sums, side);", ""),
        ("i < start; ++i) codes", "i + 1 < start; ++i) codes"),
        ("is_one && state != nullptr ? state[", "false ? state["),
        ("state[sequence * state_stride]", "state[sequence]"),
        ("state + place.z * state_strides[0]", "state"),
        ("place.y * state_strides[1]", "0"),
        ("first_token = uint(start)", "first_token = uint(start) - 1"),
    ):
        yield old, new, filled
    for old, new in (
        ("sequence >= first &&", ""),
        ("sequence < first + SLICE", "sequence <= first + SLICE"),
        ("sequence < first + SLICE", "sequence + 1 < first + SLICE"),
        ("/ 32 * 16 < SLICE &&", "/ 32 * 16 + 16 < SLICE &&"),
        ("first += SLICE", "first += 2 * SLICE"),
        ("numbers + place * STRIDE", "numbers"),
        ("MOST >= 64 ? 64", "MOST >= 64 ? 128"),
    ):
        yield old, new, of_values
    # Where a warp has fewer sequences than places: eight in a slice, and eight left over.
    yield "(place < SLICE && sequence", "(sequence", of(encodes, head_dim=256)
    yield "sequence < SEQUENCES);", "true);", of(encodes, head_dim=72, role=VALUE)


def of_the_codec():
    """Changes of every place where the old text stands: kernels repeat some of it."""
    groups = (
        *(barrier_mutations, bound_mutations, stage_mutations, scale_mutations, rule_mutations),
        trellis_mutations,
    )
    for group in groups:
        for old, new, check in group():
            yield Mutation(old, new, check, (("once", False),))


@metal
@each(of_the_codec())
def test_a_changed_codec_is_caught(runner, mutation):
    assert mutation.is_caught(runner)


# ---- attention ----------------------------------------------------------------------------------

# Several tiles of query rows, parts, steps and blocks; second planes; lanes without a token.
DECODE = Case(
    bits=(3, 3), dims=(64, 64), kv_heads=2, length=4, blocks=5, launch=Launch((2, 2)), mask="causal"
)
PREFILL = replace(DECODE, length=17)
# Few enough query rows for four places a thread, in two simdgroups; a step that ends in its middle.
LONG = {"blocks": 10, "launch": Launch((4, 2))}
FOUR = replace(DECODE, length=2, **LONG)
# Fewer rows than a threadgroup could rotate at once.
ONE_ROW = {"length": 1, **LONG}
# One threadgroup does several steps.
WHOLE = replace(DECODE, launch=Launch((2, 1)))
DENSE = {"rotation": "dense", "channel_scale": "none"}
SINKS = {"sink_logits": True}

# Each is what stands in the text, what stands there instead, and the changes of the case.

# Text that several kernels have in common, changed in all of them at once.
EVERY = [
    # Codes and levels
    ("index < Stored<BITS>::LEVELS", "index < Stored<BITS>::LEVELS - 1u", {}),
    (
        "magnitude_bits<BITS>(magnitude) ^ (negative << 31)",
        "magnitude_bits<BITS>(magnitude)",
        {},
    ),
    ("LEVELS / 2 - 1u", "LEVELS / 4 - 1u", {"bits": (4, 4)}),
    ("return MAGNITUDES_4[index]", "return MAGNITUDES_4[index ^ 1u]", {"bits": (4, 3)}),
    ("word.even >> (BITS * field)", "word.even >> (BITS * (field ^ 1u))", {"bits": (4, 3)}),
    ("field / 2 * 4", "field / 2 * 2", {}),
    ("(path << 6) | (last >> 26)", "(path << 6)", {}),
    # Masks
    ("length + place ? score", "length + place + 1 ? score", {}),
    ("position <= tokens - length", "position < tokens - length", {}),
    ("bool(mask[at]) ? score : HIDDEN", "score", {"mask": "bool"}),
    ("score + float(mask[at])", "score", {"mask": "additive"}),
    ("batch * strides[0] +", "", {"mask": "padding"}),
    ("head * strides[1] +", "", {"mask": "bool"}),
    ("place * strides[2] +", "", {"mask": "bool"}),
    ("+ position * strides[3]", "", {"mask": "bool"}),
    ("kv_head * (rows / length) + row / length", "row / length", {"mask": "bool"}),
    # Softmax
    ("x <= HIDDEN ? 0.0f : exp(x - top)", "exp(x - top)", {"mask": "bool"}),
    (": exp(x - top)", ": exp(x)", {}),
]
# Made in the kernels for the parts of a sequence.
BOTH = [
    # Scales and centres
    ("score_noise(KEY_BITS)", "0.0f", {}),
    ("float(head_centres[", "0.0f * float(head_centres[", {}),
    # Positions and lengths
    ("? sink + index", "? index", {"mask": "bool"}),
    ("index < sink ? index : packed_tokens + index", "packed_tokens + index", {"mask": "window"}),
    ("index < sink ? index : packed_tokens + index", "index", {"mask": "window"}),
    ("index < sink ? index", "index <= sink ? index", {"mask": "window"}),
    ("if (index < stop)", "if (index <= stop)", {"mask": "none"}),
]


def barrier(place):
    """A barrier of attention, by its comment."""
    return f"threadgroup_barrier(mem_flags::mem_threadgroup);  // {place}"


# Few query rows, two places a thread.
ATTEND = [
    (barrier("the queries"), "//", {}),
    (barrier("the rotated queries"), "//", {}),
    (barrier("all tops"), "//", {}),
    (barrier("all weights"), "//", {}),
    (barrier("no weights"), "//", {}),
    (barrier("the groups' sums"), "//", {}),
    # The queries
    ("i < KEY_DIM * ROWS", "i < KEY_DIM * ROWS - 1", {}),
    ("i < KEY_DIM * ROWS", "i < KEY_DIM * ROWS + 1", {}),
    ("q + batch * q_strides[0]", "q", {}),
    ("head * q_strides[1]", "kv_head * q_strides[1]", {}),
    ("row % length * q_strides[2]", "0", {}),
    ("channel * q_strides[3]", "0", {}),
    ("kv_head * (ROWS / length) + row / length;\n  const float x", "kv_head;\n  const float x", {}),
    ("x * score_scale", "x", {}),
    ("scaled * head_key_scale[channel] :", "scaled :", {}),
    ("key_channel_scale + (batch * plan[7] + kv_head * KEY_DIM)", "key_channel_scale", {}),
    ("rotated_numbers[channel * ROWS + row] =", "rotated_numbers[i] =", {}),
    ("else Rotation::template rotate<OF_LANE>(numbers, coefficients, lane);", "", {}),
    ("else Rotation::template rotate<OF_LANE>", "else Rotation::template unrotate<OF_LANE>", {}),
    ("? rows[c * ROWS + row] : 0.0f", "? rows[c * ROWS] : 0.0f", {}),
    ("if (row < ROWS && Channels", "if (row < ROWS - 1 && Channels", {}),
    ("row < ROWS && Channels::exists(c) ?", "Channels::exists(c) ?", ONE_ROW),
    ("if (row < ROWS && Channels::exists(c))", "if (Channels::exists(c))", ONE_ROW),
    (barrier("all rows are read"), "//", DENSE),
    ("coefficients[i * D + channel]", "coefficients[channel * D + i]", DENSE),
    ("i < D; ++i", "i < D - 1; ++i", DENSE),
    ("i < D; ++i", "i < D + 1; ++i", DENSE),
    ("if (channel < D) rows", "if (channel < D - 1) rows", DENSE),
    ("if (channel < D) rows", "rows", DENSE | {"dims": (80, 64)}),
    # Parts
    ("any_packed = part < plan[1]", "any_packed = part <= plan[1]", {}),
    ("part - plan[1] : part)", "part : part)", {}),
    ("min(start + run_tokens, existing_tokens)", "existing_tokens", {}),
    ("min(start + run_tokens, existing_tokens)", "start + run_tokens", {}),
    ("tokens - packed_tokens : packed_tokens;", "tokens - packed_tokens - 1 : packed_tokens;", {}),
    ("tokens - packed_tokens : packed_tokens;", "tokens - packed_tokens : packed_tokens - 1;", {}),
    ("tokens - packed_tokens : packed_tokens;", "tokens - packed_tokens : packed_tokens + 1;", {}),
    # Levels
    ("(WORD_ROWS + row / 2) * ROW_STRIDE", "(WORD_ROWS + row / 2 + 1) * ROW_STRIDE", {}),
    ("first + row * ROW_STRIDE", "first + row * (ROW_STRIDE - 1)", {}),
    ("make(value_table, uint(", "make(value_table, 1u + uint(", {}),
    ("row < WORD_ROWS", "row < WORD_ROWS - 1", {}),
    ("row < WORD_ROWS", "row < WORD_ROWS + 1", {}),
    ("field < CODES", "field < CODES - 1", {}),
    ("AXIS % CODES == 0 || i < AXIS", "true", {"dims": (24, 64)}),
    ("(AXIS + CODES - 1) / CODES", "AXIS / CODES", {"dims": (24, 64)}),
    ("if (row % 2 == 0) {", "if (true) {", {}),
    ("high[p] >>= 2", "high[p] >>= 1", {}),
    ("before[p] = word;", "before[p] = 0;", {}),
    ("p < PLACES; ++p) high[p] = component", "p < 1; ++p) high[p] = component", {}),
    ("x[i]; }\nMETAL_FUNC uint component(uint4", "x[0]; }\nMETAL_FUNC uint component(uint4", {}),
    ("fma(component(factor, i), level[p]", "fma(component(factor, 0), level[p]", {}),
    ("factors + i * (ROWS / WIDTH), level", "factors, level", {}),
    ("existing * KEY_WORDS + block_token", "existing * KEY_WORDS", {}),
    ("existing * KEY_WORDS", "KEY_WORDS", {}),
    ("first / BLOCK * VALUE_WORDS + channel", "channel", {}),
    # Exact tokens
    ("channel < DIM; channel += LOADED", "channel < DIM - LOADED; channel += LOADED", {}),
    ("channel < DIM; channel += LOADED", "channel <= DIM; channel += LOADED", {}),
    ("numbers[p * LOADED + i]", "numbers[i]", {}),
    ("first[p] + channel", "first[0] + channel", {}),
    ("min(first_token + p, stop - 1)", "first_token + p", {"tail": 17}),
    ("i < tokens", "i < tokens - 1", {}),
    ("i < tokens", "i <= tokens", {}),
    ("first + i * DIM", "first", {}),
    ("min(BLOCK, stop - first)", "BLOCK", {"tail": 33}),
    ("i == 0 ? word & 0xFFFFu : word >> 16", "word & 0xFFFFu", {"dtype": "f16"}),
    ("i == 0 ? word & 0xFFFFu : word >> 16", "word >> 16", {"dtype": "f16"}),
    ("i == 0 ? word << 16 : word & 0xFFFF0000u", "word << 16", {"dtype": "bf16"}),
    ("i == 0 ? word << 16 : word & 0xFFFF0000u", "word & 0xFFFF0000u", {"dtype": "bf16"}),
    # Scores
    ("i < KEY_DIM; i += BLOCK_LANES", "i < KEY_DIM - 1; i += BLOCK_LANES", {}),
    ("i < KEY_DIM; i += LANES", "i < KEY_DIM - 1; i += LANES", {}),
    ("simd_sum(noise[row])", "noise[row]", {}),
    ("fma(-noise[row], key_scale[p],", "fma(-noise[row], 1.0f,", {}),
    ("fma(score, key_scale[p], about)", "fma(score, 1.0f, about)", {}),
    ("fma(score, key_scale[p], about)", "score * key_scale[p]", {}),
    ("lane_sum<BLOCK_LANES>(about_centre[row])", "32.0f * about_centre[row]", {}),
    (
        "fma(plain_numbers[i * ROWS + row], centre",
        "fma(rotated_numbers[i * ROWS + row], centre",
        {},
    ),
    ("head_centres[existing * KEY_DIM + i]", "head_centres[i]", {}),
    ("existing * BLOCK + block_token, key_scale", "block_token, key_scale", {}),
    ("existing * BLOCK + block_token, value_scale", "block_token, value_scale", {}),
    # Softmax
    ("weight == 0.0f ? 0.0f : weight * value_scale[p]", "weight * value_scale[p]", {}),
    ("weight == 0.0f ? 0.0f : weight * value_scale[p]", "weight", {}),
    ("p < PLACES; ++p) top = max", "p < 1; ++p) top = max", {"gain": 60.0}),
    ("top = simd_max(top);", "", {"gain": 60.0}),
    ("s < SIMDGROUPS; ++s) top = max", "s < 1; ++s) top = max", {"gain": 200.0}),
    ("totals[row] *= shrink;", "", {}),
    ("sums[p * ROWS + row] *= shrink;", "", {}),
    ("totals[row] += weight;", "totals[row] = weight;", {}),
    ("(first_token - step + p) * ROWS + row", "(first_token - step) * ROWS + row", {}),
    # Values
    ("b = value_group;", "b = 0;", {}),
    ("step + b * BLOCK < stop; b", "step + b * BLOCK < stop - BLOCK; b", {}),
    ("value_group * VALUE_DIM + channel + p", "value_group * VALUE_DIM + channel", {}),
    ("g < GROUPS; ++g", "g < GROUPS - 1; ++g", {}),
    ("g * VALUE_DIM * ROWS + at", "at", {}),
    ("i % VALUE_DIM * ROWS + i / VALUE_DIM", "i", {}),
    ("total += by_simdgroup[s * ROWS + row]", "total = by_simdgroup[s * ROWS + row]", {}),
    ("(output_row * parts + part) * VALUE_DIM", "(output_row * parts) * VALUE_DIM", {}),
    ("part_tops[at] = tops[row]", "part_tops[at] = 0.0f", {}),
]
# Four places a thread: half a simdgroup has a block.
FOUR_PLACES = [
    ("simdgroup * BLOCKS + lane / BLOCK_LANES", "simdgroup * BLOCKS", {}),
    ("min(block, (stop - 1) / BLOCK)", "block", {"blocks": 9}),
    ("if (has_channels)", "if (value_group < GROUPS)", {"dims": (64, 24)}),
    ("lane % BLOCK_LANES * PLACES", "lane * PLACES", {}),
    ("simdgroup * BLOCKS * BLOCK < stop", "simdgroup * BLOCKS * BLOCK + BLOCK < stop", {}),
    ("i = lane % BLOCK_LANES; i < KEY_DIM", "i = lane; i < KEY_DIM", {}),
    ("x[i]; }\n\n// The numbers in a word", "x[0]; }\n\n// The numbers in a word", {}),
    ("p < PLACES; ++p) top = max", "p < PLACES - 1; ++p) top = max", {"gain": 200.0}),
    (barrier("all tops"), "//", {}),
    (barrier("all weights"), "//", {}),
]
# From the queries to the output.
ALONE = [
    (barrier("the sums are there"), "//", {}),
    (barrier("the rotated sums"), "//", {}),
    (barrier("no weights"), "//", {}),
    (
        "if (BACK) Rotation::template unrotate<OF_LANE>",
        "if (false) Rotation::template unrotate<OF_LANE>",
        {},
    ),
    (
        "if (BACK) Rotation::template unrotate<OF_LANE>",
        "if (BACK) Rotation::template rotate<OF_LANE>",
        {},
    ),
    ("head_value_scale[channel + p] : 1.0f", "1.0f : 1.0f", {}),
    ("head_value_scale[channel + p] : 1.0f", "head_value_scale[channel] : 1.0f", {}),
    ("value_channel_scale + (batch * plan[8] + kv_head * VALUE_DIM)", "value_channel_scale", {}),
    ("weight_numbers[(channel + p) * ROWS + row];", "weight_numbers[channel * ROWS + row];", {}),
    ("value_group == 0 ? factor * sum : 0.0f", "factor * sum", {}),
    ("RUNS == 2 ? run == 1 : !any_packed", "run == 0", {}),
    ("tokens - packed_tokens : packed_tokens;", "tokens - packed_tokens : packed_tokens - 1;", {}),
    (
        "float(sink_logits[(kv_head * (ROWS / length) + row / length) * sink_logits_strides[0]])",
        "HIDDEN",
        SINKS,
    ),
    ("(ROWS / length) + row / length) *", "(ROWS / length)) *", SINKS),
    ("if (thread_index == 0) totals[row] = 1.0f;", "", SINKS),
    ("if (thread_index == 0) totals", "totals", SINKS),
    ("total == 0.0f ? 0.0f :", "", {"mask": "bool"}),
    ("sum / total", "sum", {}),
    ("total += by_simdgroup[s * ROWS + row]", "total = by_simdgroup[s * ROWS + row]", {}),
]
# Ways to find a level.
COMPUTED = [
    ("magnitude | (shifted <<", "magnitude | (0u * shifted <<", {}),
    ("0x4B000000u | byte", "0x4B000000u | (byte ^ 1u)", {}),
    ("0.015625f, -131072.0f", "0.015625f, -131071.0f", {}),
    ("0x7745270Cu", "0x77450C27u", {"bits": (2, 3)}),
    ("(shifted & 4u) == 0 ? 0x30221307u", "(shifted & 4u) != 0 ? 0x30221307u", {}),
    ("? 0x30221307u : 0x9E725641u", "? 0x30221307u : 0x30221307u", {}),
    ("bytes >> ((shifted & 3u) * 8)", "bytes >> ((shifted & 1u) * 8)", {}),
    ("(shifted & 7u) << 20", "(shifted & 3u) << 20", {"bits": (4, 3)}),
    ("t, 1.15169942f", "t, 1.2f", {"bits": (4, 3)}),
    ("t, 3.03974319f", "t, 5.0f", {"bits": (4, 3)}),
]
QUAD = [
    ("thread_index % 4;", "thread_index % 2;", {}),
    ("MAGNITUDES == 8 ? lane + 4 : lane", "lane", {}),
    ("quad_shuffle(lower, lane)", "lower", {}),
    ("quad_shuffle(upper, lane)", "upper", {}),
    ("ushort(shifted & 3u)", "ushort(shifted & 1u)", {}),
    ("(shifted & 4u) == 0 ? magnitude : other", "magnitude", {}),
    ("return with_sign<BITS>(magnitude, shifted)", "return as_type<float>(magnitude)", {}),
]
# Threads of a quad that are in different groups do not come together.
QUADS = [("(VALUE_LANES + 3) / 4 * 4", "VALUE_LANES", {"dims": (64, 24), "blocks": 9})]
PREFILL_ONLY = [
    ("(WORD_ROWS + row / 2) * row_stride", "(WORD_ROWS + row / 2 + 1) * row_stride", {}),
    (
        "fill_levels<VALUE_BITS>(value_levels, uint(",
        "fill_levels<VALUE_BITS>(value_levels, 1u + uint(",
        {},
    ),
    ("key_scale, about_centre", "1.0f, about_centre", {}),
    ("min(start + part_tokens, exact", "min(start + part_tokens + 1, exact", {}),
    (
        "? tokens - packed_tokens : packed_tokens)",
        "? tokens - packed_tokens - 1 : packed_tokens)",
        {},
    ),
    (
        "? tokens - packed_tokens : packed_tokens)",
        "? tokens - packed_tokens : packed_tokens - 1)",
        {},
    ),
    (
        "? tokens - packed_tokens : packed_tokens)",
        "? tokens - packed_tokens : packed_tokens + 1)",
        {},
    ),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the levels", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the keys", "//", {}),
    ("simdgroup_barrier(mem_flags::mem_threadgroup);  // the simdgroup's", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the weights", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the values", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // no values", "//", {}),
    ("i < rows * LANES", "i < rows * LANES - 1", {}),
    ("i < rows * LANES", "i < rows * LANES + 1", {}),
    ("field < CODES", "field < CODES - 1", {}),
    ("AXIS % CODES == 0 || position < AXIS", "true", {"dims": (24, 16)}),
    (">> (row % 2 * 2)", "", {}),
    ("row > 0) before = at", "row > first_row) before = at", {}),
    ("token < tokens ?", "token <= tokens ?", {}),
    ("i < TILE * DIM", "i < TILE * DIM - 1", {}),
    ("i < TILE * DIM", "i < TILE * DIM + 1", {}),
    ("last_place + 1;", "last_place;", {}),
    ("? length - 1 : last_row % length", "? last_row % length : last_row % length", {}),
    ("seen - packed_tokens) : seen - sink", "seen - packed_tokens - 1) : seen - sink", {}),
    (
        "exact ? plain_rows : rotated",
        "exact ? rotated + (head_rows + first_row) * KEY_DIM : rotated",
        {},
    ),
    ("in_block, key_levels", "0, key_levels", {}),
    ("in_block / CODES, TILE / CODES", "0, TILE / CODES", {}),
    ("channel < KEY_DIM; channel += 8", "channel < KEY_DIM - 8; channel += 8", {}),
    ("about_centre = 0.0f;\n    for", "for", {}),
    (
        "i < KEY_DIM; i += ROW_LANES) {\n      const float centre",
        "i < KEY_DIM - 1; i += ROW_LANES) {\n      const float centre",
        {},
    ),
    (
        "i < KEY_DIM; i += ROW_LANES) {\n  const float x",
        "i < KEY_DIM - 1; i += ROW_LANES) {\n  const float x",
        {},
    ),
    ("about_centre += simd_shuffle_xor(about_centre, m)", "about_centre *= 2.0f", {}),
    ("noise += simd_shuffle_xor(noise, m)", "", {}),
    ("fma(-noise, key_scale, score)", "fma(-noise, 1.0f, score)", {}),
    ("new_top = max(new_top, simd_shuffle_xor(new_top, m))", "", {}),
    ("total *= shrink;", "", {}),
    ("total += weight;", "total = weight;", {}),
    ("total += simd_shuffle_xor(total, m)", "total *= 2.0f", {}),
    (
        "weight == 0.0f ? 0.0f : weight * value_scale[i]",
        "weight * value_scale[i]",
        {"mask": "padding"},
    ),
    ("weight == 0.0f ? 0.0f : weight * value_scale[i]", "weight", {}),
    ("my_shrinks[my_row * 9] = shrink", "my_shrinks[my_row * 9] = 1.0f", {}),
    ("if (any_shrinks)", "if (false)", {}),
    ("i < 64; i += LANES", "i < 62; i += LANES", {}),
    ("part_tops[at + my_row * parts] = top", "part_tops[at + my_row * parts] = 0.0f", {}),
]
MERGE = [
    (barrier("the shares"), "//", {}),
    (barrier("the sums of the sharers"), "//", {}),
    (barrier("the packed sums"), "//", {}),
    (barrier("the rotated sums"), "//", {}),
    ("part < parts; part += 32) top", "part < parts - 1; part += 32) top", {"gain": 60.0}),
    ("top = simd_max(top);", "", {"gain": 60.0}),
    ("part < parts; part += 32) {", "part < parts - 1; part += 32) {", {}),
    ("part < parts; part += 32) {", "part <= parts; part += 32) {", {}),
    ("total = fma(share, row_totals[part], total)", "total += row_totals[part]", {}),
    ("shares[r * MOST_PARTS + part] = share", "shares[r * MOST_PARTS + part] = 1.0f", {}),
    ("total = simd_sum(total);", "", {}),
    ("part < stop; part += step", "part < stop - 1; part += step", {}),
    ("part < stop; part += step", "part <= stop; part += step", {}),
    ("outputs + part * dim", "outputs", {}),
    ("numbers[i], sums[i]", "numbers[0], sums[i]", {}),
    ("sharer, packed_parts, SHARERS", "sharer, packed_parts - 1, SHARERS", {}),
    ("packed_parts + sharer, parts", "packed_parts + 1 + sharer, parts", {}),
    ("s < SHARERS; ++s", "s < SHARERS - 1; ++s", {**LONG, "dims": (64, 256)}),
    ("(SHARERS + s) * VALUE_DIM + c", "s * VALUE_DIM + c", {}),
    ("if (HAS_SINK_LOGITS)", "if (false)", SINKS),
    ("total = exp(sink - top)", "total = 0.0f", SINKS),
    ("if (lane == 0) total = exp", "total = exp", SINKS),
    ("kv_head * (group_rows / length) + row / length", "row / length", SINKS),
    ("if (BACK) Rotation::template unrotate", "if (false) Rotation::template unrotate", {}),
    ("coefficients[i * D + channel]", "coefficients[channel * D + i]", DENSE),
    (barrier("all rows are read"), "//", DENSE),
    ("packed_sums[c * ROWS + r] * head_scale[c] :", "packed_sums[c * ROWS + r] :", {}),
    ("batch * plan[8] + kv_head * VALUE_DIM", "0", {}),
    ("+ exact_sums[c * ROWS + r]", "", {}),
    ("total == 0.0f ? 0.0f :", "", {"mask": "bool"}),
    ("/ total)", "/ 1.0f)", {}),
    ("first_row + r < group_rows", "first_row + r < group_rows + 1", {"length": 17}),
    ("first_row + r < group_rows", "first_row + r < group_rows - 1", {}),
    ("(int64_t(head_index) * tops_shape[2] + row) * parts;", "row * parts;", {}),
    (
        "(int64_t(head_index) * tops_shape[2] + row) * parts * VALUE_DIM",
        "row * parts * VALUE_DIM",
        {},
    ),
    (
        "r < ROWS; ++r) {\n  threadgroup_barrier",
        "r < ROWS - 1; ++r) {\n  threadgroup_barrier",
        {"length": 17},
    ),
    ("r < ROWS; r += SIMDGROUPS", "r < ROWS - 1; r += SIMDGROUPS", {"length": 17}),
]


def by(case, way):
    """The case with this way to find levels."""
    return replace(case, launch=replace(case.launch, levels=way))


def of_attention():
    """Changes of one kernel, or of all at once."""
    for kernel, case, listed in (
        ("", DECODE, EVERY),
        ("rotormlx_attend_parts", DECODE, BOTH + ATTEND),
        ("rotormlx_attend_parts", FOUR, FOUR_PLACES),
        ("rotormlx_attend_alone", WHOLE, BOTH + ALONE),
        ("rotormlx_attend_parts", by(DECODE, "arithmetic"), COMPUTED),
        ("rotormlx_attend_parts", by(DECODE, "quad"), QUAD),
        ("rotormlx_attend_parts", by(FOUR, "quad"), QUADS),
        ("rotormlx_prefill", PREFILL, BOTH + PREFILL_ONLY),
        ("rotormlx_attend_merge", DECODE, MERGE),
    ):
        for old, new, changes in listed:
            check = attends(problem, replace(case, **changes))
            yield Mutation(old, new, check, (("kernel", kernel),))


@pytest.fixture(scope="module")
def _compiled_ahead(request):
    """The changed kernels are compiled first, those whose texts begin alike in one go."""
    with emulator.compiling_ahead():
        for parameters in launches_of(request):
            mutation = parameters["mutation"]
            if ("once", False) not in mutation.where:
                mutation.is_caught(METAL)


@pytest.mark.usefixtures("_compiled_ahead")
@metal
@each(of_attention())
def test_changed_attention_is_caught(runner, mutation):
    assert mutation.is_caught(runner)
