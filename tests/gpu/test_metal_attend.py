"""Attention in Metal kernels against the float64 reference.

With a Metal GPU the kernels run on it; elsewhere they run in the emulator, which also checks every
memory access they make. Mutated kernels must fail.
"""

import functools
import json
import math
import re
import shutil
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import source
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import metal_attend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.view import KVView
from scripts import make_vectors
from tests.emulator import KernelError, execution_order, lint, metal_kernel

HAS_METAL = mx.metal.is_available()
needs_runner = pytest.mark.skipif(
    not HAS_METAL and shutil.which("g++") is None, reason="neither a Metal GPU nor g++ is here"
)
needs_emulator = pytest.mark.skipif(
    HAS_METAL or shutil.which("g++") is None, reason="the emulator needs g++, and no Metal GPU"
)
needs_clang = pytest.mark.skipif(
    shutil.which("clang-19") is None, reason="clang-19 is not installed"
)

DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}
# Half a unit in the last place of 1.
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
# Hidden tokens before the others of a batch row, for each row before it.
PADDING = 40
REAL_METAL_KERNEL = mx.fast.metal_kernel


@dataclass(frozen=True)
class Case:
    """Shapes, codec, mask and launch of one call.

    gain: Factor of the scores, besides the usual one.
    steps: Simdgroups of a threadgroup (blocks of a step) and the most parts of the packed tokens.
    """

    bits: tuple[int, int] = (4, 4)
    dims: tuple[int, int] = (64, 80)
    batch: int = 2
    kv_heads: int = 3
    repeats: int = 2
    length: int = 1
    blocks: int = 3
    missing: int = 13
    sink: int = 4
    tail: int = 37
    dtype: str = "f32"
    rotation: str = "cascade"
    channel_scale: str = "prefill"
    mask: str = "none"
    sinks: bool = False
    gain: float = 1.0
    steps: tuple[int, int] = (4, 128)

    @property
    def heads(self):
        return self.kv_heads * self.repeats

    @property
    def packed_tokens(self):
        return self.blocks * BLOCK - self.missing if self.blocks else 0

    @property
    def tokens(self):
        return self.sink + self.packed_tokens + self.tail

    @property
    def scale(self):
        return self.gain * self.dims[0] ** -0.5


# ---- what a call needs, and what it must return -------------------------------------------------


