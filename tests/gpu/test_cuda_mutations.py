"""CUDA kernels with one change in their text: some check fails each time, in the emulator."""

from dataclasses import replace

import pytest

from rotormlx.codec.format import KEY, VALUE
from tests.emulator import missing
from tests.support.attend_cases import Case, Launch, problem, with_own_scales
from tests.support.codec_cases import (
    check_badly_met_rows,
    check_centre_of_finite_rows,
    check_filled_up_path,
    check_own_scales_of_rows,
    check_rotor3,
    check_ties,
    decodes,
    encodes,
    fills_up,
)
from tests.support.mutations import Mutation, attends, each, of
from tests.support.runners import CUDA
from tests.support.store_cases import StoreCase, check_steps

pytestmark = [
    pytest.mark.mutation,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
cuda = pytest.mark.parametrize("runner", ["cuda"], indirect=True)


# ---- encode, decode and rotor3 ------------------------------------------------------------------

# Batch rows, heads and blocks.
SHAPE = (2, 2, 2)
encodes_blocks, decodes_blocks = of(encodes, shape=SHAPE), of(decodes, shape=SHAPE)
own_scales_of_rows = of(check_own_scales_of_rows, 4)
fills_up_blocks, finite_rows = of(fills_up, 3), of(check_centre_of_finite_rows, 3)
values = of(encodes, role=VALUE, shape=SHAPE)
# Where a lane has several near rows of a turn, and rows turn in parts.
in_parts = of(encodes, head_dim=72, bits=8)
# Where |z| is larger than all boundaries.
far_behind = of(check_badly_met_rows, 8)

CODEC_MUTATIONS = [
    *(
        (f"__syncthreads();  // {place}", "", of(encodes, bits=4, shape=SHAPE))
        for place in ("sums written", "centres written", "codes written")
    ),
    *(
        (f"MEET();  // {place}", "", encodes_blocks)
        for place in ("no numbers are in use", "the numbers are there", "the codes are there")
    ),
    *(
        (f"MEET_LANES();  // {place}", "", encodes_blocks)
        for place in ("both have read what is replaced", "the choices are there")
    ),
    ("/ 32 * 16 < SLICE &&", "/ 32 * 16 < 64 &&", of(encodes, role=VALUE)),
    ("IS_KEY ? 0 : call.start", "IS_KEY ? 0 : 0", check_filled_up_path),
    ("&& call.state != nullptr) {", ") {", of(check_filled_up_path, has_state=False)),
    (
        "+ head) * call.blocks + block) * Codec::D;",
        ") * call.blocks + block) * Codec::D;",
        check_filled_up_path,
    ),
    (
        "Codec::IS_KEY ? 0 : call.start",
        "call.start",
        of(check_filled_up_path, role=KEY),
    ),
    ("batch * call.x_strides[0] +", "", encodes_blocks),
    ("int64_t(block) * BLOCK * one.x_stride;", "0;", encodes_blocks),
    (
        "head * packed.centres_strides[1] + block * packed.centres_strides[2];\n}",
        "0;\n}",
        encodes_blocks,
    ),
    ("call.dtype == ROTORMLX_FLOAT32 ? 4 : 2", "2", encodes_blocks),
    ("__syncthreads();  // the tables are there", "", of(encodes, role=VALUE, bits=4)),
    ("__syncwarp();  // the rows are there", "", encodes_blocks),
    ("__syncwarp();  // no rows are in use", "", encodes_blocks),
    ("+ turn) * WORKERS", ") * WORKERS", encodes_blocks),
    ("i / WARP_ROWS * TURNS", "i / WARP_ROWS", encodes_blocks),
    ("warp * WARP_ROWS + i", "i", encodes_blocks),
    ("+ q % NEAR_TURN * WARP_NEAR_ROWS", "", in_parts),
    ("if (Plan::NearChannels::exists(first + p)) piece", "if (true) piece", in_parts),
    ("near_lane / (PART / NEIGHBOURS) == part", "true", in_parts),
    ("near_lane % (PART / NEIGHBOURS) * Plan", "near_lane * Plan", in_parts),
    ("place = c - part * PART", "place = c", in_parts),
    ("Channels::channel(0, p) / PART == part", "true", in_parts),
    ("threadIdx.x / 32 * Plan::WARP_WORDS", "0", encodes_blocks),
    ("near_lane * NEIGHBOURS + p)) {\n            *", "0)) {\n            *", encodes_blocks),
    ("(n * Plan::TURNS + turn) * CHANNELS", "(n + turn) * CHANNELS", encodes_blocks),
    ("+ n * Plan::WARP_ROWS) *", ") *", encodes_blocks),
    ("+ n * Plan::WARP_NEAR_ROWS;", ";", in_parts),
    ("Codec::IS_KEY && !call.given_centres", "Codec::IS_KEY", fills_up_blocks),
    ("broken >> q & 1u ?", "false ?", finite_rows),
    ("broken >> q & 1u ?", "broken != 0 ?", finite_rows),
    ("broken = lane_any<NEAR_LANES>(broken);", "", finite_rows),
    ("weight = 1.0f / BLOCK", "weight = 1.0f", encodes_blocks),
    ("mask = NEAR_LANES; mask < SIDE", "mask = 2 * NEAR_LANES; mask < SIDE", encodes_blocks),
    ("sums[i], (lane - SIDE) & 31)", "sums[i], lane)", encodes_blocks),
    ("lane / NEAR_LANES == (FAR_TURN - 1)", "lane == (FAR_TURN - 1)", encodes_blocks),
    ("+= sums[(n + step) * WIDTH + i];", "+= 0.0f;", in_parts),
    ("shared + threadIdx.x / 32 * D", "shared", encodes_blocks),
    ("w < Plan::WARPS; ++w) mean", "w < Plan::WARPS - 1; ++w) mean", encodes_blocks),
    ("fminf(fmaxf(mean, -65504.0f), 65504.0f)", "mean", finite_rows),
    ("near[q * NEIGHBOURS + p] -= low;", ";", encodes_blocks),
    ("near[q * NEIGHBOURS + p + 1] -= high;", ";", encodes_blocks),
    ("ushort(pair >> 16)", "ushort(pair)", encodes_blocks),
    ("centre[i] = call.centres[c];", "centre[i] = __half(0.0f);", fills_up_blocks),
    ("near[q * NEIGHBOURS + p] /= factor;", ";", encodes_blocks),
    (
        "one.channel_scale += batch * call.channel_scale_stride + head * Codec::D;",
        "one.channel_scale += batch * call.channel_scale_stride;",
        encodes_blocks,
    ),
    (
        "one.channel_scale += batch * call.channel_scale_stride + head",
        "one.channel_scale += head",
        own_scales_of_rows,
    ),
    (
        "call.channel_scale[batch * call.channel_scale_stride + head * D + c]",
        "call.channel_scale[head * D + c]",
        own_scales_of_rows,
    ),
    (
        "Codec::template rotate_near<Plan::NEAR_LANES, Plan::NEAR_ROWS>"
        "(near, call.coefficients, near_lane);",
        "",
        encodes_blocks,
    ),
    ("Codec::template rotate_far<ROWS>(rows, call.coefficients, lane);", "", encodes_blocks),
    ("LANES * HELD == D || lane * HELD + start < D", "true", of(encodes, "iso4")),
    ("coefficients + (lane * GROUPS + g)", "coefficients + g", encodes_blocks),
    ("g / STRIDE * (RADIX * STRIDE) + g % STRIDE", "g * RADIX", encodes_blocks),
    ("HELD, ROWS, STRIDE, BACK>(", "HELD, ROWS - 1, STRIDE, BACK>(", encodes_blocks),
    ("fill_levels<Codec::BITS>(levels, uint(thread), THREADS);", "", encodes_blocks),
    ("fminf(size, float(Codec::CELL_COUNT - 1) / Codec::CELLS_OF_UNIT)", "size", far_behind),
    ("size >= float_of_bits(found.x)", "size > float_of_bits(found.x)", of(check_ties, 8)),
    ("(size >= float_of_bits(found.x) ? 1u : 0u)", "0u", of(encodes, bits=8)),
    ("size >= left[step - 1]", "size > left[step - 1]", of(check_ties, 4)),
    (
        "CODE_STRIDE + c] = uchar(code[p])",
        "CODE_STRIDE + (c ^ 1)] = uchar(code[p])",
        of(encodes, bits=4, shape=SHAPE),
    ),
    (
        "if (lane == 0) call.scales[worker + r * WORKERS]",
        "if (lane == 0 && r > 0) call.scales[worker + r * WORKERS]",
        encodes_blocks,
    ),
    ("i >= WORDS) break;", "i >= WORDS - 1) break;", in_parts),
    ("i >= WORDS) break;", "i >= WORDS + 1) break;", in_parts),
    (
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1)",
        "word_lane * (Codec::IS_KEY ? D : 1)",
        encodes_blocks,
    ),
    (
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1)",
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 2)",
        of(encodes, role=VALUE, shape=SHAPE),
    ),
    (
        "Codec::IS_KEY ? 1 : CODE_STRIDE, uint",
        "Codec::IS_KEY ? 1 : D, uint",
        of(encodes, role=VALUE, shape=SHAPE),
    ),
    ("head * packed.words_strides[1] +\n               block", "0 * head + block", encodes_blocks),
    (
        "const float scale = __half2float(scales[token]);",
        "const float scale = 1.0f;",
        decodes_blocks,
    ),
    (
        "(Codec::IS_KEY ? token : c), WORD_LANES",
        "(Codec::IS_KEY ? token : c), BLOCK",
        of(decodes, role=VALUE, shape=SHAPE),
    ),
    (
        "Codec::template unrotate<ROWS>(rows, call.coefficients + head * "
        "call.coefficients_stride, lane);",
        "",
        decodes_blocks,
    ),
    ("+ head) * call.blocks + block) * BLOCK;", "+ head) * call.blocks) * BLOCK;", decodes_blocks),
    (
        "? 1.0f\n              : call.channel_scale[batch",
        "? 1.0f\n              : 1.0f + 0 * call.channel_scale[batch",
        decodes_blocks,
    ),
    (
        "fmaf(rows[r * CHANNELS + p], channel_factor, centre)",
        "rows[r * CHANNELS + p] * channel_factor",
        decodes_blocks,
    ),
    ("Codec::template rotate<1>(row, call.coefficients, lane);", "", check_rotor3),
    ("Codec::template unrotate<1>(row, call.coefficients, lane);", "", check_rotor3),
    ("row[p] = scale * level_of_code", "row[p] = level_of_code", check_rotor3),
    ("(at < call.rows ? at : call.rows - 1)", "at", check_rotor3),
    ("&& at < call.rows) store", ") store", check_rotor3),
    ("key_rotation::rotate_near<NEAR_LANES, ROWS>(rows, coefficients, lane);", "", encodes_blocks),
    ("key_rotation::rotate_far<LANES, ROWS>(rows, coefficients, lane);", "", encodes_blocks),
    ("value_rotation::rotate_near<NEAR_LANES, ROWS>(rows, coefficients, lane);", "", values),
    ("value_rotation::rotate_far<LANES, ROWS>(rows, coefficients, lane);", "", values),
    ("value_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);", "", check_rotor3),
]


