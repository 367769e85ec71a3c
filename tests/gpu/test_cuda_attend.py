"""Attention in CUDA kernels against the float64 reference, run in the emulator; mutated kernels
must fail.

Cases and their tolerance are those of the Metal kernels: twice the error of MLX's operations, whose
sums are float32. The tensor cores' float16 levels, queries and weights must stay within it.
"""

import functools
import itertools
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cuda_plan
from rotormlx.mlx.backends import cuda_text
from rotormlx.mlx.cache.view import KVView
from scripts import make_vectors
from tests.emulator import KernelError
from tests.emulator.cuda import MLXKernel
from tests.gpu.test_metal_attend import DTYPES, HEAD_DIMS, MASKS, Case, Problem, float64, problem
from tests.support import cuda_calls

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def run(posed: Problem, **options):
    return cuda_calls.attend(posed.queries, *posed.views, **posed.options, **options)


def check(case, **options):
    output = run(problem(case), **options)
    assert output.dtype == DTYPES[case.dtype]
    assert output.shape == (case.batch, case.heads, case.length, case.dims[1])
    assert problem(case).is_right(output)


def module_of(case, changes=(), multiprocessors=1):
    config = RotorConfig(*case.bits, case.rotation, channel_scale=case.channel_scale)
    codecs = [codec(config, d, layer=1, role=r) for d, r in zip(case.dims, ROLES, strict=True)]
    return cuda_calls.module("attend", *codecs, tuple(changes), multiprocessors)


# ---- every combination --------------------------------------------------------------------------

# Keys and values of equal widths share their modules with the shared vectors; each width meets
# others.
WIDTHS_OF_DIM = {
    **{head_dim: [(bits, bits) for bits in codebook.BITS] for head_dim in (64, 80, 96, 112, 128)},
    192: [(4, 2), (3, 8)],
    256: [(2, 3), (8, 4)],
}
LENGTHS = (1, 3, 17)


def kinds_of(head_dim, bits, mask, dtype, length):
    """Pairs of what a case has: its kinds of head_dim, width, mask, dtype and length."""
    widths = [("bits", width) for width in bits]
    others = [("dim", head_dim), ("mask", mask), ("dtype", dtype), ("length", length)]
    pairs = itertools.chain(itertools.combinations(others, 2), itertools.product(widths, others))
    return {frozenset(pair) for pair in pairs}


def every_pair():
    """Cases in which every kind meets every other: two masks a width, and dtype and length by what
    is still missing.
    """
    seen, cases = set(), []
    masks = itertools.cycle(MASKS)
    for head_dim, all_bits in WIDTHS_OF_DIM.items():
        for bits in all_bits:
            for mask in itertools.islice(masks, 8 // len(all_bits)):
                cases.append(
                    max(
                        ((head_dim, bits, mask, d, n) for n in LENGTHS for d in DTYPES),
                        key=lambda case: len(kinds_of(*case) - seen),
                    )
                )
                seen |= kinds_of(*cases[-1])
        # Otherwise each width would have the same masks at each head_dim.
        next(masks), next(masks)
    return cases


EVERY = every_pair()


def test_combinations_meet_pairwise():
    seen = set().union(*(kinds_of(*case) for case in EVERY))
    wanted = {
        **{"dim": HEAD_DIMS, "bits": codebook.BITS, "mask": MASKS},
        **{"dtype": list(DTYPES), "length": LENGTHS},
    }
    missing = [
        (one, other)
        for a, b in itertools.combinations(wanted, 2)
        for one in itertools.product([a], wanted[a])
        for other in itertools.product([b], wanted[b])
        if frozenset((one, other)) not in seen
    ]
    assert missing == []


@pytest.mark.parametrize(("head_dim", "bits", "mask", "dtype", "length"), EVERY, ids=str)
def test_attend_in_every_combination(head_dim, bits, mask, dtype, length):
    shapes = {"batch": 2 if mask == "padding" else 1, "kv_heads": 1, "blocks": 2, "tail": 5}
    check(
        Case(dims=(head_dim, head_dim), bits=bits, mask=mask, dtype=dtype, length=length, **shapes)
    )


# ---- shapes -------------------------------------------------------------------------------------

BASE = Case(dims=(64, 80), bits=(4, 3), dtype="f16", mask="causal")


@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 33])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_attend_with_length(dtype, length):
    check(replace(BASE, length=length, dtype=dtype, batch=1, kv_heads=2, repeats=3))