def rows(shape, seed):
    """Normal numbers with unequal channels and an offset, what keys look like."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(size=shape[-1]) * 0.5)
    x = random.normal(size=shape) * spread + random.normal(size=shape[-1]) * 2
    return mx.array(x.astype(np.float32))


def float64(x):
    return np.array(x.astype(mx.float32), np.float64)


def with_room(a, axis_room, filler):
    """The first blocks of a longer buffer, which is not contiguous."""
    room = mx.full((*a.shape[:2], axis_room, *a.shape[3:]), filler, a.dtype)
    return mx.concatenate([a, room], axis=2)[:, :, : a.shape[2]]


def make_view(case, role):
    """A view, one with room behind its buffers and rubbish behind its tokens, and their vectors."""
    head_dim = case.dims[ROLES.index(role)]
    config = RotorConfig(*case.bits, case.rotation, channel_scale=case.channel_scale)
    chosen = codec(config, head_dim, layer=1, role=role)
    front, seed = (case.batch, case.kv_heads), 10 * ROLES.index(role)
    exact = rows((*front, case.sink + case.tail, head_dim), seed).astype(DTYPES[case.dtype])
    parts = [float64(exact[:, :, : case.sink]), float64(exact[:, :, case.sink :])]
    packed = spoiled = scale = None
    if case.blocks:
        x = rows((*front, case.blocks * BLOCK, head_dim), seed + 1)
        x = x.astype(DTYPES[case.dtype])
        if config.scales_channels:
            scale = MLXBackend().prefill_scale(x[:, :, :BLOCK], chosen)
        packed = MLXBackend().encode(x, chosen, channel_scale=scale)
        numpy = Packed(*(None if a is None else np.array(a) for a in packed))
        vectors = reference.decode(
            numpy, chosen, channel_scale=None if scale is None else np.array(scale)
        )
        parts.insert(1, vectors[:, :, : case.packed_tokens])
        spoiled = spoil(packed, chosen, case)
    view = KVView(chosen, exact, packed, scale, case.sink, case.packed_tokens, case.tokens)
    with_rubbish = replace(view, exact=with_room(exact, 5, np.nan), packed=spoiled)
    return view, with_rubbish, np.concatenate(parts, 2)


def spoil(packed, chosen, case):
    """What does not count must be ignored: fill it with ones, which are NaN as scales."""
    words, scales, centres = (None if a is None else a + 0 for a in packed)
    if case.mask == "padding":
        # What a mask hides must not come through either.
        for row in range(1, case.batch):
            scales[row, :, 0, : PADDING * row - case.sink] = np.nan
    if case.missing:
        kept = mx.array(chosen.kept_bits(BLOCK - case.missing))
        words[:, :, -1] = words[:, :, -1] | ~kept
        scales[:, :, -1, BLOCK - case.missing :] = np.nan
    return Packed(
        with_room(words, 2, 2**32 - 1),
        with_room(scales, 2, np.nan),
        None if centres is None else with_room(centres, 2, np.nan),
    )


def make_mask(case):
    random = np.random.default_rng(3)
    front, length, tokens = (case.batch, case.heads), case.length, case.tokens
    last_seen = np.arange(length)[:, None] + tokens - length
    column = np.arange(tokens)
    hidden_query = random.random((*front, length, tokens)) > 0.4
    hidden_query[:, 1, 0] = False
    return {
        "none": lambda: None,
        "causal": lambda: "causal",
        "window": lambda: (column <= last_seen) & (column > last_seen - 90),
        "padding": lambda: column >= np.arange(case.batch)[:, None, None, None] * PADDING,
        "bool": lambda: hidden_query,
        "additive": lambda: random.normal(size=(1, case.heads, length, tokens)) * 2,
        "additive-row": lambda: random.normal(size=tokens) * 2,
        "additive-inf": lambda: np.where(hidden_query[:, :1], 0, -np.inf),
    }[case.mask]()


MASKS = ["none", "causal", "window", "padding", "bool", "additive", "additive-row", "additive-inf"]


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of a call, the right output, and how far a float32 path may be from it."""

    case: Case
    queries: mx.array
    views: tuple[KVView, KVView]
    vectors: tuple[np.ndarray, np.ndarray]
    options: dict
    expected: np.ndarray
    tolerance: float

    @property
    def call(self):
        return AttendCall(self.queries, *self.views, **self.options)

    def run(self):
        return metal_attend.attend(self.call)

    def is_right(self, output):
        return bool(np.abs(float64(output) - self.expected).max() <= self.tolerance)


@functools.cache
def problem(case):
    plain, views, vectors = zip(*(make_view(case, role) for role in ROLES), strict=True)
    mx.eval([(view.exact, view.packed, view.channel_scale) for view in views])
    # As mlx-lm gives them: [B, L, H, D], seen as [B, H, L, D].
    # Short enough that no token takes all of the softmax.
    q = np.random.default_rng(5).normal(size=(case.batch, case.length, case.heads, case.dims[0]))
    q = mx.swapaxes(mx.array((q / 2).astype(np.float32)).astype(DTYPES[case.dtype]), 1, 2)
    mask = make_mask(case)
    logits = np.linspace(-3, 6, case.heads).astype(np.float32) if case.sinks else None
    expected = reference.attend(float64(q), *vectors, scale=case.scale, mask=mask, sinks=logits)
    if isinstance(mask, np.ndarray):
        mask = mx.array(mask if mask.dtype == np.bool_ else mask.astype(np.float32))
    options = {
        "scale": case.scale,
        "mask": mask,
        "sinks": None if logits is None else mx.array(logits),
    }
    # MLX's path in the same dtype has float32 sums in another order and the same last rounding. It
    # may be lucky, so it counts as no better than one rounding of the output, and one float32
    # rounding of |q| |k|, the size of what a score is added up from, by which a weight changes.
    same_dtype = float64(MLXBackend().attend(AttendCall(q, *plain, **options)))
    error = np.abs(same_dtype - expected).max()
    sizes = (np.linalg.norm(x, axis=-1).max() for x in (float64(q), vectors[0]))
    rounding = ROUNDING[case.dtype] + ROUNDING["f32"] * case.scale * math.prod(sizes)
    error = max(error, rounding * np.abs(expected).max())
    return Problem(case, q, views, vectors, options, expected, 2 * error)


