"""Files: whole or not there, and nothing in them is believed before it is checked."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rotormlx.mlx.cache import files
from rotormlx.storage import cache_file, tensor_file

ARRAYS = {
    "a.words": np.arange(24, dtype=np.uint32).reshape(2, 3, 4),
    "b": np.float32([[0.5, -2.0]]),
    "c.0": np.array(7, np.int32),
    "empty": np.zeros((2, 0, 3), np.float16),
    "flags": np.array([True, False, True]),
    "h": np.float16([1.5, np.nan, np.inf]),
}
TEXTS = {"note": "h\u00e9, \U0001f600", "nothing": ""}


@pytest.fixture
def path(tmp_path):
    """A file with all kinds of arrays."""
    tensor_file.write_arrays(tmp_path / "a.safetensors", ARRAYS, TEXTS)
    return tmp_path / "a.safetensors"


def assert_same(found, arrays=ARRAYS):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def parts(path):
    """Header and tensors of a file."""
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def put(path, header, tensors):
    """A file of this header, which may be text that is no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def leftovers(directory):
    return [name for name in os.listdir(directory) if ".partial" in name]


# ---- a file comes back --------------------------------------------------------------------------


def test_what_is_written_is_read(path):
    arrays, texts = tensor_file.read_arrays(path)
    assert_same(arrays)
    assert texts == TEXTS
    assert leftovers(path.parent) == []


def test_others_read_what_is_written(path):
    """It is a safetensors file like any other."""
    assert_same(load_file(path))
    assert mx.array_equal(mx.load(str(path))["a.words"], mx.array(ARRAYS["a.words"]))


@pytest.mark.parametrize("writer", ["safetensors", "mlx"])
def test_what_others_write_is_read(tmp_path, writer):
    path = tmp_path / "b.safetensors"
    if writer == "mlx":
        mx.save_safetensors(str(path), {k: mx.array(a) for k, a in ARRAYS.items()}, TEXTS)
    else:
        save_file(ARRAYS, path, TEXTS)
    arrays, texts = tensor_file.read_arrays(path, checksum_required=False)
    assert_same(arrays)
    assert TEXTS.items() <= texts.items()  # MLX adds "format"
    with pytest.raises(
        ValueError, match=r"\[files\] .* must have a checksum named rotormlx_sha256"
    ):
        tensor_file.read_arrays(path)


def test_bfloat16_is_for_those_who_ask(tmp_path):
    path = tmp_path / "b.safetensors"
    mx.save_safetensors(str(path), {"x": mx.array([1.0, -2.0], mx.bfloat16)})
    with pytest.raises(ValueError, match="hold dtypes of numpy, but x is BF16"):
        tensor_file.read_arrays(path, checksum_required=False)
    with tensor_file.open_tensors(path) as file:
        [(name, bits)] = file.tensors()
    assert (name, file.entries["x"].dtype, bits.dtype) == ("x", "BF16", np.uint16)
    assert bits.tolist() == [0x3F80, 0xC000]


def test_arrays_are_made_one_by_one(tmp_path):
    """A writer holds one array at a time, and asks for it when its turn comes."""
    alive = []

    def make(value):
        assert [a for a in alive if sys.getrefcount(a) > 3] == []  # list, variable, argument
        alive.append(np.full(8, value, np.float32))
        return alive[-1]

    tensors = {n: ("F32", (8,), lambda n=n: make(ord(n))) for n in "abc"}
    tensor_file.write_tensors(tmp_path / "c.safetensors", tensors)
    arrays, _ = tensor_file.read_arrays(tmp_path / "c.safetensors")
    assert {name: array[0] for name, array in arrays.items()} == {"a": 97, "b": 98, "c": 99}


@pytest.mark.parametrize(
    ("arrays", "texts", "message"),
    [
        ({"a": np.complex64([1])}, {}, "one of the dtypes .* but a has complex64"),
        ({"../a": np.float32([1])}, {}, "name its tensors with letters"),
        ({"a": np.float32([1])}, {"n": 1}, "must have texts as metadata"),
        ({"a": np.float32([1])}, {"n": "\ud800"}, "must have texts as metadata"),
        (
            {"a": np.float32([1])},
            {"n": "x" * tensor_file.HEADER_BYTES},
            "have a header of at most 1048576 bytes",
        ),
    ],
    ids=["dtype", "name", "number", "surrogate", "long"],
)
def test_what_would_not_be_read_is_not_written(tmp_path, arrays, texts, message):
    with pytest.raises(ValueError, match=message):
        tensor_file.write_arrays(tmp_path / "a.safetensors", arrays, texts)
    assert os.listdir(tmp_path) == []


