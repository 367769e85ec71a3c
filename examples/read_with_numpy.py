"""Decode the keys of a saved cache with numpy alone, after docs/FORMAT.md: no MLX, no torch.

    python examples/read_with_numpy.py [FILE [OUTPUT]]

FILE is a cache with the default 4 bits; without it, the example reads prompt.safetensors, which
examples/chat.py writes. If OUTPUT, a .npy file, is given, the packed keys of the first layer are
written to it. Section numbers refer to docs/FORMAT.md. head_dim must be a power of two here.
"""

import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "U32": "<u4", "I32": "<i4"}
MAGNITUDES = "3E0379FD 3EC6AE44 3F28215E 3F713D39 3FA0CC2F 3FCF1C25 40046AC7 402EE2BF"  # section 5
GOLDEN, ALL = 0x9E3779B97F4A7C15, 2**64 - 1

path = Path(sys.argv[1] if len(sys.argv) > 1 else "prompt.safetensors")
if not path.is_file():
    raise SystemExit(f"There is no file {path}; run examples/chat.py first, which writes one.")
file = path.read_bytes()
start = 8 + int.from_bytes(file[:8], "little")
header = json.loads(file[8:start])


def entry(number):
    """Return an entry of the cache of layer 0 as an array (section 8)."""
    field = header[f"0.{number}"]
    first, last = (start + offset for offset in field["data_offsets"])
    return np.frombuffer(file[first:last], DTYPES[field["dtype"]]).reshape(field["shape"])


def mix(z):
    """Apply the finalizer of SplitMix64 (section 4.1)."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ALL
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ALL
    return z ^ z >> 31


def signs(name, count):
    """Return the first signs of a stream (section 4.1)."""
    key = 0
    for word in name:
        key = mix((key + GOLDEN & ALL) ^ word)
    return np.array([1 - 2 * (mix(key + (i + 1) * GOLDEN & ALL) >> 63) for i in range(count)])


def cascade(seed, layer, role, D):
    """Return the matrix of the rotation `cascade` (sections 4.2 and 4.3)."""
    C, stride, stage = np.eye(D), 1, 0
    while stride < D:
        radix = 4 if D // stride % 4 == 0 else 2
        s = signs((seed, layer, role, 0, D, stage), D if radix == 4 else D // 2)
        if radix == 4:  # one-sided product with a rotor of Cl(3,0), for all groups at once
            a, b, c, d = s.reshape(-1, 4).T / 2
            blocks = np.array([[a, -b, -c, -d], [b, a, d, -c], [c, -d, a, b], [d, c, -b, a]])
        else:
            blocks = np.array([[s * s, -s], [s, s * s]]) * np.sqrt(0.5)
        blocks = blocks.reshape(radix, radix, -1, stride)
        groups = C.reshape(-1, radix, stride, D)
        C = np.einsum("tuoi,ouid->otid", blocks, groups).reshape(D, D)
        stride, stage = stride * radix, stage + 1
    return C


config = json.loads("".join(map(chr, entry(1))))
if (config["key_bits"], config["rotation"], config["channel_scale"]) != (4, "cascade", None):
    raise SystemExit(f"This example reads the default configuration, but the file has {config}.")
words, scales, centres, channel_scale = (entry(number) for number in (6, 7, 8, 9))
D = centres.shape[-1]

codes = words[..., None, :] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15  # section 3
codes = codes.reshape(*words.shape[:3], D, 64).swapaxes(-1, -2)  # [B, K, N, 64, D]
positive = np.array([int(text, 16) for text in MAGNITUDES.split()], np.uint32).view(np.float32)
rows = np.concatenate([positive, -positive])[codes] * scales[..., None].astype(np.float64)
rows = rows @ cascade(config["seed"], int(entry(2)), 0, D)  # section 6: C^-1 is C^T
keys = channel_scale[:, None, None] * rows + centres[..., None, :]
keys = keys.reshape(*keys.shape[:2], -1, D)[:, :, : int(entry(4))]

bits = 8 * (words.nbytes + scales.nbytes + centres.nbytes) / (64 * centres.size)
print(f"Format version {int(entry(0))}, {int(entry(3))} tokens, {int(entry(4))} of them packed.")
print(f"The decoded keys of layer 0 have shape {keys.shape}: batch, KV heads, tokens, head_dim.")
print(f"They took {bits:.3f} bits per value. The first ones: {np.round(keys[0, 0, 0, :4], 4)}")
if len(sys.argv) > 2:
    np.save(sys.argv[2], keys)
    print(f"All of them are in {sys.argv[2]}.")
