"""Calls of attention in torch, and their check against the float64 reference."""

import numpy as np
import torch

import rotormlx.torch as rt
from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, ROLES, Packed, codec
from rotormlx.torch.torch_ops import KVView
from tests.support import noise

B, K, REPEATS, L, SINK, TAIL, LAYER = 2, 3, 2, 5, 4, 70, 1
H = K * REPEATS
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def rows(shape, seed=0):
    """Normal numbers with unequal channels and an offset, what keys look like."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[-1]) * 0.5)
    x = rng.normal(size=shape) * spread + rng.normal(size=shape[-1]) * 3
    return torch.from_numpy(x.astype(np.float32))


def numpy_of(packed):
    words, scales, centres = packed
    return Packed(
        words.numpy().view(np.uint32), scales.numpy(), None if centres is None else centres.numpy()
    )


def float64(x):
    return x.double().numpy()


# ---- shared vectors -----------------------------------------------------------------------------


# (Packed tokens, all tokens) of each row: one as long as can be; one that stops within a block.
LENGTHS = ((4 * BLOCK, 4 * BLOCK + SINK + TAIL), (2 * BLOCK + 51, 2 * BLOCK + 51 + SINK + 33))


def make_sources(config, head_dims, dtype, lengths=LENGTHS):
    """Sources of random rows, and the float64 vectors of each batch row that they stand for."""
    sources, vectors = [], []
    for role, head_dim, seed in zip(ROLES, head_dims, (1, 2), strict=True):
        chosen = codec(config, head_dim, layer=LAYER, role=role)
        x = rows((B, K, 4 * BLOCK, head_dim), seed).to(dtype)
        scale = None
        if config.scales_channels:
            scale = rt.prefill_scale(x[:, :, :BLOCK], config, layer=LAYER, role=role)
        packed = rt.encode(x, config, layer=LAYER, role=role, channel_scale=scale)
        exact = rows((B, K, SINK + TAIL + 3, head_dim), seed + 2).to(dtype)
        middle = [
            reference.decode(
                Packed(*(None if a is None else a[b : b + 1] for a in numpy_of(packed))),
                chosen,
                channel_scale=None if scale is None else scale[b],
            )[0]
            for b in range(B)
        ]
        ends = float64(exact)
        vectors.append(
            [
                np.concatenate(
                    [
                        ends[b, :, : min(SINK, t - p)],
                        middle[b][:, :p],
                        ends[b, :, SINK : max(SINK, t - p)],
                    ],
                    1,
                )[None]
                for b, (p, t) in enumerate(lengths)
            ]
        )
        for b, (p, t) in enumerate(lengths):
            # What lies behind the lengths may be anything.
            packed.scales[b].reshape(K, -1)[:, p:] = np.nan
            exact[b, :, t - p :] = np.nan
        sources.append(KVView(chosen, exact, packed, scale))
    return sources, vectors


def noise_of_row(query, keys, lengths, b, scale, sink=SINK):
    """What is taken off the scores of one batch row."""
    packed_tokens, tokens = lengths[b]
    return noise.of_sequence(
        float64(query[b : b + 1]),
        numpy_of(keys.packed),
        keys.codec,
        scale=scale,
        channel_scale=None if keys.channel_scale is None else keys.channel_scale[b],
        sink=min(sink, tokens - packed_tokens),
        packed_tokens=packed_tokens,
        tokens=tokens,
        row=b,
    )


def masks(tokens, length):
    rng = np.random.default_rng(10)
    seen, columns = np.arange(length)[:, None] + tokens - length, np.arange(tokens)
    found = {
        "none": None,
        "causal": None,
        "window": (columns <= seen) & (columns > seen - 90),
        "bool": rng.random((B, 1, length, tokens)) > 0.4,
        "bool-heads": rng.random((B, H, length, tokens)) > 0.4,
        "nothing": np.zeros((1, 1, 1, 1), bool),
        "additive": rng.normal(size=(1, H, length, tokens)).astype(np.float32),
        "additive-row": rng.normal(size=tokens).astype(np.float32),
        "additive-inf": np.where(rng.random((length, tokens)) > 0.4, 0, -np.inf).astype("f4"),
    }
    return {name: None if m is None else torch.from_numpy(m) for name, m in found.items()}


def check(
    config,
    head_dims,
    name,
    dtype="f32",
    *,
    length=L,
    logits=None,
    lengths=LENGTHS,
    attend=rt.attend,
    roundings=1,
):
    """Attention over rows of these lengths, by ``attend``, against the float64 reference.

    ``name`` is that of a mask. In float32 the error may be 2e-6 of the largest output, else so many
    roundings of the dtype.
    """
    dtype = DTYPES[dtype]
    sources, vectors = make_sources(config, head_dims, dtype, lengths)
    query = rows((B, H, length, head_dims[0]), 9).to(dtype) / 4
    mask = masks(max(t for _, t in lengths), length)[name]
    found = attend(
        query,
        torch.tensor(lengths, dtype=torch.int32),
        *sources,
        config,
        layer=LAYER,
        scale=head_dims[0] ** -0.5,
        causal=name == "causal",
        mask=mask,
        sink_logits=None if logits is None else torch.from_numpy(logits),
    )
    assert found.dtype == dtype
    for b, (_, tokens) in enumerate(lengths):
        if tokens == 0:
            assert found[b].eq(0).all()
            continue
        part = None if mask is None else mask.expand(B, H, length, -1)[b : b + 1, :, :, :tokens]
        expected = reference.attend(
            float64(query[b : b + 1]),
            vectors[0][b],
            vectors[1][b],
            scale=head_dims[0] ** -0.5,
            noise=noise_of_row(query, sources[0], lengths, b, head_dims[0] ** -0.5),
            mask="causal" if name == "causal" else None if part is None else part.numpy(),
            sink_logits=logits,
        )
        # Sums are in float32; the result is rounded once to the dtype.
        error = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        error *= roundings
        assert np.abs(float64(found[b]) - expected[0]).max() <= error * np.abs(expected).max()
