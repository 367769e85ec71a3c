"""The packed format, read by a stranger: docs/FORMAT.md in plain Python and numpy.

The first half of this file is a decoder and an encoder of the format, written from the page alone
and in its words, in float64, without speed. It imports nothing of the package: take it as the
example for a decoder in another language. Numbers in brackets, such as (4.1), are sections of the
page. The second half holds the page, the test vectors and the package against it.

Arrays are of one batch row and one KV head, so a block of rows is [64, D].
"""

import json
import math
import re
from functools import cache
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "FORMAT.md").read_text(encoding="utf-8")
VECTORS = sorted((ROOT / "tests" / "vectors").glob("*.safetensors"))

BLOCK = 64
ROLES = ("key", "value")  # the number of a role is its place (1)
ROTATIONS = ("cascade", "rotor3", "iso4", "planar2", "hadamard", "dense", "identity")  # too (4.3)
BITS = (2, 3, 4, 8)
TRELLIS_BITS = (2, 3)


# ---------------------------------------------------------------------------- the generator (4.1)

G = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def mix(z):
    """The finalizer of SplitMix64."""
    z &= MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def stream_key(name):
    k = 0
    for w in name:
        k = mix((k + G & MASK) ^ w)
    return k


def integers(name):
    """The integers of the stream that is named by a tuple, without end."""
    k = stream_key(name)
    return (mix(k + (i + 1) * G) for i in count())


def signs(name, n):
    """The first n signs of a stream."""
    return np.array([-1.0 if z >> 63 else 1.0 for z in islice(integers(name), n)])


def uniforms(name):
    return ((z >> 11) * 2.0**-53 for z in integers(name))


def disc_points(name):
    u = uniforms(name)
    while True:
        x, y = 2 * next(u) - 1, 2 * next(u) - 1
        if 0 < x * x + y * y < 1:
            yield x, y


def circle_points(name):
    """The disc points, each divided by its norm."""
    for x, y in disc_points(name):
        norm = math.sqrt(x * x + y * y)
        yield x / norm, y / norm


class Sphere:
    """Points on spheres; every draw goes on where the one before ended."""

    def __init__(self, name):
        self.disc_points = disc_points((*name, 0))
        self.uniforms = uniforms((*name, 1))

    def point(self, d):
        m = (d + 1) // 2
        discs = list(islice(self.disc_points, m))
        cuts = [0.0, *sorted(islice(self.uniforms, m - 1)), 1.0]
        point = []
        for j, (x, y) in enumerate(discs):
            g = cuts[j + 1] - cuts[j]
            r = math.sqrt(g / (x * x + y * y))
            point += [r * x, r * y]
        point = np.array(point)
        if d % 2:
            point = point[:-1]
            point = point / np.sqrt(in_order(point * point))
        return point


def in_order(terms, axis=0):
    """A sum that adds one term after the other (numpy's own sums do not)."""
    return np.add.accumulate(terms, axis=axis).take(-1, axis=axis)


# ---------------------------------------------------------------------------- stages (4.2)


def left(a, b, c, d):
    return np.array([[a, -b, -c, -d], [b, a, d, -c], [c, -d, a, b], [d, c, -b, a]])


def sandwich(a, b, c, d):
    return np.array(
        [
            [a * a - b * b - c * c + d * d, 2 * (a * b - c * d), 2 * (a * c + b * d)],
            [-2 * (a * b + c * d), a * a - b * b + c * c - d * d, 2 * (a * d - b * c)],
            [2 * (b * d - a * c), -2 * (a * d + b * c), a * a + b * b - c * c - d * d],
        ]
    )


def plane(c, s):
    return np.array([[c, -s], [s, c]])


def odd(r):
    """The block E_r."""
    if r == 3:
        return 2 / 3 * np.ones((3, 3)) - np.eye(3)
    if r == 5:
        return np.eye(5) - 2 / 5 * np.ones((5, 5))
    e = 2 - math.sqrt(2)
    y = 1 / math.sqrt(3 * e * e + 4)
    x = -e * y
    return np.array([[x if (j - i) % 7 in {1, 2, 4} else y for j in range(7)] for i in range(7)])


def radices(D):
    found = []
    for r in (4, 3, 2, 5, 7):
        while D % r == 0:
            found.append(r)
            D //= r
    return found


def apply_stage(matrix, blocks, stride=1, first=0):
    """Apply a stage, given as the blocks of its groups 0, 1, ..., to the columns of a matrix."""
    for g, block in enumerate(blocks):
        r = len(block)
        o, i = divmod(g, stride)
        channels = [first + (o * r + t) * stride + i for t in range(r)]
        matrix[channels] = in_order(block[:, :, None] * matrix[channels], axis=1)