# ---- kernels ------------------------------------------------------------------------------------


def use_kernels(monkeypatch, factory):
    """Let the launch code build its kernels anew, with this as ``mx.fast.metal_kernel``."""
    monkeypatch.setattr(mx.fast, "metal_kernel", factory)
    for build in (metal_attend._parts_kernel, metal_attend._merge_kernel):
        build.cache_clear()


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    use_kernels(monkeypatch, REAL_METAL_KERNEL if HAS_METAL else metal_kernel)
    yield
    use_kernels(monkeypatch, REAL_METAL_KERNEL)


def launch_as(monkeypatch, case):
    simdgroups, parts = case.steps
    monkeypatch.setattr(metal_attend, "SIMDGROUPS", simdgroups)
    monkeypatch.setattr(metal_attend, "MAX_PARTS", parts)


def check(monkeypatch, case):
    launch_as(monkeypatch, case)
    output = problem(case).run()
    assert output.dtype == DTYPES[case.dtype]
    assert output.shape == (case.batch, case.heads, case.length, case.dims[1])
    assert problem(case).is_right(output)


pytestmark = needs_runner


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 5, 21])
def test_attend_with_mask(monkeypatch, mask, length):
    check(monkeypatch, Case(mask=mask, length=length))


@pytest.mark.parametrize("length", [2, 16, 17, 32])
def test_attend_with_length(monkeypatch, length):
    check(monkeypatch, Case(length=length, mask="causal", batch=1, kv_heads=2, repeats=3))


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("bits", [(2, 3), (3, 2), (4, 8), (8, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_with_bits(monkeypatch, dtype, bits, length):
    check(monkeypatch, Case(bits=bits, dtype=dtype, length=length, mask="causal", kv_heads=1))


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize(
    "dims", [(64, 64), (96, 112), (112, 96), (128, 128), (192, 128), (256, 256), (24, 40)], ids=str
)
def test_attend_with_head_dim(monkeypatch, dims, length):
    case = Case(dims=dims, length=length, bits=(3, 4), batch=1, kv_heads=2, dtype="bf16")
    check(monkeypatch, case)


# The four kinds of masks that kernels tell apart; the others are arrays of other shapes.
KINDS = ("none", "causal", "bool", "additive")


@pytest.mark.parametrize("length", [1, 17], ids=["decode", "prefill"])
@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attend_in_every_combination(monkeypatch, head_dim, bits, dtype, mask, length):
    shapes = {"batch": 1, "kv_heads": 1, "blocks": 2, "tail": 5, "length": length}
    variant = {"dims": (head_dim, head_dim), "bits": (bits, bits), "dtype": dtype, "mask": mask}
    check(monkeypatch, Case(**shapes, **variant))


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 17], ids=["decode", "prefill"])
def test_attend_with_every_mask_and_width(monkeypatch, bits, mask, length):
    case = Case(dims=(80, 80), bits=(bits, bits), dtype="f16", mask=mask, length=length)
    check(monkeypatch, replace(case, kv_heads=2, blocks=2, tail=5))


@pytest.mark.parametrize(("repeats", "length"), [(n, 1) for n in range(1, 10)] + [(4, 2), (2, 4)])
def test_attend_with_group(monkeypatch, repeats, length):
    check(monkeypatch, Case(repeats=repeats, kv_heads=2, batch=1, length=length, mask="bool"))


@pytest.mark.parametrize(
    ("repeats", "length", "tiles"), [(8, 1, 1), (4, 16, 1), (8, 8, 1), (8, 9, 2)]
)
def test_a_byte_is_read_once_for_its_group(monkeypatch, repeats, length, tiles):
    """Threadgroups that read the same part of a KV head, up to 64 query rows: one."""
    grids = []

    def recorded(**arguments):
        kernel = metal_kernel(**arguments)

        def call(**launch):
            grids.append(launch["grid"])
            return kernel(**launch)

        return call

    use_kernels(monkeypatch, recorded)
    check(monkeypatch, Case(repeats=repeats, kv_heads=1, batch=1, length=length, mask="causal"))
    assert grids[0][1:] == (1, tiles)


@pytest.mark.parametrize("rotation", ["rotor3", "dense", "identity", "hadamard"])
def test_attend_with_rotation(monkeypatch, rotation):
    check(monkeypatch, Case(rotation=rotation, channel_scale="none", bits=(3, 4)))


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_attend_with_sink_logits(monkeypatch, mask, length):
    check(monkeypatch, Case(sinks=True, mask=mask, length=length))


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
def test_attend_with_counts(monkeypatch, counts, length):
    check(monkeypatch, Case(**counts, length=length, mask="causal", kv_heads=1))


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("steps", [(4, 1), (4, 2), (4, 128), (2, 2)], ids=str)
def test_attend_in_parts(monkeypatch, steps, length):
    """Several steps a part, several parts, and both."""
    case = Case(blocks=10, tail=150, steps=steps, length=length, mask="causal", batch=1)
    check(monkeypatch, replace(case, kv_heads=1))


def test_a_query_that_sees_nothing_is_zero(monkeypatch):
    for length in (1, 17):
        output = problem(Case(mask="bool", length=length)).run()
        assert not float64(output[:, 1, 0]).any()


@pytest.mark.parametrize("length", [2, 17])
def test_rows_of_a_batch_have_their_own_lengths(length):
    """A row counts fewer packed tokens, and exact ones from its own sink on."""
    case = Case(batch=3, kv_heads=2, length=length, tail=60)
    made = problem(case)
    # Packed and all tokens of each row; the first has what the views count.
    lengths = [(case.packed_tokens, case.tokens), (70, 100), (0, 23)]
    views = [replace(view, rows=tuple(lengths)) for view in made.views]
    output = metal_attend.attend(AttendCall(made.queries, *views, scale=case.scale, mask="causal"))
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


@pytest.mark.parametrize("length", [2, 17])
def test_rows_of_a_batch_have_their_own_channel_scale(length):
    case = Case(kv_heads=2, length=length)
    made = problem(case)
    views = [replace(view, channel_scale=own_scales(case, view)) for view in made.views]
    output = metal_attend.attend(AttendCall(made.queries, *views, scale=case.scale))
    for row in range(case.batch):
        part = slice(row, row + 1)
        keys_and_values = [vectors_of_row(case, view, row) for view in views]
        expected = reference.attend(float64(made.queries[part]), *keys_and_values, scale=case.scale)
        # Scores and outputs may be twice as large as those that the tolerance is for.
        assert np.abs(float64(output[part]) - expected).max() <= 2 * made.tolerance


def own_scales(case, view):
    factor = np.random.default_rng(11).uniform(0.5, 2, (case.batch, *view.channel_scale.shape))
    return view.channel_scale * mx.array(factor.astype(np.float32))


def vectors_of_row(case, view, row):
    packed = Packed(*(None if a is None else np.array(a[row : row + 1]) for a in view.packed))
    with np.errstate(invalid="ignore"):  # what does not count is spoiled
        decoded = reference.decode(
            packed, view.codec, channel_scale=np.array(view.channel_scale[row])
        )
    exact = float64(view.exact[row : row + 1])
    parts = (
        exact[:, :, : case.sink],
        decoded[:, :, : case.packed_tokens],
        exact[:, :, case.sink :],
    )
    return np.concatenate(parts, 2)


@needs_emulator
@pytest.mark.parametrize("order", [1, 7])
@pytest.mark.parametrize("length", [3, 17])
def test_attend_in_any_order_of_threads(monkeypatch, length, order):
    case = Case(length=length, blocks=5, steps=(2, 2), mask="causal", batch=1, sinks=True)
    with execution_order(order):
        check(monkeypatch, case)


def test_longer_vectors_take_the_operations_of_mlx(monkeypatch):
    """No kernel is built for them."""
    use_kernels(monkeypatch, None)
    check(monkeypatch, Case(dims=(320, 64), batch=1, kv_heads=1, missing=0))


VECTORS = [case for case in make_vectors.CASES if case.head_dim <= metal_attend.MAX_HEAD_DIM]


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case.file_name.split(".")[0])
def test_attend_reproduces_the_vectors(case, bits):
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
        exact = arrays[f"{role}.exact"]
        chosen = codec(config, facts["head_dim"], layer=facts["layer"], role=role)
        scale = arrays.get(f"{role}.channel_scale")
        tokens = count + exact.shape[2]
        views.append(KVView(chosen, exact, packed, scale, facts["sink"], count, tokens))
    call = AttendCall(arrays["query"], *views, scale=facts["head_dim"] ** -0.5, mask="causal")
    output = metal_attend.attend(call)
    expected = np.array(arrays[f"output.{bits}"])
    # The bound of docs/FORMAT.md, section 9.
    assert np.abs(np.array(output) - expected).max() <= 1e-5 * np.abs(expected).max()


