"""The benchmark of whole models: turns, bytes, tokens and refusals. No test looks at a clock."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from rotormlx.config import RotorConfig
from rotormlx.torch import __main__ as commands
from rotormlx.torch import apply, bench
from rotormlx.torch.bench import Contender, Measured, Settings
from tests.support.torch_models import build

TINY = ["bench", "tiny", "--device", "cpu", "--dtype", "float32"]
SHORT = ["--prompt", "70", "--history", "200", "--tokens", "3", "--batch", "2", "--runs", "2"]
VALUES = 2 * 2 * 2 * 32  # of a token: keys and values, layers, KV heads, head_dim


def ran(arguments):
    return CliRunner().invoke(commands.app, arguments)


def test_the_command_counts_bytes_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    arguments = [*TINY, *SHORT, "--bits", "4,2", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    done = ran(arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert found["settings"] == {"prompt": 70, "history": 200, "tokens": 3, "batch": 2, "runs": 2}
    assert (found["model"], found["weights"], found["dtype"]) == ("tiny", "random", "float32")
    assert found["command"] == f"python -m rotormlx.torch {' '.join(arguments)}"
    assert found["versions"]["torch"] == torch.__version__
    rows = {row["contender"]: row for row in found["rows"]}
    names = ["DynamicCache", "QuantizedCache 4 bit, quanto", "QuantizedCache 4 bit, hqq"]
    names += ["RotorCache 4 bit", "RotorCache 2 bit", "StaticCache"]
    assert list(rows) == [*names, "RotorCache 4 bit, static", "RotorCache 2 bit, static"]
    # The last token that is written is not read again.
    exact = 2 * VALUES * (200 + 3) * 4
    for name in ("DynamicCache", "StaticCache"):
        assert rows[name]["measured"]["cache_bytes"] >= exact
    assert rows["DynamicCache"]["measured"]["cache_bytes"] == exact
    sizes = [rows[f"RotorCache {bits} bit"]["measured"]["cache_bytes"] for bits in (4, 2)]
    assert exact > sizes[0] > sizes[1]
    for row in rows.values():
        assert (row["measured"] is None) == bool(row["reason"])
        if row["measured"]:
            assert row["measured"]["peak_bytes"] == row["measured"]["cache_bytes"]
        else:
            assert f"{row['contender']}: {row['reason']}" in done.output


def test_a_compressed_cache_has_the_bytes_that_it_tells():
    model, _ = bench.model_of("tiny", device="cpu", dtype="float32")
    apply(model, RotorConfig())
    _, _, cache = bench._generate(model, Contender("", {}), 1, 200, 4)
    assert (cache.get_seq_length(), cache.packed_tokens) == (203, 128)
    assert bench.cache_bytes(cache) == cache.nbytes


def test_each_tensor_of_a_cache_counts_once():
    class Layer:
        def __init__(self):
            self.keys, self.values = torch.zeros(3), [torch.zeros(5, dtype=torch.int8)]
            self.view = self.keys

    cache = torch.nn.Module()
    cache.layers = [Layer(), Layer()]
    assert bench.cache_bytes(cache) == 2 * (12 + 5)


def test_contenders_take_turns_and_keep_nothing(monkeypatch):
    model, weights = bench.model_of("tiny", device="cpu", dtype="float32")
    asked, kept = [], []

    def turn(model, one, settings):
        asked.append(one.name)
        number = len(asked)
        if one.name == "c":
            raise ValueError("[x] no.")
        if one.name == "d":
            raise torch.OutOfMemoryError
        if one.name == "f":
            raise RuntimeError("a compiler's words\nand its stack")
        return Measured(number, 10 * number, number, 7)

    monkeypatch.setattr(bench, "_turn", turn)
    chosen = [Contender(name, {}) for name in "abcdf"] + [Contender("e", {}, missing="not here")]
    options = {"name": "tiny", "weights": weights, "command": "x"}
    result = bench.run(model, chosen, Settings(runs=3, history=99), keep=kept.append, **options)
    # The first round warms up, and what is refused there is not asked again.
    assert asked == [*"abcdf", *"ab" * 3]
    rows = {row.contender: row for row in result.rows}
    assert rows["a"].measured == Measured(8, 80, 10, 7)
    assert rows["b"].measured == Measured(9, 90, 11, 7)
    said = ["c: refused: [x] no.", "d: out of memory", "f: failed: a compiler's words"]
    assert bench.remarks(result) == [*said, "e: not here"]
    assert len(kept) == 3
    assert kept[-1] == result


def test_tokens_a_second_are_of_all_sequences(monkeypatch):
    model, _ = bench.model_of("tiny", device="cpu", dtype="float32")
    asked = []

    def generate(model, one, batch, length, new_tokens):
        asked.append((batch, length, new_tokens))
        return 0.25, 2.0, torch.nn.Module()

    monkeypatch.setattr(bench, "_generate", generate)
    monkeypatch.setattr(bench, "cache_bytes", lambda cache: 11)
    found = bench._turn(model, Contender("", {}), Settings(50, 60, 7, batch=3))
    assert found == Measured(250.0, 10.5, 11, 11)
    # The first token behind the history comes with reading it.
    assert asked == [(3, 50, 1), (3, 60, 8)]


def test_a_folder_gives_its_shape_and_its_weights_when_asked(tmp_path):
    saved = build("qwen3")
    saved.save_pretrained(tmp_path)
    own, is_own = bench.model_of(str(tmp_path), device="cpu", dtype="float32", weights=True)
    made, is_random = bench.model_of(str(tmp_path), device="cpu", dtype="float32")
    assert (is_own, is_random) == ("its own", "random")
    assert type(own) is type(made) is type(saved)
    name, parameter = next(iter(saved.named_parameters()))
    assert torch.equal(own.get_parameter(name), parameter)
    assert not torch.equal(made.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("qwen3-4b", 4_022_468_096),
    ],
)
def test_a_shape_has_the_parameters_of_its_model(name, parameters):
    with torch.device("meta"):
        model = bench.AutoModelForCausalLM.from_config(bench._config(name))
    assert sum(x.numel() for x in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "none", "--device", "cpu"], "MODEL must be one of llama-1b"),
        (
            [*TINY, "--bits", "5"],
            "--bits must be from (2, 3, 4, 8), comma-separated, but it is '5'",
        ),
        ([*TINY, "--bits", ""], "--bits must be from"),
        ([*TINY, "--weights"], "--weights needs a folder with weights, but tiny is a shape"),
        ([*TINY, "--history", "4090", "--tokens", "9"], "4,096 positions, but 4,100 tokens"),
        ([*TINY, "--dtype", "int8"], "--dtype must be one of float32"),
        ([*TINY, "--device", "tpu"], "--device must be cpu, cuda or cuda:N, but 'tpu' came"),
        ([*TINY, "--output", "/none/a.json"], "in an existing folder, but it is /none/a.json"),
        ([*TINY, "--output", "/"], "--output must be a file in an existing folder, but it is /"),
    ],
)
def test_bad_input_is_refused_by_one_sentence(arguments, sentence):
    done = ran(arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert done.output.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_is_refused_without_a_gpu():
    done = ran(["bench", "tiny"])
    assert done.exit_code == 1
    assert "--device cuda needs a CUDA GPU, but torch sees none; use --device cpu." in done.output