def test_an_array_of_another_size_is_not_written(tmp_path):
    tensors = {"a": ("F32", (3,), lambda: np.zeros(2, np.float32))}
    with pytest.raises(ValueError, match="a must have 12 bytes, but it has 8"):
        tensor_file.write_tensors(tmp_path / "a.safetensors", tensors)
    assert os.listdir(tmp_path) == []


# ---- what a header may not say ------------------------------------------------------------------


def replaced(**fields):
    def change(header):
        header["a.words"] |= fields

    return change


def renamed(name):
    def change(header):
        header[name] = header.pop("a.words")

    return change


def texts(value):
    def change(header):
        header["__metadata__"] = value

    return change


# change of the header, part of the message; a.words is uint32 [2, 3, 4], 96 bytes, and comes first
HEADERS = {
    "dtype": (replaced(dtype="F8_E4M3"), "give a.words a dtype of BOOL"),
    "dtype-list": (replaced(dtype=[]), "give a.words a dtype"),
    "wider-dtype": (replaced(dtype="U64"), "hold 192 bytes of a.words, U64"),
    "shape": (replaced(shape=[2, 3, 5]), "hold 120 bytes of a.words"),
    "shape-text": (replaced(shape="234"), "dimensions below"),
    "shape-real": (replaced(shape=[2.0, 3, 4]), "dimensions below"),
    "shape-bool": (replaced(shape=[24, True]), "dimensions below"),
    "shape-negative": (replaced(shape=[-2, -3, 4]), "dimensions below"),
    "shape-huge": (replaced(shape=[2**62, 2**62]), "dimensions below"),
    "shape-huge-and-none": (replaced(shape=[0, 2**20, 2**20], data_offsets=[0, 0]), "dimensions"),
    "shape-long": (replaced(shape=[24] + [1] * 8), "at most 8 dimensions"),
    "offsets": (replaced(data_offsets=[0, 97]), "hold 96 bytes of a.words"),
    "offsets-one": (replaced(data_offsets=[0]), "a first byte and an end"),
    "offsets-negative": (replaced(data_offsets=[-96, 0]), "a first byte and an end"),
    "offsets-real": (replaced(data_offsets=[0.0, 96.0]), "a first byte and an end"),
    "offsets-swapped": (replaced(data_offsets=[96, 0]), "hold 96 bytes of a.words"),
    "overlap": (replaced(data_offsets=[1, 97]), "without gap or overlap"),
    "gap": (replaced(data_offsets=[1000, 1096]), "without gap or overlap"),
    "no-shape": (lambda h: h["a.words"].pop("shape"), "give dtype, shape and data_offsets"),
    "one-more-field": (replaced(code="print()"), "give dtype, shape and data_offsets"),
    "no-tensor": (lambda h: h.pop("a.words"), "without gap or overlap"),
    "last-missing": (lambda h: h.pop("flags"), "have 114 bytes of tensors, but it has 117"),
    "tensor-a-list": (lambda h: h.update(b=[1]), "give dtype, shape and data_offsets of b"),
    "path": (renamed("../../etc/passwd"), "letters, digits"),
    "hidden": (renamed(".bashrc"), "letters, digits"),
    "unicode": (renamed("\u0430"), "letters, digits"),
    "newline": (renamed("a\n"), "letters, digits"),
    "long-name": (renamed("a" * 201), "letters, digits"),
    "texts": (texts({"a": 1}), "have texts as metadata"),
    "texts-list": (texts(["a"]), "have texts as metadata"),
    "texts-nested": (texts({"a": {"b": "c"}}), "have texts as metadata"),
    "texts-surrogate": (texts({"a": "\ud800"}), "have texts as metadata"),
    "checksum-short": (texts({tensor_file.CHECKSUM: "12"}), "checksum of 64 digits"),
    "no-checksum": (texts({}), "must have a checksum"),
    "another-text": (lambda h: h["__metadata__"].update(note="he"), "match its checksum"),
    "another-dtype": (replaced(dtype="I32"), "match its checksum"),
    "another-shape": (replaced(shape=[3, 2, 4]), "match its checksum"),
    "another-name": (renamed("a.word"), "match its checksum"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_refused(path, name):
    change, message = HEADERS[name]
    header, tensors = parts(path)
    change(header)
    put(path, header, tensors)
    with pytest.raises(ValueError, match=rf"^\[files\] .*{message}"):
        tensor_file.read_arrays(path)


def test_swapped_tensors_are_refused(path):
    """Two of one shape and dtype, the names exchanged: only the checksum sees it."""
    two = {"x": np.zeros(4, np.uint32), "y": np.ones(4, np.uint32)}
    tensor_file.write_arrays(path, two)
    header, tensors = parts(path)
    header["x"], header["y"] = header["y"], header["x"]
    put(path, header, tensors)
    with pytest.raises(ValueError, match="match its checksum"):
        tensor_file.read_arrays(path)


# header as bytes, part of the message
TEXT_HEADERS = {
    "none": (b"", "header of 2 to"),
    "no-json": (b"{]", "header in JSON"),
    "list": (b"[]", "a JSON object"),
    "number": (b"12", "a JSON object"),
    "nested": (b"[" * 200_000, "header in JSON"),
    "nested-in-place": (b'{"__metadata__":' + b"[" * 500 + b"]" * 500 + b"}", "texts as metadata"),
    "twice": (b'{"a":1,"a":1}', "a name occurs twice"),
    "twice-inside": (b'{"a":{"dtype":"U8","dtype":"U8"}}', "a name occurs twice"),
    "long-number": (b'{"a":' + b"9" * 5000 + b"}", "header in JSON"),
    "infinite": (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', "dimensions below"),
    "utf-16": ('{"a":1}'.encode("utf-16"), "header in JSON"),
    "no-utf-8": (b'{"\xff":1}', "header in JSON"),
    "too-long": (b"{" + b" " * 2**20 + b"}", "header of 2 to 1048576 bytes"),
}


@pytest.mark.parametrize("name", TEXT_HEADERS)
def test_text_that_is_no_header_is_refused(path, name):
    text, message = TEXT_HEADERS[name]
    put(path, text, b"")
    with pytest.raises(ValueError, match=rf"^\[files\] .*{message}"):
        tensor_file.read_arrays(path)


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 2**40, 2**20 + 1])
def test_a_header_length_is_not_believed(path, claim):
    path.write_bytes(claim.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=rf"its length field says {claim}"):
        tensor_file.read_arrays(path)


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^\[files\] "):
            tensor_file.read_arrays(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="bytes of tensors"):
        tensor_file.read_arrays(path)


def test_a_flipped_bit_of_any_byte_is_refused(path):
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^\[files\] "):
            tensor_file.read_arrays(path)


def test_a_boolean_of_another_value_is_refused(tmp_path):
    path = tmp_path / "b.safetensors"
    save_file({"x": np.array([True])}, path)
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match="bytes of 0 and 1"):
        tensor_file.read_arrays(path, checksum_required=False)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)  # to open it would wait for a writer
    with pytest.raises(ValueError, match=r"\[files\] An existing file is required"):
        tensor_file.read_arrays("/dev/zero" if kind == "device" else path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(path):
    tensor_file.write_arrays(path, {"a": np.zeros(2**16)})  # more than is read ahead
    with tensor_file.open_tensors(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(ValueError, match="be complete, but it ends early"):
            list(file.tensors())


# ---- writing is all or nothing ------------------------------------------------------------------


def test_a_new_file_takes_the_place_of_the_old_one(path):
    path.chmod(0o640)
    tensor_file.write_arrays(path, {"n": np.float32([3])})
    assert tensor_file.read_arrays(path)[0]["n"] == 3
    assert path.stat().st_mode & 0o777 == 0o640
    assert leftovers(path.parent) == []


def test_a_new_file_has_the_rights_of_any_other(tmp_path):
    (tmp_path / "usual").touch()
    tensor_file.write_arrays(tmp_path / "a.safetensors", ARRAYS)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_stays_a_link(path):
    link = path.parent / "link.safetensors"
    link.symlink_to(path)
    tensor_file.write_arrays(link, {"n": np.float32([3])})
    assert link.is_symlink()
    assert tensor_file.read_arrays(path)[0]["n"] == 3


@pytest.mark.parametrize("where", ["nowhere/a.safetensors", "", "old.safetensors/a.safetensors"])
def test_a_place_for_no_file_is_refused(tmp_path, where):
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(ValueError, match=r"\[files\] A file in an existing directory is required"):
        tensor_file.write_arrays(tmp_path / where, ARRAYS)


def test_a_device_is_not_replaced():
    with pytest.raises(ValueError, match="but /dev/null is not a file"):
        tensor_file.write_arrays("/dev/null", ARRAYS)


def test_the_disk_has_the_bytes_before_the_name_does(path, monkeypatch):
    """fsync of the file, then the rename, then fsync of its directory."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def spied_fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        complete = not os.path.isdir(name) and set(tensor_file.read_arrays(name)[0]) == {"n"}
        steps.append(("fsync", "directory" if os.path.isdir(name) else complete))
        fsync(descriptor)

    def spied_replace(source, target):
        steps.append(("replace", Path(target) == path))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    tensor_file.write_arrays(path, {"n": np.float32([3])})
    assert steps == [("fsync", True), ("replace", True), ("fsync", "directory")]


# ---- faults -------------------------------------------------------------------------------------

OLD, NEW = ({"x": np.full(2**17, value, np.float32)} for value in (1, 2))

# Saves without end, each time a file of one number that its texts tell too, and kills that.
KILLER = """
import os, random, re, signal, sys, time
from pathlib import Path
import numpy as np
from rotormlx.storage import tensor_file
def save(number):
    arrays = {"x": np.full(2**17, number, np.float32), "y": np.arange(5, dtype=np.int32)}
    tensor_file.write_arrays(path, arrays, {"number": str(number)})
path, rng = Path(sys.argv[1]), random.Random(0)
save(1)
numbers, interrupted = set(), 0
for first in range(1000, 101_000, 1000):
    child = os.fork()
    while child == 0:
        save(first := first + 1)
    time.sleep(rng.uniform(0.002, 0.02))  # a save takes about 2 ms
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    arrays, texts = tensor_file.read_arrays(path)
    numbers.add(int(texts["number"]))
    assert (arrays["x"] == int(texts["number"])).all()
    for name in set(os.listdir(path.parent)) - {path.name}:
        assert re.fullmatch(r"[.]rotormlx-[0-9a-f]{16}[.]partial[.]safetensors", name), name
        (path.parent / name).unlink()
        interrupted += 1
print(interrupted, len(numbers))
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path, figure):
    """Of a process that saves without end: the old file or a new one, and its checksum is right."""
    interrupted, seen = map(int, python(KILLER, tmp_path / "a.safetensors").stdout.split())
    # Both happened: kills in the middle of a save, and after some that were done.
    assert interrupted > 20
    assert seen > 5
    figure(
        f"kill -9 while saving: 100 kills, {interrupted} in the middle of a save, the file whole "
        "each time"
    )


SAVER = """
import os, resource, signal, sys
import numpy as np
from rotormlx.storage import tensor_file
if sys.argv[2] == "full-disk":  # no file may grow beyond 200 KB, and that is an error, not the end
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
elif os.geteuid() == 0:  # rights bind others: root may write everywhere
    os.setgid(65534)
    os.setuid(65534)
try:
    tensor_file.write_arrays(sys.argv[1], {"x": np.ones(2**17)}, where="prompt cache")
except OSError as error:
    print(type(error).__name__, error.errno, error.strerror)
"""


FAULTS = {"full-disk": errno.EFBIG, "read-only": errno.EACCES}


@pytest.mark.parametrize("is_new", [False, True], ids=["replaced", "new"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_save_that_fails_changes_nothing(tmp_path, name, is_new):
    directory = tmp_path / "kept"
    directory.mkdir()
    path = directory / "a.safetensors"
    if not is_new:
        tensor_file.write_arrays(path, OLD)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    # The directories above must let another user through, this one only look.
    above = [parent for parent in tmp_path.parents if "pytest-of-" in str(parent)]
    for parent in (directory, *above, tmp_path):
        parent.chmod(0o555 if parent == directory else 0o755)
    said = python(SAVER, path, name).stdout
    directory.chmod(0o755)
    assert re.match(
        rf"\w+ {FAULTS[name]} \[prompt cache\] {path} could not be written: \w", said
    ), said
    assert "an existing file is unchanged" in said
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize("step", ["fsync", "replace", "open", "chmod"])
def test_no_step_of_a_save_may_fail_and_leave_a_trace(path, monkeypatch, step):
    """The disk reports what it could not keep as late as in fsync."""
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"\[files\] .* could not be written: No space left") as error:
        tensor_file.write_arrays(path, NEW)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupt_leaves_the_old_file(path):
    before = path.read_bytes()

    def give():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensor_file.write_tensors(path, {"a": ("F32", (1,), give)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# ---- memory -------------------------------------------------------------------------------------

READER = """
import sys
import mlx.core as mx
from rotormlx.mlx.cache import files
from rotormlx.storage import cache_file
from tests.support.memory import peak_bytes
before = peak_bytes()
try:
    with cache_file.opened(sys.argv[1]) as saved:
        kept = saved.read(files._array)
except ValueError as error:
    assert "match its checksum" in str(error), error
    print("refused", end=" ")
print(peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_reading_takes_the_memory_of_the_file_and_of_one_array(tmp_path, is_damaged):
    path = tmp_path / "a.safetensors"
    parts = [mx.full((1, 2, 2**14, 32), i, mx.float32) for i in range(16)]  # 4 MiB each
    states = [(keys, values, 2**14) for keys, values in zip(parts, reversed(parts), strict=True)]
    cache_file.write(path, ["KVCache"] * len(states), states, {}, files._tensor)
    size = path.stat().st_size
    if is_damaged:
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(b"\x7f")
    *refused, grown = python(READER, path).stdout.split()
    assert refused == ["refused"] * is_damaged
    assert size > 2**27
    # The file once, an array of numpy's and one of MLX's, and 16 MiB of what else Python does.
    assert int(grown) < size + 2 * 2**22 + 2**24
