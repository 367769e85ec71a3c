"""Attention in the kernels of every platform against the float64 reference.

They run on the device where it is there, else in the emulator, which also checks every memory
access they make. Metal compiles each kind of call by itself, CUDA one module for a pair of widths
and head_dims, for a second. On Metal every three of head_dim, width, dtype, mask and length meet
(with ROTORMLX_EXAMPLES all five), on CUDA every two.
"""

import itertools
import os
from dataclasses import replace

import pytest

from rotormlx.codec import codebook
from rotormlx.mlx.backends.metal_attend import MAX_HEAD_DIM, MAX_ROWS
from tests import emulator
from tests.support import vectors as shared_vectors
from tests.support.attend_cases import (
    MASKS,
    Case,
    Launch,
    float64,
    forget_problems,
    of_vectors,
    problem,
    with_factors,
    with_own_lengths,
    with_own_scales,
)
from tests.support.codec_cases import DTYPES, HEAD_DIMS
from tests.support.runners import METAL, launches_of

LENGTHS = (1, 3, 17)
# The four kinds of masks that kernels tell apart; the others are arrays of other shapes.
KINDS = ("none", "causal", "bool", "additive")
# What Metal's and CUDA's cases vary. CUDA's have one pair of widths and head_dims.
METAL_BASE = Case()
CUDA_BASE = Case(dims=(64, 80), bits=(4, 3), dtype="f16", mask="causal")
COUNTS = [
    {"missing": 0},
    {"missing": 1},
    {"missing": 63},
    {"tail": 0},
    {"tail": 0, "sink": 0},
    {"blocks": 0},
    {"blocks": 0, "tail": 0, "sink": 17},
    {"tail": 300, "blocks": 1},
]


# ---- combinations -------------------------------------------------------------------------------


def triples_of(case):
    """All triples of what a case of the cross has."""
    kinds = [("dim", case.dims[0]), ("bits", case.bits[0])]
    kinds += [(name, getattr(case, name)) for name in ("dtype", "mask", "length")]
    return {frozenset(triple) for triple in itertools.combinations(kinds, 3)}


def full_cross():
    """Every head_dim, width, dtype, kind of mask and one of two lengths; one kernel does every
    other case of one query, and two the others.
    """
    kinds = [[*enumerate(listed)] for listed in (HEAD_DIMS, codebook.BITS, DTYPES, KINDS)]
    for numbered, length in itertools.product(itertools.product(*kinds), (1, 17)):
        places, (head_dim, bits, dtype, mask) = zip(*numbered, strict=True)
        shapes = {"batch": 1, "kv_heads": 1, "blocks": 2, "tail": 5, "length": length}
        dims, widths = (head_dim, head_dim), (bits, bits)
        case = Case(dims=dims, bits=widths, dtype=dtype, mask=mask, **shapes)
        yield by_two_kernels(case) if length == 1 and sum(places) % 2 else case


def every_triple():
    """Cases of the full cross in which every three kinds meet; all of it where
    ROTORMLX_EXAMPLES asks for more than the usual.
    """
    triples = {case: triples_of(case) for case in full_cross()}
    if "ROTORMLX_EXAMPLES" in os.environ:
        return [*triples]
    missing, chosen = set().union(*triples.values()), []
    while missing:
        chosen.append(max(triples, key=lambda case: len(triples[case] & missing)))
        missing -= triples[chosen[-1]]
    return chosen


# Keys and values of equal widths share their modules with the shared vectors; each width meets
# others.
WIDTHS_OF_DIM = {
    **{head_dim: [(bits, bits) for bits in codebook.BITS] for head_dim in (64, 80, 96, 112, 128)},
    192: [(4, 2), (3, 8)],
    256: [(2, 3), (8, 4)],
}


