"""Kernels that are not right on a machine: who notices, what is said, and what does their work."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from typer.testing import CliRunner

import rotormlx
from rotormlx.cli import main
from rotormlx.codec.format import ROLES
from rotormlx.config import BITS, RotorConfig
from rotormlx.measure import doctor
from rotormlx.measure.attention_time import EXACT, QUANTIZED, rotor_name
from rotormlx.mlx import backends, hosts
from rotormlx.mlx.backends import kept, metal, vectors
from rotormlx.mlx.backends.first_call import KernelError
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.backends.vectors import NAMES, RIGHT, Operation
from tests import emulator
from tests.support import models as tiny_models
from tests.support.runners import METAL

WIDTH = 3
needs_emulator = pytest.mark.skipif(
    METAL.on_device or emulator.missing() is not None, reason="needs the emulator, and no Metal"
)


def new_process():
    """Forget what a process knows; files stay."""
    backends.choose.cache_clear()
    kept._findings.cache_clear()


# ---- the check ----------------------------------------------------------------------------------


class Wrong(MLXBackend):
    """One result is wrong in one number."""

    def __init__(self, method, role=None):
        self.method, self.role = method, role

    def _encode(self, x, codec, *args):
        packed = super()._encode(x, codec, *args)
        if (self.method, self.role) == ("encode", codec.role):
            return packed._replace(words=packed.words.at[0, 0, 0, 0, 5].add(1))
        return packed

    def _decode(self, packed, codec, *args):
        rows = super()._decode(packed, codec, *args)
        wrong = (self.method, self.role) == ("decode", codec.role)
        return rows.at[0, 0, 1, 2].add(1e-3) if wrong else rows

    def _attend(self, call):
        output = super()._attend(call)
        wrong = self.method == "attend" and (call.group_rows > 8) == (self.role == "many")
        return output.at[0, -1, 1, 3].add(float("nan")) if wrong else output


WRONG = {
    **{f"{verb} {role}s": (verb, role) for verb in ("encode", "decode") for role in ROLES},
    "attend": ("attend", "few"),
    "attend, many query rows": ("attend", "many"),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_judged_by_itself(name):
    backend = Wrong(*WRONG[name])
    found = {
        other: vectors.difference(backend, Operation(other, WIDTH), "cascade-d64")
        for other in NAMES
    }
    wrong = {other for other, said in found.items() if said is not None}
    assert wrong == {name}
    says = "gives 1 of " if name.startswith("encode") else "is wrong by "
    assert found[name].startswith(says)


def test_the_backend_of_this_machine_is_right(each_backend):
    """Every operation, at every width, on one file."""
    new_process()
    found = {op: vectors.check(backends.fused(), op, "cascade-d80") for op in vectors.operations()}
    new_process()
    assert {op: said for op, said in found.items() if said != RIGHT} == {}


# ---- faults that are planted ---------------------------------------------------------------------


@pytest.fixture
def metal_here(monkeypatch, tmp_path):
    """This machine seems to have Metal; its kernels run in the emulator."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROTORMLX_BACKEND", raising=False)
    known = (metal.MetalBackend, lambda: None)
    monkeypatch.setitem(backends._BACKENDS, "metal", known)
    new_process()
    yield
    new_process()


def planted(fault, part):
    """A maker of kernels: those whose name has ``part`` do not compile, or miscompute."""
    made = []

    def make(*, name, source, **more):
        made.append(name)
        broken = part in name
        if broken and fault == "does not compile":
            source = "this is no Metal;\n" + source
        kernel = emulator.metal_kernel(name=name, source=source, **more)

        def call(**launch):
            outputs = kernel(**launch)
            if broken and fault == "miscomputes":
                return [out + mx.ones_like(out) for out in outputs]
            return outputs

        return call

    make.made = made
    return make


SAYS = {
    "does not compile": "It does not compile or run: ",
    "miscomputes": "It (gives|is wrong by) ",
}