# ---- text ---------------------------------------------------------------------------------------


@needs_emulator
@needs_clang
@pytest.mark.parametrize(
    "case",
    [
        Case(bits=(2, 8), dtype="f16", sinks=True, mask="additive"),
        Case(bits=(3, 3), dtype="bf16", repeats=4, mask="causal"),
        Case(bits=(4, 4), dtype="f32", repeats=5, mask="bool", batch=5),
        Case(bits=(3, 2), dtype="f16", length=17, sinks=True, mask="additive", batch=5),
        Case(bits=(8, 4), dtype="bf16", length=17, dims=(192, 128), mask="bool"),
        Case(bits=(4, 3), dtype="f32", length=17, mask="causal"),
    ],
    ids=lambda case: f"l{case.length}-k{case.bits[0]}-v{case.bits[1]}-{case.dtype}",
)
def test_text_passes_the_lint(monkeypatch, case):
    texts = []

    def recorded(**arguments):
        kernel = metal_kernel(**arguments)

        def call(**launch):
            texts.append(kernel.metal_text(**launch))
            return kernel(**launch)

        return call

    use_kernels(monkeypatch, recorded)
    problem(case).run()
    assert len(texts) == 2
    assert [lint(text) for text in texts] == [[], []]


def test_levels_are_the_codebook():
    text = source.read("shared_kernels/levels.h")
    for bits in codebook.BITS:
        (table,) = re.findall(
            rf"MAGNITUDES_{bits}\[{2 ** (bits - 1)}\] = {{(.*?)}};", text, re.DOTALL
        )
        patterns = [int(word.strip().rstrip("u"), 16) for word in table.split(",")]
        assert patterns == codebook.magnitudes(bits).view(np.uint32).tolist()


