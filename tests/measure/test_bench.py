"""The speed benchmark: turns, medians, sizes and files. No test looks at a clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import pytest
from mlx.nn.layers.linear import Linear
from typer.testing import CliRunner

from rotormlx.cli import main
from rotormlx.measure import bench, plots, schemes
from rotormlx.measure.bench import Timing
from rotormlx.mlx import hosts
from tests.support import models as tiny_models


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama", seed=3)


def timing(scheme: str, context: int, number: float) -> Timing:
    return Timing(
        scheme, context, number, 10 / number, 2 * number, round(number), round(9 * number)
    )


def test_schemes_take_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int, int]] = []

    def turn(model: Any, prompt: Any, each: Any, decode_tokens: int) -> Timing:
        turns.append((each.name, len(prompt), decode_tokens))
        return timing(each.name, len(prompt), 1 + len(turns))

    monkeypatch.setattr(bench, "turn", turn)
    result = bench.run(
        model,
        Bytes(),
        ["exact", "k4v4"],
        model_name="tiny",
        command="x",
        contexts=(100, 60_000),
        repeats=3,
        decode_tokens=7,
    )
    warm, timed = turns[:2], turns[2:]
    assert warm == [("exact", 64, 2), ("k4v4", 64, 2)]
    once = [(name, n, 7) for n in (100, 60_000) for name in ("exact", "k4v4")]
    assert timed == once * 3
    # The first of 12 turns is number 3; its medians are those of turns 3, 7 and 11: 1 + 7.
    assert result.medians[0] == timing("exact", 100, 8)
    assert [(m.scheme, m.context) for m in result.medians] == [(n, c) for n, c, _ in once]
    assert not hosts.MLX_LM.installed()


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="needs MLX on the CPU")
@pytest.mark.parametrize("numpy", [True, False])
def test_numpy_multiplies_only_where_it_is_asked_for(
    model: Any, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: set[str] = set()

    def turn(model: Any, prompt: Any, each: Any, decode_tokens: int) -> Timing:
        where.add(Linear.__call__.__module__)
        return timing(each.name, len(prompt), 1)

    monkeypatch.setattr(bench, "turn", turn)
    options: Any = {"model_name": "", "command": "", "contexts": (9,), "repeats": 1}
    bench.run(model, Bytes(), ["k4v4"], numpy=numpy, **options)
    assert where == {"rotormlx.measure.cpu_linear" if numpy else "mlx.nn.layers.linear"}


def test_median_is_of_each_number() -> None:
    turns = [
        Timing("k4v4", 5, 1, 30, 200, 7, 9),
        Timing("k4v4", 5, 3, 20, 100, 8, 9),
        Timing("k4v4", 5, 2, 10, 300, 6, 9),
    ]
    assert bench.median(turns) == Timing("k4v4", 5, 2, 20, 200, 7, 9)


def test_turn_reads_and_writes_what_it_says(model: Any) -> None:
    """The cache holds prompt and written tokens, and the peak holds the cache."""
    prompt = Bytes().encode("The answer is in the text. " * 30)[:600]
    with hosts.MLX_LM.in_place():
        found = {
            name: bench.turn(model, prompt, schemes.scheme(name), 9)
            for name in ("exact", "affine-k4v4", "k4v4")
        }
    values = 2 * 2 * 2 * 64  # a token's: keys and values, layers, KV heads, head_dim
    packed = (609 - 4 - 64) // 64 * 64
    assert found["exact"].cache_bytes == values * 609 * 4
    assert found["affine-k4v4"].cache_bytes == values * 609 * 5 / 8
    assert found["k4v4"].cache_bytes == values * (packed * 4.375 / 8 + (609 - packed) * 4 + 4)
    for one in found.values():
        assert one.context == 600
        assert one.peak_bytes > one.cache_bytes
        assert one.prefill_tokens_per_second == pytest.approx(600 / one.first_token_seconds)


def test_decoding_goes_on_from_the_prompt(model: Any) -> None:
    """The tokens written are those of greedy decoding."""
    read: list[list[int]] = []

    def recording(tokens: mx.array, cache: Any) -> mx.array:
        read.append(tokens.tolist()[0])
        return model(tokens, cache=cache)

    recording.layers = model.layers  # type: ignore[attr-defined]
    prompt = Bytes().encode("x" * 40)
    bench.turn(recording, prompt, schemes.scheme("exact"), 3)
    assert read[0] == prompt
    text = list(prompt)
    for tokens in read[1:]:
        assert tokens == [int(mx.argmax(model(mx.array([text]))[0, -1]).item())]
        text += tokens
    assert len(text) == 43


@pytest.mark.parametrize(
    ("contexts", "repeats", "decode"), [((0,), 1, 1), ((5,), 0, 1), ((5,), 1, 0)]
)
def test_run_refuses(contexts: tuple[int, ...], repeats: int, decode: int) -> None:
    with pytest.raises(ValueError, match=f"but {contexts[0]}, {repeats} and {decode} were given"):
        bench.run(
            None,
            None,
            ["k4v4"],
            model_name="",
            command="",
            contexts=contexts,
            repeats=repeats,
            decode_tokens=decode,
        )


def test_plot_and_table_show_every_scheme() -> None:
    medians = tuple(timing(name, c, c / 10) for name in ("exact", "k4v4") for c in (512, 128))
    result = bench.Result("tiny", "x", "", "", {}, 3, 8, medians)
    texts = {text.strip() for text in ElementTree.fromstring(plots.of_bench(result)).itertext()}
    assert {"exact", "k4v4", "context, tokens"} <= texts
    assert [(row[0], row[1]) for row in bench.cells(result)] == [
        ("128", "exact"),
        ("128", "k4v4"),
        ("512", "exact"),
        ("512", "k4v4"),
    ]
    assert "| 512 | k4v4 | 51.2 | 0.20 | 102.40 | 0.00 MB | 0.00 MB |" in bench.markdown(result)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    argv = ["bench", path, "--schemes", "exact k4v4", "--contexts", "64,200", "--repeats", "1"]
    argv += ["--decode-tokens", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rotormlx", *argv])
    done = CliRunner().invoke(main.app, argv)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    pairs = [(median["scheme"], median["context"]) for median in found["medians"]]
    assert pairs == [("exact", 64), ("k4v4", 64), ("exact", 200), ("k4v4", 200)]
    assert (tmp_path / "out" / "bench.md").read_text().count("\n| 200 |") == 2
    ElementTree.parse(tmp_path / "out" / "bench.svg")


def test_bench_and_quality_need_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``pip install`` without an extra gives: all but the plots, and how to get them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "rotormlx.measure.plots", raising=False)
    path = tiny_models.save(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    output = str(tmp_path / "out")
    arguments = {
        "bench": ["--contexts", "64", "--repeats", "1", "--decode-tokens", "1"],
        "quality": [
            "--text", str(tmp_path / "text.txt"), "--tokens", "200", "--greedy", "1",
            "--sampled", "1", "--seeds", "1",
        ],
    }  # fmt: skip
    for name, own in arguments.items():
        done = CliRunner().invoke(
            main.app, [name, path, "--schemes", "k4v4", *own, "--output", output]
        )
        assert done.exit_code == 0, (done.output, done.exception)
        assert done.stderr.count("no plots, because matplotlib is not installed") == 1
        assert "pip install -e '.[bench]'" in done.stderr  # in a clone
        assert "pip install 'rotormlx[bench]'" in done.stderr  # from a wheel
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {
        *("bench.json", "bench.md", "quality.json", "quality.md", "quality.html"),
    }
    page = (tmp_path / "out" / "quality.html").read_text()
    assert "<td>k4v4</td>" in page
    assert "<svg" not in page
