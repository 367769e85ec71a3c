"""The rotations, which spread a vector's outliers before its coordinates are quantized.

Most rotations are a list of stages. A stage mixes channels in small groups, with one orthogonal
block per group: radix 4 multiplies by a rotor from one side, radix 3 is the sandwich product, and
radix 2 rotates in a plane. The **cascade** has as many stages, with growing stride, as it takes to
mix every channel with every other. ``rotor3``, ``iso4`` and ``planar2`` mix each channel at most
once. ``dense`` is a matrix instead of a list of stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from rotormlx.codec import algebra
from rotormlx.codec.random_stream import Floats, Sphere, Stream, sequential_sum
from rotormlx.config import CALIBRATED, ROTATIONS

KEY, VALUE = "key", "value"
ROLES = (KEY, VALUE)

# The radices of stages; a head_dim with another prime factor is refused.
RADICES = (4, 3, 2, 5, 7)


@dataclass(frozen=True, eq=False)
class Stage:
    """Orthogonal blocks over groups of channels.

    Group ``(o, i)`` mixes the ``radix`` channels ``start + (o * radix + r) * stride + i`` for
    r = 0 .. radix - 1. Channels outside all groups stay unchanged.

    Args:
        start: First channel of the stage.
        stride: Distance between the channels of a group.
        kind: Kind of the blocks, a key of ``BLOCKS``.
        coefficients: float64 ``[outer, stride, n]``, the n numbers that define each block.
    """

    start: int
    stride: int
    kind: str
    coefficients: Floats

    @cached_property
    def blocks(self) -> Floats:
        """The orthogonal matrix of each group, float64 ``[outer, stride, radix, radix]``."""
        return _frozen(BLOCKS[self.kind](self.coefficients))

    @property
    def radix(self) -> int:
        """Number of channels in a group."""
        return int(self.blocks.shape[-1])

    @property
    def outer(self) -> int:
        """Number of runs of ``radix * stride`` channels."""
        return int(self.coefficients.shape[0])

    @property
    def stop(self) -> int:
        """The channel after the last channel of the stage."""
        return self.start + self.outer * self.radix * self.stride

    def apply(self, x: Floats) -> Floats:
        """Mix the channels of float64 ``[..., D]``."""
        groups = x[..., self.start : self.stop].reshape(
            *x.shape[:-1], self.outer, self.radix, self.stride
        )
        mixed = np.einsum("oirs,...osi->...ori", self.blocks, groups)
        out = x.copy()
        out[..., self.start : self.stop] = mixed.reshape(*x.shape[:-1], -1)
        return out


@dataclass(frozen=True, eq=False)
class Rotation:
    """A map of head_dim channels, orthogonal unless it is calibrated.

    Args:
        name: One of ``rotormlx.config.ROTATIONS``, or ``calibrated``.
        head_dim: D.
        stages: Stages in the order of application; empty for ``dense``, ``identity`` and a
            calibrated rotation.
        matrix: float64 ``[D, D]``: the whole map, ``rotated = matrix @ x``. For a rotation with
            stages it is their product; a calibrated one has ``[K, D, D]``, one matrix per KV head.
        parameters: Number of real parameters: 4 per rotor, 1 per plane, D² for ``dense``.
        sign_bits: Number of random signs that the rotation also depends on.
        multiply_adds: Number of multiply-adds, or additions alone, for one vector. Constant factors
            common to all channels are not counted, because they are merged into the vector's norm.

    Source: docs/FORMAT.md, section 4.
    """

    name: str
    head_dim: int
    stages: tuple[Stage, ...]
    matrix: Floats
    parameters: int
    sign_bits: int
    multiply_adds: int

    @cached_property
    def inverse(self) -> Floats:
        """The inverse map, ``x = inverse @ rotated``: float64, in the shape of ``matrix``."""
        return _frozen(np.linalg.inv(self.matrix))

    @property
    def has_stages(self) -> bool:
        """Whether the map is a product of stages (none for ``identity``), and so orthogonal."""
        return bool(self.stages) or self.name == "identity"

    @property
    def is_per_head(self) -> bool:
        """Whether every KV head has its own matrix."""
        return self.matrix.ndim == 3

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the matrix, in hexadecimal."""
        shape = "x".join(map(str, self.matrix.shape)).encode()
        return hashlib.sha256(shape + self.matrix.tobytes()).hexdigest()


