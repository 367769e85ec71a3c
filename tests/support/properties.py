"""Implementations of the codec and of attention, cases for them, and the checks that hold for all.

tests/support/bounds.py derives the bounds.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import torch
from hypothesis import strategies as st

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Packed, codec
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.mlx import backends
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.cache.view import KVView
from rotormlx.torch import native, torch_ops
from tests.support import noise
from tests.support.bounds import (
    KINDS,
    WIDE_KINDS,
    attention_error,
    check_decoded,
    check_encoded,
    rotated,
    row_error,
    rows,
)

HEAD_DIMS = (8, 16, 24, 40, 56, 64, 72, 80, 96, 112, 128, 144, 160, 256)
MLX_DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}
TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


# ---- implementations, all from numpy and to numpy -----------------------------------------------


def to_mlx(a):
    return None if a is None else mx.array(a)


def to_torch(a):
    if a is None:
        return None
    return torch.from_numpy(np.array(a.view(np.int32) if a.dtype == np.uint32 else a))


class InMLX:
    """A backend of the MLX side."""

    def __init__(self, backend):
        self.backend = backend

    def encode(self, x, dtype, chosen, scale=None, centres=None):
        given = mx.array(x).astype(MLX_DTYPES[dtype])
        packed = self.backend.encode(
            given, chosen, channel_scale=to_mlx(scale), centres=to_mlx(centres)
        )
        return Packed(*(None if a is None else np.array(a) for a in packed))

    def decode(self, packed, chosen, scale=None):
        return np.array(
            self.backend.decode(Packed(*map(to_mlx, packed)), chosen, channel_scale=to_mlx(scale))
        )

    def prefill_scale(self, x, chosen):
        return np.array(self.backend.prefill_scale(mx.array(x), chosen))

    def attend(self, q, dtype, sequences, *, scale, mask, sink_logits):
        views = []
        for s in sequences:
            exact = mx.array(s.exact).astype(MLX_DTYPES[dtype])
            packed = None if s.packed is None else Packed(*map(to_mlx, s.packed))
            most = [max(column) for column in zip(*s.lengths, strict=True)]
            ragged = s.lengths if len(set(s.lengths)) > 1 else None
            views.append(KVView(s.codec, exact, packed, to_mlx(s.scale), s.sink, *most, ragged))
        mask = mask if mask is None or isinstance(mask, str) else mx.array(mask)
        given = mx.array(q).astype(MLX_DTYPES[dtype])
        call = AttendCall(given, *views, scale=scale, mask=mask, sink_logits=to_mlx(sink_logits))
        out = self.backend.attend(call)
        return np.array(out.astype(mx.float32))


class InTorch:
    """The operators' implementation on the torch side."""

    def __init__(self, module):
        self.module = module

    def encode(self, x, dtype, chosen, scale=None, centres=None):
        given = torch.from_numpy(x).to(TORCH_DTYPES[dtype])
        packed = self.module.encode(
            given, chosen, channel_scale=to_torch(scale), centres=to_torch(centres)
        )
        words, scales, means = (None if a is None else np.ascontiguousarray(a) for a in packed)
        return Packed(words.view(np.uint32), scales, means)

    def decode(self, packed, chosen, scale=None):
        packed = Packed(*map(to_torch, packed))
        return self.module.decode(
            packed, chosen, channel_scale=to_torch(scale), dtype=torch.float32
        ).numpy()

    def prefill_scale(self, x, chosen):
        return torch_ops.prefill_scale(torch.from_numpy(x[:1]), chosen)[0].numpy()

    def attend(self, q, dtype, sequences, *, scale, mask, sink_logits):
        sources = []
        for s in sequences:
            packed = None if s.packed is None else Packed(*map(to_torch, s.packed))
            sources.append(
                torch_ops.KVView(
                    s.codec,
                    torch.from_numpy(s.exact).to(TORCH_DTYPES[dtype]),
                    packed,
                    to_torch(s.scale),
                )
            )
        call = torch_ops.AttendCall(
            torch.from_numpy(q).to(TORCH_DTYPES[dtype]),
            torch.tensor(sequences[0].lengths, dtype=torch.int32),
            *sources,
            sink=sequences[0].sink,
            scale=scale,
            causal=isinstance(mask, str),
            mask=torch.from_numpy(mask) if isinstance(mask, np.ndarray) else None,
            sink_logits=to_torch(sink_logits),
        )
        return self.module.attend(call).float().numpy()