@cuda
@each(Mutation(*mutation) for mutation in CODEC_MUTATIONS)
def test_a_changed_codec_is_caught(runner, mutation):
    assert mutation.is_caught(runner)


# ---- store --------------------------------------------------------------------------------------

STORE = StoreCase((3, 3), "f32", 64, 4, 3, "own")
SHARED_SCALE = replace(STORE, scale="shared", rotation="calibrated")
LONG_TAIL = replace(STORE, window=130, bits=(4, 4))
# What stands in the text, what stands there instead, and the case.
STORE_MUTATIONS = [
    ("__syncthreads();  // the places behind the tail have been read", "", STORE),
    ("to < row.left(); to += BLOCK", "to < sink + BLOCK; to += BLOCK", LONG_TAIL),
    ("__syncthreads();  // no sums are in use", "", STORE),
    ("__syncthreads();  // the sums of so many tokens are there", "", STORE),
    ("__syncthreads();  // so many squares are there", "", STORE),
    ("__syncthreads();  // the sum of all is there", "", STORE),
    ("__syncthreads();  // the scale is there", "", STORE),
    ("__syncthreads();  // all has been read and stored", "", STORE),
    ("{\n    __threadfence();\n    int32_t", "{\n    int32_t", STORE),
    ("1) {\n      __threadfence();", "1) {", STORE),
    ("*counter = 0;", "", STORE),
    ("int(gridDim.x * gridDim.y) - 1", "int(gridDim.x * gridDim.y) - 2", STORE),
    ("int(gridDim.x * gridDim.y) - 1", "int(gridDim.x) - 1", STORE),
    ("call.counter + blockIdx.z", "call.counter", STORE),
    ("call.lengths + 2 * blockIdx.z", "call.lengths", STORE),
    ("row.packed / BLOCK < call.blocks &&", "", STORE),
    ("row.exact - call.sink >= call.window", "row.exact - call.sink > call.window", STORE),
    ("row.exact - call.sink >= call.window", "row.exact >= call.window", STORE),
    ("min(call.length, call.capacity - row.left())", "call.length", STORE),
    ("lengths[0] + row.left() + row.added", "lengths[0] + row.exact + row.added", STORE),
    ("due ? row.packed + BLOCK : row.packed;", "due ? row.packed : row.packed;", STORE),
    ("to < row.left(); to += BLOCK", "to + BLOCK < row.left(); to += BLOCK", STORE),
    ("min(row.left() - to, BLOCK)", "BLOCK", STORE),
    ("if (token < tokens) pieces[n]", "if (true) pieces[n]", STORE),
    ("if (token < tokens) *reinterpret", "if (true) *reinterpret", STORE),
    (
        "exact + row.left() * stride, stride, fresh",
        "exact + row.exact * stride, stride, fresh",
        STORE,
    ),
    ("+ call.sink * role.exact_strides[2]", "", STORE),
    ("batch, head, row.packed / BLOCK)", "batch, head, 0)", STORE),
    ("call.own_scale && row.packed == 0 &&", "row.packed == 0 &&", SHARED_SCALE),
    ("call.own_scale && row.packed == 0 &&", "call.own_scale &&", STORE),
    ("&& channel_scale != nullptr;", ";", replace(STORE, scale="none")),
    ("head * role.coefficients_stride", "head * 0", SHARED_SCALE),
    ("batch * role.channel_scale_stride + head * D", "head * D", STORE),
    ("x = i == p ? near", "x = i == 0 ? near", STORE),
    ("add(sums[i], sums[i + half * NEAR_LANES]);", "add(sums[i], sums[half * NEAR_LANES]);", STORE),
    ("i < half * NEAR_LANES;", "i < half * NEAR_LANES - 1;", STORE),
    ("sums[Plan::near_token(q) * NEAR_LANES", "sums[q * NEAR_LANES", STORE),
    ("squares[count / 2] = squares[count - 1];", ";", STORE),
    ("1.0f / 4096", "1.0f / 64", replace(STORE, quiet=True)),
    ("is_finite(whole) && whole > 0.0f", "true", replace(STORE, quiet=True)),
]


