"""The ways of Metal's attention to find a level, and how one of them is chosen."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook
from rotormlx.codec.format import TRELLIS_BITS
from rotormlx.kernels.source import metal_text, read
from rotormlx.mlx.backends import choices, kept, metal_attend, metal_levels
from rotormlx.mlx.backends.example import Size
from rotormlx.mlx.backends.metal_levels import OF_BITS, WAYS
from tests.support import vectors as shared_vectors
from tests.support.attend_cases import Case, Launch, of_vectors, problem
from tests.support.runners import METAL

EACH = [(bits, way) for bits in codebook.BITS for way in OF_BITS[bits]]
OTHERS = [(bits, way) for bits, way in EACH if way != "table"]


@pytest.fixture
def runner():
    """Metal, ready to run."""
    if missing := METAL.missing():
        pytest.skip(missing)
    with METAL.kernels():
        yield METAL


def found_levels(bits, way, words):
    """Levels of the fields of words, given as they are for even places and for odd ones."""
    fields = 8 if bits in TRELLIS_BITS else 32 // bits
    files = ["shared_kernels/levels.h", "shared_kernels/trellis.h", "metal_kernels/lookup.h"]
    text = metal_text("attend", *map(read, files))
    kernel = mx.fast.metal_kernel(
        name="levels_of_words",
        input_names=["words"],
        output_names=["levels"],
        header=text.header[: text.header.index("// Attention of few queries")],
        source="""
            threadgroup float memory[Lookup<BITS, WAY>::FLOATS];
            const uint i = thread_position_in_grid.x;
            const auto lookup = Lookup<BITS, WAY>::make(memory, i, 32);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            Indices<uint> word;
            word.even = words[2 * i];
            word.odd = words[2 * i + 1];
            for (uint field = 0; field < FIELDS; ++field) {
              levels[i * FIELDS + field] = lookup.at(word, field);
            }
        """,
    )
    (levels,) = kernel(
        inputs=[mx.array(words)],
        template=[("BITS", bits), ("WAY", WAYS.index(way)), ("FIELDS", fields)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32, fields)],
        output_dtypes=[mx.float32],
    )
    return np.array(levels)


def expected_levels(bits, words):
    if bits not in TRELLIS_BITS:
        codes = words[:, :1] >> (bits * np.arange(32 // bits, dtype=np.uint32))
        return codebook.levels(bits)[codes & (2**bits - 1)]
    field = np.arange(8)
    index = words[:, field % 2] >> (field // 2 * 4).astype(np.uint32)
    return codebook.trellis_levels(bits)[index & (2 ** (bits + 1) - 1)]


@pytest.mark.parametrize(("bits", "way"), EACH)
@pytest.mark.usefixtures("runner")
def test_every_way_gives_the_levels_bit_for_bit(bits, way):
    words = np.random.default_rng(bits).integers(0, 2**32, (32, 2), np.uint32)
    # All indices, in some field.
    words[:16] = np.arange(16, dtype=np.uint32)[:, None] * np.uint32(0x11111111)
    words[16] = [0x03020100, 0x07060504]
    found, expected = found_levels(bits, way, words), expected_levels(bits, words)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    if bits < 8:
        assert len(np.unique(found)) == len(np.unique(codebook_of(bits)))


def codebook_of(bits):
    return codebook.trellis_levels(bits) if bits in TRELLIS_BITS else codebook.levels(bits)


def same_as_by_table(runner, posed, way):
    """The output of a way is right, and bit for bit that of the table."""
    launch = posed.case.launch
    by_table, found = (
        np.array(posed.run(runner, launch=replace(launch, levels=name))) for name in ("table", way)
    )
    assert posed.is_right(mx.array(found))
    assert np.array_equal(by_table, found)


# Two places a thread and four; groups of threads that end within a quad, or part a simdgroup.
SHAPES = [
    Case(dims=(64, 64), batch=1, kv_heads=1, repeats=4),
    Case(dims=(64, 24), batch=1, kv_heads=2, launch=Launch(kernels=2)),
    Case(dims=(24, 40), batch=1, kv_heads=1, repeats=8, launch=Launch(kernels=2), blocks=5),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "way"), OTHERS)
def test_every_way_gives_the_same_attention(runner, bits, way, case):
    same_as_by_table(runner, problem(replace(case, bits=(bits, bits))), way)


@pytest.mark.parametrize(("bits", "way"), OTHERS)
@pytest.mark.parametrize("file", shared_vectors.CASES[:2], ids=shared_vectors.name_of)
def test_every_way_reproduces_the_vectors(runner, file, bits, way):
    same_as_by_table(runner, of_vectors(file, bits, "f32"), way)


# ---- the choice ---------------------------------------------------------------------------------


AT_2 = ("quad", "pairs", "arithmetic", "table")
AT_4 = ("pairs", "quad", "arithmetic", "table")


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        *(((4, 4), AT_4), ((2, 3), AT_2), ((3, 2), AT_4)),
        *(((8, 3), AT_4), ((2, 8), AT_2), ((8, 8), ("table",))),
    ],
)
def test_ways_are_those_of_either_width(monkeypatch, bits, names):
    run = pytest.fail  # nothing is timed where no Metal is, or one is named
    assert metal_levels.ways(*bits) == names
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.delenv("ROTORMLX_METAL_LEVELS", raising=False)
    assert metal_levels.chosen(*bits, run) == names[0]
    for name in names:
        monkeypatch.setenv("ROTORMLX_METAL_LEVELS", name)
        assert metal_levels.chosen(*bits, run) == name


def test_a_width_without_a_way_takes_the_table():
    assert dict(metal_levels.template(8, 4, "quad")) == {
        "KEY_WAY": WAYS.index("table"),
        "VALUE_WAY": WAYS.index("quad"),
    }


@pytest.mark.parametrize(("bits", "name"), [((4, 4), "abacus"), ((8, 8), "quad")])
def test_an_impossible_way_is_refused(monkeypatch, bits, name):
    monkeypatch.setenv("ROTORMLX_METAL_LEVELS", name)
    message = rf"^\[attend\] ROTORMLX_METAL_LEVELS must be one of .*, but it is '{name}'; unset it"
    with pytest.raises(RuntimeError, match=message):
        metal_levels.chosen(*bits, pytest.fail)


@pytest.mark.usefixtures("runner")
def test_the_fastest_way_on_the_device_is_taken(monkeypatch, tmp_path):
    """The same call goes through the kernel in each way, and the one that took least is kept."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    monkeypatch.delenv("ROTORMLX_METAL_LEVELS", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(metal_levels, "SIZE", Size(2, 1, 64, length=1, packed_tokens=128))
    monkeypatch.setattr(choices, "RUNS", 1)
    clock, outputs = [0.0], {}

    def run(call, way):
        outputs[way] = np.array(metal_attend._attend_few(call, way))
        clock[0] += {"quad": 1}.get(way, 2)
        return mx.array(outputs[way])

    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])
    assert metal_levels.chosen(4, 3, run) == "quad"
    assert outputs.keys() == {*AT_4}
    assert all(np.array_equal(out, outputs["table"]) for out in outputs.values())
    assert np.abs(outputs["table"]).max() > 0
    assert kept.findings("metal").everything() == {
        "levels of keys of 4 and values of 3 bits": "quad"
    }
    # It was kept: another process times nothing.
    kept._findings.cache_clear()
    metal_levels._fastest.cache_clear()
    assert metal_levels.chosen(4, 3, pytest.fail) == "quad"
    metal_levels._fastest.cache_clear()
