"""Whether packed and decoded rows are those of the shared test vectors."""

import numpy as np

from rotormlx.codec.format import KEY
from rotormlx.mlx.backends.vectors import channel_scale, codec_of, load, packed_of, views_of
from scripts import make_vectors

__all__ = ["CASES", "channel_scale", "codec_of", "load_case", "packed_of", "views_of"]

CASES = make_vectors.CASES


def name_of(case):
    """A file of vectors in the id of a test."""
    return case.file_name.split(".")[0]


def load_case(case):
    """The arrays of a file, and the facts about them."""
    return load(name_of(case))


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
