"""The operators, with one tensor of a right call changed: refused in a sentence, or still right.

Native code reads memory where it lies, so nothing may reach it that does not fit.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK, ROLES
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library

B, K, REPEATS, L, DIM, VALUE_DIM, BLOCKS, TAIL = 2, 3, 2, 5, 16, 24, 2, 9
CONFIG = RotorConfig(3, 2, "rotor3", sink=4)
CODING = {"rotation": CONFIG.rotation, "seed": CONFIG.seed, "layer": 1}
DIMS = dict(zip(ROLES, (DIM, VALUE_DIM), strict=True))
ONE_SENTENCE = re.compile(r"\[\w+\] \w[^\n]*[^.]\.")
PACKED, TOKENS = BLOCKS * BLOCK, BLOCKS * BLOCK + CONFIG.sink + TAIL
OPERATORS = torch.ops.rotormlx


# ---- right calls --------------------------------------------------------------------------------


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(role):
    """Packed blocks and their channel scale."""
    scale = numbers(K, DIMS[role], seed=2).exp()
    x = numbers(B, K, BLOCKS * BLOCK, DIMS[role], seed=1)
    return rt.encode(x, CONFIG, layer=1, role=role, channel_scale=scale), scale


BLOCKS_OF = {role: blocks_of(role) for role in ROLES}


def encode_call(role):
    packed, scale = BLOCKS_OF[role]
    tensors = {
        "x": numbers(B, K, PACKED, DIMS[role]),
        "centres": packed.centres,
        "channel_scale": scale,
    }
    coding = {"role": role, "bits": CONFIG.code_bits(role), **CODING}
    return tensors, lambda x, centres, channel_scale: OPERATORS.encode(
        x, centres, channel_scale, **coding
    )


def decode_call(role):
    packed, scale = BLOCKS_OF[role]
    coding = {"role": role, "bits": CONFIG.code_bits(role), "head_dim": DIMS[role], **CODING}
    return {**packed._asdict(), "channel_scale": scale}, lambda **tensors: OPERATORS.decode(
        *tensors.values(), dtype=torch.float16, **coding
    )


def attend_call(mask, is_packed):
    (keys, key_scale), (values, value_scale) = (BLOCKS_OF[role] for role in ROLES)
    part = (lambda x: x) if is_packed else (lambda _: None)
    lengths = ((PACKED, TOKENS), (70, 80)) if is_packed else ((0, TAIL), (0, 7))
    tensors = {
        "query": numbers(B, K * REPEATS, L, DIM),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "key_exact": numbers(B, K, CONFIG.sink + TAIL, DIM, seed=3),
        **{f"key_{name}": part(x) for name, x in keys._asdict().items()},
        "key_channel_scale": key_scale,
        "value_exact": numbers(B, K, CONFIG.sink + TAIL, VALUE_DIM, seed=4),
        "value_words": part(values.words),
        "value_scales": part(values.scales),
        "value_channel_scale": value_scale,
        "mask": MASKS[mask],
        "sink_logits": numbers(K * REPEATS, seed=5),
    }
    facts = {"key_bits": 3, "value_bits": 2, "sink": CONFIG.sink, "scale": 0.3, **CODING}
    return tensors, lambda **given: OPERATORS.attend(
        *given.values(), causal=mask == "causal", **facts
    )


def prefill_scale_call(role):
    return {"x": numbers(B, K, BLOCK, DIMS[role])}, lambda x: rt.prefill_scale(
        x, CONFIG, layer=1, role=role
    )


HEADS = K * REPEATS
MASKS = {
    "causal": None,
    "boolean": numbers(B, 1, L, TOKENS, seed=6) > 0,
    "heads": numbers(1, HEADS, 1, TOKENS, seed=6) > 0,
    "additive": numbers(L, TOKENS, seed=6),
    "one": torch.tensor(True),
}
CALLS = {
    **{
        f"{make.__name__}-{role}": (make, role)
        for make in (encode_call, decode_call, prefill_scale_call)
        for role in ROLES
    },
    **{
        f"attend_call-{mask}-{'packed' if packed else 'exact'}": (attend_call, mask, packed)
        for mask in MASKS
        for packed in (True, False)
    },
}


# ---- changes of one tensor ----------------------------------------------------------------------

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.int64),
)


def with_step(x, axis):
    """The same numbers, every other one of a longer axis."""
    wide = x.repeat_interleave(2, axis)
    return wide[(slice(None),) * axis + (slice(None, None, 2),)]


def laid_out(x, order):
    """The same numbers, with the axes in another order in memory."""
    order = [axis for axis in order if axis < x.ndim]
    back = sorted(range(x.ndim), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def behind(x):
    """The same numbers, not at the start of their memory."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


OPTIONAL = {"centres", "channel_scale", "mask", "sink_logits"}
OPTIONAL |= {
    f"{role}_{part}" for role in ROLES for part in ("words", "scales", "centres", "channel_scale")
}
AXES = st.integers(0, 4)
# Of an axis, by how much, or of which dtype; what does not fit the tensor leaves it as it is.
CHANGES = st.one_of(
    st.tuples(st.just("shorter"), AXES),
    st.tuples(st.just("empty"), AXES),
    st.tuples(st.just("longer"), AXES),
    st.tuples(st.just("first of"), AXES),
    st.tuples(st.just("expanded"), AXES),
    st.tuples(st.just("with step"), AXES),
    st.tuples(st.just("another axis"), AXES),
    st.tuples(st.just("first again"), AXES),
    st.tuples(st.just("flat"), AXES),
    st.tuples(st.just("behind"), AXES),
    st.tuples(st.just("none"), AXES),
    st.tuples(st.just("meta"), AXES),
    st.tuples(st.just("parameter"), AXES),
    st.tuples(st.just("transposed"), AXES, AXES),
    st.tuples(st.just("laid out"), st.permutations(range(5))),
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES)),
    st.tuples(st.just("plus"), st.sampled_from((-200, -64, -1, 1, 5, 64))),
)