@needs_emulator
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("part", ["attend", "encode"])
@pytest.mark.parametrize("fault", SAYS)
def test_text_stays_right(metal_here, fault, part):
    model, prompt = tiny_models.build("llama"), tiny_models.tokens(200)[0]

    def text():
        rotormlx.apply(model, RotorConfig(WIDTH, WIDTH))
        try:
            return [token for token, _ in generate_step(prompt, model, max_tokens=4)]
        finally:
            hosts.MLX_LM.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTORMLX_BACKEND", "mlx")
        new_process()
        expected = text()
    new_process()
    make = planted(fault, part)
    says = rf"the metal kernel .* cannot be used: {part}.*, 3 bits\. {SAYS[fault]}"
    with METAL.kernels(make), pytest.warns(UserWarning, match=says):
        assert text() == expected
    assert any(part not in name for name in make.made)  # the others run as kernels
    # Another process knows it, and makes no such kernel.
    new_process()
    make = planted(fault, part)
    with METAL.kernels(make), pytest.warns(UserWarning, match=says):
        assert text() == expected
    assert [name for name in make.made if part in name] == []


@needs_emulator
@pytest.mark.gpu
@pytest.mark.parametrize("part", ["attend_alone", "attend_parts", "attend_merge"])
def test_every_kernel_of_few_query_rows_is_judged(metal_here, part):
    """A short sequence takes one kernel, a long one two others."""
    operation = Operation("attend", WIDTH)
    with METAL.kernels(planted("miscomputes", part)):
        assert "is wrong by" in vectors.check(metal.MetalBackend(), operation, "cascade-d64")
    with METAL.kernels(planted("miscomputes", "none")):
        assert vectors.check(metal.MetalBackend(), operation, "cascade-d64") == RIGHT


@needs_emulator
@pytest.mark.gpu
def test_a_named_backend_does_not_give_way(metal_here, monkeypatch):
    monkeypatch.setenv("ROTORMLX_BACKEND", "metal")
    operation = Operation("encode keys", WIDTH)
    with METAL.kernels(planted("does not compile", "encode")):
        chosen = backends.backend()
        arrays, facts = vectors.load("cascade-d64")
        with pytest.raises(RuntimeError, match="must compile and run on"):
            chosen.encode(
                mx.array(arrays["key.input"]), vectors.codec_of(facts, operation.bits, "key")
            )


@pytest.mark.parametrize(
    ("said", "lacks"),
    [
        ("[metal::malloc] Unable to allocate 9 bytes.", True),
        ("[METAL] Command buffer execution failed: Insufficient Memory", True),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", True),
        ("Threadgroup memory size (33024) exceeds the maximum allowed (32768)", False),
        ("error: use of undeclared identifier 'abacus'", False),
    ],
)
def test_missing_memory_is_told_by_what_mlx_says(said, lacks):
    assert KernelError("attend", said).lacks_memory == lacks


@needs_emulator
@pytest.mark.gpu
@pytest.mark.parametrize("checked", [False, True], ids=["at the check", "later"])
def test_missing_memory_is_no_fault_of_a_kernel(metal_here, checked):
    """It is raised, and the kernel is trusted, or checked, the next time."""
    arrays, facts = vectors.load("cascade-d64")
    chosen, x = vectors.codec_of(facts, WIDTH, "key"), mx.array(arrays["key.input"])
    operation = Operation("encode keys", WIDTH)

    def make(**made):
        def call(**launch):
            raise RuntimeError("[metal::malloc] Unable to allocate 9 bytes.")

        return call

    if checked:
        backends.backend().keep(operation, RIGHT)
    with METAL.kernels(make), pytest.raises(RuntimeError, match="Unable to allocate 9 bytes"):
        backends.backend().encode(x, chosen)
    assert kept.findings("metal").get(str(operation)) == (RIGHT if checked else None)
    assert backends.backend().replaced() == {}
    with METAL.kernels():
        packed = backends.backend().encode(x, chosen)
    assert np.array_equal(np.array(packed.words), arrays[f"key.words.{WIDTH}"])


@needs_emulator
@pytest.mark.gpu
def test_right_kernels_are_checked_once(metal_here):
    arrays, facts = vectors.load("cascade-d64")
    chosen = vectors.codec_of(facts, WIDTH, "key")

    def encode():
        """What is launched while keys are encoded in a new process."""
        new_process()
        launches = []
        with METAL.recorded(lambda kernel, launch: launches.append(launch["grid"])):
            packed = backends.backend().encode(mx.array(arrays["key.input"]), chosen)
        assert np.array_equal(np.array(packed.words), arrays[f"key.words.{WIDTH}"])
        return len(launches)

    assert [encode(), encode()] == [2, 1]


