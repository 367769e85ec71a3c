"""The shared test vectors as what a backend takes."""

import json

import mlx.core as mx
import numpy as np

from rotormlx.codec.format import BLOCK, KEY, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import tensor_file
from scripts import make_vectors

CASES = make_vectors.CASES


def name_of(case):
    """A file of vectors in the id of a test."""
    return case.file_name.split(".")[0]


def load(case):
    """The arrays of a file, and the facts about them."""
    path = make_vectors.DIRECTORY / case.file_name
    arrays, texts = tensor_file.read_arrays(path, where="test vectors", checksum_required=False)
    return arrays, json.loads(texts["rotormlx"])


def codec_of(facts, bits, role):
    """The codec that has written a role's blocks of this width."""
    config = RotorConfig(bits, bits, facts["rotation"], seed=facts["seed"])
    return codec(config, facts["head_dim"], layer=facts["layer"], role=role)


def channel_scale(arrays, role):
    """The channel scale of a role, an MLX array, or None."""
    scale = arrays.get(f"{role}.channel_scale")
    return None if scale is None else mx.array(scale)


def packed_of(arrays, role, bits):
    """The packed rows of a role, MLX arrays."""
    centres = mx.array(arrays["key.centres"]) if role == KEY else None
    words, scales = (mx.array(arrays[f"{role}.{part}.{bits}"]) for part in ("words", "scales"))
    return Packed(words, scales, centres)


def views_of(arrays, facts, bits, dtype=mx.float32):
    """Views of keys and of values, exact tokens in this dtype."""
    views = []
    for role in ROLES:
        packed = packed_of(arrays, role, bits)
        packed_tokens = packed.scales.shape[2] * BLOCK - facts["missing"]
        exact = mx.array(arrays[f"{role}.exact"]).astype(dtype)
        tokens = packed_tokens + exact.shape[2]
        scale = channel_scale(arrays, role)
        counts = facts["sink"], packed_tokens, tokens
        views.append(KVView(codec_of(facts, bits, role), exact, packed, scale, *counts))
    return views


def check_encoded(packed, arrays, role, bits):
    """Every bit of words, scales and centres is that of the vectors."""
    assert np.array_equal(np.array(packed.words), arrays[f"{role}.words.{bits}"])
    assert np.array_equal(np.array(packed.scales), arrays[f"{role}.scales.{bits}"])
    if role == KEY:
        assert np.array_equal(np.array(packed.centres), arrays["key.centres"])


def check_decoded(decoded, arrays, role, bits):
    """Decoded numbers are those of the vectors, within the bound of docs/FORMAT.md, section 9."""
    expected = arrays[f"{role}.decoded.{bits}"]
    decoded = np.array(decoded)[:, :, : expected.shape[2]]
    assert np.abs(decoded - expected).max() <= 1e-5 * np.abs(expected).max()