def changed(x, kind, a=0, b=0):
    if x is None or (kind not in ("laid out", "dtype", "plus") and not a < max(x.ndim, 1)):
        return x
    simple = {
        "flat": x.flatten,
        "another axis": lambda: x.unsqueeze(a),
        "none": lambda: None,
        "meta": lambda: x.to("meta"),
        "parameter": lambda: torch.nn.Parameter(x) if x.is_floating_point() else x,
        "laid out": lambda: laid_out(x, a),
        "dtype": lambda: x.to(a),
        # Lengths only: scores of large numbers differ by more than the bound.
        "plus": lambda: x + a if x.dtype == torch.int32 and x.ndim == 2 else x,
    }
    of_an_axis = {
        "shorter": lambda: x.narrow(a, 0, size - 1),
        "empty": lambda: x.narrow(a, 0, 0),
        "longer": lambda: torch.cat([x, x.narrow(a, 0, 1)], a),
        "first of": lambda: x.select(a, 0),
        "expanded": lambda: x.narrow(a, 0, 1).expand_as(x),
        "first again": lambda: x.narrow(a, 0, 1),
        "with step": lambda: with_step(x, a),
        "behind": lambda: behind(x),
        "transposed": lambda: x.transpose(a, min(b, x.ndim - 1)),
    }
    if kind in simple:
        return simple[kind]()
    size = x.shape[a] if a < x.ndim else 0
    return of_an_axis[kind]() if size else x


# ---- the property -------------------------------------------------------------------------------


def contiguous(x):
    return None if x is None else x.detach().clone(memory_format=torch.contiguous_format)


def in_torch_operations(run, tensors):
    """What torch operations make of contiguous copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "missing", lambda: "this test wants torch operations")
        return run(**{name: contiguous(x) for name, x in tensors.items()})


def answer(run, tensors):
    """What comes of a call, or what the refusal says."""
    try:
        with torch.no_grad():
            return run(**tensors)
    except ValueError as error:
        return str(error)


def assert_alike(result, expected):
    if isinstance(expected, torch.Tensor):
        result, expected = (result,), (expected,)
    for x, y in zip(result, expected, strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        if x.is_meta:
            continue
        # Sums are in float32 in another order; then there is one rounding to the dtype. Of what is
        # encoded every bit is the same.
        rounding = torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        most = float(y.double().abs().amax()) if y.numel() else 0.0
        bound = (1e-5 + rounding) * most if x.is_floating_point() else 0.0
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_changed_tensor_is_refused_or_right(name, data):
    make, *facts = CALLS[name]
    tensors, run = make(*facts)
    argument = data.draw(st.sampled_from([k for k, x in tensors.items() if x is not None]))
    change = data.draw(CHANGES.filter(lambda change: change[0] != "none" or argument in OPTIONAL))
    check(run, {**tensors, argument: changed(tensors[argument], *change)})


def check(run, tensors):
    result = answer(run, tensors)
    if isinstance(result, str):
        assert ONE_SENTENCE.fullmatch(result)
    else:
        assert_alike(result, in_torch_operations(run, tensors))


SHAPES = ("shorter", "empty", "longer", "first of", "first again", "expanded", "with step")


@pytest.mark.parametrize(
    "name", ["encode_call-key", "decode_call-key", "attend_call-boolean-packed"]
)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_axis_of_every_tensor_is_checked(name, kind):
    make, *facts = CALLS[name]
    tensors, run = make(*facts)
    for argument, x in tensors.items():
        for axis in range(0 if x is None else x.ndim):
            check(run, {**tensors, argument: changed(x, kind, axis)})


@pytest.mark.parametrize("axis", [0, 1], ids=["B", "K"])
def test_blocks_of_other_rows_or_heads_than_the_exact_tokens_are_refused(axis):
    """All of them, so that they fit one another."""
    tensors, run = attend_call("causal", True)
    for name, x in tensors.items():
        if name.endswith(("words", "scales", "centres")):
            tensors[name] = x.narrow(axis, 0, 1)
    with pytest.raises(ValueError, match=r"key words must have shape \(2, 3, 2, "):
        run(**tensors)


@pytest.mark.parametrize("name", CALLS)
def test_a_right_call_is_right(name):
    make, *facts = CALLS[name]
    tensors, run = make(*facts)
    assert_alike(run(**tensors), in_torch_operations(run, tensors))


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_requires_a_gradient_is_refused(name):
    """Whichever it is; it would get none."""
    make, *facts = CALLS[name]
    tensors, run = make(*facts)
    floating = [k for k, x in tensors.items() if x is not None and x.is_floating_point()]
    expected = run(**tensors)
    for argument in floating:
        given = {**tensors, argument: torch.nn.Parameter(tensors[argument])}
        with pytest.raises(ValueError, match=r"must need no gradient.* requires one; call detach"):
            run(**given)
        with torch.no_grad():
            assert_alike(run(**given), expected)