@needs_emulator
@pytest.mark.gpu
def test_a_damaged_file_of_findings_counts_as_none(metal_here, tmp_path):
    with METAL.kernels():
        backend = backends.backend()
        backend.keep(Operation("encode keys", WIDTH), RIGHT)
        (path,) = (tmp_path / "cache" / "kernels").iterdir()
        assert json.loads(path.read_text())["found"] == {"encode keys, 3 bits": RIGHT}
        for text in ("", "[]", '{"found": 3}'):
            path.write_text(text)
            new_process()
            backends.backend().keep(Operation("attend", WIDTH), RIGHT)
            assert json.loads(path.read_text())["found"] == {"attend, 3 bits": RIGHT}


@needs_emulator
@pytest.mark.gpu
def test_a_cache_folder_that_cannot_be_written_is_named_once(metal_here, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path / "file"))
    says = r"must be stored in .*kernels, but that folder cannot be written \(Not a directory\)"
    with METAL.kernels():
        backend = backends.backend()
        with pytest.warns(UserWarning, match=says):
            backend.keep(Operation("encode keys", WIDTH), RIGHT)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend.keep(Operation("encode values", WIDTH), RIGHT)


# ---- the command --------------------------------------------------------------------------------


def run(*options):
    return CliRunner().invoke(main.app, ["doctor", *options])


def test_doctor_finds_this_machine_right(monkeypatch, tmp_path):
    for name, small in {"CONTEXTS": (64, 256), "CHUNK": 4, "HEADS": 4, "KV_HEADS": 2}.items():
        monkeypatch.setattr(doctor, name, small)
    monkeypatch.setattr(doctor, "names", lambda: ["cascade-d64", "dense-d64"])
    path = tmp_path / "found.json"
    done = run("--output", str(path), "--runs", "1")
    assert done.exit_code == 0, done.output
    assert done.output.count("right") == 4 * len(NAMES) + 1
    assert "every kernel is right" in done.output
    found = json.loads(path.read_text())
    assert found["wrong"] == {}
    timed = [(t["what"], t["tokens"], t["queries"]) for t in found["timings"]]
    steps = [("decode step", 1), ("prompt chunk", 4)]
    assert timed == [(what, n, queries) for n in (64, 256) for what, queries in steps]
    assert {*map(rotor_name, BITS), EXACT, QUANTIZED} == found["timings"][0]["ms"].keys()
    assert found["verdict"] in " ".join(done.output.split())


@needs_emulator
@pytest.mark.gpu
def test_doctor_names_what_is_wrong(metal_here, monkeypatch, tmp_path):
    asked = [Operation("encode keys", WIDTH), Operation("encode values", WIDTH)]
    kept.findings("metal").keep("levels of keys", "quad")
    monkeypatch.setattr(doctor, "names", lambda: ["cascade-d64"])
    monkeypatch.setattr(doctor, "operations", lambda: asked)
    path = tmp_path / "found.json"
    # Values have no centres.
    with METAL.kernels(planted("miscomputes", "centre_means")):
        done = run("--output", str(path), "--no-time")
        assert done.exit_code == 1, done.output
        assert list(backends.backend().replaced()) == asked[:1]
    assert "encode keys, 3 bits: gives " in done.output
    assert "fastest levels of keys: quad\n" in done.output
    assert "exact" not in done.output  # nothing was timed
    assert "1 of 2 operations are not right" in " ".join(done.output.split())
    found = json.loads(path.read_text())
    assert list(found["wrong"]) == ["encode keys, 3 bits"]
    assert found["ways"] == {"levels of keys": "quad"}


def test_doctor_refuses_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_out", lambda **_: pytest.fail("work was done"))
    done = run("--output", str(tmp_path))
    assert done.exit_code == 2
    monkeypatch.undo()
    monkeypatch.setenv("ROTORMLX_BACKEND", "abacus")
    new_process()
    done = run("--output", str(tmp_path / "found.json"), "--no-time")
    new_process()
    assert done.exit_code == 2
    assert "ROTORMLX_BACKEND must be one of" in done.output