@pytest.mark.parametrize("repeats", [1, 3, 4, 5, 7, 8, 9, 16])
def test_attend_with_group(repeats):
    check(replace(BASE, repeats=repeats, kv_heads=2, batch=1, length=2, mask="bool"))


@pytest.mark.parametrize("rotation", ["rotor3", "dense", "identity"])
def test_attend_with_rotation(rotation):
    check(replace(BASE, rotation=rotation, channel_scale="none"))


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_attend_with_sink_logits(mask, length):
    check(replace(BASE, sinks=True, mask=mask, length=length))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize(
    "counts",
    [
        {"missing": 0},
        {"missing": 1},
        {"missing": 63},
        {"tail": 0},
        {"tail": 0, "sink": 0},
        {"blocks": 0},
        {"blocks": 0, "tail": 0, "sink": 17},
        {"tail": 300, "blocks": 1},
    ],
    ids=lambda counts: "-".join(f"{name}{n}" for name, n in counts.items()),
)
def test_attend_with_counts(counts, length, dtype):
    check(replace(BASE, **counts, length=length, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("multiprocessors", [1, 2, 50])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("length", [1, 17])
def test_attend_in_parts(length, dtype, multiprocessors):
    """Warps with none, one, and more than 16 blocks; one part, some, and one for each step."""
    case = replace(BASE, blocks=70, tail=300, length=length, batch=1, kv_heads=1, dtype=dtype)
    check(case, made=module_of(case, multiprocessors=multiprocessors))


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_attend_where_rows_share_what_they_read_of_a_matrix(dtype, length, monkeypatch):
    """Eight at a time, as where there are many."""
    case = replace(BASE, length=length, repeats=3, kv_heads=2, batch=1, dtype=dtype, sinks=True)
    monkeypatch.setattr(cuda_plan, "MANY_ROWS", 1)
    cuda_plan.attend_plan.cache_clear()
    check(case)
    monkeypatch.undo()
    cuda_plan.attend_plan.cache_clear()


@pytest.mark.parametrize("bits", codebook.BITS)
def test_lanes_that_are_served_together_meet_no_bank_twice(bits):
    """Of shared memory: 8 neighbouring lanes where each moves 16 bytes, 16 where it moves 8."""
    body = f"""
      using Packed = AttendPacked<{bits}, {bits}, 128, 128, 1>;
      const int lane = int(threadIdx.x), group = lane / 4, quad_lane = lane % 4;
      copied[lane] = Packed::place_of_words(lane % 8, lane / 8);
      taken[lane] = Packed::place_of_words(group, quad_lane);
      for (int step = 0; step < 2; ++step) {{
        const int chunk = Chunks<{bits}, BLOCK>::chunk(step, quad_lane);
        read[32 * step + lane] = 8 * group + Packed::place_of_weights(group, chunk);
        for (int r = 0; r < 2; ++r) {{
          const int row = 2 * quad_lane + r;
          const int place = 8 * row + Packed::place_of_weights(row, 4 * step + group / 2);
          written[32 * (2 * step + r) + lane] = 2 * place + group % 2;
        }}
      }}
    """
    kernel = MLXKernel(
        "places", [], ["copied", "taken", "read", "written"], body, cuda_text.attend_header()
    )
    *of_sixteen_bytes, of_eight = kernel(
        inputs=[],
        output_shapes=[(32,), (32,), (64,), (128,)],
        output_dtypes=[mx.int32] * 4,
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert np.array_equal(*(np.sort(places) for places in of_sixteen_bytes[:2]))
    for places in of_sixteen_bytes:
        assert all(len(set(lanes)) == 8 for lanes in np.array(places).reshape(-1, 8) % 8)
    # Lanes write weights of 2 and 3 bits by four bytes.
    if bits in (4, 8):
        assert all(len(set(lanes)) == 16 for lanes in np.array(of_eight).reshape(-1, 16) % 16)


@pytest.mark.parametrize("kilobytes", [99, 150, 163])
def test_devices_with_less_shared_memory(kilobytes, monkeypatch):
    """Each takes the kernel that fits: the one in float32, that of 8 rows, that of 16."""
    case = replace(BASE, length=9, batch=1, kv_heads=1, dims=(256, 256), bits=(8, 8))
    made = module_of(case)
    monkeypatch.setattr(made, "shared_memory", 1024 * kilobytes)
    check(case, made=made)
    kernel_bytes = made.reports[1].threadgroup_bytes
    least = {99: 0, 150: 99, 163: 150}[kilobytes]
    assert 1024 * least < kernel_bytes <= 1024 * kilobytes


@pytest.mark.parametrize("field", [name for name, _ in cuda_calls.AttendPlan._fields_])
def test_the_launcher_refuses_a_plan_that_does_not_fit(field, monkeypatch):
    """A number that is one off launches nothing."""
    case = replace(BASE, length=1, batch=1, kv_heads=1)
    right = cuda_calls.plan_of

    def wrong(*call):
        plan = right(*call)
        setattr(plan, field, getattr(plan, field) + 1)
        return plan

    monkeypatch.setattr(cuda_calls, "plan_of", wrong)
    with pytest.raises(RuntimeError, match="rotormlx_attend returned the CUDA error 1"):
        run(problem(case), made=module_of(case))


def test_a_query_that_sees_nothing_is_zero():
    for length, dtype in itertools.product((1, 17), ("f16", "f32")):
        output = run(problem(replace(BASE, mask="bool", length=length, dtype=dtype)))
        assert not float64(output[:, 1, 0]).any()


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("length", [2, 17])
def test_rows_of_a_batch_have_their_own_lengths(length, dtype):
    """A row counts fewer packed tokens, and exact ones from its own sink on."""
    case = replace(BASE, batch=3, kv_heads=2, length=length, tail=60, dtype=dtype)
    made = problem(case)
    # Packed and all tokens of each row; the first has what the views count.
    lengths = ((case.packed_tokens, case.tokens), (70, 100), (0, 23))
    views = [replace(view, rows=lengths) for view in made.views]
    output = cuda_calls.attend(made.queries, *views, scale=case.scale, mask="causal")
    whole = case.packed_tokens
    for row, (packed_tokens, tokens) in enumerate(lengths):
        sink = case.sink if packed_tokens else 0
        tail = tokens - packed_tokens - sink
        keys_and_values = []
        for x in made.vectors:
            exact = np.delete(x[row], np.s_[case.sink : case.sink + whole], axis=1)
            packed = x[row][:, case.sink : case.sink + packed_tokens]
            parts = [exact[:, :sink], packed, exact[:, sink : sink + tail]]
            keys_and_values.append(np.concatenate(parts, 1)[None])
        expected = reference.attend(
            float64(made.queries[row : row + 1]), *keys_and_values, scale=case.scale, mask="causal"
        )
        assert np.abs(float64(output[row : row + 1]) - expected).max() <= made.tolerance


@pytest.mark.parametrize("order", [1, 7, 12345])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("length", [3, 17])
def test_attend_in_any_order_of_threads(length, dtype, order):
    case = replace(BASE, length=length, blocks=6, batch=1, sinks=True, dtype=dtype)
    check(case, order=order)


@functools.cache
def with_own_scales(case):
    """A problem whose batch rows have channel scales of their own."""
    made = problem(case)
    random = np.random.default_rng(11)
    views, vectors = [], []
    for shared in made.views:
        factor = random.uniform(0.5, 2, (case.batch, *shared.channel_scale.shape)).astype(
            np.float32
        )
        view = replace(shared, channel_scale=shared.channel_scale * mx.array(factor))
        views.append(view)
        packed = Packed(*(None if a is None else np.array(a) for a in view.packed))
        exact = float64(view.exact)
        rows = []
        for row in range(case.batch):
            of_row = Packed(*(None if a is None else a[row : row + 1] for a in packed))
            with np.errstate(invalid="ignore"):  # what does not count
                x = reference.decode(
                    of_row, view.codec, channel_scale=np.array(view.channel_scale[row])
                )
            middle = x[0, :, : case.packed_tokens]
            parts = [exact[row, :, : case.sink], middle, exact[row, :, case.sink :]]
            rows.append(np.concatenate(parts, 1))
        vectors.append(np.stack(rows))
    expected = reference.attend(float64(made.queries), *vectors, scale=case.scale, mask=case.mask)
    # The tolerance of the same problem with one scale: sizes are alike within a factor of two.
    options = {"scale": case.scale, "mask": case.mask}
    return Problem(case, made.queries, views, vectors, options, expected, 2 * made.tolerance)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_rows_of_a_batch_have_their_own_channel_scale(dtype):
    posed = with_own_scales(replace(BASE, dtype=dtype))
    assert posed.is_right(run(posed))


# ---- numbers that float16 does not hold ---------------------------------------------------------


@functools.cache
def with_factors(query, key, value):
    """A problem whose queries and scales of keys and values are multiplied by powers of two."""
    case = replace(BASE, batch=1, tail=0, sink=0, channel_scale="none", dtype="bf16")
    made = problem(case)
    keys, values = (
        replace(view, packed=view.packed._replace(scales=view.packed.scales * factor))
        for view, factor in zip(made.views, (key, value), strict=True)
    )
    # Centres stay: a constant of all scores of a block, which queries multiply.
    queries = made.queries * query
    vectors = []
    for view in (keys, values):
        packed = Packed(*(None if a is None else np.array(a) for a in view.packed))
        with np.errstate(invalid="ignore"):  # what does not count
            vectors.append(reference.decode(packed, view.codec)[:, :, : case.packed_tokens])
    scale = case.scale / query
    expected = reference.attend(float64(queries), *vectors, scale=scale, mask="causal")
    # One rounding of the output to bfloat16, doubled as elsewhere.
    tolerance = 2 * 2.0**-8 * np.abs(expected).max()
    options = {"scale": scale, "mask": "causal"}
    return Problem(case, queries, (keys, values), vectors, options, expected, tolerance)


@pytest.mark.parametrize("query", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("value", [2.0**-10, 1.0, 2.0**10])
def test_size_of_queries_and_values_does_not_matter(query, value):
    made = with_factors(query, 1.0, value)
    assert made.is_right(run(made))


# ---- shared vectors -----------------------------------------------------------------------------

VECTORS = [case for case in make_vectors.CASES if case.head_dim <= 256]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case.file_name.split(".")[0])
def test_attend_reproduces_the_vectors(case, bits, dtype):
    with safe_open(make_vectors.DIRECTORY / case.file_name, "numpy") as file:
        facts = json.loads(file.metadata()["rotormlx"])
        arrays = {name: mx.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    config = RotorConfig(bits, bits, facts["rotation"], seed=facts["seed"])
    views = []
    for role in ROLES:
        packed = Packed(
            arrays[f"{role}.words.{bits}"],
            arrays[f"{role}.scales.{bits}"],
            arrays["key.centres"] if role == KEY else None,
        )
        count = facts["blocks"] * BLOCK - facts["missing"]
        exact = arrays[f"{role}.exact"].astype(DTYPES[dtype])
        chosen = codec(config, facts["head_dim"], layer=facts["layer"], role=role)
        scale = arrays.get(f"{role}.channel_scale")
        tokens = count + exact.shape[2]
        views.append(KVView(chosen, exact, packed, scale, facts["sink"], count, tokens))
    output = cuda_calls.attend(
        arrays["query"].astype(DTYPES[dtype]),
        *views,
        scale=facts["head_dim"] ** -0.5,
        mask="causal",
    )
    expected = np.array(arrays[f"output.{bits}"])
    # In float32 the bound of docs/FORMAT.md, section 9. In float16 twice the rounding of the
    # output; the vectors' inputs are multiples of 1/32, which it holds.
    bound = {"f32": 1e-5, "f16": 2 * 2.0**-11}[dtype]
    assert np.abs(float64(output) - expected).max() <= bound * np.abs(expected).max()


# ---- mutations ----------------------------------------------------------------------------------

# Several tiles of query rows, warps with one and two blocks, planes of signs, tokens behind the
# last.
TENSOR = Case(
    bits=(3, 3), dims=(80, 80), batch=2, kv_heads=2, length=9, blocks=6, mask="causal", dtype="f16"
)
FLOAT = replace(TENSOR, dims=(64, 64), length=5, dtype="f32")
# Kernels that a case does not launch are not compiled.
WITHOUT_TENSOR = [
    ("return launch(attend<1>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
    ("return launch(attend<2>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
]
WITHOUT_FLOAT = [
    ("return launch(attend<1>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);", "return 1;"),
    (
        "return launch(attend_float, grid, ATTEND_THREADS, plan.part_bytes, stream, all);",
        "return 1;",
    ),
]

# Each is what stands in the text, what stands there instead, and the changes of the case.
TENSOR_MUTATIONS = [
    # Levels
    ("return NEXT == 2 ? i % 2 * 4 + i / 2 : i;", "return i;", {}),
    ("rest == 0x1000u && half % 2 == 1) ? 1u : 0u", "false) ? 1024u : 512u", {"bits": (4, 4)}),
    ("chosen_bytes(low, high, 0x5140u)", "chosen_bytes(low, high, 0x5041u)", {"bits": (4, 4)}),
    ("chosen_bytes(low, high, 0x7362u)", "chosen_bytes(low, high, 0x5140u)", {"bits": (2, 4)}),
    (
        "chosen_bytes(shifted, word, 0x5140u)",
        "chosen_bytes(word, shifted, 0x5140u)",
        {"bits": (4, 4)},
    ),
    (
        "chosen_bytes(shifted, word, 0x7362u)",
        "chosen_bytes(shifted, word, 0x5140u)",
        {"bits": (4, 4)},
    ),
    (
        "chosen_bytes(HIGH_0, HIGH_1, indices) ^ first_signs",
        "chosen_bytes(HIGH_0, HIGH_1, indices)",
        {"bits": (4, 4)},
    ),
    ("indices >> 16) ^ last_signs", "indices >> 16)", {"bits": (4, 4)}),
    ("word & 0x77777777u", "word & 0x37777777u", {"bits": (4, 4)}),
    (
        "look_up<2>(fields & 0x3333u, pairs)",
        "look_up<2>(fields & 0x1333u, pairs)",
        {"bits": (2, 2)},
    ),
    ("look_up<2>((fields >> 2) & 0x3333u", "look_up<2>(fields & 0x3333u", {"bits": (2, 2)}),
    ("(signs << 2) & 0x4444u", "(signs << 2) & 0x0444u", {}),
    ("(signs << 1) & 0x4444u", "(signs << 2) & 0x4444u", {}),
    ("16 * (place % 2) + 8 * part", "8 * part", {}),
    ("16 * (place % 2) + 8 * part", "16 * (place % 2)", {}),
    ("(spaced | (spaced << 2)) & 0x3333u", "spaced & 0x3333u", {}),
    ("codes = words[i / 2] >> (16 * (i % 2))", "codes = words[i / 2]", {"bits": (8, 8)}),
    ("table[(codes >> 8) & 0xffu]", "table[codes & 0xffu]", {"bits": (8, 8)}),
    ("uint(code / 128) << 15", "0u", {"bits": (8, 4)}),
    ("code < 256; code += threads", "code < 255; code += threads", {"bits": (8, 4)}),
    # Which lane has which chunk
    ("(step / SHARE * 4 + quad_lane) * SHARE + step % SHARE", "step * 4 + quad_lane", {}),
    ("return min(2 * place + i, last)", "return min(2 * place + 1 - i, last)", {"bits": (8, 8)}),
    ("if (i == 0) return min(place, last)", "if (i == 0) return place", {"bits": (4, 3)}),
    ("last + 1 + min(place / 2,", "last + 1 + min(place,", {}),
    # Copies
    ("copies.template wait<SLOTS - 1>()", "copies.template wait<SLOTS>()", {}),
    ("copies.template wait<SLOTS - 1>()", "", {}),
    ("i < SLOTS - 1; ++i) start_next()", "i < SLOTS; ++i) start_next()", {}),
    ("BLOCK + 4 * group;", "BLOCK + 4 * quad_lane;", {}),
    ("row + 32 * half)", "row + 16 * half)", {}),
    ("scales + 32 * half + 4 * group", "scales + 4 * group", {}),
    ("lane < 16 ? call.keys : call.values", "lane >= 16 ? call.keys : call.values", {}),
    (
        "slot + Shape::KEY_LOADS * 32 + lane / 16 * 8 + group",
        "slot + 32 + lane / 16 * 8 + group",
        {},
    ),
    ("Shape::KEY_LOADS * 32 + 8 + group]", "Shape::KEY_LOADS * 32 + group]", {}),
    ("8 * row + (group ^ (2 * row))", "8 * row + (group & (2 * row))", {}),
    (
        "__syncwarp();  // the copies of all lanes are there, and the products with the centres",
        "",
        {},
    ),
    ("min(32 * tile + 4 * group, VALUE_DIM - 4)", "32 * tile + 4 * group", {}),
    ("words + row * VALUE_DIM + channel", "words + row * VALUE_DIM + 4 * group", {}),
    ("block * call.keys.words_strides[2]", "0", {}),
    ("block * call.values.words_strides[2]", "0", {}),
    # Operands
    (
        "levels[2 * half][2 * pair], levels[2 * half + 1][2 * pair],",
        "levels[2 * half + 1][2 * pair], levels[2 * half][2 * pair],",
        {},
    ),
    ("operand + 2 * pair", "operand + 2 - 2 * pair", {}),
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
    ("row_at(warp + WARPS * i)", "row_at(warp)", {"gain": 60.0}),
    ("min(c + lane, KEY_DIM - 1)", "c + lane", {}),
    ("load_factors(plain, factors + ROWS, warp, lane);", "", {}),
    ("dtype == ROTORMLX_FLOAT16) use(", "dtype == ROTORMLX_BFLOAT16) use(", {}),
    ("__syncthreads();  // the factors are there", "", {}),
    ("__syncthreads();  // the queries and the table are there", "", {}),
    # Centres
    ("if (n % 16 == 0)", "if (n == 0)", {"blocks": 70}),
    (
        "min(first_block + (group + 8 * half) * WARPS, last_block)",
        "first_block + (group + 8 * half) * WARPS",
        {},
    ),
    ("min(8 * (4 * step + quad_lane), KEY_DIM - 8)", "8 * (4 * step + quad_lane)", {}),
    ("products[(group + i / 2 * 8) * ROWS + row]", "products[(group + i / 2) * ROWS + row]", {}),
    ("row_factors[tile][r], about_centre)", "row_factors[tile][r], 0.0f)", {}),
    # Softmax
    ("__half2float(scales[0][i]) * row_factors", "row_factors", {}),
    ("if (!all_seen) {", "if (false) {", {}),
    ("score = index < p.stop ? masked(", "score = true ? masked(", {}),
    ("(block + 1) * BLOCK <= p.stop &&", "", {"mask": "none"}),
    ("<= p.tokens - call.length + 1));", "<= p.tokens));", {"tail": 0, "missing": 0}),
    (
        "mask = 4; mask < 32; mask *= 2) {\n            new_tops",
        "mask = 8; mask < 32; mask *= 2) {\n            new_tops",
        {"gain": 60.0},
    ),
    ("totals[tile][r] *= shrink;", "", {}),
    ("++i) sums[place(i, tile, r)] *= shrink;", "++i) ;", {}),
    ("totals[tile][r] += weight;", "totals[tile][r] = weight;", {}),
    (
        "weight == 0.0f ? 0.0f : weight * __half2float(scales[1][i])",
        "weight * __half2float(scales[1][i])",
        {"mask": "padding"},
    ),
    ("weight == 0.0f ? 0.0f : weight * __half2float(scales[1][i])", "weight", {}),
    ("Order<VALUE_BITS>::place(half + i)", "half + i", {}),
    ("scaled[4 * h + i + NEXT]", "scaled[4 * h + i + 1]", {}),
    ("place_of_weights(row, chunk) + place", "place_of_weights(row, chunk ^ 1) + place", {}),
    ("place_of_weights(row, Values", "place_of_weights(row ^ 1, Values", {}),
    ("chunk ^ (row / 2 % 4 * 2)", "chunk & (row / 2 % 4 * 2)", {}),
    ("__syncwarp();  // the weights are there, the keys have been read", "", {}),
    ("__syncwarp();  // no weights are in use, the values have been read", "", {"blocks": 9}),
    # Warps
    (
        "max(0, (end_block - first_block + WARPS - 1) / WARPS)",
        "max(0, (end_block - first_block) / WARPS)",
        {},
    ),
    ("first_block + next_item / 2 * WARPS", "first_block + next_item / 2", {}),
    ("__syncthreads();  // the ring and the queries are no longer in use", "", {}),
    ("__syncthreads();  // the warps' tops, totals and sums are there", "", {}),
    ("totals[tile][r] += shuffle_xor(totals[tile][r], mask)", "totals[tile][r] *= 2.0f", {}),
    ("all_tops[w * 2 * ROWS + row]);\n      for", "all_tops[row]);\n      for", {"gain": 60.0}),
    ("= tops[tile][r] - 15.0f;\n          all", "= tops[tile][r];\n          all", {}),
    ("total = fmaf(shares[w],", "total = fmaf(1.0f,", {}),
    ("sum = fmaf(shares[w],", "sum = fmaf(1.0f,", {}),
    (
        "if (channel < VALUE_DIM) {\n            all_sums",
        "if (channel < VALUE_DIM - 1) {\n            all_sums",
        {},
    ),
    ("row < ROWS && p.first_row + row < p.group_rows; row", "row < ROWS; row", {}),
]
SHARED_MUTATIONS = [
    # Positions and masks
    ("min(call.sink, p.tokens - p.packed_tokens)", "0", {"mask": "bool"}),
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
        "? p.tokens - p.packed_tokens : p.packed_tokens);",
        "? p.tokens - p.packed_tokens : p.packed_tokens + 1);",
        {"mask": "none"},
    ),
    (
        "? p.tokens - p.packed_tokens : p.packed_tokens);",
        "? p.tokens - p.packed_tokens - 1 : p.packed_tokens);",
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
    ("if (n > 0 || column >= 4 * 32) load", "if (n > 0) load", {"dims": (192, 192)}),
    ("if (n > 0 || column >= 4 * 32) load", "if (column >= 4 * 32) load", {"dims": (192, 192)}),
    ("column < D; column += 4 * 32", "column < 4 * 32; column += 4 * 32", {"dims": (192, 192)}),
    ("w < WARPS; ++w) sum += products", "w < WARPS - 1; ++w) sum += products", {}),
    ("__syncthreads();  // the products of the rows are there", "", {}),
    ("__syncthreads();  // the shares are there", "", {}),
    ("__syncthreads();  // the products of the sums are there", "", {}),
    ("top = fmaxf(top, tops[i]);", "top = tops[i];", {"gain": 60.0}),
    ("exists = part < parts", "exists = true", {}),
    ("total += share_of(sink, top);", "", {"sinks": True}),
    ("row / call.length] * LOG2_E", "row / call.length]", {"sinks": True}),
    ("start + i < all.exact_parts)", "start + i <= all.exact_parts)", {}),
    ("start + i < all.exact_parts)", "start + i < all.exact_parts - 1)", {}),
    ("min(start + i, parts - 1) * VALUE_DIM", "min(start, parts - 1) * VALUE_DIM", {}),
    ("packed_sum = fmaf(share, x[i], packed_sum)", "packed_sum += x[i]", {}),
    ("total = fmaf(tops[i], totals[i], total)", "total += totals[i]", {}),
    ("kv_head * VALUE_DIM + channel;", "channel;", {}),
    ("total == 0.0f ? 0.0f :", "", {"mask": "bool"}),
    ("head) * call.length + row % call.length) *", "head) * call.length) *", {}),
    ("if (first_row + r >= group_rows) break;", "if (first_row + r >= group_rows - 1) break;", {}),
    # Launches
    ("const dim3 grid(plan.tiles, heads, parts);", "const dim3 grid(1, heads, parts);", {}),
    ("grid(plan.tiles, heads, parts);", "grid(plan.tiles, heads, parts - 1);", {"blocks": 9}),
    ("all.totals = all.tops + query_rows * parts;", "all.totals = all.tops + 1;", {}),
]
PLAIN_MUTATIONS = [
    ("__syncthreads();  // the query and the levels are there", "", {}),
    ("__syncthreads();  // all tops are there, no weights are in use", "", {}),
    ("__syncthreads();  // all weights are there, no tops are in use", "", {"blocks": 9}),
    ("__syncthreads();  // no weights and no tops are in use", "", {}),
    ("__syncthreads();  // the groups' sums and the totals are there", "", {}),
    ("x * (call.scale * LOG2_E)", "x * call.scale", {}),
    ("row < WORD_ROWS; ++row", "row < WORD_ROWS - 1; ++row", {}),
    ("signs.x : first_signs >> CODES", "signs.x : first_signs", {}),
    ("signs.y : second_signs >> CODES", "signs.y : second_signs >> 15", {}),
    ("words + 2 * lane, BLOCK", "words + lane / 2 * 2, BLOCK", {}),
    ("key_scale[0], about_centre[row])", "1.0f, about_centre[row])", {}),
    ("key_scale[1], about_centre[row])", "key_scale[1], 0.0f)", {}),
    ("key_scales[2 * lane + t]", "key_scales[2 * lane]", {}),
    ("HELD * lane + i / ROWS;", "HELD * lane;", {}),
    ("__half2float(centre[i]) * call.scale * LOG2_E", "__half2float(centre[i]) * call.scale", {}),
    ("i < KEY_DIM; i += LANES", "i < KEY_DIM - 1; i += LANES", {}),
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
    ("batch * call.key_channel_scale_stride +", "", {}),
    ("head_index / call.kv_heads * call.value_channel_scale_stride +", "", {}),
]


def mutations():
    for case, trimmed, listed in (
        (TENSOR, WITHOUT_FLOAT, TENSOR_MUTATIONS),
        (FLOAT, WITHOUT_TENSOR, SHARED_MUTATIONS + PLAIN_MUTATIONS),
    ):
        for old, new, changes in listed:
            yield problem, replace(case, **changes), (*trimmed, (old, new))
    for old, new, _ in OWN_SCALE_MUTATIONS:
        yield with_own_scales, FLOAT, (*WITHOUT_TENSOR, (old, new))


def is_caught(pose, case, changes):
    made = module_of(case, changes)
    try:
        return not pose(case).is_right(run(pose(case), made=made))
    except KernelError:
        return True


def test_mutated_kernels_fail(figure):
    posed, cases, changes = zip(*mutations(), strict=True)
    # Each is compiled anew, which is most of the time.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        caught = list(pool.map(is_caught, posed, cases, changes, chunksize=8))
    missed = [change[-1] for change, found in zip(changes, caught, strict=True) if not found]
    figure(f"CUDA attention kernels: {sum(caught)} of {len(caught)} mutations caught")
    assert not missed, "\n".join(map(repr, missed))