IMPLEMENTATIONS = {name: InMLX(backends._BACKENDS[name][0]()) for name in backends.available()}
if cpu_library.missing() is None:
    IMPLEMENTATIONS["torch native"] = InTorch(native)
IMPLEMENTATIONS["torch"] = InTorch(torch_ops)
# These add up in the same order on a CPU, so they write the same bytes; a matrix product may not.
ALIKE = [n for n in ("cpu", "mlx", "torch native", "torch") if n in IMPLEMENTATIONS]
ALIKE = ALIKE if mx.default_device().type == mx.DeviceType.cpu else ALIKE[-1:]


def rounded(x, dtype):
    """Numbers of a dtype, float32."""
    return np.array(mx.array(x).astype(MLX_DTYPES[dtype]).astype(mx.float32))


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows to encode, and how."""

    role: str
    bits: int
    head_dim: int
    rotation: str
    scaled: bool
    dtype: str
    batch: int
    heads: int
    blocks: int
    kinds: tuple[str, ...]
    seed: int

    @property
    def codec(self):
        config = RotorConfig(self.bits, self.bits, self.rotation, seed=7)
        return codec(config, self.head_dim, layer=3, role=self.role)

    def make(self):
        """The rows, float32, and the channel scale or None."""
        kinds = [k for k in self.kinds if k not in WIDE_KINDS or self.dtype != "f16"] or ["normal"]
        shape = (self.batch, self.heads, self.blocks * BLOCK, self.head_dim)
        scale = np.exp(
            np.random.default_rng(self.seed + 1).normal(size=(self.heads, self.head_dim))
        )
        return rounded(rows(shape, kinds, self.seed), self.dtype), scale.astype(
            np.float32
        ) if self.scaled else None


def row_cases(kinds, /, **fixed):
    choices = {
        "role": st.sampled_from(ROLES),
        "bits": st.sampled_from(codebook.BITS),
        "head_dim": st.sampled_from(HEAD_DIMS),
        "rotation": st.sampled_from(ROTATIONS),
        "scaled": st.booleans(),
        "dtype": st.sampled_from(sorted(MLX_DTYPES)),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "blocks": st.integers(1, 3),
        "kinds": st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4).map(tuple),
        "seed": st.integers(0, 2**16),
    }
    return st.builds(Rows, **{**choices, **fixed})


def check_rows(case, implementations):
    """Returns what each implementation has written."""
    x, scale = case.make()
    exact = x.astype(np.float64)
    written = {}
    for name, implementation in implementations.items():
        packed = written[name] = implementation.encode(x, case.dtype, case.codec, scale)
        check_encoded(exact, packed, case.codec, scale)
        check_decoded(
            exact, implementation.decode(packed, case.codec, scale), packed, case.codec, scale
        )
    return written


def bits_of(a):
    """Bytes of an array; the sign of a zero is not specified."""
    return np.where(a == 0, a.dtype.type(0), a).tobytes()


def check_broken_row(case, broken, kind, implementations):
    zeroed, scale = case.make()
    at = np.array(sorted({i % zeroed.shape[2] for i in broken}))
    zeroed[:, :, at] = 0
    spoiled = zeroed.copy()
    spoiled[:, :, at] = rows(spoiled[:, :, at].shape, (kind,), case.seed)
    others = np.setdiff1d(np.arange(zeroed.shape[2]), at)
    for name, implementation in implementations.items():
        found, plain = (
            implementation.encode(x, case.dtype, case.codec, scale) for x in (spoiled, zeroed)
        )
        if case.role == KEY:
            assert found.centres.tobytes() == plain.centres.tobytes(), name
        for part in ("codes", "scales"):
            a, b = (by_token(p, case.codec, part) for p in (found, plain))
            assert a[:, :, others].tobytes() == b[:, :, others].tobytes(), (name, part)
        decoded = implementation.decode(found, case.codec, scale)
        assert np.isnan(decoded[:, :, at]).all()
        assert np.array_equal(
            decoded[:, :, others],
            implementation.decode(plain, case.codec, scale)[:, :, others],
            equal_nan=True,
        )


def by_token(packed, chosen, part):
    """Codes or scales ``[B, K, tokens, ...]``."""
    a = reference.unpack(packed.words, chosen) if part == "codes" else packed.scales
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def check_heads(case, given_centres, implementations):
    x, scale = case.make()
    centres = None
    if given_centres and case.role == KEY:
        centres = rows((2, 3, case.blocks, case.head_dim), ("normal", "offset"), case.seed).astype(
            np.float16
        )
    for name, implementation in implementations.items():
        together = implementation.encode(x, case.dtype, case.codec, scale, centres)
        check_encoded(x.astype(np.float64), together, case.codec, scale, centres)
        b, k, n = case.seed % 2, case.seed % 3, case.seed % case.blocks
        part = (slice(b, b + 1), slice(k, k + 1))
        block = (*part, slice(n, n + 1))
        own = None if centres is None else centres[block]
        alone = implementation.encode(
            x[(*part, slice(n * BLOCK, (n + 1) * BLOCK))],
            case.dtype,
            case.codec,
            scale[k : k + 1],
            own,
        )
        for a, b in zip(together, alone, strict=True):
            assert (a is b is None) or a[block].tobytes() == b.tobytes(), name


def prefill_scales(x, role):
    """The scale of a block ``[K, 64, D]``; two, where a mean lies next to a rounding tie."""
    found = []
    finite = np.isfinite(x).all(-1, keepdims=True)
    for side in (-1, 1):
        y = x
        if role == KEY:
            counted = np.where(finite, x, 0)
            # Float32 sums of 64 numbers, as in check_encoded().
            centre = counted.mean(1) + side * 2.0**-18 * np.abs(counted).mean(1)
            y = x - centre.clip(-65504, 65504).astype(np.float16).astype(np.float64)[:, None]
        with np.errstate(invalid="ignore"):
            square = np.square(y).mean(1)
        whole = square.mean(-1, keepdims=True)
        usable = np.isfinite(square).all(-1, keepdims=True) & (whole > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(usable, np.maximum(square / whole, 64.0**-2) ** 0.25, 1))
    return np.array(found)


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """Keys or values as they are stored: what a view and a source are made of."""

    codec: object
    exact: np.ndarray
    packed: Packed | None
    scale: np.ndarray | None
    sink: int
    lengths: tuple[tuple[int, int], ...]

    def middle(self):
        """Decoded blocks, float64 ``[B, K, tokens, D]``."""
        return reference.decode(self.packed, self.codec, channel_scale=self.scale)

    def noise(self, b, q, scale):
        """What is taken off the scores of queries ``[1, H, L, D]`` of a batch row."""
        packed_tokens, tokens = self.lengths[b]
        return noise.of_sequence(
            q,
            self.packed,
            self.codec,
            scale=scale,
            channel_scale=self.scale,
            sink=self.sink,
            packed_tokens=packed_tokens,
            tokens=tokens,
            row=b,
        )

    def rotated_size(self, b, x):
        """The largest norm that a row of x ``[K, S, D]`` or a centre has while attending."""
        factor = 1.0 if self.scale is None else self.scale.astype(np.float64)[:, None]
        size = np.linalg.norm(x / factor, axis=-1).max(initial=0)
        if self.packed is not None and self.codec.role == KEY:
            centres = self.packed.centres[b].astype(np.float64)
            size += 2 * np.linalg.norm(centres / factor, axis=-1).max(initial=0)
        return size * (np.max(factor) if self.codec.role == VALUE else 1)

    def of_row(self, b, middle):
        """What a batch row stands for, float64 ``[K, S, D]``; ``middle`` are the packed tokens."""
        packed, tokens = self.lengths[b]
        exact = self.exact[b].astype(np.float64)
        ends = exact[:, : self.sink], exact[:, self.sink : tokens - packed]
        return (
            np.concatenate([ends[0], middle[b][:, :packed], ends[1]], 1)
            if packed
            else exact[:, :tokens]
        )


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values to attend with, and how."""

    bits: tuple[int, int]
    head_dims: tuple[int, int]
    rotation: str
    scaled: bool
    dtype: str
    heads: int
    repeats: int
    length: int
    sink: int
    # Packed blocks, tokens that the last lacks, and tokens behind them, of each batch row.
    sizes: tuple[tuple[int, int, int], ...]
    mask: str
    has_sink_logits: bool
    kinds: tuple[str, ...]
    seed: int

    @property
    def scale(self):
        return self.head_dims[0] ** -0.5

    @property
    def lengths(self):
        out = []
        for blocks, missing, tail in self.sizes:
            packed = max(0, blocks * BLOCK - missing)
            out.append((packed, packed + (self.sink if packed else 0) + tail + self.length))
        return tuple(out)

    def make(self):
        """Keys and values as stored, and the rows ``[B, K, tokens, D]`` of their blocks."""
        sequences, originals = [], []
        batch, most = len(self.sizes), max(b for b, _, _ in self.sizes)
        capacity = max(tokens - packed for packed, tokens in self.lengths) + self.seed % 3
        config = RotorConfig(*self.bits, self.rotation, seed=7)
        for place, role in enumerate(ROLES):
            chosen = codec(config, self.head_dims[place], layer=3, role=role)
            shape = (batch, self.heads, most * BLOCK, chosen.head_dim)
            x = rounded(rows(shape, self.kinds, self.seed + place), self.dtype)
            exact = rounded(
                rows((*shape[:2], capacity, shape[3]), self.kinds, self.seed + 2 + place),
                self.dtype,
            )
            rng = np.random.default_rng(self.seed)
            # An outlier divided by a smaller number would have a scale beyond float16: a NaN.
            scale = np.exp(rng.uniform(-1, 1, (self.heads, shape[3]))).astype(np.float32)
            scale = scale if self.scaled else None
            packed = IMPLEMENTATIONS["torch"].encode(x, self.dtype, chosen, scale) if most else None
            sequences.append(Sequence(chosen, exact, packed, scale, self.sink, self.lengths))
            originals.append(x)
        return sequences, originals

    def queries(self):
        rng = np.random.default_rng(self.seed + 9)
        q = rng.normal(
            size=(len(self.sizes), self.heads * self.repeats, self.length, self.head_dims[0])
        )
        return rounded(q.astype(np.float32), self.dtype)

    def sink_logits(self):
        heads = self.heads * self.repeats
        return np.linspace(-3, 6, heads).astype(np.float32) if self.has_sink_logits else None

    def make_mask(self):
        tokens = max(n for _, n in self.lengths)
        batch, heads, rng = (
            len(self.sizes),
            self.heads * self.repeats,
            np.random.default_rng(self.seed + 8),
        )
        visible = rng.random((batch, heads, self.length, tokens)) > 0.4
        return {
            "none": None,
            "causal": "causal",
            "boolean": visible,
            "boolean of tokens": visible[0, 0, 0],
            "boolean of queries": visible[:1, :1],
            "boolean of rows": visible[:, :1, :1],
            "nothing": np.zeros((1, 1), bool),
            "additive": rng.normal(size=(1, heads, self.length, tokens)).astype(np.float32),
            "additive of tokens": np.where(visible[0, 0, :1], 0, -np.inf).astype(np.float32),
        }[self.mask]

    def mask_of(self, mask, b):
        """What batch row b sees of a mask."""
        if not isinstance(mask, np.ndarray):
            return mask
        mask = mask[b : b + 1] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        return mask[..., : self.lengths[b][1]] if mask.shape[-1] > 1 else mask