def check_head_dim(head_dim: int) -> None:
    """Refuse a head_dim that the rotations do not support.

    Raises:
        ValueError: If it is not a multiple of 8 from 8 to 1024 with no prime factor above 7.
    """
    if 8 <= head_dim <= 1024 and head_dim % 8 == 0 and factors(head_dim) is not None:
        return
    raise ValueError(
        f"[rotation] head_dim must be a multiple of 8 from 8 to 1024 whose prime factors are "
        f"2, 3, 5 and 7, but {head_dim} was given; leave this model's cache uncompressed."
    )


@cache
def rotation(
    name: str, head_dim: int, *, seed: int = 0, layer: int = 0, role: str = KEY
) -> Rotation:
    """Return the rotation of one layer's keys or values.

    Args:
        name: One of ``rotormlx.config.ROTATIONS``.
        head_dim: D, see :func:`check_head_dim`.
        seed: Seed of the configuration.
        layer: Index of the layer in the model.
        role: ``"key"`` or ``"value"``.

    Raises:
        ValueError: If an argument is out of range.

    Source: docs/FORMAT.md, section 4.
    """
    check_head_dim(head_dim)
    if name not in ROTATIONS or role not in ROLES or layer < 0:
        raise ValueError(
            f"[rotation] A rotation needs a name of {', '.join(ROTATIONS)}, a role of "
            f"{', '.join(ROLES)} and a layer from 0, but {name!r}, {role!r} and {layer} were given."
        )
    stream = (seed, layer, ROLES.index(role), ROTATIONS.index(name), head_dim)
    return _BUILDERS[name](head_dim, stream)


def calibrated(matrix: npt.ArrayLike) -> Rotation:
    """Return the rotation given by the matrices of a calibration file.

    Args:
        matrix: Invertible matrices ``[K, D, D]``, one per KV head.
    """
    frozen = _frozen(matrix)
    d = frozen.shape[-1]
    made = Rotation(CALIBRATED, d, (), frozen, d * d, 0, d * d)
    # One object per content, because backends cache derived data per object.
    return _calibrated.setdefault(made.digest, made)


def reference_to(chosen: Rotation) -> str:
    """Return a text from which :func:`referred` finds the rotation while it is in use."""
    if chosen.name != CALIBRATED:
        return chosen.name
    _calibrated.setdefault(chosen.digest, chosen)  # a copy may outlive the registered object
    return f"{CALIBRATED}:{chosen.digest}"


def referred(text: str) -> Rotation | None:
    """Return the calibrated rotation for a text of :func:`reference_to`; None for another name.

    Raises:
        ValueError: If the rotation is no longer in use.
    """
    name, _, digest = text.partition(":")
    if name != CALIBRATED:
        return None
    if (alive := _calibrated.get(digest)) is None:
        raise ValueError(
            f"[rotation] A calibrated rotation must be given as an object that is in use, but "
            f"{text[:30]!r} refers to none; pass a result of rotormlx.codec.rotation.calibrated."
        )
    return alive


# Calibrated rotations by digest. An entry disappears with the last cache that uses it.
_calibrated: WeakValueDictionary[str, Rotation] = WeakValueDictionary()


# ---- the named rotations ------------------------------------------------------------------------

Name = tuple[int, ...]


def _cascade(d: int, name: Name) -> Rotation:
    stages, sign_bits, adds, stride = [], 0, 0, 1
    for index, radix in enumerate(factors(d) or ()):
        groups = d // radix
        signs = _sign_rows(groups, 1 if radix == 2 else radix, (*name, index))
        kind, coefficients = f"Odd{radix}", signs
        if radix == 4:
            kind, coefficients = "Left", signs / 2
        elif radix == 2:
            kind = "Plane"
            coefficients = np.concatenate([np.ones_like(signs), signs], 1) * np.sqrt(0.5)
        stages.append(_stage(stride, kind, coefficients))
        sign_bits += signs.size
        adds += groups * _SIGNED_MULTIPLY_ADDS[radix]
        stride *= radix
    return _from_stages("cascade", d, stages, 0, sign_bits, adds)


