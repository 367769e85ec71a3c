"""Problems of attention over a partly packed cache, and the outputs that are right.

The judge is the float64 reference over decoded vectors. Tolerances are twice the error of MLX's own
operations in the same dtype, whose sums are float32.
"""

import functools
import math
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.view import KVView
from tests.support import noise
from tests.support import vectors as shared_vectors
from tests.support.codec_cases import DTYPES, as_numpy, float64, rows

# Half a unit in the last place of 1.
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
MASKS = ["none", "causal", "window", "padding", "bool", "additive", "additive-row", "additive-inf"]
# Hidden tokens before the others of a batch row, for each row before it.
PADDING = 40


@dataclass(frozen=True)
class Launch:
    """How a call is cut; each platform has its own ways.

    Attributes:
        steps: Metal: simdgroups of a threadgroup (blocks of a step) and the most parts of the
            packed tokens; None for the backend's own.
        multiprocessors: CUDA: of the device.
        shares_rows: CUDA: query rows share what they read of a matrix, as where there are many.
        levels: Metal: the way to find levels; None for the table, as all give the same numbers.
        kernels: One, where it can do the call; else three on CUDA and two on Metal.
    """

    steps: tuple[int, int] | None = None
    multiprocessors: int = 1
    shares_rows: bool = False
    kernels: int = 1
    levels: str | None = None


@dataclass(frozen=True)
class Case:
    """Shapes, codec, mask and launch of one call.

    gain: Factor of the scores, besides the usual one.
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
    sink_logits: bool = False
    gain: float = 1.0
    launch: Launch = Launch()

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

    def __str__(self):
        """For ids: what is not as by default."""
        changed = {name: now for name, now in vars(self).items() if now != getattr(Case, name)}
        launch = vars(changed.pop("launch", Launch()))
        changed |= {name: now for name, now in launch.items() if now != getattr(Launch, name)}
        parts = (f"{name}={now}".replace(" ", "") for name, now in changed.items())
        return "-".join(parts) or "default"


# ---- what a call needs --------------------------------------------------------------------------


def with_room(a, axis_room, filler):
    """The first blocks of a longer buffer, which is not contiguous."""
    room = mx.full((*a.shape[:2], axis_room, *a.shape[3:]), filler, a.dtype)
    return mx.concatenate([a, room], axis=2)[:, :, : a.shape[2]]


def make_view(case, role):
    """A view, one with room behind its buffers and rubbish behind its tokens, and their vectors."""
    # Cases that differ in their queries, masks and launches read the same tokens.
    mask = case.mask if case.mask == "padding" else "none"
    queries = {"repeats": 1, "length": 1, "mask": mask, "sink_logits": False, "gain": 1.0}
    return _view_of(replace(case, launch=Launch(), **queries), role)


@functools.cache
def _view_of(case, role):
    head_dim = case.dims[ROLES.index(role)]
    config = RotorConfig(*case.bits, case.rotation, channel_scale=case.channel_scale)
    chosen = codec(config, head_dim, layer=1, role=role)
    front, seed = (case.batch, case.kv_heads), 10 * ROLES.index(role)

    def given(tokens, seed):
        return mx.array(rows((*front, tokens, head_dim), seed, offset=2)).astype(DTYPES[case.dtype])

    exact = given(case.sink + case.tail, seed)
    parts = [float64(exact[:, :, : case.sink]), float64(exact[:, :, case.sink :])]
    packed = spoiled = scale = None
    if case.blocks:
        x = given(case.blocks * BLOCK, seed + 1)
        if config.scales_channels:
            scale = MLXBackend().prefill_scale(x[:, :, :BLOCK], chosen)
        packed = MLXBackend().encode(x, chosen, channel_scale=scale)
        decoded = reference.decode(
            as_numpy(packed), chosen, channel_scale=None if scale is None else np.array(scale)
        )
        parts.insert(1, decoded[:, :, : case.packed_tokens])
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
    """The mask of a call as the reference takes it."""
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


# ---- problems -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of a call, the right output, and how far a kernel may be from it.

    Attributes:
        vectors: What the views stand for, float64 ``[B, K, S, D]``; None where rows differ.
    """

    case: Case
    queries: mx.array
    views: tuple[KVView, KVView]
    vectors: tuple[np.ndarray, np.ndarray] | None
    options: dict
    expected: np.ndarray
    tolerance: float

    def run(self, runner, **more):
        """The output of a platform, ``[B, H, L, D]``."""
        more = {"launch": self.case.launch, **more}
        return runner.attend(self.queries, *self.views, **self.options, **more)

    def is_right(self, output):
        """Whether an output is within the tolerance."""
        return bool(np.abs(float64(output) - self.expected).max() <= self.tolerance)

    def check(self, runner, **more):
        """A platform gives the right numbers, in the dtype and shape of the queries' output."""
        output = self.run(runner, **more)
        assert output.dtype == self.queries.dtype
        assert output.shape == self.expected.shape
        assert self.is_right(output)