MASKS = (
    *("none", "causal", "boolean", "boolean of tokens", "boolean of queries", "boolean of rows"),
    *("nothing", "additive", "additive of tokens"),
)
# Sums of larger numbers are not finite in float16.
ATTENDED_KINDS = sorted(set(KINDS) - {"largest", "large", "one-hot", "heavy"})


def attention_cases(**fixed):
    choices = {
        "bits": st.tuples(st.sampled_from(codebook.BITS), st.sampled_from(codebook.BITS)),
        "head_dims": st.tuples(st.sampled_from(HEAD_DIMS[:11]), st.sampled_from(HEAD_DIMS[:11])),
        "rotation": st.sampled_from(ROTATIONS),
        "scaled": st.booleans(),
        "dtype": st.sampled_from(sorted(MLX_DTYPES)),
        "heads": st.integers(1, 3),
        "repeats": st.integers(1, 4),
        "length": st.integers(1, 9),
        "sink": st.integers(0, 5),
        "sizes": st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 63), st.integers(0, 90)),
            min_size=1,
            max_size=3,
        ).map(tuple),
        "mask": st.sampled_from(MASKS),
        "has_sink_logits": st.booleans(),
        "kinds": st.lists(st.sampled_from(ATTENDED_KINDS), min_size=1, max_size=3).map(tuple),
        "seed": st.integers(0, 2**16),
    }
    return st.builds(Attention, **{**choices, **fixed})