def test_buffers_of_the_cache_are_read_where_they_lie(monkeypatch):
    copies = {}

    def recorded(**arguments):
        copies[arguments["name"]] = arguments.get("ensure_row_contiguous", True)
        return REAL_METAL_KERNEL(**arguments)

    use_kernels(monkeypatch, recorded)
    exported(Case())
    exported(Case(length=17))
    assert not copies["rotormlx_attend"]
    assert not copies["rotormlx_prefill"]


def exported(case):
    """Names and texts of the kernels that a call launches, recorded where no kernel can run."""
    made = problem(case)
    recorded = []

    def record(event):
        if event["type"] == "primitive" and event["name"] == "CustomKernel":
            recorded.append(tuple(event["arguments"][:2]))

    def traced(queries):
        return metal_attend.attend(made.call._replace(queries=queries))

    mx.export_function(record, traced, made.queries)
    return recorded


@pytest.mark.parametrize("length", [1, 17])
def test_launch_code_can_be_exported(monkeypatch, length):
    use_kernels(monkeypatch, REAL_METAL_KERNEL)
    (first, _), (second, _) = exported(Case(length=length, mask="causal", sinks=True))
    assert ("attend" if length == 1 else "prefill") in first
    assert "attend_merge" in second


def test_a_name_stands_for_one_text(monkeypatch):
    """MLX compiles anew whenever a name's text is not the one before."""
    use_kernels(monkeypatch, REAL_METAL_KERNEL)
    base = Case(batch=1, kv_heads=1, sinks=True)
    changes = [
        *({"dtype": dtype} for dtype in DTYPES),
        *({"batch": 5}, {"sink": 0, "tail": 0}, {"repeats": 8}, {"blocks": 0}),
        *({"mask": mask} for mask in MASKS),
        *({"tail": 300}, {"channel_scale": "none"}, {"sinks": False}, {"length": 17}),
    ]
    texts = {}
    for change in changes:
        for name, text in exported(replace(base, **change)):
            assert texts.setdefault(name, text) == text, change
    assert len(texts) > 12