def kinds_of(case):
    """Pairs of what a case has: its kinds of head_dim, width, mask, dtype and length."""
    widths = [("bits", width) for width in case.bits]
    others = [("dim", case.dims[0]), *((n, getattr(case, n)) for n in ("mask", "dtype", "length"))]
    pairs = itertools.chain(itertools.combinations(others, 2), itertools.product(widths, others))
    return {frozenset(pair) for pair in pairs}


def every_pair():
    """Cases in which every kind meets every other: two masks per width, and dtype and length by
    what is still missing.
    """
    seen, cases = set(), []
    masks = itertools.cycle(MASKS)
    for head_dim, all_bits in WIDTHS_OF_DIM.items():
        for bits in all_bits:
            for mask in itertools.islice(masks, 8 // len(all_bits)):
                shapes = {"batch": 2 if mask == "padding" else 1, "kv_heads": 1, "blocks": 2}
                case = Case(dims=(head_dim, head_dim), bits=bits, mask=mask, tail=5, **shapes)
                variants = (
                    replace(case, dtype=dtype, length=n) for n in LENGTHS for dtype in DTYPES
                )
                cases.append(max(variants, key=lambda case: len(kinds_of(case) - seen)))
                seen |= kinds_of(cases[-1])
        # Otherwise each width would have the same masks at each head_dim.
        next(masks), next(masks)
    return cases


def test_combinations_meet_pairwise():
    seen = set().union(*map(kinds_of, every_pair()))
    wanted = {
        **{"dim": HEAD_DIMS, "bits": codebook.BITS, "mask": MASKS},
        **{"dtype": list(DTYPES), "length": LENGTHS},
    }
    missing = [
        pair
        for a, b in itertools.combinations(wanted, 2)
        for pair in itertools.product(
            itertools.product([a], wanted[a]), itertools.product([b], wanted[b])
        )
        if frozenset(pair) not in seen
    ]
    assert missing == []


# ---- what each platform meets -------------------------------------------------------------------


def varied(case, **choices):
    """The case with each combination of these values."""
    for values in itertools.product(*choices.values()):
        yield replace(case, **dict(zip(choices, values, strict=True)))


def by_two_kernels(case):
    """The case by two Metal kernels where one could do it."""
    return replace(case, launch=replace(case.launch, kernels=2))


def metal_cases():
    """All cases; those of few query rows by one kernel and by two."""
    for case in many_metal_cases():
        yield case
        if case.repeats * case.length <= MAX_ROWS:
            yield by_two_kernels(case)
    yield from every_triple()
    # Several steps per part, several parts, and both.
    few = replace(METAL_BASE, mask="causal", kv_heads=1, blocks=10, tail=150, batch=1)
    steps = [Launch(steps) for steps in ((4, 1), (4, 2), (4, 128), (2, 2))]
    yield from varied(few, launch=steps, length=(1, 17))


def many_metal_cases():
    """Masks, lengths, widths, head_dims, groups, rotations, sink logits, counts."""
    few = replace(METAL_BASE, mask="causal", kv_heads=1)
    yield from varied(METAL_BASE, mask=MASKS, length=(1, 5, 21))
    group = replace(METAL_BASE, mask="causal", batch=1, kv_heads=2, repeats=3)
    yield from varied(group, length=(2, 16, 17, 32))
    widths = [(2, 3), (3, 2), (4, 8), (8, 4), (3, 3)]
    yield from varied(few, bits=widths, dtype=DTYPES, length=(1, 20))
    pairs = [(64, 64), (96, 112), (112, 96), (128, 128), (192, 128), (256, 256), (24, 40), (8, 16)]
    narrow = replace(METAL_BASE, bits=(3, 4), batch=1, kv_heads=2, dtype="bf16")
    yield from varied(narrow, dims=pairs, length=(1, 17))
    every = Case(dims=(80, 80), dtype="f16", kv_heads=2, blocks=2, tail=5)
    yield from varied(every, bits=[(b, b) for b in codebook.BITS], mask=MASKS, length=(1, 17))
    group = replace(METAL_BASE, kv_heads=2, batch=1, mask="bool")
    yield from varied(group, repeats=range(1, 10))
    yield from (replace(group, repeats=n, length=length) for n, length in ((4, 2), (2, 4)))
    plain = replace(METAL_BASE, channel_scale="none", bits=(3, 4))
    yield from varied(plain, rotation=("rotor3", "dense", "identity", "hadamard"))
    with_sinks = replace(METAL_BASE, sink_logits=True)
    yield from varied(with_sinks, mask=("none", "causal", "bool"), length=(1, 17))
    for counts in COUNTS:
        yield from varied(replace(few, **counts), length=(1, 17))


def by_three_kernels(case):
    """The case by three CUDA kernels where one could do it."""
    return replace(case, launch=replace(case.launch, kernels=3))


def cuda_cases():
    """The same, for two dtypes: one takes the tensor cores and one does not."""
    for case in one_kernel_cases():
        yield case
        if case.dtype != "f32":
            yield by_three_kernels(case)
    # Rows that share what they read of a matrix, eight at a time.
    many = replace(CUDA_BASE, batch=1, kv_heads=2, repeats=3, sink_logits=True)
    many = replace(many, launch=Launch(shares_rows=True))
    yield from varied(many, length=(3, 9), dtype=("f16", "f32"))
    # A matrix takes three kernels.
    yield replace(CUDA_BASE, channel_scale="none", rotation="dense")


def one_kernel_cases():
    """Those that one kernel does on the tensor cores."""
    both = ("f16", "f32")
    yield from every_pair()
    group = replace(CUDA_BASE, batch=1, kv_heads=2, repeats=3)
    yield from varied(group, length=(1, 2, 8, 9, 16, 33), dtype=both)
    group = replace(CUDA_BASE, kv_heads=2, batch=1, length=2, mask="bool")
    yield from varied(group, repeats=(1, 3, 4, 5, 7, 8, 9, 16))
    plain = replace(CUDA_BASE, channel_scale="none")
    yield from varied(plain, rotation=("rotor3", "iso4", "planar2", "hadamard", "identity"))
    # Rows that fewer lanes share.
    yield from varied(CUDA_BASE, dims=[(24, 40), (16, 8)], length=(1, 9))
    yield from varied(replace(CUDA_BASE, sink_logits=True), mask=("none", "bool"), length=(1, 17))
    for counts in COUNTS:
        few = replace(CUDA_BASE, kv_heads=1, **counts)
        yield from varied(few, length=(1, 17), dtype=("bf16", "f32"))
    # Warps with none, one, and more than 16 blocks; one part, some, and one for each step.
    long = replace(CUDA_BASE, blocks=70, tail=300, batch=1, kv_heads=1)
    devices = [Launch(multiprocessors=n) for n in (1, 2, 50)]
    yield from varied(long, launch=devices, length=(1, 17), dtype=both)
    # One row and three, whose parts warps share.
    yield from varied(replace(long, kv_heads=2, launch=Launch(multiprocessors=50)), repeats=(1, 3))


def mlx_cuda_cases():
    """The launch code of MLX's CUDA build: masks take turns with dtypes and lengths."""
    turns = itertools.cycle([("f16", 1), ("f32", 5), ("bf16", 17)])
    by_mask = [
        Case(bits=(4, 3), mask=mask, dtype=dtype, length=length, sink_logits=mask == "bool")
        for mask, (dtype, length) in zip(MASKS, turns, strict=False)
    ]
    yield from by_mask
    yield from (replace(case, launch=Launch(shares_rows=True)) for case in by_mask[:3])
    yield Case(blocks=0, dtype="f16")
    wide = Case(dtype="f16", dims=(256, 256), bits=(8, 8), batch=1, kv_heads=1)
    yield replace(wide, tail=0, sink=0)
    plain = Case(dtype="bf16", channel_scale="none", dims=(128, 128), bits=(2, 4))
    yield replace(plain, repeats=5, length=2)


def on(**cases):
    """Parameters: the cases of each platform, each once."""
    lines = [(name, case) for name, listed in cases.items() for case in dict.fromkeys(listed)]
    marked = [pytest.param(*line, id=f"{line[0]}-{line[1]}") for line in lines]
    return pytest.mark.parametrize(("runner", "case"), marked, indirect=["runner"])


@pytest.fixture(autouse=True, scope="module")
def _compiled_ahead(request):
    """Metal's kernels for all cases are compiled first, many at once; and the problems are gone
    when this file is done.
    """
    with METAL.kernels(), emulator.compiling_ahead():
        for parameters in launches_of(request):
            if "case" in parameters:
                problem(parameters["case"]).run(METAL)
    yield
    forget_problems()


@on(metal=metal_cases(), cuda=cuda_cases(), mlx_cuda=mlx_cuda_cases())
def test_attend_is_the_reference(runner, case):
    problem(case).check(runner)


# ---- rows of a batch ----------------------------------------------------------------------------


RAGGED = replace(CUDA_BASE, batch=3, kv_heads=2, tail=60)


@on(
    metal=varied(METAL_BASE, mask=["causal"], batch=[3], kv_heads=[2], length=(2, 17), tail=[60]),
    cuda=[
        *varied(RAGGED, length=(2, 17), dtype=("f16", "f32")),
        *varied(by_three_kernels(RAGGED), length=(2, 17)),
    ],
)
def test_rows_of_a_batch_have_their_own_lengths(runner, case):
    """A row counts fewer packed tokens, and exact ones from its own sink on."""
    with_own_lengths(case).check(runner)


@on(
    metal=varied(METAL_BASE, kv_heads=[2], length=(2, 17)),
    cuda=[*varied(CUDA_BASE, dtype=("f16", "f32")), by_three_kernels(CUDA_BASE)],
    mlx_cuda=varied(CUDA_BASE, dtype=("f16", "f32")),
)
def test_rows_of_a_batch_have_their_own_channel_scale(runner, case):
    with_own_scales(case).check(runner)


@on(
    metal=varied(METAL_BASE, mask=["bool"], length=(1, 17)),
    cuda=varied(CUDA_BASE, mask=["bool"], length=(1, 17), dtype=("f16", "f32")),
)
def test_a_query_that_sees_nothing_is_zero(runner, case):
    assert not float64(problem(case).run(runner)[:, 1, 0]).any()


# ---- orders, sizes, vectors ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 7, 12345])
@on(
    metal=varied(
        Case(blocks=5, launch=Launch((2, 2)), mask="causal", batch=1, sink_logits=True),
        length=(3, 17),
    ),
    cuda=varied(
        replace(CUDA_BASE, blocks=6, batch=1, sink_logits=True),
        length=(3, 17),
        dtype=("f16", "f32"),
    ),
)
def test_attend_in_any_order_of_threads(runner, case, order):
    if runner.on_device:
        pytest.skip("about the emulator, which runs where no device is")
    with emulator.execution_order(order):
        problem(case).check(runner)


@pytest.mark.parametrize("runner", ["cuda"], indirect=True)
@pytest.mark.parametrize("query", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("value", [2.0**-10, 1.0, 2.0**10])
def test_size_of_queries_and_values_does_not_matter(runner, query, value):
    """Of numbers that float16, the type of the tensor cores, does not hold."""
    case = replace(CUDA_BASE, batch=1, tail=0, sink=0, channel_scale="none", dtype="bf16")
    with_factors(case, query, value).check(runner)


VECTORS = [file for file in shared_vectors.CASES if file.head_dim <= MAX_HEAD_DIM]


@pytest.mark.parametrize(
    ("runner", "dtype"), [("metal", "f32"), ("cuda", "f32"), ("cuda", "f16")], indirect=["runner"]
)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("file", VECTORS, ids=shared_vectors.name_of)
def test_attend_reproduces_the_vectors(runner, file, bits, dtype):
    of_vectors(file, bits, dtype).check(runner)