# ---------------------------------------------------------------------------- rotations (4.3)


def cascade_block(r, g, s):
    """The block of group g of a stage of radix r with the signs s."""
    if r == 4:
        return left(*s[4 * g : 4 * g + 4]) / 2
    if r == 2:
        q = math.sqrt(1 / 2)
        return plane(q, q * s[g])
    t = s[r * g : r * g + r]
    return t[:, None] * odd(r) * t


def hadamard_block(r):
    if r == 4:
        return np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    if r == 2:
        q = math.sqrt(1 / 2)
        return np.array([[q, q], [q, -q]])
    return odd(r)


@cache
def rotation_matrix(name, D, seed, layer, role):
    """The matrix C: its stages, applied to the identity."""
    n = (seed, layer, ROLES.index(role), ROTATIONS.index(name), D)
    C = np.eye(D)
    if name == "cascade":
        stride = 1
        for k, r in enumerate(radices(D)):
            s = signs((*n, k), D)
            apply_stage(C, [cascade_block(r, g, s) for g in range(D // r)], stride)
            stride *= r
    elif name == "rotor3":
        sphere = Sphere((*n, 0))
        apply_stage(C, [sandwich(*sphere.point(4)) for _ in range(D // 3)])
        if D % 3 == 2:
            circle = circle_points((*n, 1))
            apply_stage(C, [plane(*next(circle))], first=D - 2)
    elif name == "iso4":
        sphere = Sphere((*n, 0))
        apply_stage(C, [left(*sphere.point(4)) for _ in range(D // 4)])
    elif name == "planar2":
        circle = circle_points((*n, 0))
        apply_stage(C, [plane(*next(circle)) for _ in range(D // 2)])
    elif name == "hadamard":
        stride = 1
        s = signs((*n, 0), D)
        for k, r in enumerate(radices(D)):
            blocks = [hadamard_block(r) for _ in range(D // r)]
            if k == 0:
                blocks = [block * s[r * g : r * g + r] for g, block in enumerate(blocks)]
            apply_stage(C, blocks, stride)
            stride *= r
    elif name == "dense":
        sphere = Sphere((*n, 0))
        C[-1, -1] = signs((*n, 1), 1)[0]
        for k in range(2, D + 1):
            u = sphere.point(k)
            u[0] -= 1
            uu = in_order(u * u)
            if uu > 0:
                M = C[-k:]
                uM = in_order(u[:, None] * M)
                C[-k:] = M - u[:, None] * uM * (2 / uu)
    return C


# ---------------------------------------------------------------------------- packing (3)


def packed_axis_first(a, role):
    """[A, lanes] of a block [64, D], and back: the packed axis is the channel for keys."""
    return a.T if role == "key" else a


def pack(codes, bits, role):
    """Words [R, lanes] of codes [64, D]."""
    codes = packed_axis_first(codes, role)
    if bits == 3:
        return np.concatenate([pack_plane(codes & 3, 2), pack_plane(codes >> 2, 1)])
    return pack_plane(codes, bits)


def place(i, bits):
    """The word and its lowest bit that position i of the packed axis has in a plane."""
    if bits == 1:
        return i // 32, 4 * (i % 16 // 2) + 2 * (i // 16 % 2) + i % 2
    return i // (32 // bits), bits * (i % (32 // bits))


def pack_plane(codes, bits):
    A, lanes = codes.shape
    words = np.zeros((-(-A * bits // 32), lanes), np.uint32)
    for i in range(A):
        word, bit = place(i, bits)
        words[word] |= codes[i].astype(np.uint32) << np.uint32(bit)
    return words


def unpack(words, bits, role, D):
    """Codes [64, D] of words [R, lanes]."""
    A = D if role == "key" else BLOCK
    if bits == 3:
        low = -(-A // 16)
        codes = unpack_plane(words[:low], 2, A) | unpack_plane(words[low:], 1, A) << 2
    else:
        codes = unpack_plane(words, bits, A)
    return packed_axis_first(codes, role)


def unpack_plane(words, bits, A):
    codes = np.zeros((A, words.shape[1]), np.uint8)
    for i in range(A):
        word, bit = place(i, bits)
        codes[i] = words[word] >> np.uint32(bit) & np.uint32(2**bits - 1)
    return codes


# ---------------------------------------------------------------------------- encoding (5)


@cache
def codebook(bits):
    """The magnitudes of a codebook, out of the page."""
    rows = section("Codebooks").splitlines()
    if bits == 8:
        rows = [row for row in rows if row.startswith("    ")]
    else:
        rows = [row for row in rows if row.startswith(f"| {bits} |")]
    if bits in TRELLIS_BITS:
        return np.array(rows[0].split("|")[2].split(), np.float32) / 64
    return hex_words(" ".join(rows), np.float32)


def boundaries(bits):
    m = codebook(bits).astype(np.float64)
    return ((m[:-1] + m[1:]) / 2).astype(np.float32)


def nearest_level(z, bits):
    """4 and 8 bits: the codes of z. The index is the number of boundaries t <= |z|."""
    index = np.searchsorted(boundaries(bits), np.abs(z), side="right")
    return ((z < 0) * 2 ** (bits - 1) + index).astype(np.uint8)


def level(c, s, h, bits):
    """2 and 3 bits: the level of a code of subset c."""
    magnitude = codebook(bits).astype(np.float64)[(c ^ 3 * s) + 4 * h]
    return np.where(s, -magnitude, magnitude)


def subset(p, p1, p2, p3):
    """The subset c of a code with the path bit p, and with p1, p2, p3 in the codes before it."""
    return p2 + 2 * (p ^ p1 ^ p3)


def cheapest_path(z, bits, start=0, state=0):
    """2 and 3 bits: the codes of z along its first axis, [A, lanes].

    The codes before ``start`` are there already, come out as 0, and leave the state, [lanes].
    """
    A, lanes = z.shape
    rests = [(s, h) for s in (0, 1) for h in range(bits - 1)]
    sums = np.where(np.arange(8)[:, None] == state, 0.0, np.inf) * np.ones(lanes)
    rest, comes_from = np.zeros((2, A, 8, lanes), int)
    for i in range(start, A):
        errors = [[(z[i] - level(c, s, h, bits)) ** 2 for s, h in rests] for c in range(4)]
        cost = np.min(errors, axis=1)
        least = np.array([2 * s + 4 * h for s, h in rests])[np.argmin(errors, axis=1)]
        sums_before, sums = sums, np.zeros((8, lanes))
        for t in range(8):
            befores = (t // 2, t // 2 + 4)
            c = [subset(t % 2, u & 1, u >> 1 & 1, u >> 2) for u in befores]
            two = [sums_before[u] + cost[c[j]] for j, u in enumerate(befores)]
            wins = two[1] < two[0]
            sums[t] = np.where(wins, two[1], two[0])
            rest[i, t] = np.where(wins, least[c[1]], least[c[0]])
            comes_from[i, t] = np.where(wins, *reversed(befores))
    codes, state, lane = np.zeros((A, lanes), np.uint8), sums.argmin(axis=0), np.arange(lanes)
    for i in reversed(range(start, A)):
        codes[i] = state % 2 + rest[i, state, lane]
        state = comes_from[i, state, lane]
    return codes


def state_behind(codes):
    """The state behind the last position of codes [A, lanes]."""
    state = np.zeros(codes.shape[1], int)
    for code in codes:
        state = state << 1 & 7 | code & 1
    return state


def levels(codes, bits, role):
    """The numbers that codes [64, D] stand for."""
    if bits not in TRELLIS_BITS:
        magnitude = codebook(bits).astype(np.float64)[codes & (2 ** (bits - 1) - 1)]
        return np.where(codes >> (bits - 1), -magnitude, magnitude)
    codes = packed_axis_first(codes, role)
    p = np.concatenate([np.zeros((3, codes.shape[1]), np.uint8), codes & 1])
    c = subset(p[3:], p[2:-1], p[1:-2], p[:-3])
    return packed_axis_first(level(c, codes >> 1 & 1, codes >> 2, bits), role)


def centre(x):
    """Step 1: the centre mu of a block of keys."""
    finite = np.isfinite(x).all(axis=1)
    return np.clip(x[finite].sum(axis=0) / BLOCK, -65504, 65504).astype(np.float16)


def prefill(x):
    """The channel scale c that a first block x - mu of keys, or x of values, gives."""
    channels, r = np.sqrt(np.mean(x * x, axis=0)), np.sqrt(np.mean(x * x))
    usable = np.isfinite(r) and r > 0
    c = np.sqrt(np.maximum(channels / r, 1 / 64)) if usable else np.ones(x.shape[1])
    return c.astype(np.float32)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def encode(x, C, bits, role, mu=0.0, c=1.0, kept=None):
    """Steps 2 to 5: codes and scales of a block of rows.

    ``kept`` are the codes of the first rows, where a block is filled up (8).
    """
    D = x.shape[1]
    w = (x - np.float64(mu)) / np.float64(c) @ C.T
    n = np.sqrt(np.sum(w * w, axis=1, keepdims=True))
    r = (n / np.sqrt(D)).astype(np.float16)
    special = (r == 0) | ~np.isfinite(r)
    z = np.where(special, 0, np.sqrt(D) * w / n)
    codes = code_numbers(z, bits, role, kept)
    l = levels(codes, bits, role)  # noqa: E741
    along = np.sum(l * z, axis=1, keepdims=True)
    t = 1 if role == "key" else VALUE_SHRINK[bits]
    scales = (t * n * np.sqrt(D) / np.maximum(along, D / 2)).astype(np.float16)
    scales[r == 0] = 0
    scales[~np.isfinite(r) | ~np.isfinite(scales)] = np.nan
    return codes, scales[:, 0]


def code_numbers(z, bits, role, kept=None):
    """Step 4: the codes of z; the first rows have those that are kept."""
    kept = np.zeros((0, z.shape[1]), np.uint8) if kept is None else kept
    if bits not in TRELLIS_BITS:
        codes = nearest_level(z, bits)
    elif role == "key":
        codes = cheapest_path(z.T, bits).T
    else:
        codes = cheapest_path(z, bits, len(kept), state_behind(kept))
    return np.concatenate([kept, codes[len(kept) :]])


# ---------------------------------------------------------------------------- decoding (6, 7)


def decode(codes, scales, C, bits, role, mu=0.0, c=1.0):
    """The rows that codes and scales stand for. C^-1 is C^T: row by row, times C from the right."""
    return mu + c * ((scales.astype(np.float64)[:, None] * levels(codes, bits, role)) @ C)


def attention(queries, key, value, sink, bits):
    """Causal attention (7) of queries [L, D], the last of which sees all tokens.

    bits are those of the keys. key and value have the packed tokens as levels l [P, D], scale [P],
    mu of the block of each token [P, D] (keys), the rotation C, the channel scale c, and the exact
    rows [E, D].
    """
    a = queries.shape[1] ** -0.5
    packed = len(key.scale)
    tokens = packed + len(key.exact)
    outputs = []
    for at, q in enumerate(queries, start=tokens - len(queries)):
        turned = key.C @ (key.c * q)
        noise = SCORE_NOISE[bits] * (a * np.linalg.norm(turned) * key.scale) ** 2
        packed_scores = a * (key.scale * (key.l @ turned) + key.mu @ q) - noise
        exact_scores = a * (key.exact @ q)
        scores = np.concatenate([exact_scores[:sink], packed_scores, exact_scores[sink:]])
        scores[at + 1 :] = -np.inf
        p = np.exp(scores - scores.max())
        p_sink, p_packed, p_tail = np.split(p / p.sum(), [sink, sink + packed])
        out = value.c * (value.C.T @ ((p_packed * value.scale) @ value.l))
        outputs.append(out + np.concatenate([p_sink, p_tail]) @ value.exact)
    return np.array(outputs)


# ---------------------------------------------------------------------------- reading the page


def section(title):
    """The text under the heading that ends with a title, up to the next heading."""
    (text,) = re.findall(rf"^##+ [^\n]*{re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return text


def table(title):
    """The first table under a heading, as a list of rows without its head."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def row_of_bits(name):
    """A row of a table by bits."""
    ((row,),) = [re.findall(rf"^ *\| {name} \|(.*)\|$", PAGE, re.M)]
    return row.split("|")


def hex_words(text, dtype):
    """The floats whose bit patterns stand in a text."""
    size = np.dtype(dtype).itemsize
    words = re.findall(rf"\b[0-9A-F]{{{2 * size}}}\b", text)
    return np.array([int(word, 16) for word in words], f"u{size}").view(dtype)


VALUE_SHRINK = {b: int(t) / 512 for b, t in zip(BITS, row_of_bits("512 t"), strict=True)}
SCORE_NOISE = dict(zip(BITS, map(float, row_of_bits("g")), strict=True))


# ============================================================================ tests: vectors (9)


@pytest.fixture(scope="module", params=VECTORS, ids=lambda path: path.stem)
def vector(request):
    with safe_open(request.param, "numpy") as file:
        meta = json.loads(file.metadata()["rotormlx"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heads = [(b, k) for b in range(meta["batch"]) for k in range(meta["kv_heads"])]
    return SimpleNamespace(**meta, arrays=arrays, heads=heads)


def head(vector, role, b, k):
    """All that a vector has of one role, batch row and KV head; blocks of tokens come apart."""
    arrays, D = vector.arrays, vector.head_dim
    x = arrays[f"{role}.input"][b, k].reshape(vector.blocks, BLOCK, D).astype(np.float64)
    channel_scale = arrays.get(f"{role}.channel_scale")
    return SimpleNamespace(
        x=x,
        C=rotation_matrix(vector.rotation, D, vector.seed, vector.layer, role),
        mu=arrays["key.centres"][b, k].astype(np.float64) if role == "key" else 0 * x[:, 0],
        c=np.ones(D) if channel_scale is None else channel_scale[k].astype(np.float64),
        exact=arrays[f"{role}.exact"][b, k].astype(np.float64),
    )


def unpack_head(vector, role, bits, b, k):
    """Codes [N, 64, D] and scales [N, 64]."""
    words = vector.arrays[f"{role}.words.{bits}"][b, k]
    codes = [unpack(block, bits, role, vector.head_dim) for block in words]
    return np.array(codes), vector.arrays[f"{role}.scales.{bits}"][b, k]


def assert_close(actual, stored):
    """The bound of section 9: 1e-5 of the largest absolute value of the array."""
    np.testing.assert_allclose(actual, stored, rtol=0, atol=1e-5 * np.abs(stored).max())


def assert_same_bits(actual, stored):
    assert actual.dtype == stored.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(np.uint8), np.ascontiguousarray(stored).view(np.uint8)
    )


def test_there_are_vectors():
    assert VECTORS


@pytest.mark.parametrize("role", ROLES)
def test_vector_rotation(vector, role):
    rows = vector.arrays[f"{role}.rotation"]
    C = rotation_matrix(vector.rotation, vector.head_dim, vector.seed, vector.layer, role)
    np.testing.assert_allclose(rows, C[: len(rows)], rtol=0, atol=2**-24)


def test_vector_centres(vector):
    centres = [
        [[centre(x) for x in head(vector, "key", b, k).x] for k in range(vector.kv_heads)]
        for b in range(vector.batch)
    ]
    assert_same_bits(np.array(centres), vector.arrays["key.centres"])


@pytest.mark.parametrize("role", ROLES)
def test_vector_channel_scale(vector, role):
    """An input; what `prefill` would take (5) stands beside it."""
    assert (f"{role}.channel_scale" in vector.arrays) == vector.scaled
    first = [head(vector, role, 0, k) for k in range(vector.kv_heads)]
    found = [prefill(h.x[0] - h.mu[0]) for h in first]
    np.testing.assert_allclose(found, vector.arrays[f"{role}.prefill"], rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_vector_encoding(vector, role, bits):
    """Words and scales, bit for bit."""
    words = vector.arrays[f"{role}.words.{bits}"]
    scales = vector.arrays[f"{role}.scales.{bits}"]
    for b, k in vector.heads:
        h = head(vector, role, b, k)
        for n in range(vector.blocks):
            codes, s = encode(h.x[n], h.C, bits, role, h.mu[n], h.c)
            assert_same_bits(pack(codes, bits, role), words[b, k, n])
            assert_same_bits(s, scales[b, k, n])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_vector_decoding(vector, role, bits):
    """Codes and decoded numbers of the first tokens, out of the words."""
    stored_codes = vector.arrays[f"{role}.codes.{bits}"]
    stored = vector.arrays[f"{role}.decoded.{bits}"]
    first = stored.shape[2]
    decoded = np.zeros(stored.shape)
    for b, k in vector.heads:
        h = head(vector, role, b, k)
        codes, scales = unpack_head(vector, role, bits, b, k)
        np.testing.assert_array_equal(codes[0, :first], stored_codes[b, k])
        decoded[b, k] = decode(codes[0], scales[0], h.C, bits, role, h.mu[0], h.c)[:first]
    assert_close(decoded, stored)


@pytest.mark.parametrize("bits", BITS)
def test_vector_output(vector, bits):
    """Attention over sink, packed tokens and tail, out of words and scales."""
    query = vector.arrays["query"].astype(np.float64)
    packed = BLOCK * vector.blocks - vector.missing
    output = np.zeros(query.shape)
    for b, h in np.ndindex(query.shape[:2]):
        k = h // (query.shape[1] // vector.kv_heads)
        sides = []
        for role in ROLES:
            side = head(vector, role, b, k)
            codes, scales = unpack_head(vector, role, bits, b, k)
            side.l = np.concatenate([levels(block, bits, role) for block in codes])[:packed]
            side.scale = scales.reshape(-1)[:packed].astype(np.float64)
            side.mu = np.repeat(side.mu, BLOCK, axis=0)[:packed]
            sides.append(side)
        output[b, h] = attention(query[b, h], *sides, vector.sink, bits)
    assert_close(output, vector.arrays[f"output.{bits}"])


# ============================================================================ tests: the page


CONFIGURATION = {
    "key_bits": ("integer", list(BITS), 4),
    "value_bits": ("integer", list(BITS), 4),
    "rotation": ("string", [*ROTATIONS, "calibrated"], "cascade"),
    "channel_scale": ("string or null", ["none", "prefill", "calibrated", None], None),
    "sink": ("integer", range(2**20), 4),
    "window": ("integer", range(2**20), 64),
    "seed": ("integer", range(2**63), 0),
}


def literal(text):
    """`cascade` is a string, 2^20 - 1 a number; null and 4 are themselves."""
    if power := re.fullmatch(r"2\^(\d+) - 1", text):
        return 2 ** int(power[1]) - 1
    return text.strip("`") if text.startswith("`") else json.loads(text)


def configuration():
    """The table of section 2: for each field its type, values (a list or a range) and default."""
    fields = {}
    for names, kind, values, default in table("2. Configuration"):
        if values.startswith("a name of section 4, or "):
            named = [name for _, name, _ in table("4.3 Names")]
            allowed = [name.strip("`") for name in (*named, values.rpartition(" ")[2])]
        elif " to " in values:
            low, high = map(literal, values.split(" to "))
            allowed = range(low, high + 1)
        else:
            allowed = [literal(value) for value in values.split(", ")]
        for name in re.findall(r"`(\w+)`", names):
            fields[name] = (kind, allowed, literal(default))
    return fields


def test_configuration_table():
    assert configuration() == CONFIGURATION
    assert list(configuration()) == list(CONFIGURATION)
    for _, values, default in configuration().values():
        assert default in values


def test_rotation_numbers():
    rows = [(int(number), name.strip("`")) for number, name, _ in table("4.3 Names")]
    assert rows == list(enumerate(ROTATIONS))


def test_vector_metadata(vector):
    for name in ("rotation", "sink", "seed"):
        _, values, _ = configuration()[name]
        assert getattr(vector, name) in values
    (version,) = re.findall(r"^# .* version (\d+)$", PAGE, re.MULTILINE)
    assert vector.format_version == int(version) == int(table("Versions")[-1][0])


@pytest.mark.parametrize("bits", [4, 8])
def test_codebook(bits):
    """The codebooks are the Lloyd-Max quantizers of N(0, 1), to the last bit of every magnitude.

    A magnitude m is the mean of the normal distribution between the boundaries t below and u above
    it: m (Phi(u) - Phi(t)) = phi(t) - phi(u). Newton's method solves that from where the page is.
    """
    stored = codebook(bits)
    assert len(stored) == 2 ** (bits - 1)
    m = stored.astype(np.float64)
    for _ in range(4):
        t = np.array([0, *(m[:-1] + m[1:]) / 2, np.inf])
        phi = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        beyond = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in t])  # 1 - Phi(t)
        error = m * (beyond[:-1] - beyond[1:]) - (phi[:-1] - phi[1:])
        # How each error moves with its magnitude, and through the boundaries half as much with
        # its magnitude and with the one below or above.
        below = phi[1:-1] * (t[1:-1] - m[1:]) / 2
        above = phi[1:-1] * (m[:-1] - t[1:-1]) / 2
        slope = np.diag(beyond[:-1] - beyond[1:]) + np.diag([0, *below]) + np.diag([*above, 0])
        slope += np.diag(below, -1) + np.diag(above, 1)
        m = m - np.linalg.solve(slope, error)
    assert_same_bits(m.astype(np.float32), stored)


# ---------------------------------------------------------------------------- the worked row (10)


def worked(pattern):
    """What a pattern finds in section 10: a tuple of its groups for each place."""
    found = [match.groups() for match in re.finditer(pattern, section("10. A worked row"))]
    assert found, f"section 10 has no {pattern}"
    return found


@pytest.fixture(scope="module")
def row():
    """The block of section 10 and its rotation."""
    ((D, seed, layer, role, rotation),) = worked(
        r"D = (\d+), seed (\d+), layer (\d+), role (\w+), rotation `(\w+)`"
    )
    ((token, first, second, last, zeros),) = worked(
        r"Token (\d+) .* x = \((.*), (.*), \.\.\., (.*)\), the other (\d+) are zero"
    )
    D, token = int(D), int(token)
    x = np.zeros((BLOCK, D))
    x[token] = np.linspace(float(first), float(last), D)
    assert x[token, 1] == float(second)
    assert np.sum(~x.any(axis=1)) == int(zeros)
    name = (int(seed), int(layer), ROLES.index(role), ROTATIONS.index(rotation), D)
    C = rotation_matrix(rotation, D, int(seed), int(layer), role)
    mu = centre(x).astype(np.float64)
    return SimpleNamespace(D=D, token=token, x=x, name=name, C=C, mu=mu, y=x[token] - mu)


def test_worked_streams(row):
    ((first, second),) = worked(rf"The radices of {row.D} are (\d) and (\d)\.")
    assert [int(first), int(second)] == radices(row.D)
    streams = worked(r"stream \((.*)\) +key ([0-9A-F]{16}) +([+ -]+)\n")
    assert len(streams) == len(radices(row.D))
    for k, (name, key, drawn) in enumerate(streams):
        assert tuple(map(int, name.split(", "))) == (*row.name, k)
        assert stream_key((*row.name, k)) == int(key, 16)
        written = "".join("+" if s > 0 else "-" for s in signs((*row.name, k), row.D))
        assert written == drawn.replace(" ", "")


def test_worked_centre(row):
    ((of, written),) = worked(r"The centre is x / (\d+), exactly: float16\n\n +([0-9A-F ]+)\n")
    assert_same_bits(centre(row.x), hex_words(written, np.float16))
    np.testing.assert_array_equal(row.mu, row.x[row.token] / int(of))


def test_worked_rotation(row):
    ((factor, of, norm),) = worked(r"y = x (\d+)/(\d+), its norm is ([\d.]+),")
    np.testing.assert_array_equal(row.y, row.x[row.token] * int(factor) / int(of))
    assert f"{np.linalg.norm(row.y):.6f}" == norm
    ((written,),) = worked(r"C y is\n\n([-\d.\s]+)\n\n")
    np.testing.assert_allclose(row.C @ row.y, np.array(written.split(), float), rtol=0, atol=5.1e-7)


def test_worked_path(row):
    ((bits, subsets, numbers),) = worked(
        r"At (\d) bits the codes are [\d ]+, of the subsets ([\d ]+)\. Their levels\n"
        r"are, in 64ths, ([-\d ]+):"
    )
    codes, _ = encode(row.x, row.C, int(bits), "key", row.mu)
    found = levels(codes, int(bits), "key")[row.token]
    np.testing.assert_array_equal(64 * found, np.array(numbers.split(), int))
    s, h = codes[row.token] >> 1 & 1, codes[row.token] >> 2
    c = np.array(subsets.split(), int)
    np.testing.assert_array_equal(level(c, s, h, int(bits)), found)


@pytest.mark.parametrize("bits", [4, 3])
def test_worked_words(row, bits):
    text = section("10. A worked row")
    text = text.split(f"At {bits} bits the codes are ")[1].split("\nAt ")[0]
    written = [int(code) for code in re.match(r"[\d ]+", text)[0].split()]
    codes, scales = encode(row.x, row.C, bits, "key", row.mu)
    np.testing.assert_array_equal(codes[row.token], written)
    words = [(r, row.token, word) for r, word in enumerate(pack(codes, bits, "key")[:, row.token])]
    assert set(re.findall(r"lie in lane (\d+)", text)) <= {str(row.token)}
    places = re.findall(r"words\[(\d+)\]\[(\d+)\] = ([0-9A-F]{8})", text)
    assert [(int(r), int(lane), int(word, 16)) for r, lane, word in places] == words
    ((lane, scale),) = re.findall(r"scale\[(\d+)\] += ([0-9A-F]{4})", text)
    assert int(lane) == row.token
    assert_same_bits(scales[row.token], hex_words(scale, np.float16)[0])


def test_worked_decoding(row):
    ((written, bits),) = worked(r"The first four coordinates decode to (.*) at (\d) bits")
    bits = int(bits)
    codes, scales = encode(row.x, row.C, bits, "key", row.mu)
    codes = unpack(pack(codes, bits, "key"), bits, "key", row.D)
    decoded = decode(codes, scales, row.C, bits, "key", row.mu)[row.token]
    assert ", ".join(f"{number:.6f}" for number in decoded[:4]) == written


# ---------------------------------------------------------------------------- special cases (5)


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_level(bits):
    """Every level is its own nearest; a tie goes to the larger magnitude, either zero to code 0."""
    codes = np.arange(2**bits, dtype=np.uint8)
    assert_same_bits(nearest_level(levels(codes, bits, "value"), bits), codes)
    ties = boundaries(bits).astype(np.float64)
    assert_same_bits(nearest_level(ties, bits), codes[1 : 2 ** (bits - 1)])
    assert_same_bits(nearest_level(-ties, bits), codes[2 ** (bits - 1) + 1 :])
    assert not nearest_level(np.array([0.0, -0.0]), bits).any()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_any_codes_are_a_path(bits, role):
    """Its levels are numbers that it costs nothing to code, so they are coded by it."""
    codes = np.random.default_rng(2).integers(0, 2**bits, (BLOCK, 24), dtype=np.uint8)
    assert_same_bits(code_numbers(levels(codes, bits, role), bits, role), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_scale_beyond_float16(bits):
    """A row that is not special, but whose levels are so short that its scale is a NaN."""
    x = np.ones((BLOCK, 16))
    x[9] = 65504
    codes, scales = encode(x, np.eye(16), bits, "key")
    assert np.isnan(scales[9])
    assert np.isfinite(np.delete(scales, 9)).all()
    assert_same_bits(codes[9], codes[8])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", BITS)
def test_special_rows(bits, bad):
    """A zero row has zero scale; one that is not finite decodes to NaN; neither reaches another."""
    x = np.random.default_rng(1).standard_normal((BLOCK, 16))
    x[9] = 0
    broken = x.copy()
    broken[9, 3] = bad
    assert_same_bits(centre(broken), centre(x))
    C = rotation_matrix("cascade", 16, 0, 0, "value")
    codes, scales = encode(x, C, bits, "value")
    assert scales[9] == 0
    assert not decode(codes, scales, C, bits, "value")[9].any()
    broken_codes, broken_scales = encode(broken, C, bits, "value")
    assert np.isnan(decode(broken_codes, broken_scales, C, bits, "value")[9]).all()
    assert_same_bits(broken_codes, codes)
    assert_same_bits(np.delete(broken_scales, 9), np.delete(scales, 9))


@pytest.mark.parametrize("bits", BITS)
def test_too_large(bits):
    """A centre is clipped to float16; a row that is too large for float16 is special."""
    x = np.zeros((BLOCK, 16))
    zeros, _ = encode(x, np.eye(16), bits, "value")
    x[9, 3] = -1e9
    assert_same_bits(centre(x), np.where(np.arange(16) == 3, -65504, 0).astype(np.float16))
    codes, scales = encode(x, rotation_matrix("cascade", 16, 0, 0, "value"), bits, "value")
    assert np.isnan(scales[9])
    assert_same_bits(codes, zeros)


# ============================================================================ tests: the package


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("name", ROTATIONS)
def test_package_rotation(name, head_dim):
    """The one place where the package is held against the page directly."""
    from rotormlx.codec.rotation import rotation

    at = {"seed": 2**63 - 25, "layer": 17, "role": "value"}
    C = rotation_matrix(name, head_dim, **at)
    np.testing.assert_allclose(C @ C.T, np.eye(head_dim), rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotation(name, head_dim, **at).matrix, C, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 3, 17, 63])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_package_fills_up_a_block(role, bits, kept):
    """No vector was ever trimmed: where rows are kept, the package goes on as the page does (8)."""
    from rotormlx.codec import reference, trellis
    from rotormlx.codec.format import codec
    from rotormlx.config import RotorConfig

    chosen = codec(RotorConfig(bits, bits), 16, layer=0, role=role)
    C = rotation_matrix("cascade", 16, 0, 0, role)
    rng = np.random.default_rng(kept)
    before, x = rng.standard_normal((2, BLOCK, 16))
    mu = centre(before) if role == "key" else np.zeros(16)
    first, _ = encode(before, C, bits, role, mu)
    expected, scales = encode(x, C, bits, role, mu, kept=first[:kept])

    words = pack(first, bits, role)
    packed = reference.encode(
        x[None, None],
        chosen,
        centres=mu[None, None, None],
        start=kept,
        state=trellis.state_after(words, kept) if bits in TRELLIS_BITS and role == "value" else 0,
    )
    mask = chosen.kept_bits(kept)
    filled = words & mask | packed.words[0, 0, 0] & ~mask
    assert_same_bits(filled, pack(expected, bits, role))
    assert_same_bits(packed.scales[0, 0, 0, kept:], scales[kept:])


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_package_ties(bits):
    """The vectors have no ties. Here sums are exact, and many of them equal."""
    from rotormlx.codec import trellis

    z = np.random.default_rng(4).integers(-16, 17, (BLOCK, 400)) / 8
    codes = cheapest_path(z, bits)
    assert_same_bits(trellis.encode(z, bits).astype(np.uint8), codes)
    assert_same_bits(trellis.encode(z.astype(np.float32), bits).astype(np.uint8), codes)