def _hadamard(d: int, name: Name) -> Rotation:
    stages, adds, stride = [_stage(1, "Signs", Stream(*name, 0).signs(d)[:, None])], 0, 1
    for radix in factors(d) or ():
        groups = d // radix
        if radix in (2, 4):
            stages.append(_stage(stride, f"Walsh{radix}", np.zeros((groups, 0))))
        else:
            stages.append(_stage(stride, f"Odd{radix}", np.ones((groups, radix))))
        adds += groups * _HADAMARD_MULTIPLY_ADDS[radix]
        stride *= radix
    return _from_stages("hadamard", d, stages, 0, d, adds)


def _rotor3(d: int, name: Name) -> Rotation:
    """Return the published method: sandwich products of triples; a plane if a pair is left over."""
    groups, rest = divmod(d, 3)
    stages = [_stage(1, "Sandwich", _rotors(groups, (*name, 0)))]
    parameters, multiply_adds = 4 * groups, 9 * groups
    if rest == 2:
        stages.append(_stage(1, "Plane", _planes(1, (*name, 1)), start=3 * groups))
        parameters, multiply_adds = parameters + 1, multiply_adds + 4
    return _from_stages("rotor3", d, stages, parameters, 0, multiply_adds)


def _iso4(d: int, name: Name) -> Rotation:
    stage = _stage(1, "Left", _rotors(d // 4, (*name, 0)))
    return _from_stages("iso4", d, [stage], d, 0, 4 * d)


def _planar2(d: int, name: Name) -> Rotation:
    stage = _stage(1, "Plane", _planes(d // 2, (*name, 0)))
    return _from_stages("planar2", d, [stage], d // 2, 0, 2 * d)


def _dense(d: int, name: Name) -> Rotation:
    """Return a matrix uniform over all orthogonal matrices (the subgroup algorithm).

    It is built from the last row upwards. The matrix of dimension k is the matrix of dimension
    k - 1, bordered by a 1, then reflected so that e1 is mapped to a uniform point of the sphere.
    """
    sphere = Sphere(*name, 0, pairs=sum((k + 1) // 2 for k in range(2, d + 1)))
    matrix = np.eye(d)
    matrix[d - 1, d - 1] = Stream(*name, 1).signs(1)[0]
    for k in range(2, d + 1):
        u = sphere.point(k)
        u[0] -= 1.0
        square = sequential_sum(u * u)
        if square > 0:
            below = matrix[d - k :]
            matrix[d - k :] = below - np.outer(u, sequential_sum(u[:, None] * below) * (2 / square))
    return Rotation("dense", d, (), _frozen(matrix), d * d, 0, d * d)


def _identity(d: int, name: Name) -> Rotation:
    return Rotation("identity", d, (), _frozen(np.eye(d)), 0, 0, 0)


_BUILDERS: dict[str, Callable[[int, Name], Rotation]] = {
    "cascade": _cascade,
    "rotor3": _rotor3,
    "iso4": _iso4,
    "planar2": _planar2,
    "hadamard": _hadamard,
    "dense": _dense,
    "identity": _identity,
}


def _from_stages(
    name: str, d: int, stages: list[Stage], parameters: int, sign_bits: int, multiply_adds: int
) -> Rotation:
    columns = np.eye(d)
    for stage in stages:
        columns = stage.apply(columns)
    return Rotation(
        name, d, tuple(stages), _frozen(columns.T), parameters, sign_bits, multiply_adds
    )


def factors(d: int) -> list[int] | None:
    """Return the radices of ``d`` in the order of the stages; None if another prime divides it."""
    radices = []
    for radix in RADICES:
        while d % radix == 0:
            radices.append(radix)
            d //= radix
    return radices if d == 1 else None


def _stage(stride: int, kind: str, coefficients: Floats, *, start: int = 0) -> Stage:
    """Return a stage from the coefficients ``[groups, n]`` of its blocks."""
    groups, numbers = coefficients.shape
    return Stage(
        start, stride, kind, _frozen(coefficients.reshape(groups // stride, stride, numbers))
    )


def _frozen(a: npt.ArrayLike) -> Floats:
    """Return a contiguous read-only copy, because rotations are cached and shared."""
    a = np.array(a, np.float64)
    a.flags.writeable = False
    return a


# ---- coefficients -------------------------------------------------------------------------------


def _rotors(count: int, name: Name) -> Floats:
    """Return uniformly distributed rotors as unit 4-vectors ``[count, 4]``."""
    sphere = Sphere(*name, pairs=2 * count)
    return np.stack([sphere.point(4) for _ in range(count)])


def _planes(count: int, name: Name) -> Floats:
    xy = Stream(*name).disc(count)
    return xy / np.sqrt(xy[:, :1] * xy[:, :1] + xy[:, 1:] * xy[:, 1:])


def _sign_rows(groups: int, signs_a_group: int, name: Name) -> Floats:
    return Stream(*name).signs(groups * signs_a_group).reshape(groups, signs_a_group)


# ---- blocks -------------------------------------------------------------------------------------


def _plane_blocks(planes: Floats) -> Floats:
    """Return ``[[c, -s], [s, c]]`` for each ``(c, s)`` of ``[..., 2]``."""
    c, s = planes[..., 0], planes[..., 1]
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def _mirrored(block: Floats) -> Callable[[Floats], Floats]:
    """Return the function that maps each row of signs s to ``diag(s) block diag(s)``."""
    return lambda signs: signs[..., :, None] * block * signs[..., None, :]


def _always(block: Floats) -> Callable[[Floats], Floats]:
    return lambda coefficients: np.broadcast_to(block, (*coefficients.shape[:-1], *block.shape))


def _two_valued_7() -> Floats:
    """Return the flattest orthogonal 7x7 matrix of two values.

    The places of the values follow the quadratic residues modulo 7.
    """
    y = 1 / np.sqrt(3 * (2 - np.sqrt(2)) * (2 - np.sqrt(2)) + 4)
    x = -(2 - np.sqrt(2)) * y
    return np.array([[x if (j - i) % 7 in (1, 2, 4) else y for j in range(7)] for i in range(7)])


_H2 = np.array([[1.0, 1.0], [1.0, -1.0]])

# The kinds of blocks of a stage: matrices ``[..., radix, radix]`` from coefficients ``[..., n]``.
# The device code of shared_kernels/rotation.h uses the same names.
#   Left: x -> R x for a rotor R = (a, b, c, d) and even multivectors x.
#   Sandwich: v -> R v R~ for such a rotor.
#   Plane: a rotation in a plane by the angle with cosine and sine (c, s).
#   Odd3, Odd5, Odd7: diag(s) B diag(s) for signs s and a fixed block B, whose entries are as equal
#     in size as the dimension allows. Odd3: the sandwich of a half turn about (1, 1, 1), entries
#     1/3 and 2/3. Odd5: the reflection at (1, 1, 1, 1, 1), entries 2/5 and 3/5. Odd7: two values
#     from a difference set, 0.26 and 0.45.
#   Walsh4, Walsh2: Walsh-Hadamard.
#   Signs: one sign per channel.
# In the cascade, Left uses (±1 ±e12 ±e13 ±e23) / 2, whose entries are ±1/2, and Plane uses an
# eighth of a turn. So the cascade has no parameters except signs, and it spreads an outlier as
# widely as possible.
BLOCKS: dict[str, Callable[[Floats], Floats]] = {
    "Left": lambda rotors: algebra.left_matrix(algebra.rotor(rotors)),
    "Sandwich": lambda rotors: algebra.sandwich_matrix(algebra.rotor(rotors)),
    "Plane": _plane_blocks,
    "Odd3": _mirrored(np.full((3, 3), 2 / 3) - np.eye(3)),
    "Odd5": _mirrored(np.eye(5) - np.full((5, 5), 2 / 5)),
    "Odd7": _mirrored(_two_valued_7()),
    "Walsh4": _always(np.kron(_H2, _H2) / 2),
    "Walsh2": _always(_H2 * np.sqrt(0.5)),
    "Signs": lambda signs: signs[..., None],
}
_SIGNED_MULTIPLY_ADDS = {4: 12, 2: 2, 3: 9, 5: 25, 7: 49}
_HADAMARD_MULTIPLY_ADDS = {4: 8, 2: 2, 3: 9, 5: 25, 7: 49}
