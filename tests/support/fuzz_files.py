"""Files as strangers may make them: valid ones, ways to damage them, and what loading one must do.

``python -m tests.support.fuzz_files --count 1000000 --seed 1`` tries so many damaged files; it ends
with the first that is neither loaded nor refused in our words, and leaves it in the working
directory.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache, save_prompt_cache

import rotormlx.torch
from rotormlx.codec.learned_rotors import learned_size
from rotormlx.config import RotorConfig
from rotormlx.mlx import calibration, integration, prompt_cache
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.fingerprint import fingerprint
from rotormlx.mlx.host_caches import leaves
from rotormlx.storage import tensor_file
from rotormlx.storage.calibration import TRANSFORMS, Calibration
from rotormlx.storage.fingerprint import MODEL
from tests.support import models as tiny_models
from tests.support import torch_models
from tests.support.memory import peak_bytes

K, D, LAYERS, TOKENS = 2, 32, 2, 70
CONFIG = RotorConfig(4, 2, sink=1, window=2)
SCALED = RotorConfig(2, 3, "rotor3", sink=1, window=2)
# A file that takes longer ends the process: most take a millisecond.
HANG_SECONDS = 60

# model type, its configuration
MODELS = {
    "llama": ("llama", CONFIG),
    "scaled": ("llama", SCALED),
    "sliding": ("gemma3_text", CONFIG),
    "lists": ("falcon_h1", CONFIG),
}


@cache
def model_of(kind):
    """A model that reads files of this kind."""
    name, config = MODELS[kind]
    changes = {"head_dim": D, "num_hidden_layers": LAYERS * (1 + (name == "gemma3_text"))}
    model = tiny_models.build(name, **changes)
    integration.apply(model, config)
    return model


@cache
def torch_model():
    model = torch_models.build("llama")
    rotormlx.torch.apply(model)
    return model


def tokens(count=TOKENS, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 1, K, count, D)).astype(np.float32)
    return mx.array(x[0]), mx.array(x[1])


def filled(caches):
    for _, _, held in leaves(caches):
        if hasattr(held, "update_and_fetch"):
            held.update_and_fetch(*tokens())
        else:
            held.cache = [mx.ones((1, 3, 4)) for _ in held.cache]
    return caches


@cache
def bases():
    """Valid files by name: the kind of their model, or "calibration", and their bytes."""
    found = {}

    def keep(name, kind, save):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "a.safetensors"
            save(path)
            found[name] = kind, path.read_bytes()

    for kind in MODELS:
        model = model_of(kind)
        caches = filled(make_prompt_cache(model))
        keep(
            f"{kind}-sealed",
            kind,
            lambda path: prompt_cache.save_prompt_cache(str(path), model, caches, {"note": "n"}),  # noqa: B023
        )
        keep(kind, kind, lambda path: save_prompt_cache(str(path), caches, {"note": "n"}))  # noqa: B023
    limited = filled([RotorKVCache(CONFIG, layer, max_size=131) for layer in range(LAYERS)])
    empty = [RotorKVCache(CONFIG, layer) for layer in range(LAYERS)]
    plain = filled([KVCache() for _ in range(LAYERS)])
    batch = filled([BatchRotorKVCache([0], CONFIG, layer) for layer in range(LAYERS)])
    several = {"limited": limited, "empty": empty, "plain": plain, "batch": batch}
    for name, held in several.items():
        keep(name, "llama", lambda path: save_prompt_cache(str(path), held))  # noqa: B023
    model = model_of("llama")
    for transform in TRANSFORMS:
        shape = (K, D, D) if transform == "klt" else (K, D)
        array = np.broadcast_to(np.eye(D) if transform == "klt" else 1, shape).astype(np.float32)
        numbers = {f"{i}.{role}": array for i in range(LAYERS) for role in ("key", "value")}
        if transform == "rotors":
            size = learned_size(D)
            rotors = np.full((K, size), 0.5, np.float32)
            numbers |= {f"{name}.rotors": rotors for name in numbers}
        made = Calibration(transform, fingerprint(model), numbers, 7)
        keep(f"calibration-{transform}", "calibration", made.save)
    return found


# ---- what loading must do -----------------------------------------------------------------------


def load(kind, path):
    """Give a file to the loaders of its kind.

    Returns:
        For each loader whether it took the file; what it raised else is ours, or comes through.
    """
    if kind == "calibration":
        return [_refused("[calibration] ", lambda: calibration.load(path, model_of("llama")))]
    taken = [_refused("[prompt cache] ", lambda: _evaluated(kind, path))]
    if kind == "llama":
        read = rotormlx.torch.load_prompt_cache
        taken.append(_refused("[prompt cache] ", lambda: read(path, torch_model())))
    return taken


def kind_of(data):
    """Which model is to read a file."""
    if b"1.0" not in data[:100_000]:
        return "calibration"
    marks = {
        b"RotatingKVCache": "sliding",
        b"CacheList": "lists",
        b"r\0\0\0o\0\0\0t\0\0\0o": "scaled",
    }
    return next((kind for mark, kind in marks.items() if mark in data), "llama")


def _refused(start, read):
    try:
        read()
    except ValueError as error:
        if not str(error).startswith(start) or type(error) is not ValueError:
            raise
        str(error).encode("ascii", "strict")
        return False
    return True


def _evaluated(kind, path):
    caches, _ = prompt_cache.load_prompt_cache(str(path), model_of(kind))
    mx.eval([held.state for held in caches])


# ---- ways to damage a file ----------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 63, 64, 65, 127, 2**20, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30)
STRANGE = (*NUMBERS, 0.0, -0.5, 1e308, float("nan"), True, None, "", "x", [], {}, [[]], {"a": {}})
CLASSES = (
    *("KVCache", "RotatingKVCache", "ArraysCache", "ChunkedKVCache", "CacheList", "RotorKVCache"),
    *("BatchRotorKVCache", "QuantizedKVCache", "BatchKVCache", "LRUPromptCache", "_BaseCache"),
    *("print", "exec", "mx", "copy", "__builtins__", "__import__", "tree_map", "", "\U0001f600"),
)
NAMES = (
    *("../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "0", "0.0", "1.0", "0.0.0", "-1.0"),
    *(
        "999999999.0",
        "0.999999",
        "0." * 40 + "0",
        "1e9",
        "٣.0",
        "\u202e",
        "a" * 5000,
        "__metadata__",
    ),
)
TEXTS = (
    *CLASSES,
    *NAMES,
    "scalar",
    "string",
    "none",
    "0.5",
    "9" * 5000,
    "f" * 64,
    "{}",
    "[" * 3000,
)
DTYPES = (
    *tensor_file.ITEM_BYTES,
    "F8_E4M3",
    "F4",
    "f32",
    "C64",
    "object",
    "O",
    "",
    7,
    None,
    ["F32"],
)
JSON_TEXTS = (
    *("{}", "[]", "null", "[" * 2000, "{" * 2000, '{"key_bits":4}', "1" * 5000, "NaN", "\x00"),
    *(CONFIG.to_json().replace("4", new, 1) for new in ("5", "1e9", "true", '"4"', "-4", "[4]")),
    *(CONFIG.to_json().replace('"sink": 1', f'"sink": {n}') for n in (2**20 - 1, 2**20, -1, 2**70)),
    *(CONFIG.to_json().replace("cascade", n) for n in ("dense", "calibrated", "x" * 999, "rotor3")),
    *(CONFIG.to_json().replace("null", n) for n in ('"calibrated"', '"prefill"', '"none"', "0")),
)


def taken_apart(data):
    """Metadata, and the tensors in order: name, dtype, shape, bytes."""
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    texts = header.pop("__metadata__", {})
    fields = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return texts, [
        [
            name,
            field["dtype"],
            field["shape"],
            data[stop + field["data_offsets"][0] : stop + field["data_offsets"][1]],
        ]
        for name, field in fields
    ]


def put_together(texts, tensors, change=None):
    """A file; ``change`` may alter its header, whatever the tensors are."""
    header, end = {"__metadata__": texts}, 0
    for name, dtype, shape, content in tensors:
        start, end = end, end + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(t[3] for t in tensors)


def sealed(texts, tensors, change=None):
    """The same with a checksum that is right, so that what lies behind it is tried too."""
    key = "2.0" if "1.0" in texts else tensor_file.CHECKSUM
    data = put_together(texts | {key: "0" * 64}, tensors, change)
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def damaged_bytes(data, rng):
    """Bits, bytes and lengths, without regard to what they mean."""
    data = bytearray(data)
    kind = rng.randrange(6)
    place = rng.randrange(len(data))
    span = min(rng.choice((1, 4, 8, 64, 1000)), len(data) - place)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data += rng.randbytes(span)
    elif kind == 3:
        data[place : place + span] = rng.randbytes(span)
    elif kind == 4:
        del data[place : place + span]
    else:
        length = int.from_bytes(data[:8], "little")
        wrong = rng.choice((length + 1, length - 1, 0, 1, 2, len(data), 2**20, 2**63, 2**64 - 1))
        data[:8] = (max(0, wrong) % 2**64).to_bytes(8, "little")
    return bytes(data)


def damaged_content(texts, tensors, rng):
    """Entries, classes, numbers and texts: the header still fits the bytes."""
    kind = rng.randrange(10)
    tensor = rng.choice(tensors)
    if kind == 0:
        other = rng.choice(tensors)
        place = rng.choice(([0], [1, 2, 3], [2], [1]))
        for i in place:
            tensor[i], other[i] = other[i], tensor[i]
    elif kind == 1:
        tensor[0] = rng.choice((rng.choice(NAMES), f"{rng.randrange(4)}.{rng.randrange(20)}"))
    elif kind == 2:
        tensors.remove(tensor)
    elif kind == 3:
        tensors.append([rng.choice(NAMES), *copy.deepcopy(tensor[1:])])
    elif kind == 4:
        name = rng.choice(sorted(texts) or ["1.0"])
        texts[rng.choice((name, rng.choice(NAMES), "2.1.1"))] = rng.choice(TEXTS)
    elif kind == 5:
        texts.pop(rng.choice(sorted(texts) or ["1.0"]), None)
    elif kind == 6:
        tensor[2] = rng.sample(tensor[2], len(tensor[2])) + rng.choice(([], [1], [0], [1, 1]))
    else:
        numbers = [t for t in tensors if t[2] == []] or [tensor]
        texts_of = [t for t in tensors if t[1] == "I32" and len(t[2]) == 1] or [tensor]
        if kind == 7:
            text = rng.choice((*JSON_TEXTS, *CLASSES))
            chosen = rng.choice(texts_of)
            letters = np.array([ord(c) for c in text], "<i4")
            chosen[1:] = "I32", [len(letters)], letters.tobytes()
        else:
            chosen = rng.choice(numbers)
            number = rng.choice(NUMBERS) % 2**32
            size = len(chosen[3])
            chosen[3] = (number.to_bytes(8, "little") * (size // 8 + 1))[:size]


def damaged_header(header, rng):
    """Fields of the header that need not fit anything."""
    name = rng.choice([n for n in header if n != "__metadata__"] or ["a"])
    field = header.setdefault(name, {})
    kind = rng.randrange(7)
    if kind == 0:
        field["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        shape = field.get("shape") or [0]
        shape[rng.randrange(len(shape))] = rng.choice(STRANGE)
        field["shape"] = shape
    elif kind == 2:
        field["data_offsets"] = [rng.choice(STRANGE) for _ in range(rng.choice((0, 1, 2, 2, 3)))]
    elif kind == 3:
        field[rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice(STRANGE)
    elif kind == 4:
        header[rng.choice((name, "__metadata__", "more"))] = rng.choice(STRANGE)
    elif kind == 5:
        texts = header.get("__metadata__")
        if isinstance(texts, dict):
            texts[rng.choice(sorted(texts) or ["a"])] = rng.choice(STRANGE)
    else:
        nested = []
        for _ in range(rng.choice((3, 30, 900, 5000))):
            nested = [nested]
        try:
            json.dumps(nested)
            header[rng.choice((name, "__metadata__"))] = nested
        except RecursionError:
            header["__metadata__"] = {"\ud800": "\udfff"}


def damaged_text(data, rng):
    """The text of the header: names twice, brackets, other encodings."""
    stop = 8 + int.from_bytes(data[:8], "little")
    text = data[8:stop]
    kind = rng.randrange(5)
    if kind == 0:
        text = text[:-1].rstrip() + b"," + text.lstrip()[1:]  # every name twice
    elif kind == 1:
        text = b"[" * rng.choice((10, 1000, 200_000)) + text
    elif kind == 2:
        text = text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    elif kind == 3:
        text = text.replace(b"0", b"9" * rng.choice((2, 400, 5000)), 3)
    else:
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice((b"\x00", b"\xff", b'"', b"}", b"\\u", b" " * 9))
            + text[place:]
        )
    return len(text).to_bytes(8, "little") + text + data[stop:]


def mutate(data, rng):
    """A damaged file, now and then the file as it is; and whether its checksum was made anew."""
    kind = rng.randrange(20)
    if kind == 0:
        return data, False
    if kind < 5:
        return damaged_bytes(data, rng), False
    try:
        texts, tensors = taken_apart(data)
        if kind < 8:
            return damaged_text(data, rng), False
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if kind < 16 and tensors:
                damaged_content(texts, tensors, rng)
        build = rng.choice((put_together, sealed))
        change = (lambda header: damaged_header(header, rng)) if kind > 14 else None
        return build(texts, tensors, change), build is sealed
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return damaged_bytes(data, rng), False  # the fuzzer's own inputs are no files at times


# ---- many of them -------------------------------------------------------------------------------


def run(count, seed):
    """Try ``count`` damaged files; returns what came of them, and the growth of the process."""
    rng = random.Random(seed)
    names = sorted(bases())
    came = Counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        peak = 0
        for index in range(-200, count):
            name = names[index % len(names)]
            kind, original = bases()[name]
            data, anew = mutate(original, rng) if index >= 0 else (original, False)
            path.write_bytes(data)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            try:
                taken = load(kind, path)
                # What has a checksum is loaded as it was written, or not at all.
                has_checksum = name.endswith("sealed") or kind == "calibration"
                # An empty place makes it a file of mlx-lm, which has no checksum.
                is_changed = data != original and not anew and b'"2.0": ""' not in data
                assert not (any(taken) and has_checksum and is_changed), f"{name} is taken"
                assert index >= 0 or name == "batch" or taken[0], f"{name} is refused"
            except BaseException:
                kept = Path(f"refused-badly-{hashlib.sha256(data).hexdigest()[:16]}.safetensors")
                kept.write_bytes(data)
                print(f"kept {kept}, a damaged {name}", file=sys.stderr)
                raise
            faulthandler.cancel_dump_traceback_later()
            if index == 0:
                peak = peak_bytes()
            if index >= 0:
                came["files"] += 1
                came["loaded" if taken[0] else "refused"] += 1
                came["unchanged"] += data == original
                came["largest"] = max(came["largest"], len(data))
    came["grown"] = peak_bytes() - peak
    return came


def write_corpus(directory):
    """Small files to start from; what is called valid is taken on any machine, by any weights."""
    rng = random.Random(0)
    for name, (kind, found) in bases().items():
        data = found
        if len(data) > 40_000:
            continue
        texts, tensors = taken_apart(data)
        is_signed = kind == "calibration" or f"0.{MODEL}" in texts
        if is_signed and kind != "calibration":
            del texts[f"0.{MODEL}"]
            data, is_signed = sealed(texts, tensors), False
        start = "of-these-weights" if is_signed else "batch" if name == "batch" else "valid"
        (directory / f"{start}-{name}.safetensors").write_bytes(data)
        for number in range(2):
            damaged = mutate(data, rng)[0]
            if damaged != data and len(damaged) < 8_000:
                (directory / f"damaged-{name}-{number}.safetensors").write_bytes(damaged)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="only write tests/storage/corpus anew, there")
    arguments = parser.parse_args()
    if arguments.corpus:
        write_corpus(arguments.corpus)
        return
    print(json.dumps(run(arguments.count, arguments.seed)))


if __name__ == "__main__":
    main()