# One rounding to the dtype of the queries: relative, and of subnormal numbers.
ROUNDING = {"f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 0.0), "f32": (0.0, 0.0)}


def sums_error(case, sequences, b, q, vectors, rounding=0.0):
    """The largest error of attention over these very keys and values ``[K, S, D]`` by its sums.

    D products in a score and S in the output, each product off by 2^-24 of its size, in rotated
    space; scores go through the softmax. Where products are of less than float32, ``rounding`` of
    each comes on top.
    """
    sizes = [s.rotated_size(b, x) for s, x in zip(sequences, vectors, strict=True)]
    norm = query_norm(case, sequences[0], q[b])
    rounding += 2.0**-24 * (2 * max(case.head_dims) + 16)
    largest_logit = 6 if case.has_sink_logits else 0
    score = rounding * (case.scale * norm * sizes[0] + largest_logit)
    values = vectors[1].reshape(-1, vectors[1].shape[-1])
    return attention_error(values, score, (rounding + vectors[1].shape[1] * 2.0**-24) * sizes[1])


def query_norm(case, keys, q):
    """The largest norm of a query ``[H, L, D]`` times the channel scale of its keys."""
    if keys.scale is not None:
        q = q * np.repeat(keys.scale, case.repeats, 0)[:, None]
    return np.linalg.norm(q, axis=-1).max()


def check_attention(case, implementations, rounding=0.0):
    """``rounding`` as for :func:`sums_error`."""
    sequences, _ = case.make()
    q, mask, sink_logits = case.queries(), case.make_mask(), case.sink_logits()
    given = {"scale": case.scale, "sink_logits": sink_logits}
    middles = [None if s.packed is None else s.middle() for s in sequences]
    found = {
        name: implementation.attend(q, case.dtype, sequences, mask=mask, **given)
        for name, implementation in implementations.items()
    }
    relative, absolute = ROUNDING[case.dtype]
    for b in range(len(case.sizes)):
        keys, values = (s.of_row(b, m) for s, m in zip(sequences, middles, strict=True))
        own, row = case.mask_of(mask, b), q[b : b + 1]
        taken = sequences[0].noise(b, row, case.scale)
        expected = reference.attend(row, keys[None], values[None], noise=taken, mask=own, **given)[
            0
        ]
        tolerance = sums_error(case, sequences, b, q, (keys, values), rounding)
        tolerance += relative * np.abs(expected).max() + absolute
        for name, out in found.items():
            assert np.abs(out[b] - expected).max() <= tolerance, (name, b)
            assert case.mask != "nothing" or not out[b].any()


def row_errors(sequence, x):
    """The largest error of a packed row, divided by the channel scale; 0 if nothing is packed."""
    if sequence.packed is None:
        return 0.0
    w = rotated(x, sequence.codec, sequence.packed.centres, sequence.scale)
    return float(row_error(w, sequence.packed.words, sequence.codec).max())


def check_hidden_row(case, role, packed, place, implementations):
    packed = packed or role == VALUE
    clean, originals = case.make()
    index = ROLES.index(role)
    spoiled = list(clean)
    sequence = clean[index]
    packed_tokens, tokens = case.lengths[0]
    if packed:
        row = place % packed_tokens
        token = case.sink + row
        x = originals[index].copy()
        for sequences, number in ((clean, 0.0), (spoiled, np.nan)):
            x[:, :, row] = number
            made = IMPLEMENTATIONS["torch"].encode(x, case.dtype, sequence.codec, sequence.scale)
            sequences[index] = replace(sequence, packed=made)
    else:
        slot = place % (tokens - packed_tokens)
        token = slot if slot < case.sink else slot + packed_tokens
        for sequences, number in ((clean, 0.0), (spoiled, np.nan)):
            exact = sequence.exact.copy()
            exact[:, :, slot] = number
            sequences[index] = replace(sequence, exact=exact)
    q, mask = case.queries(), case.make_mask()
    given = {"scale": case.scale, "mask": mask, "sink_logits": case.sink_logits()}
    last = np.arange(case.length)[:, None] + tokens - case.length
    seen = np.arange(tokens) <= last if isinstance(mask, str) else mask
    sees = np.broadcast_to(seen, (1, q.shape[1], case.length, tokens))[..., token]
    for name, implementation in implementations.items():
        found, expected = (
            implementation.attend(q, case.dtype, s, **given) for s in (spoiled, clean)
        )
        assert np.isnan(found[sees]).all(), name
        assert found[~sees].tobytes() == expected[~sees].tobytes(), name
