"""The scripts for a GPU, as far as they go without one: stages, cases, and going on after a cut."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rotormlx.codec.format import KEY, VALUE
from rotormlx.config import RotorConfig

CLONE = Path(__file__).resolve().parents[2]
CHECK = CLONE / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(not CHECK.exists(), reason="this is no clone: there is no scripts")

# ---- gpu_check.sh --------------------------------------------------------------------------------

# Stands for every program; a stage that runs a word of $BROKEN fails.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
[ -z "${BROKEN-}" ] || [[ "$*" != *"$BROKEN"* ]]
"""


def check(*arguments, **environment):
    return subprocess.run(
        ["bash", str(CHECK), *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def stages():
    done = check("--list")
    assert done.returncode == 0
    return [line.split(maxsplit=2) for line in done.stdout.splitlines()]


@pytest.fixture
def stubs(tmp_path):
    """A machine on which every program is there and does nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("nvidia-smi", "nvcc", "g++", "python3", "compute-sanitizer"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:/usr/bin:/bin",
        "OUT": str(tmp_path / "out"),
        "CALLS": str(tmp_path / "calls"),
    }


def test_every_stage_has_a_limit_below_eight_minutes():
    names = [name for name, _, _ in stages()]
    assert len(set(names)) == len(names) >= 7
    for name, limit, what in stages():
        assert 0 < int(limit) < 480, name
        assert what
        assert re.search(rf"^stage_{name}\(\)", CHECK.read_text(), re.MULTILINE), name


def test_an_unknown_stage_is_refused():
    done = check("build", "nothing")
    assert done.returncode == 2
    assert done.stdout == "There is no stage nothing; scripts/gpu_check.sh --list names all.\n"


@pytest.mark.skipif((CLONE / ".venv-gpu").exists(), reason="a real Python would be run")
def test_what_has_passed_is_skipped_unless_it_is_named(stubs, tmp_path):
    names = [name for name, _, _ in stages()]
    first = check(**stubs, BROKEN="--tables decode")
    assert first.returncode == 1
    assert re.findall(r"^== (\S+):", first.stdout, re.MULTILINE) == names
    assert "bench-decode: exit status 1" in first.stdout
    again = check(**stubs)
    assert again.returncode == 0, again.stdout
    assert re.findall(r"^== (\S+):", again.stdout, re.MULTILINE) == ["bench-decode"]
    assert again.stdout.count("has passed with these sources; name it") == len(names) - 1
    (tmp_path / "out" / "done" / "build").write_text("other sources")
    changed = check(**stubs)
    assert re.findall(r"^== (\S+):", changed.stdout, re.MULTILINE) == ["build"]
    named = check("build", "sanitizer", **stubs)
    assert re.findall(r"^== (\S+):", named.stdout, re.MULTILINE) == ["build", "sanitizer"]
    # What each stage printed is kept.
    kept = {path.stem for path in (tmp_path / "out").glob("*.txt")}
    assert kept == {*names, "gpu"}
    calls = Path(stubs["CALLS"]).read_text()
    assert calls.count("rotormlx.torch build --head-dim 128") == 3 * 4
    assert calls.count("--tables encode") == 1


# ---- bench_cuda.py -------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """The script, on a CPU."""
    monkeypatch.syspath_prepend(str(CLONE / "scripts"))  # scripts import each other by name
    module = importlib.import_module("bench_cuda")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "copies_needed", lambda size: 2)
    return module


def test_every_case_is_another(bench):
    decode = bench.decode_cases([1024, 4096], [1, 32])
    assert decode[0] == {"batch": 1, "tokens": 1024}
    prompts = bench.prefill_cases([512], [4096, 8192], 2048)
    assert prompts[0] == {"history": 0, "queries": 512}
    assert prompts[1:] == [{"history": n, "queries": 2048} for n in (4096, 8192)]
    encode = bench.encode_cases([2, 3])
    for cases, number in ((decode, 4), (prompts, 3), (encode, 12)):
        assert len({json.dumps(case) for case in cases}) == len(cases) == number


def test_a_cut_run_goes_on(bench, tmp_path, monkeypatch):
    cases = {"decode": bench.decode_cases([64, 128], [1]), "encode": bench.encode_cases([4])}
    asked = []

    def measure(case, bits, runs):
        asked.append(case)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [{**case, "contender": "x", "ms": len(asked)}]

    monkeypatch.setattr(bench, "MEASURES", dict.fromkeys(cases, measure))
    path = tmp_path / "new" / "cases.json"
    kept = bench.KeptCases(path, {"device": "a"})
    with pytest.raises(KeyboardInterrupt):
        bench.measure_missing(kept, cases, [4], 1)
    kept = bench.KeptCases(path, {"device": "a"})
    assert [row["ms"] for row in kept.table("decode")] == [1, 2]
    assert kept.table("encode") == []
    bench.measure_missing(kept, cases, [4], 1)
    assert asked == cases["decode"] + cases["encode"][:1] + cases["encode"]
    assert len(bench.KeptCases(path, {"device": "a"}).table("encode")) == 6
    # Another device, or a damaged file, begins anew.
    assert bench.KeptCases(path, {"device": "b"}).table("decode") == []
    path.write_text(path.read_text()[:50])
    assert bench.KeptCases(path, {"device": "a"}).table("decode") == []
    assert list(path.parent.iterdir()) == [path]


def test_what_goes_into_memory_is_measured(bench):
    sizes = {"a": 50, "b": 60, "c": 40, "d": 0}
    assert bench.fitting(sizes, 100) == ["a", "c", "d"]
    assert bench.fitting(sizes, 1000) == list(sizes)


def test_bytes_of_a_packed_history(bench):
    config = RotorConfig(4, 3)
    views = [bench.packed_view(config, role, 2, 128) for role in (KEY, VALUE)]
    assert bench.packed_bytes(config, 2, 128) == sum(size for _, size in views)
    held = [x for view, _ in views for x in (view.exact, *view.packed) if x is not None]
    assert bench.packed_bytes(config, 2, 128) == sum(x.nbytes for x in held)


def test_speed_is_against_what_was_measured(bench):
    rows = [{"contender": "a", "ms": 4.0}, {"contender": "b", "ms": 2.0}]
    assert [row["a / this"] for row in bench.compared(rows, "a", "a / this")] == [1, 2]
    assert [row["c / this"] for row in bench.compared(rows, "c", "c / this")] == [None, None]


@pytest.mark.parametrize("history", [0, 192])
def test_a_chunk_is_attended_by_all(bench, history):
    case = {"history": history, "queries": 96}
    steps = bench.chunk_calls(case, [4, 2])
    own = ["rotormlx 4 bit", "rotormlx 2 bit"] if history else ["rotormlx"]
    assert list(steps) == [bench.SDPA, *own]
    for calls in steps.values():
        output = calls[0]()
        assert output.shape == (1, 32, 96, 128)
        assert output.isfinite().all()
    # Each query sees the tokens up to its own.
    call = steps[bench.SDPA][0]
    tokens = call.args[1].shape[2]
    seen = torch.arange(tokens) <= torch.arange(96)[:, None] + tokens - 96
    mask = seen.float().log().bfloat16()
    wanted = scaled_dot_product_attention(*call.args, attn_mask=mask, enable_gqa=True)
    # A rounding or two of bfloat16, on numbers about 1.
    assert torch.allclose(call(), wanted, atol=2**-6)


def test_steps_over_packed_tokens_run(bench):
    query = torch.randn(2, 32, 1, 128, dtype=torch.bfloat16)
    first, second = bench.packed_steps(RotorConfig(3, 3), query, 128, 2)
    assert first().shape == (2, 32, 1, 128)
    assert not torch.equal(first(), second())


def test_rivals_read_the_exact_tokens(bench):
    """Their layouts, by stand-ins with their interfaces."""
    query = torch.randn(2, 32, 1, 128, dtype=torch.bfloat16)
    pairs = bench.exact_pairs(2, 2, 100)
    asked = {}

    class Wrapper:
        def __init__(self, work, layout, use_tensor_cores):
            asked["layout"] = layout

        def plan(self, pointers, indices, last, *sizes, q_data_type, kv_data_type):
            asked.update(pointers=pointers.tolist(), pages=len(indices), last=last.tolist())
            asked["sizes"] = sizes

        def run(self, q, paged):
            assert q.shape == (2, 32, 128)
            assert [x.shape for x in paged] == [(2 * 2, 8, 64, 128)] * 2
            return q

    def with_cache(q, keys, values):
        turned = (x.transpose(1, 2) for x in (q, keys, values))
        return scaled_dot_product_attention(*turned, enable_gqa=True)

    found = {
        "FlashInfer": SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper),
        "FlashAttention 2": SimpleNamespace(flash_attn_with_kvcache=with_cache),
        "FlashAttention 3": SimpleNamespace(),  # of another interface
    }
    steps = bench.rival_steps(found, query, pairs)
    assert {name: len(calls) for name, calls in steps.items()} == {
        "FlashInfer": 2,
        "FlashAttention 2": 2,
    }
    assert asked == {
        "layout": "HND",
        "pointers": [0, 2, 4],
        "pages": 4,
        "last": [36, 36],
        "sizes": (32, 8, 128, 64),
    }
    for call, pair in zip(steps["FlashAttention 2"], pairs, strict=True):
        wanted = scaled_dot_product_attention(query, *pair, enable_gqa=True)
        assert torch.equal(call(), wanted)


def test_rivals_that_are_missing_are_named(bench, monkeypatch):
    monkeypatch.setattr(bench, "RIVALS", {"a": ("no_such_module", None), "b": ("json", None)})
    found, missing = bench.rivals()
    assert found == {"b": json}
    assert missing == {"a": "not measured, no_such_module is not installed"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_nothing_is_measured_without_a_gpu(bench, tmp_path, capsys):
    asked = {"contexts": "64", "batches": "1", "prompts": "64", "output": tmp_path / "out"}
    with pytest.raises(bench.typer.Exit):
        bench.main(tables="encode", bits="4", **asked)
    assert "torch finds no CUDA GPU" in capsys.readouterr().out
    with pytest.raises(bench.typer.Exit):
        bench.main(tables="speed", bits="4", **asked)
    assert "--tables must list some of encode, decode, prefill" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_decode_rows_have_their_bytes(bench, monkeypatch):
    times = iter(range(1, 99))
    monkeypatch.setattr(bench, "median_ms", lambda steps, runs: {n: next(times) for n in steps})
    monkeypatch.setattr(bench.torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    rows = bench.measure_decode({"batch": 2, "tokens": 128}, [4, 8], 1)
    assert [row["contender"] for row in rows] == [bench.FLASH, "rotormlx 4 bit", "rotormlx 8 bit"]
    exact = 2 * 2 * 8 * (4 + 128 + 96) * 128 * 2
    assert rows[0]["bytes"] == exact
    assert rows[1]["bytes"] == bench.packed_bytes(RotorConfig(4, 4), 2, 128)
    assert [row["flash / this"] for row in rows] == [1, 1 / 2, 1 / 3]
    monkeypatch.setattr(bench.torch.cuda, "mem_get_info", lambda: (0, 0))
    assert bench.measure_decode({"batch": 2, "tokens": 128}, [4, 8], 1) == []


def test_tables_have_all_that_is_kept(bench, monkeypatch, tmp_path, capsys):
    """A command that measures one table writes those of commands before it too."""
    cuda = {"is_available": True, "get_device_name": "a GPU"}
    for name, value in cuda.items():
        monkeypatch.setattr(bench.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda runs: 2e9)
    monkeypatch.setattr(bench, "driver", lambda: "1.0")

    def measure(case, bits, runs):
        return bench.compared(
            [{**case, "contender": "x", "ms": 2.0, "bytes": 2e6}], "y", "y / this"
        )

    monkeypatch.setattr(bench, "MEASURES", dict.fromkeys(bench.MEASURES, measure))
    asked = {"contexts": "64", "batches": "1,2", "bits": "4", "prompts": "64", "chunk": 64}
    for table in ("encode", "decode"):
        bench.main(tables=table, runs=1, output=tmp_path, **asked)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {title.split(",")[0]: len(rows) for title, rows in found["tables"].items()} == {
        "Encoding": 6,
        "Decode attention": 2,
    }
    row = found["tables"][bench.TITLES["decode"]][0]
    assert (row["GB/s"], row["share of copy"]) == (1.0, 0.5)
    assert found["device"].startswith("a GPU, driver 1.0, torch ")
    assert (tmp_path / "decode.svg").exists()
    assert "FlashInfer: not measured" in capsys.readouterr().out