@pytest.mark.parametrize("changed", STORE_MUTATIONS, ids=[m[0][:50] for m in STORE_MUTATIONS])
def test_a_changed_store_is_caught(changed):
    old, new, case = changed
    mutation = Mutation(old, new, of(check_steps, case))
    assert mutation.is_caught(CUDA)


# ---- attention ----------------------------------------------------------------------------------

# Several tiles of query rows, warps with one and two blocks, second planes, tokens behind the
# last.
TENSOR = Case(
    bits=(3, 3), dims=(80, 80), batch=2, kv_heads=2, length=9, blocks=6, mask="causal", dtype="f16"
)
FLOAT = replace(TENSOR, dims=(64, 64), length=5, dtype="f32")
# Kernels that a case does not launch are not compiled.
WITHOUT_MANY_ROWS = [
    ("if (plan->matrix_rows == 8) return launch_all<8>(*arguments, *plan, stream);", ""),
]
# Nor are loads of other dtypes.
OF_HALF = "if (dtype == ROTORMLX_FLOAT16) use(static_cast<const __half*>(x));\n  else "
OF_BFLOAT = "if (dtype == ROTORMLX_BFLOAT16) use(static_cast<const __nv_bfloat16*>(x));\n  else "
WITHOUT_TENSOR = [
    (OF_HALF + OF_BFLOAT, ""),
    *WITHOUT_MANY_ROWS,
    ("return launch(attend<1>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
    ("return launch(attend<2>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
]
WITHOUT_FLOAT = [
    (OF_BFLOAT, ""),
    *WITHOUT_MANY_ROWS,
    ("return launch(attend<1>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
    (
        "return launch(attend_float, grid, ATTEND_THREADS, plan.part_bytes, stream, all);",
        "return 1;",
    ),
]

# Each is what stands in the text, what stands there instead, and the changes of the case.
# Where the noise of the codes counts in a score.
NOISY = {"bits": (2, 4), "gain": 8.0}
# Where a row's largest score grows much from block to block.
LOUD = {"gain": 60.0, "blocks": 30}
NONE, HOLED, FULL = {"mask": "none"}, {"mask": "bool"}, {"tail": 0, "missing": 0}
# Where a span of the keys, or two of the values, are an item of their own.
WIDE = {"bits": (8, 8), "dims": (128, 128)}
TENSOR_MUTATIONS = [
    # Levels
    ("return NEXT == 2 ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 : i;", "return i;", {}),
    ("rest == 0x1000u && half % 2 == 1) ? 1u : 0u", "false) ? 1024u : 512u", {"bits": (4, 4)}),
    ("chosen_bytes(low, high, 0x5140u)", "chosen_bytes(low, high, 0x5041u)", {"bits": (4, 4)}),
    ("chosen_bytes(low, high, 0x7362u)", "chosen_bytes(low, high, 0x5140u)", {"bits": (2, 4)}),
    ("half), word << 4, word,", "half), word, word << 4,", {"bits": (4, 4)}),
    ("half == 0 ? 0x5140u : 0x7362u", "0x5140u", {}),
    ("indices = word & 0x77777777u", "indices = word & 0x37777777u", {"bits": (4, 4)}),
    ("indices >> (16 * half)", "indices", {"bits": (4, 4)}),
    ("pairs + 2 * half);", "pairs + 2 - 2 * half);", {"bits": (4, 4)}),
    ("look_up(bytes, odd >>", "look_up(bytes, even >>", {"bits": (2, 2)}),
    ("word ^ moved_up<2>(word, before) ^ by_six", "word ^ by_six", {"bits": (2, 2)}),
    ("joined(0x55555555u, word ^ moved", "joined(0x44444444u, word ^ moved", {"bits": (2, 2)}),
    ("(fields & 0x33333333u) | (by_six", "(fields & 0x33333333u) | (by_four", {"bits": (2, 2)}),
    ("| (by_four & 0x44444444u)", "", {"bits": (2, 2)}),
    ("subset ^ (3u * negative)", "subset", {"bits": (2, 2)}),
    ("words[1] >> (quad_lane % 2 * 2)", "words[1]", {}),
    ("((word >> 1) ^ by_two)", "(word ^ by_two)", {}),
    ("joined(0x55555555u, by_six, moved_up<5>(word, before))", "by_six", {}),
    ("(high & 0x11111111u) | ((subsets << 1)", "((subsets << 1)", {}),
    ("(high & 0x22222222u) | (subsets", "(subsets", {}),
    ("odd >> (16 * half + 1)", "odd >> (16 * half)", {}),
    ("by_six, by_two, half", "by_two, by_six, half", {}),
    ("by_four, word, half", "word, by_four, half", {}),
    ("(nibble >> 2) | (nibble & 2u) | (nibble & 1u) << 2", "nibble", {}),
    # The word before
    ("(word << SHIFT) | (before >> (32 - SHIFT))", "word << SHIFT", {}),
    ("is_first ? decoder.before_first : decoder.before)", "decoder.before)", {}),
    ("is_first ? decoder.before_first : decoder.before)", "decoder.before_first)", {}),
    ("quad_lane == 0 ? ring + 32 : behind", "behind", {}),
    ("quad_lane == 0 ? behind - LOAD * Words::WORDS : behind", "behind", {}),
    ("(quad_lane + 3) % 4", "quad_lane", {}),
    ("of_lane, before[2 * half + i]", "of_lane, before[i]", {}),
    ("ring[i * LOAD + 32] = {0, 0, 0, 0};", ";", {}),
    ("i < SLOTS * Shape::SLOT_LOADS; i += 32", "i < Shape::SLOT_LOADS; i += 32", {}),
    # 8 bits
    ("codes = words[i / 2] >> (16 * (i % 2))", "codes = words[i / 2]", {"bits": (8, 8)}),
    ("table[(codes >> 8) & 0xffu]", "table[codes & 0xffu]", {"bits": (8, 8)}),
    ("uint(code / 128) << 15", "0u", {"bits": (8, 4)}),
    ("code < 256; code += threads", "code < 255; code += threads", {"bits": (8, 4)}),
    # Which lane has which chunk
    ("(step / SHARE * 4 + quad_lane) * SHARE + step % SHARE", "step * 4 + quad_lane", {}),
    ("BITS == 8 ? 2 * quad_lane + i", "BITS == 8 ? 2 * quad_lane + 1 - i", {"bits": (8, 8)}),
    ("in_first ? FIRST - 1 :", "in_first ? FIRST + 8 :", {"bits": (4, 3)}),
    ("FIRST + SECOND - 1)", "FIRST + SECOND + 8)", {}),
    ("FIRST + quad_lane / 2;", "FIRST + quad_lane;", {"dims": (128, 128)}),
    ("BITS == 8 ? 8 : in_first ? 4 : 2", "BITS == 8 ? 8 : 4", {"dims": (128, 128)}),
    # Copies
    ("copies.template wait<SLOTS - 1>()", "copies.template wait<SLOTS>()", {}),
    ("copies.template wait<SLOTS - 1>()", "", {}),
    ("i < SLOTS - 1; ++i) start(", "i < SLOTS; ++i) start(", {}),
    ("n + item / ITEMS < blocks", "n < blocks", {}),
    ("lanes_before = 4 * (lane % 8)", "lanes_before = 4 * (lane / 4)", {}),
    ("LANES % 32 == 0 ? 32 * span", "LANES % 32 == 0 ? 16 * span", {}),
    ("scales + lane / 8 % 2 * 32 + lanes_before", "scales + lanes_before", {}),
    ("lane < 16 ? call.keys : call.values", "lane >= 16 ? call.keys : call.values", {}),
    ("ring + Shape::KEY_LOADS * LOAD + lane / 16", "ring + LOAD + lane / 16", {}),
    ("Shape::KEY_LOADS * LOAD + 8 + group]", "Shape::KEY_LOADS * LOAD + group]", {}),
    ("8 * row + (group ^ (2 * row))", "8 * row + (group & (2 * row))", {}),
    (
        "__syncwarp();  // the copies of all lanes are there, and the products with the centres",
        "",
        {},
    ),
    ("min(32 * span + 4 * group, LANES - 4) - 4 * group", "32 * span", {}),
    ("words[word] + rows * LANES + further", "words[word] + rows * LANES", {}),
    ("first_block * strides[2]", "0", {}),
    ("advance(source.keys, call.keys.words_strides[2]);", "", {}),
    ("advance(source.values, call.values.words_strides[2]);", "", {}),
    ("words[1] += WARPS * int(stride);", "", {}),
    ("source.scales += WARPS *", "source.scales += 0 *", {}),
    ("keys + Keys::row(0, 1, quad_lane)", "keys + Keys::row(0, 0, quad_lane)", {}),
    ("values + Values::row(0, 1, quad_lane)", "values + Values::row(0, 0, quad_lane)", {}),
    # Items
    ("if (item > 0) __syncwarp();  // the keys before have been read", "", WIDE),
    ("if (item == KeySpans::ITEMS - 1) {", "if (item == 0) {", WIDE),
    ("item - KeySpans::ITEMS, lane, to", "0, lane, to", WIDE),
    ("take_slot(n, KeySpans::ITEMS + item)", "take_slot(n, KeySpans::ITEMS)", WIDE),
    ("free_slot == (SLOTS - 1) * SLOT ? 0", "free_slot == (SLOTS - 2) * SLOT ? 0", {}),
    # Operands
    ("{first[0], second[0], first[1]", "{second[0], first[0], first[1]", {}),
    ("left, operand + pair)", "left, operand + 2 - pair)", {}),
    ("levels[1] + 4 * share + pair", "levels[1] + pair", {}),
    (
        "((i / 2) * TILES + tile) * 4 + 2 * (i % 2) + r",
        "((i / 2) * TILES + tile) * 4 + (i % 2) + 2 * r",
        {},
    ),
    # Queries
    ("first + c < KEY_DIM ?", "first + c < KEY_DIM - 1 ?", {}),
    ("first + c < KEY_DIM ?", "first + c < KEY_DIM + 8 ?", {}),
    ("placed[Places::place(c)]", "placed[c]", {}),
    ("to_float(numbers[first + c]) * inverse", "to_float(numbers[first + c])", {}),
    ("(254u << 23) - bits", "(253u << 23) - bits", {}),
    ("operands[i * 32 + lane] = operand", "operands[i * 32 + (lane ^ 1)] = operand", {}),
    (
        "const auto* row = row_at(warp + WARPS * i)",
        "const auto* row = row_at(warp)",
        {"gain": 60.0},
    ),
    ("const float x = c + lane < KEY_DIM ?", "const float x = true ?", {}),
    ("load_factors(plain, call.scale, factors + ROWS, warp, lane, [](int, float) {});", "", {}),
    ("dtype == ROTORMLX_FLOAT16) use(", "dtype == ROTORMLX_BFLOAT16) use(", {}),
    ("__syncthreads();  // the factors are there", "", {}),
    ("__syncthreads();  // the queries, the levels and the part are there", "", {}),
    ("if (threadIdx.x == 0) p = first;", "", {}),
    # Centres
    ("if (n % 16 == 0)", "if (n == 0)", {"blocks": 210}),
    (
        "min(first_block + (group + 8 * half) * WARPS, last_block)",
        "first_block + (group + 8 * half) * WARPS",
        {},
    ),
    ("min(first_block + i / LINES * WARPS, last_block)", "first_block + i / LINES * WARPS", {}),
    ("min(8 * (4 * step + quad_lane), KEY_DIM - 8)", "8 * (4 * step + quad_lane)", {}),
    ("products[(group + i / 2 * 8) * ROWS + row]", "products[(group + i / 2) * ROWS + row]", {}),
    ("scale, centre)", "scale, 0.0f)", {}),
    # Softmax
    ("scale, centre)", "1.0f, centre)", {}),
    ("fmaf(score, factor,", "fmaf(score, 1.0f,", {}),
    ("-noise * scale", "-noise", NOISY),
    ("score_noise(KEY_BITS) * LOG2_E", "score_noise(KEY_BITS)", NOISY),
    ("square_sum[i] += shuffle_xor(square_sum[i], mask);", "", NOISY),
    ("fmaf(scale * x, scale * x, square_sum[i])", "scale * x * scale * x", NOISY),
    ("fmaf(scale * x, scale * x, square_sum[i])", "fmaf(x, x, square_sum[i])", NOISY),
    ("if (!all_seen) hide(call, p, block, lane, scores);", "", {}),
    ("score = index < p.stop ? masked(", "score = true ? masked(", {}),
    ("ROTORMLX_MASK_NONE) return p.stop;", "ROTORMLX_MASK_NONE) return 2 * BLOCK + p.stop;", NONE),
    ("p.tokens - call.length + 1 - p.sink)", "p.tokens + 1 - p.sink)", FULL),
    ("p.tokens - call.length + 1 - p.sink)", "p.tokens - call.length + 1)", FULL | {"tail": 5}),
    ("mask = 4; mask < 32; mask *= 2) largest", "mask = 8; mask < 32; mask *= 2) largest", LOUD),
    ("if (!any_lane(beyond)) return;", "if (!beyond) return;", LOUD),
    ("largest + ROOM - LARGEST : base", "base : base", {}),
    ("largest + ROOM - LARGEST : base", "largest + ROOM - 2.0f * LARGEST : base", {}),
    ("rows.totals[tile][r] *= shrink;", "", LOUD),
    ("++i) rows.sums[place(i, tile, r)] *= shrink;", "++i) ;", LOUD),
    ("totals[tile][r] += weight;", "totals[tile][r] = weight;", {}),
    ("ALL_SEEN ? power_of_two(score - base) :", "true ? power_of_two(score - base) :", HOLED),
    ("!ALL_SEEN && weight == 0.0f ?", "false ?", {"mask": "padding"}),
    ("0.0f : weight * __half2float(value_scales[i])", "0.0f : weight", {}),
    ("scaled[4 * h + NEXT])", "scaled[4 * h + 1])", {}),
    ("scaled[4 * h + 2 / NEXT],", "scaled[4 * h + 2],", {}),
    ("chunk) + group % 2 * 4)", "chunk ^ 1) + group % 2 * 4)", {}),
    ("place_of_weights(row, Values", "place_of_weights(row ^ 1, Values", {}),
    ("chunk ^ (row / 2 % 4 * 2)", "chunk & (row / 2 % 4 * 2)", {}),
    ("__syncwarp();  // the weights are there, the item before has been read", "", {}),
    ("__syncwarp();  // no weights are in use, the values have been read", "", {"blocks": 9}),
    # Warps
    (
        "max(0, (end_block - first_block + WARPS - 1) / WARPS)",
        "max(0, (end_block - first_block) / WARPS)",
        {},
    ),
    ("const int block = first_block + n * WARPS;", "const int block = first_block + n;", {}),
    ("__syncthreads();  // the ring, the queries and the part are no longer in use", "", {}),
    ("__syncthreads();  // the warps' tops, totals and sums are there", "", {}),
    ("mask *= 2) total += shuffle_xor(total, mask)", "mask *= 2) total *= 2.0f", {}),
    ("all_tops[w * 2 * ROWS + row]);\n      for", "all_tops[row]);\n      for", {"gain": 60.0}),
    ("= rows.bases[tile][r];\n          all", "= 0.0f;\n          all", {}),
    ("total = fmaf(shares[w],", "total = fmaf(1.0f,", {}),
    ("sum = fmaf(shares[w],", "sum = fmaf(1.0f,", {}),
    (
        "if (channel < VALUE_DIM) {\n            all_sums",
        "if (channel < VALUE_DIM - 1) {\n            all_sums",
        {},
    ),
    ("row < ROWS && p.first_row + row < p.group_rows; row", "row < ROWS; row", {}),
]
# Rows of more than one round of lanes, and parts of more than one round of loads.
LONG = {"dims": (192, 192)}
MANY_PARTS = {
    **{"batch": 1, "kv_heads": 1, "blocks": 1, "tail": 2200, "length": 2},
    "launch": Launch(multiprocessors=50),
}
SHARED_MUTATIONS = [
    # Positions and masks
    ("min(call.sink, exact_tokens)", "0", {"mask": "bool"}),
    ("return p.sink + index;", "return index;", {"mask": "bool"}),
    (
        "index < p.sink ? index : p.packed_tokens + index",
        "p.packed_tokens + index",
        {"mask": "window"},
    ),
    ("index < p.sink ? index : p.packed_tokens + index", "index", {"mask": "window"}),
    (
        "min(p.start + part_tokens, p.exact",
        "min(p.start + part_tokens + 1, p.exact",
        {"blocks": 70, "batch": 1, "kv_heads": 1, "length": 2},
    ),
    (
        "? exact_tokens : p.packed_tokens);",
        "? exact_tokens : p.packed_tokens + 1);",
        {"mask": "none"},
    ),
    (
        "? exact_tokens : p.packed_tokens);",
        "? exact_tokens - 1 : p.packed_tokens);",
        {},
    ),
    ("p.tokens - call.length + last_place + 1;", "p.tokens - call.length + last_place;", {}),
    (
        "wraps ? call.length - 1 : last_row % call.length",
        "last_row % call.length",
        {"blocks": 2, "tail": 0, "missing": 0},
    ),
    ("max(p.sink, seen - p.packed_tokens)", "max(p.sink, seen - p.packed_tokens - 1)", {}),
    (
        "position <= p.tokens - call.length + place",
        "position <= p.tokens - call.length + place + 1",
        {},
    ),
    ("[at] != 0 ? score : HIDDEN", "[at] != 0 ? score : score", {"mask": "bool"}),
    (
        "fmaf(static_cast<const float*>(call.mask)[at], LOG2_E, score)",
        "score",
        {"mask": "additive"},
    ),
    ("[at], LOG2_E, score)", "[at], 1.0f, score)", {"mask": "additive"}),
    ("p.batch * call.mask_strides[0] +", "", {"mask": "padding"}),
    ("head * call.mask_strides[1] +", "", {"mask": "bool"}),
    ("place * call.mask_strides[2] +", "", {"mask": "bool"}),
    ("position * call.mask_strides[3];", "0;", {"mask": "bool"}),
    ("p.kv_head * (p.group_rows / call.length) +", "", {"mask": "bool"}),
    ("x <= HIDDEN ? 0.0f : power_of_two(x - top)", "power_of_two(x - top)", {"mask": "bool"}),
    # Queries and the merge
    ("__syncthreads();  // the rows are there", "", {}),
    ("if (i < ROWS * D) use", "if (i < ROWS * D - 1) use", {}),
    ("if (i < ROWS * D) use", "use", {"dims": (16, 16)}),
    ("scale == nullptr ? x : x * scale[scale_at + channel]", "x", {}),
    ("kv_head * KEY_DIM;", "0;", {}),
    ("(products, i / KEY_DIM, channel)", "(products, i / KEY_DIM, channel ^ 1)", {}),
    ("(warp * SHARE + start + i) * D", "(start + i) * D", {}),
    ("min(column, D - 4)", "column", {}),
    ("fmaf(number, entries[i].z, x[r][2])", "fmaf(number, entries[i].y, x[r][2])", {}),
    ("rows[r * D + warp * SHARE + n * BATCH + i]", "rows[r * D + n * BATCH + i]", {}),
    ("if (n > 0 || column >= 4 * 32) load", "if (n > 0) load", LONG),
    ("if (n > 0 || column >= 4 * 32) load", "if (column >= 4 * 32) load", LONG),
    ("column < D; column += 4 * 32", "column < 4 * 32; column += 4 * 32", LONG),
    ("w < WARPS; ++w) sum += products", "w < WARPS - 1; ++w) sum += products", {}),
    ("__syncthreads();  // the products of the rows are there", "", {}),
    ("__syncwarp();  // the shares are there", "", {}),
    ("__syncthreads();  // the sums of all warps are there", "", {}),
    ("__syncthreads();  // the products of the sums are there", "", {}),
    ("top = fmaxf(top, tops[i]);", "top = tops[i];", {"gain": 60.0}),
    ("exists = part < parts", "exists = true", {}),
    ("total += share_of(sink, top);", "", {"sink_logits": True}),
    ("row / call.length] * LOG2_E", "row / call.length]", {"sink_logits": True}),
    ("part < all.exact_parts) exact", "part <= all.exact_parts) exact", {}),
    ("part < all.exact_parts) exact", "part < all.exact_parts - 1) exact", {}),
    ("min(start + i * sharers, parts - 1)", "min(start, parts - 1)", MANY_PARTS),
    ("min(start + i * sharers, parts - 1)", "start + i * sharers", {}),
    ("if (start > sharer || column >= 4 * 32) load", "if (column >= 4 * 32) load", MANY_PARTS),
    ("if (start > sharer || column >= 4 * 32) load", "if (start > sharer) load", LONG),
    ("start = sharer; start < parts", "start = 0; start < parts", {}),
    ("packed[c] = fmaf(share, four[c], packed[c])", "packed[c] += four[c]", {}),
    ("exact[c] = fmaf(share, four[c], exact[c])", "exact[c] += four[c]", {}),
    ("(sharer * ROWS + r) * VALUE_DIM;", "r * VALUE_DIM;", {}),
    ("s < SHARERS; ++s) sum +=", "s < 1; ++s) sum +=", {}),
    ("total = fmaf(tops[i], totals[i], total)", "total += totals[i]", {}),
    ("kv_head * VALUE_DIM + channel;", "channel;", {}),
    ("total == 0.0f ? 0.0f :", "", {"mask": "bool"}),
    ("head) * call.length + row % call.length) *", "head) * call.length) *", {}),
    ("if (first_row + r >= group_rows) break;", "if (first_row + r >= group_rows - 1) break;", {}),
    # Launches
    ("const dim3 grid(plan.tiles, heads, parts);", "const dim3 grid(1, heads, parts);", {}),
    ("grid(plan.tiles, heads, parts);", "grid(plan.tiles, heads, parts - 1);", {"blocks": 9}),
    ("all.totals = all.tops + query_rows * parts;", "all.totals = all.tops + 1;", {}),
    ("all.tops = all.outputs + query_rows * parts * VALUE_DIM", "all.tops = all.outputs + 1", {}),
]
PLAIN_MUTATIONS = [
    ("__syncthreads();  // the query and the levels are there", "", {}),
    ("__syncthreads();  // all tops are there, no weights are in use", "", {}),
    ("__syncthreads();  // all weights are there, no tops are in use", "", {"blocks": 9}),
    ("__syncthreads();  // no weights and no tops are in use", "", {}),
    ("__syncthreads();  // the groups' sums and the totals are there", "", {}),
    ("x * (call.scale * LOG2_E)", "x * call.scale", {}),
    ("row < WORD_ROWS; ++row", "row < WORD_ROWS - 1; ++row", {}),
    ("high.x >>= 2, high.y >>= 2", "high.y >>= 2", {}),
    ("high.x >>= 2, high.y >>= 2", "high.x >>= 2", {}),
    ("before = word;", "before.x = word.x;", {}),
    ("before = word;", "before.y = word.y;", {}),
    ("words + 2 * lane, BLOCK", "words + lane / 2 * 2, BLOCK", {}),
    ("key_scale[t], about_centre[row])", "1.0f, about_centre[row])", {}),
    ("key_scale[t], about_centre[row])", "key_scale[t], 0.0f)", {}),
    ("fmaf(-noise[row], key_scale[t],", "fmaf(-noise[row], 1.0f,", {}),
    ("score_noise(KEY_BITS) / LOG2_E", "score_noise(KEY_BITS)", {}),
    ("noise[row] += shuffle_xor(noise[row], mask)", "", {}),
    ("key_scales[2 * lane + t]", "key_scales[2 * lane]", {}),
    ("HELD * lane + i / ROWS;", "HELD * lane;", {}),
    ("__half2float(centre[i]) * call.scale * LOG2_E", "__half2float(centre[i]) * call.scale", {}),
    (
        "i < KEY_DIM; i += LANES) {\n        const float x",
        "i < KEY_DIM - 1; i += LANES) {\n        const float x",
        {},
    ),
    (
        "i < KEY_DIM; i += LANES) {\n        noise",
        "i < KEY_DIM - 1; i += LANES) {\n        noise",
        {},
    ),
    ("about_centre[row] += shuffle_xor(about_centre[row], mask)", "about_centre[row] *= 2.0f", {}),
    (
        "weight == 0.0f ? 0.0f : weight * value_scale[t]",
        "weight * value_scale[t]",
        {"mask": "padding"},
    ),
    ("weight == 0.0f ? 0.0f : weight * value_scale[t]", "weight", {}),
    (
        "top = fmaxf(top, by_warp[w * ROWS + row])",
        "top = by_warp[w * ROWS + row]",
        {"mask": "window"},
    ),
    ("totals[row] *= shrink;", "", {"blocks": 9}),
    ("        sums[row] *= shrink;", "", {"blocks": 9}),
    ("sums[ROWS + row] *= shrink;", "", {"blocks": 9}),
    ("totals[row] += weight;", "totals[row] = weight;", {}),
    ("token = step + value_group * UNIT;", "token = step;", {}),
    ("token < stop; token +=", "token < stop - UNIT; token +=", {}),
    ("token += GROUPS * UNIT", "token += 2 * GROUPS * UNIT", {"tail": 200}),
    ("min(step + STEP, p.stop)", "step + STEP - UNIT", {"tail": 200}),
    ("weights + (token - step) * ROWS", "weights", {}),
    ("min(index, p.stop - 1)", "index", {"tail": 17}),
    ("min(first_token + i, p.stop - 1)", "first_token + i", {"tail": 33}),
    ("min(first_token + i, p.stop - 1)", "min(first_token, p.stop - 1)", {}),
    ("to_float(pairs[i].all[1])", "to_float(pairs[i].all[0])", {}),
    ("add_products(weights + i * ROWS, two, sums)", "add_products(weights, two, sums)", {}),
    ("run_start + lane, query, scores", "run_start, query, scores", {}),
    ("g < GROUPS - 1; ++g", "g < GROUPS - 2; ++g", {}),
    ("(value_group - 1) * VALUE_DIM + channel", "value_group * VALUE_DIM + channel", {}),
    ("total += by_warp[w * ROWS + row]", "total = by_warp[w * ROWS + row]", {}),
    ("if (value_group == 0)", "if (value_group <= 1)", {}),
    ("if (p.first_row + row >= p.group_rows) break;", "", {}),
    ("load_numbers<8>(keys + at + 8 * (start + n))", "load_numbers<8>(keys + at + 8 * n)", {}),
    ("query + (8 * (start + n) + i) * ROWS", "query + (8 * start + i) * ROWS", {}),
    ("i < BYTES / 16; ++i", "i < 1; ++i", {}),
]


OWN_SCALE_MUTATIONS = [
    ("scale_at = batch * call.key_channel_scale_stride +", "scale_at =", {}),
    ("batch * call.value_channel_scale_stride +", "", {}),
]


# One kernel in place of three, which are not compiled.
WITHOUT_THREE = [
    *WITHOUT_FLOAT,
    (
        "error = launch(attend_query<ROWS>, row_grid, ROW_THREADS, plan.query_bytes, stream, all);",
        "",
    ),
    (
        "return launch(attend_merge<ROWS>, row_grid, ROW_THREADS, plan.merge_bytes, stream, all);",
        "",
    ),
]
# Eight rows, for more workers than that, so long that twice as many do not fit where they go.
FEW_LANES = replace(TENSOR, dims=(120, 40), length=1)
LAST = "const bool found = atomicAdd(counter, 1) == int(gridDim.z) - 1;"
ONE_KERNEL_MUTATIONS = [
    # Queries
    ("__syncthreads();  // the rotated queries are there", "", {}),
    ("Codec::template rotate<Rows::OF_LANE>(", "(void)(", {}),
    ("scale == nullptr ? x : x * scale[channel]", "x", {}),
    (
        "min(p.first_row + row, p.group_rows - 1);\n      const float x",
        "p.first_row + row;\n      const float x",
        {},
    ),
    ("rotated[row * Codec::D + channel] = x;", "rotated[row * Codec::D + (channel ^ 1)] = x;", {}),
    # Rows over the lanes
    ("Codec::LANES + r * WORKERS;", "Codec::LANES;", {}),
    (
        "Channels::exists(c) ? number_at(row, c) : 0.0f",
        "number_at(row, c)",
        {"rotation": "rotor3", "dims": (64, 64)},
    ),
    # The last thread block of a tile
    ("__syncthreads();  // the part is written, and shared memory is free", "", {}),
    ("if (gridDim.z == 1) return true;", "if (gridDim.z >= 1) return true;", {}),
    ("if (threadIdx.x == 0) {\n    __threadfence();", "if (threadIdx.x == 0) {", {}),
    (LAST + "\n    __threadfence();", LAST, {}),
    (LAST, LAST.replace("- 1", "- 2"), {}),
    ("call.counters + blockIdx.y * gridDim.x + blockIdx.x", "call.counters + blockIdx.y", {}),
    ("call.counters + blockIdx.y * gridDim.x + blockIdx.x", "call.counters + blockIdx.x", {}),
    ("if (found) *counter = 0;", "", {}),
    ("*is_last = found;", "*is_last = 1;", {}),
    ("__syncthreads();  // it is known whether this is the last", "", {}),
    # Its merge
    ("i < sharers * rows; i += WARPS", "i < rows; i += WARPS", {}),
    ("first_row + i % rows, i / rows, sharers", "first_row + i % rows, 0, sharers", {}),
    ("first_row + i % rows, i / rows, sharers", "first_row, i / rows, sharers", {}),
    ("packed_sums + i * D, exact_sums + i * D", "packed_sums, exact_sums + i * D", {}),
    ("__syncthreads();  // the sums of all rows are there", "", {}),
    ("s < sharers; ++s) sum +=", "s < 1; ++s) sum +=", {}),
    ("sums[(s * rows + row) * D + channel]", "sums[(s + row) * D + channel]", {}),
    ("min(row, rows - 1), channel)", "0, channel)", {}),
    ("Codec::template unrotate<Rows::OF_LANE>(", "Codec::template rotate<Rows::OF_LANE>(", {}),
    ("if (row >= rows) return;", "", {}),
    ("x, of_sharers(exact_sums, row, channel));", "x, 0.0f);", {}),
]


def of_attention():
    """Changes of the kernels that a case launches."""
    for case, trims, listed in (
        (TENSOR, WITHOUT_FLOAT, TENSOR_MUTATIONS),
        (FLOAT, WITHOUT_TENSOR, SHARED_MUTATIONS + PLAIN_MUTATIONS),
    ):
        for old, new, changes in listed:
            check = attends(problem, replace(case, **changes))
            yield Mutation(old, new, check, trims=tuple(trims))
    shares_rows = attends(problem, replace(FLOAT, launch=Launch(shares_rows=True)))
    yield Mutation("__syncwarp();  // no shares are in use", "", shares_rows)
    for old, new, _ in OWN_SCALE_MUTATIONS:
        yield Mutation(old, new, attends(with_own_scales, FLOAT), trims=tuple(WITHOUT_TENSOR))
    for old, new, changes in ONE_KERNEL_MUTATIONS:
        check = attends(problem, replace(TENSOR, **changes))
        yield Mutation(old, new, check, trims=tuple(WITHOUT_THREE))
    few_lanes = attends(problem, FEW_LANES)
    old = "if (row < ROWS && Channels::exists(c)) use("
    yield Mutation(old, "if (Channels::exists(c)) use(", few_lanes, trims=tuple(WITHOUT_MANY_ROWS))
    own_scales = attends(with_own_scales, TENSOR)
    old = "p.batch * call.key_channel_scale_stride +"
    yield Mutation(old, "", own_scales, trims=tuple(WITHOUT_THREE))


@cuda
@each(of_attention())
def test_changed_attention_is_caught(runner, mutation):
    assert mutation.is_caught(runner)
