"""Every file in examples/, run as a user runs it, and a fact of what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import rotormlx
from rotormlx.codec import reference
from rotormlx.codec.format import Packed
from tests.support import models

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"
FILES = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The tiny model: 2 layers, 2 KV heads, head_dim 64, float32.
VALUES_PER_TOKEN = 2 * 2 * 2 * 64
BITS_PER_VALUE = 4 + 16 / 64 + 8 / 64  # at 4 bits: a scale per row, and a centre per key block
Run = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that chats in printable letters.

    Its weights are so large that its text depends on what it has read.
    """
    directory = tmp_path_factory.mktemp("model")
    models.save(directory)
    weights = mx.load(str(directory / "model.safetensors"))
    larger = {name: w if "norm" in name else 5 * w for name, w in weights.items()}
    # Tokens are characters in their order, "!" to "~" first. The others score 0, never the best.
    letters = mx.arange(models.VOCABULARY)[:, None] <= ord("~") - ord("!")
    larger["lm_head.weight"] = mx.where(letters, larger["lm_head.weight"], 0)
    mx.save_safetensors(str(directory / "model.safetensors"), larger)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program in a folder of its own, without a network and without the demo's model."""
    without_network = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "ROTORMLX_CACHE": str(tmp_path)}

    def run(program: str | Path, *arguments: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, str(FOLDER / program), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | without_network | environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def found(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of the first place that fits."""
    match = re.search(pattern, text)
    assert match, text
    return match.groups()


def numbers(line: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)]


def sizes(printed: str) -> list[tuple[float, float, float]]:
    """Tokens, times smaller, and rotormlx's MB of each line of memory; float16's MB are checked."""
    lines = [line for line in printed.splitlines() if line.startswith("Cache at")]
    rows = []
    for line in lines:
        tokens, _, exact, size, ratio = numbers(line)
        assert exact == pytest.approx(2 * VALUES_PER_TOKEN * tokens / 1e6, abs=0.005)
        rows.append((tokens, ratio, size))
    return rows


def test_every_file_has_a_test_and_a_line_in_the_list():
    listed = set(re.findall(r"^\| \[(\S+)\]\(\1\) \| \S", (FOLDER / "README.md").read_text(), re.M))
    assert listed == FILES
    assert len(FILES) == 10
    assert {f"test_{name.partition('.')[0]}" for name in FILES} <= set(globals())


def test_generate(run, model):
    printed = run("generate.py", model)
    exact, compressed = found("^Exact cache: (.+)\n4-bit cache: (.+)\n", printed)
    assert exact != compressed  # 4 bits change the text of a model with random weights
    packed, tokens = map(int, found(r"(\d+) of (\d+) tokens are packed", printed))
    assert packed == (tokens - 4 - 64) // 64 * 64 > 0
    (short, _, size), (long, ratio, _) = sizes(printed)
    assert short == tokens
    scales = 4 * VALUES_PER_TOKEN  # of the channels
    expected = VALUES_PER_TOKEN * (packed * BITS_PER_VALUE / 8 + 4 * (tokens - packed)) + scales
    assert size == pytest.approx(expected / 1e6, abs=0.005)
    assert long == 32_768
    assert 3.5 < ratio < 16 / BITS_PER_VALUE  # sink and tail are exact


def test_chat(run, model, tmp_path):
    printed, path = run("chat.py", model), tmp_path / "prompt.safetensors"
    tokens, size = map(float, found(r"values of (\d+) tokens in ([\d.]+) MB", printed))
    assert size == pytest.approx(path.stat().st_size / 1e6, abs=0.005)
    assert size < 0.8 * 2 * VALUES_PER_TOKEN * tokens / 1e6
    saved = re.findall("^Answer, saved prompt: (.+)$", printed, re.M)
    fresh = re.findall("^Answer, fresh prompt: (.+)$", printed, re.M)
    assert saved == fresh
    assert len(set(saved)) == 2  # two questions, two answers
    # What the other example says it reads.
    assert f"version 2, {tokens:.0f} tokens, " in run("read_with_numpy.py")


def test_batch(run, model):
    printed = run("batch.py", model)
    assert "3 of 3 texts are the same in the batch and alone." in printed
    rows = re.findall(r"of (\d+) tokens: (\d+) of (\d+) tokens packed", printed)
    assert len({tokens for tokens, _, _ in rows}) == 3
    for tokens, packed, held in rows:
        assert int(held) == int(tokens) + 24
        assert int(packed) == (int(held) - 4 - 64) // 64 * 64
    texts = re.findall("in the batch: (.+)", printed)
    assert len(set(texts)) == 3
    assert {len(text) for text in texts} == {24}  # a token is a letter


def test_server_and_client(run, model):
    printed = run("server_and_client.py", model)
    assert len(set(re.findall("^Answer: (.+)$", printed, re.M))) == 2
    (first, none), (second, reused) = re.findall(r"Prompt: (\d+) tokens, (\d+) from", printed)
    assert int(none) == 0
    # A compressed cache is reused up to the end of a whole block behind the sink.
    assert 600 < int(reused) < min(int(first), int(second))
    assert int(reused) % 64 == 4


def test_calibrate(run, model):
    printed = run("calibrate.py", model)
    rows = re.findall(r"^([a-z, ]+?) +([\d.]+) +([\d.]+)%$", printed, re.M)
    names = [name for name, _, _ in rows]
    assert names == ["not calibrated", "calibrated, scale", "calibrated, klt"]
    plain, _, klt = (float(kl) for _, kl, _ in rows)
    assert 0 < klt < plain
    assert all(0 < float(top1) < 100 for _, _, top1 in rows)


def test_layer_bits(run, model):
    printed = run("layer_bits.py", model)
    rows = dict(re.findall(r"^(\S.+?) {2,}([\d.]+) +[\d.]+ MB$", printed, re.M))
    assert rows == {
        "keys 4, values 4": "4.375",
        "keys 4, values 2": "3.375",
        "keys 3, values 3": "3.375",
        "3 on average, by layer": "3.375",
    }
    bars = re.findall(r"^ +(\d)  (\d)  (#+) +(\d)  (#+)$", printed, re.M)
    assert [int(layer) for layer, *_ in bars] == [0, 1]
    bits = [int(n) for _, keys, _, values, _ in bars for n in (keys, values)]
    assert bits == [len(bar) for _, _, keys, _, values in bars for bar in (keys, values)]
    assert np.mean(bits) == 3
    assert len(set(bits)) > 1  # the model's layers differ


def test_with_transformers(run, model):
    printed = run("with_transformers.py", model)
    exact, compressed = found("^Exact cache: (.+)\n4-bit cache: (.+)\n", printed)
    assert exact != compressed
    packed, tokens = map(int, found(r"(\d+) of (\d+) tokens are packed", printed))
    assert packed == (tokens - 4 - 64) // 64 * 64 > 0
    (_, short, _), (_, long, _) = sizes(printed)
    assert 3 < short < long < 16 / BITS_PER_VALUE


def test_torch_operators(run):
    rows = [numbers(line) for line in run("torch_operators.py").splitlines()[3:]]
    assert [bits for bits, *_ in rows] == [8, 4, 3, 2]
    # Squared errors of the codes on normal numbers: docs/CODES.md.
    distortions = {8: 0.0, 4: 0.0095, 3: 0.0239, 2: 0.0867}
    for bits, share, keys, values, attention in rows:
        # head_dim 128: a scale per row, a centre per block of keys.
        assert share == pytest.approx(100 * (bits + 16 / 128 + 8 / 64) / 16, abs=0.05)
        assert values**2 == pytest.approx(1 - distortions[bits], abs=0.002)
        assert keys > values or bits == 8
        assert attention > 0.9


def saved(path, head_dim=64, **options):
    """Save the caches of a random model behind 180 tokens; returns that of layer 0.

    The last of its 3 blocks counts fewer than 64 tokens.
    """
    model = models.build("llama", head_dim=head_dim)
    caches = rotormlx.make_prompt_cache(model, rotormlx.RotorConfig(**options))
    mx.eval(model(models.tokens(300), cache=caches))
    for cache in caches:
        cache.trim(120)
    rotormlx.save_prompt_cache(path, model, caches)
    return caches[0]


@pytest.mark.parametrize("head_dim", [32, 64, 128])  # the last stage of 64 has radix 4, not 2
def test_read_with_numpy(head_dim, run, tmp_path):
    hidden = tmp_path / "hidden"
    for name in ("mlx", "mlx_lm", "torch", "rotormlx", "safetensors"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise RuntimeError('numpy alone')")
    path, output = tmp_path / "cache.safetensors", tmp_path / "keys.npy"
    cache = saved(path, head_dim, seed=5)
    printed = run("read_with_numpy.py", path, output, PYTHONPATH=str(hidden))

    keys, _ = cache.views()
    packed = Packed(*(np.array(part) for part in keys.packed))
    expected = reference.decode(packed, keys.codec, channel_scale=np.array(keys.channel_scale))
    expected = expected[:, :, : cache.packed_tokens]
    np.testing.assert_allclose(np.load(output), expected, rtol=0, atol=1e-9)  # both in float64
    assert "version 2, 180 tokens, 176 of them packed" in printed
    (bits,) = found(r"took ([\d.]+) bits per value", printed)
    assert float(bits) == 4 + 16 / head_dim + 16 / 64


def test_read_with_numpy_refuses_what_it_cannot_read(run, tmp_path):
    with pytest.raises(AssertionError, match=r"no file prompt\.safetensors; run examples/chat\.py"):
        run("read_with_numpy.py")
    saved(tmp_path / "three.safetensors", key_bits=3)
    with pytest.raises(AssertionError, match="reads the default configuration, but the file has"):
        run("read_with_numpy.py", tmp_path / "three.safetensors")


def test_plots(run, model, tmp_path):
    notebook = json.loads((FOLDER / "plots.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    show = (
        "import json\n"
        "axes = [plt.figure(n).axes[0] for n in plt.get_fignums()]\n"
        "titles = [(a.get_title(), a.get_xlabel() != '', a.get_ylabel() != '') for a in axes]\n"
        "sizes = {name: size.tolist() for name, size in sizes.items()}\n"
        "print(json.dumps([titles, memory, list(kl.values()), sizes]))\n"
    )
    program = tmp_path / "cells.py"
    program.write_text("\n".join("".join(cell["source"]) for cell in code) + "\n" + show)
    printed = run(program, MODEL=str(model), MPLBACKEND="Agg")

    titles, memory, kl, sizes = json.loads(printed)
    expected = ["Memory of the cache", "Quality against bits", "Channels of keys"]
    assert titles == [[title, True, True] for title in expected]
    at_128k = {name: size[-1] for name, size in memory.items()}
    assert at_128k["float16"] / at_128k["4 bits"] == pytest.approx(16 / BITS_PER_VALUE, rel=0.01)
    assert kl == sorted(kl)  # fewer bits, more divergence
    before, after = (np.array(size) for size in sizes.values())
    assert np.square(before).sum() == pytest.approx(np.square(after).sum(), rel=1e-4)
    assert not np.allclose(before, after, rtol=0.1)