# ---- mutations ----------------------------------------------------------------------------------

# Several tiles of query rows, parts, steps and blocks; planes of signs; lanes without a token.
DECODE = Case(
    bits=(3, 3), dims=(64, 64), kv_heads=2, length=4, blocks=5, steps=(2, 2), mask="causal"
)
PREFILL = replace(DECODE, length=17)

# Each is what stands in the text, what stands there instead, and the changes of the case.

# Text that several kernels have in common, changed in all of them at once.
EVERY = [
    # Codes and levels
    ("code < (1u << BITS)", "code < (1u << BITS) - 1u", {}),
    ("^ (negative << 31)", "", {}),
    ("(1u << (BITS - 1)) - 1u", "(1u << (BITS - 2)) - 1u", {"bits": (4, 4)}),
    ("return MAGNITUDES_4[index]", "return MAGNITUDES_4[index ^ 1u]", {"bits": (4, 3)}),
    ("(word >> (BITS * field))", "(word >> (BITS * (field ^ 1u)))", {"bits": (4, 3)}),
    ("((signs >> field) & 1u) << 2", "((signs >> (field ^ 1u)) & 1u) << 2", {}),
    ("(word >> (2 * field)) & 3u", "(word >> (2 * field)) & 1u", {}),
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
# Made in each of the two kernels for the parts of a sequence.
BOTH = [
    ("(WORD_ROWS + row / 2) * row_stride", "(WORD_ROWS + row / 2 + 1) * row_stride", {}),
    (
        "fill_levels<VALUE_BITS>(value_levels, uint(",
        "fill_levels<VALUE_BITS>(value_levels, 1u + uint(",
        {},
    ),
    # Scales and centres
    ("key_scale, about_centre", "1.0f, about_centre", {}),
    ("float(head_centres[", "0.0f * float(head_centres[", {}),
    # Positions and lengths
    ("? sink + index", "? index", {"mask": "bool"}),
    ("index < sink ? index : packed_tokens + index", "packed_tokens + index", {"mask": "window"}),
    ("index < sink ? index : packed_tokens + index", "index", {"mask": "window"}),
    ("index < sink ? index", "index <= sink ? index", {"mask": "window"}),
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
    ("if (index < stop)", "if (index <= stop)", {"mask": "none"}),
]
ATTEND = [
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the query", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // all tops", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // all weights", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // no weights", "//", {}),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the groups' sums", "//", {}),
    ("i < KEY_DIM * ROWS", "i < KEY_DIM * ROWS - 1", {}),
    ("i < KEY_DIM * ROWS", "i < KEY_DIM * ROWS + 1", {}),
    (
        "row < ROWS; ++row) {\n  const int64_t at",
        "row < ROWS - 1; ++row) {\n  const int64_t at",
        {},
    ),
    (
        "row < ROWS; ++row) {\n  const int64_t at",
        "row < ROWS + 1; ++row) {\n  const int64_t at",
        {},
    ),
    ("i < size", "i < size - 1", {}),
    ("i < size", "i <= size", {}),
    ("row < WORD_ROWS", "row < WORD_ROWS - 1", {}),
    ("row < WORD_ROWS", "row < WORD_ROWS + 1", {}),
    ("field < CODES", "field < CODES - 1", {}),
    ("AXIS % CODES == 0 || i < AXIS", "true", {"dims": (24, 64)}),
    ("(AXIS + CODES - 1) / CODES", "AXIS / CODES", {"dims": (24, 64)}),
    ("signs[first_lane] : first_signs >> CODES", "signs[first_lane] : first_signs", {}),
    ("signs[second_lane] : second_signs >> CODES", "signs[second_lane] : second_signs >> 15", {}),
    ("(lane + LANES) * key_words_strides[4]", "(lane + LANES - 1) * key_words_strides[4]", {}),
    ("(channel + VALUE_LANES) * value_words_strides[4]", "channel * value_words_strides[4]", {}),
    ("min(block_start + lane, stop - 1)", "block_start + lane", {"tail": 17}),
    ("i < KEY_DIM; i += LANES", "i < KEY_DIM - 1; i += LANES", {}),
    ("about_centre[row] = simd_sum(about_centre[row])", "about_centre[row] *= 32.0f", {}),
    ("weight == 0.0f ? 0.0f : weight * value_scale[t]", "weight * value_scale[t]", {}),
    ("weight == 0.0f ? 0.0f : weight * value_scale[t]", "weight", {}),
    ("simd_max(max(scores[row], scores[ROWS + row]))", "scores[row]", {"gain": 60.0}),
    ("top = max(top, by_simdgroup[s * ROWS + row])", "top = by_simdgroup[s * ROWS + row]", {}),
    ("totals[row] *= shrink;", "", {}),
    ("    sums[row] *= shrink;", "", {}),
    ("sums[ROWS + row] *= shrink;", "", {}),
    ("totals[row] += weight;", "totals[row] = weight;", {}),
    ("b = value_group;", "b = 0;", {}),
    ("step + b * BLOCK < stop; b", "step + b * BLOCK < stop - BLOCK; b", {}),
    ("min(BLOCK, stop - first_token)", "BLOCK", {"tail": 33}),
    ("min(BLOCK, stop - first_token)", "min(BLOCK, stop - first_token - 1)", {}),
    ("g < GROUPS - 1; ++g", "g < GROUPS - 2; ++g", {}),
    ("(value_group - 1) * VALUE_DIM + channel", "value_group * VALUE_DIM + channel", {}),
    ("total += by_simdgroup[s * ROWS + row]", "total = by_simdgroup[s * ROWS + row]", {}),
    ("if (value_group == 0)", "if (value_group <= 1)", {}),
]
PREFILL_ONLY = [
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
    (">> (row % 2 * CODES)", "", {}),
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
    ("i < KEY_DIM; i += ROW_LANES", "i < KEY_DIM - 1; i += ROW_LANES", {}),
    ("about_centre += simd_shuffle_xor(about_centre, m)", "about_centre *= 2.0f", {}),
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
    ("threadgroup_barrier(mem_flags::mem_threadgroup);  // the packed", "//", {}),
    ("top = max(top, tops[first_part + part])", "top = tops[first_part + part]", {"gain": 60.0}),
    ("part < parts; ++part) top", "part < parts - 1; ++part) top", {"gain": 60.0}),
    ("part < parts; ++part) {\n    total", "part < parts - 1; ++part) {\n    total", {}),
    ("part < parts; ++part) {\n    total", "part <= parts; ++part) {\n    total", {}),
    ("part < parts; ++part) {\n        const", "part < parts - 1; ++part) {\n        const", {}),
    ("part < packed_parts", "part <= packed_parts", {}),
    ("part < packed_parts", "part < packed_parts - 1", {}),
    ("total += share_of(tops[first_part + part], top) *", "total +=", {}),
    ("const float x = share_of(tops[first_part + part], top) *", "const float x =", {}),
    ("if (HAS_SINKS)", "if (false)", {"sinks": True}),
    ("total = exp(sink - top)", "total = 0.0f", {"sinks": True}),
    ("kv_head * (group_rows / length) + row / length", "row / length", {"sinks": True}),
    ("if (HAS_SCALE)", "if (false)", {}),
    ("channel_scale[head_index * VALUE_DIM +", "channel_scale[", {}),
    ("channel_scale[head_index * VALUE_DIM +", "channel_scale[(head_index + 1) * VALUE_DIM +", {}),
    (
        "MATRICES * VALUE_DIM + i) * VALUE_DIM + channel]",
        "MATRICES * VALUE_DIM + channel) * VALUE_DIM + i]",
        {},
    ),
    (
        "unrotation[(kv_head % MATRICES * VALUE_DIM + i) * VALUE_DIM + channel]",
        "float(i == channel)",
        {},
    ),
    ("i < VALUE_DIM; ++i", "i < VALUE_DIM - 1; ++i", {}),
    ("i < VALUE_DIM; ++i", "i < VALUE_DIM + 1; ++i", {}),
    ("total == 0.0f ? 0.0f :", "", {"mask": "bool"}),
    ("/ total)", "/ 1.0f)", {}),
    ("first_row + r < group_rows; ++r", "first_row + r < group_rows + 1; ++r", {"length": 17}),
    ("first_row + r < group_rows; ++r", "first_row + r < group_rows - 1; ++r", {}),
    ("tops_shape[2] + row", "group_rows + row", {"length": 17}),
]


def mutations():
    yield from (("every kernel", DECODE, *mutation) for mutation in EVERY)
    yield from (("rotormlx_attend", DECODE, *mutation) for mutation in BOTH + ATTEND)
    yield from (("rotormlx_prefill", PREFILL, *mutation) for mutation in BOTH + PREFILL_ONLY)
    yield from (("rotormlx_attend_merge", DECODE, *mutation) for mutation in MERGE)


def is_caught(name, case, old, new):
    """Whether a check fails when the text of one kernel is changed, or of all that have it."""
    changed = []

    def mutated(**arguments):
        for key in ("header", "source"):
            times = arguments[key].count(old)
            if times and name in (arguments["name"], "every kernel"):
                assert times == 1, f"{old!r} must stand once in {arguments['name']}"
                arguments[key] = arguments[key].replace(old, new)
                changed.append(key)
        return metal_kernel(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        use_kernels(patch, mutated)
        launch_as(patch, case)
        try:
            caught = not problem(case).is_right(problem(case).run())
        except KernelError:
            caught = True
    assert changed, f"{old!r} must stand in {name}"
    return caught


@needs_emulator
def test_mutated_kernels_fail(figure):
    missed = []
    count = 0
    for name, case, old, new, changes in mutations():
        count += 1
        if not is_caught(name, replace(case, **changes), old, new):
            missed.append((name, old, new))
    figure(f"attention kernels: {count - len(missed)} of {count} mutations caught")
    assert not missed, "\n".join(map(repr, missed))


@needs_emulator
@pytest.mark.parametrize("length", [5, 17])
def test_unrotated_queries_fail(monkeypatch, length):
    """The rotation of the keys, left out or turned the wrong way; their channel scale left out."""
    case = replace(DECODE, length=length)
    right = metal_attend._rotated
    rotation = problem(case).views[0].codec.rotation
    matrix = mx.array(rotation.matrix.astype(np.float32))
    wrong = [
        lambda q, keys: q * keys.channel_scale[:, None, :],
        lambda q, keys: (q * keys.channel_scale[:, None, :]) @ matrix,
        lambda q, keys: right(q, replace(keys, channel_scale=None)),
    ]
    launch_as(monkeypatch, case)
    for rotated in wrong:
        monkeypatch.setattr(metal_attend, "_rotated", rotated)
        assert not problem(case).is_right(problem(case).run())