@functools.cache
def problem(case):
    """The problem that a case describes."""
    plain, views, vectors = zip(*(make_view(case, role) for role in ROLES), strict=True)
    mx.eval([(view.exact, view.packed, view.channel_scale) for view in views])
    # As mlx-lm gives them: [B, L, H, D], seen as [B, H, L, D].
    # Short enough that no token takes all of the softmax.
    q = np.random.default_rng(5).normal(size=(case.batch, case.length, case.heads, case.dims[0]))
    q = mx.swapaxes(mx.array((q / 2).astype(np.float32)).astype(DTYPES[case.dtype]), 1, 2)
    mask = make_mask(case)
    logits = np.linspace(-3, 6, case.heads).astype(np.float32) if case.sink_logits else None
    expected = reference.attend(
        float64(q),
        *vectors,
        scale=case.scale,
        noise=noise.of_view(float64(q), plain[0], case.scale),
        mask=mask,
        sink_logits=logits,
    )
    if isinstance(mask, np.ndarray):
        mask = mx.array(mask if mask.dtype == np.bool_ else mask.astype(np.float32))
    options = {
        "scale": case.scale,
        "mask": mask,
        "sink_logits": None if logits is None else mx.array(logits),
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


def vectors_of_row(view, row):
    """What a batch row of a view stands for, float64 ``[K, S, D]``; its own channel scale, if any,
    and its own counts are taken.
    """
    packed_tokens, tokens = view.lengths[row]
    sink = view.sink if packed_tokens else 0
    exact = float64(view.exact[row])[:, : tokens - packed_tokens]
    scale = view.channel_scale
    if scale is not None:
        scale = np.array(scale[row] if scale.ndim == 3 else scale)
    of_row = Packed(*(None if a is None else np.array(a[row : row + 1]) for a in view.packed))
    with np.errstate(invalid="ignore"):  # what does not count is spoiled
        decoded = reference.decode(of_row, view.codec, channel_scale=scale)[0, :, :packed_tokens]
    return np.concatenate([exact[:, :sink], decoded, exact[:, sink:]], 1)


def attend_row(queries, views, row, **options):
    """The right output of one batch row, ``[1, H, L, Dv]``."""
    q, keys = float64(queries[row : row + 1]), views[0]
    return reference.attend(
        q,
        *(vectors_of_row(view, row)[None] for view in views),
        noise=noise.of_row(q, keys, row, options["scale"]),
        **options,
    )


def posed_by_row(made, views, tolerance):
    """The problem of other views, of which each batch row is judged by itself."""
    options = {"scale": made.case.scale, "mask": made.options["mask"]}
    expected = [attend_row(made.queries, views, row, **options) for row in range(made.case.batch)]
    return Problem(
        made.case, made.queries, tuple(views), None, options, np.concatenate(expected), tolerance
    )


@functools.cache
def with_own_scales(case):
    """A problem whose batch rows have channel scales of their own."""
    made = problem(case)
    random = np.random.default_rng(11)
    views = []
    for view in made.views:
        factor = random.uniform(0.5, 2, (case.batch, *view.channel_scale.shape)).astype(np.float32)
        views.append(replace(view, channel_scale=view.channel_scale * mx.array(factor)))
    # Scores and outputs may be twice as large as those that the tolerance is for.
    return posed_by_row(made, views, 2 * made.tolerance)


@functools.cache
def with_own_lengths(case):
    """A problem of three batch rows: one counts fewer packed tokens, one none, and each has exact
    tokens from its own sink on.
    """
    made = problem(case)
    # Packed and all tokens of each row; the first has what the views count.
    lengths = ((case.packed_tokens, case.tokens), (70, 100), (0, 23))
    return posed_by_row(made, [replace(view, rows=lengths) for view in made.views], made.tolerance)


@functools.cache
def with_factors(case, query, value):
    """A problem whose queries and scales of values are multiplied by powers of two."""
    made = problem(case)
    keys, values = made.views
    scales = values.packed.scales * value
    values = replace(values, packed=values.packed._replace(scales=scales))
    scale = case.scale / query
    queries = made.queries * query
    views = keys, values
    vectors = [np.stack([vectors_of_row(v, row) for row in range(case.batch)]) for v in views]
    options = {"scale": scale, "mask": "causal"}
    rows = [attend_row(queries, views, row, **options) for row in range(case.batch)]
    expected = np.concatenate(rows)
    # One rounding of the output to the dtype, doubled as elsewhere.
    tolerance = 2 * ROUNDING[case.dtype] * np.abs(expected).max()
    return Problem(case, queries, views, vectors, options, expected, tolerance)


@functools.cache
def of_vectors(file, bits, dtype):
    """The problem of a file of shared vectors."""
    arrays, facts = shared_vectors.load_case(file)
    views = shared_vectors.views_of(arrays, facts, bits, DTYPES[dtype])
    queries = mx.array(arrays["query"]).astype(DTYPES[dtype])
    expected = arrays[f"output.{bits}"]
    # In float32 the bound of docs/FORMAT.md, section 9. In float16 twice the rounding of the
    # output; the vectors' inputs are multiples of 1/32, which it holds.
    bound = {"f32": 1e-5, "f16": 2 * ROUNDING["f16"]}[dtype]
    options = {"scale": facts["head_dim"] ** -0.5, "mask": "causal"}
    tolerance = bound * np.abs(expected).max()
    return Problem(Case(dtype=dtype), queries, tuple(views), None, options, expected, tolerance)


def forget_problems():
    """Free the arrays of all problems so far."""
    for made in (_view_of, problem, with_own_scales, with_own_lengths, with_factors, of_vectors):
        made.cache_clear()
