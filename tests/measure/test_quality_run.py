"""A whole run of ``rotormlx quality``, its numbers, its files and its command."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from typer.testing import CliRunner

from rotormlx.cli import main, measure
from rotormlx.measure import (
    attention_error,
    cache_contents,
    plots,
    quality_report,
    quality_run,
    reading,
    schemes,
    scoring,
)
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.free_running import Settings
from rotormlx.measure.text import default_text
from rotormlx.mlx import hosts
from tests.support import models as tiny_models
from tests.support.models import Bytes

SCHEMES = ["k4v4", "k2v2:bare", "kivi-k4v4", "turboquant-k4v4:bare", "affine-k8v8"]
TOKENS = 321
WRITTEN = Settings(greedy=5, sampled=4, seeds=3)
NOTHING = Settings(greedy=0, sampled=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama", seed=3)


@pytest.fixture(scope="module")
def result(model: Any) -> quality_run.Result:
    return quality_run.run(
        model,
        Bytes(),
        SCHEMES,
        model_name="tiny",
        command="x",
        tokens=TOKENS,
        written=WRITTEN,
    )


def read(model: Any, name: str, ids: list[int]) -> tuple[scoring.Scores, list[Any]]:
    caches = schemes.scheme(name).caches(model)
    with hosts.MLX_LM.in_place():
        return scoring.score(model, ids, caches), caches


# ---- the numbers --------------------------------------------------------------------------------


def test_rows_are_what_compare_says(model: Any, result: quality_run.Result) -> None:
    ids = Bytes().encode(default_text())[:TOKENS]
    exact, exact_caches = read(model, "exact", ids)
    assert [row.scheme for row in result.rows] == SCHEMES
    assert (result.start, result.predictions) == (192, TOKENS - 1 - 192)
    assert result.exact_ppl == pytest.approx(exact.perplexity(192), rel=1e-5)
    assert result.exact_bytes == cache_contents.used_bytes(exact_caches)
    for row in result.rows:
        scores, caches = read(model, row.scheme, ids)
        found = scoring.compare(exact, scores, start=192)
        # numpy multiplies in another order than MLX: 1e-6 of logits, beside divergences of 1e-4.
        assert row.kl == pytest.approx(found.kl_mean, rel=0.02, abs=5e-7)
        assert row.ppl == pytest.approx(found.ppl, rel=1e-4)
        assert row.top1 == pytest.approx(found.top1, abs=2 / result.predictions)
        assert row.packed_tokens == scoring.packed_of(caches) >= 128
        assert row.cache_bytes == cache_contents.used_bytes(caches)
        assert row.bits_per_value == cache_contents.bits_per_value(caches)
        assert row.kl_interval[0] < row.kl < row.kl_interval[1]
        assert row.kl_median_interval[0] < row.kl_median < row.kl_median_interval[1]
        assert row.kl_p99_interval[0] < row.kl_p99 <= row.kl_p99_interval[1]
        # One of 128 is more than a thousandth.
        assert row.kl_p999 == row.kl_max == row.kl_p999_interval[1]
        assert row.top1_interval[0] <= row.top1 <= row.top1_interval[1]
        assert row.kl_median == pytest.approx(found.kl_median, rel=0.02, abs=5e-7)
        assert row.kl_p99 == pytest.approx(found.kl_p99, rel=0.02, abs=5e-6)
        assert np.mean(row.kl_by_position) == pytest.approx(row.kl)
        assert [error.layer for error in row.layers] == [0, 1]
        assert row.cosine == pytest.approx(np.mean([error.cosine for error in row.layers]))


def test_every_quantile_has_its_own_interval() -> None:
    kl = np.random.default_rng(6).exponential(size=8000)
    found = scoring.Differences(kl, kl < 5, -kl)
    layer = attention_error.LayerError(0, *[0.5] * 6)
    text = reading.Coded(found, [0], (layer,), 4.0, (4, 64), 1, 1, 1.0)
    row = quality_run._row("x", found, found, [text], NOTHING, ())
    # Of the exponential distribution, -ln(1 - level), within some deviations of 8,000 draws.
    for value, (low, high), level in (
        (row.kl_median, row.kl_median_interval, 0.5),
        (row.kl_p99, row.kl_p99_interval, 0.99),
        (row.kl_p999, row.kl_p999_interval, 0.999),
    ):
        assert low < value < high < row.kl_max
        assert low < -np.log(1 - level) < high
    assert row.top1_interval[0] < np.mean(kl < 5) < row.top1_interval[1] < 1


def test_first_scheme_is_what_others_are_compared_with(result: quality_run.Result) -> None:
    first, coarse, *_ = result.rows
    assert first.kl_difference == (0, 0)
    low, high = coarse.kl_difference
    assert 0 < low < coarse.kl - first.kl < high
    assert coarse.cosine < first.cosine


def test_several_texts_are_pooled(model: Any) -> None:
    text = default_text()
    halves = {"a": text[:1000], "b": text[1000:2000]}
    options: Any = {"model_name": "tiny", "command": "x", "tokens": 270, "written": NOTHING}
    both = quality_run.run(model, Bytes(), ["k4v4"], texts=halves, **options)
    single = [
        quality_run.run(model, Bytes(), ["k4v4"], texts={name: part}, **options)
        for name, part in halves.items()
    ]
    assert both.predictions == 2 * single[0].predictions
    assert both.rows[0].kl == pytest.approx(np.mean([one.rows[0].kl for one in single]))
    assert single[0].rows[0].kl != single[1].rows[0].kl
    assert both.texts == ("a", "b")


def test_run_computes_in_another_dtype_and_leaves_the_model_as_it_was() -> None:
    model = tiny_models.build("llama", seed=3)
    model.set_dtype(mx.bfloat16)
    before = tree_flatten(model.parameters())
    options: Any = {"model_name": "tiny", "command": "x", "tokens": 270, "written": NOTHING}
    own, wide = (
        quality_run.run(model, Bytes(), ["k4v4"], dtype=dtype, **options)
        for dtype in (None, "float32")
    )
    assert (own.dtype, wide.dtype) == ("bfloat16", "float32")
    assert wide.exact_bytes == 2 * own.exact_bytes
    # What is left is quantization; in bfloat16 rounding adds to it.
    assert 0 < wide.rows[0].kl < own.rows[0].kl
    assert "computed in float32" in quality_report.setting(wide)
    after = tree_flatten(model.parameters())
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


def test_run_leaves_the_hook_as_it_was(result: quality_run.Result) -> None:
    assert not hosts.MLX_LM.installed()


def run_short(model: Any) -> quality_run.Result:
    options: dict[str, Any] = {"model_name": "", "command": "", "tokens": 270, "written": NOTHING}
    return quality_run.run(model, Bytes(), ["k4v4"], **options)


def test_run_refuses_a_cache_that_packs_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemes.Scheme, "caches", lambda self, model: make_prompt_cache(model))
    with pytest.raises(RuntimeError, match="one through k4v4 read 0"):
        run_short(model)


def test_run_refuses_predictions_that_read_nothing_packed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_run, "first_packed", lambda schemes: 128)
    with pytest.raises(RuntimeError, match="one through k4v4 read 0; start later"):
        run_short(model)


@pytest.mark.parametrize(
    ("names", "tokens", "message"),
    [
        ([], 300, "At least one scheme"),
        (["exact"], 300, "At least one scheme"),
        (["k4v4"], 193, "At least 194 tokens are required"),
        (["k4v4"], 10**6, "A text of at least 1000000 tokens"),
        (["k4v4:window=500"], 300, "At least 578 tokens are required"),
    ],
)
def test_run_refuses(model: Any, names: list[str], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality_run.run(model, Bytes(), names, model_name="", command="", tokens=tokens)


def test_run_refuses_a_dtype(model: Any) -> None:
    with pytest.raises(ValueError, match=r"A dtype must be .* but 'int4' was given"):
        quality_run.run(model, Bytes(), ["k4v4"], model_name="", command="", dtype="int4")


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("k4v4", 192),
        ("k4v4:bare", 64),
        ("affine-k4v4", 64),
        ("kivi-k4v4:window=128,sink=0", 192),
        ("kvarn-k4v4:bare", 64),
        ("kvarn-k4v4:bare,group=128", 128),
        ("kvarn-k4v4:window=0,group=128", 192),
    ],
)
def test_first_packed(name: str, first: int) -> None:
    assert quality_run.first_packed([schemes.scheme(name)]) == first


# ---- matrix products on a CPU -------------------------------------------------------------------


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="needs MLX on the CPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_numpy_linear_is_the_linear_layer(dtype: mx.Dtype, bias: bool) -> None:
    layer, table = Linear(24, 40, bias=bias), Embedding(30, 24)
    layer.set_dtype(dtype)
    table.set_dtype(dtype)
    x = mx.random.normal((2, 3, 24), key=mx.random.key(0)).astype(dtype)
    before = layer(x), table.as_linear(x)
    with numpy_linear():
        after = layer(x), table.as_linear(x)
        layer.weight = layer.weight * 2
        doubled = layer(x)
    # float32 sums of 24 terms in another order; bfloat16 rounds to 2^-8 of numbers up to 4.
    tolerance = 1e-5 if dtype == mx.float32 else 0.04
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.shape == b.shape
        difference = np.abs(np.array(a.astype(mx.float32)) - np.array(b.astype(mx.float32)))
        assert difference.max() < tolerance
    # New weights count at once, and nothing is left of the exchange.
    assert np.abs(np.array((doubled - after[0]).astype(mx.float32))).max() > 0.1
    assert Linear.__call__.__module__ == "mlx.nn.layers.linear"


# ---- the files ----------------------------------------------------------------------------------


def test_page_needs_nothing_else(result: quality_run.Result) -> None:
    page = quality_report.html(replace(result, model="<b>&tiny"), plots.of_quality(result))
    assert "&lt;b&gt;&amp;tiny" in page
    # What an element would fetch: no address, no file; only places in the page itself.
    loads = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|(@import)""", page)
    assert all("".join(found).startswith("#") for found in loads)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4
    for svg in pictures:
        texts = {text.strip() for text in ElementTree.fromstring(svg).itertext()}
        assert set(SCHEMES) <= texts
    for row in result.rows:
        cells = row.scheme, f"{row.bits_per_value:.3f}", f"{row.sink} + {row.window}"
        assert f"<tr><td>{'</td><td>'.join((*cells, f'{row.kl:.4f}'))}</td>" in page


@pytest.mark.slow
def test_plots_show_the_numbers(result: quality_run.Result) -> None:
    """A plot changes with its numbers, and only then."""
    first, *others = result.rows
    changed = {
        "Quality against bits": replace(first, bits_per_value=7.0),
        "KL divergence by position": replace(first, kl_by_position=first.kl_by_position[::-1]),
        "Error of the keys by layer": replace(
            first, layers=tuple(replace(e, key_error=2 * e.key_error) for e in first.layers)
        ),
        "Error of the attention output by layer": replace(
            first, layers=tuple(replace(e, cosine=e.cosine**2) for e in first.layers)
        ),
    }
    before = plots.of_quality(result)
    assert plots.of_quality(result) == before
    for title, row in changed.items():
        after = plots.of_quality(replace(result, rows=(row, *others)))
        assert {name for name in before if before[name] != after[name]} == {title}


@pytest.mark.parametrize(
    ("width", "last"), [(40, "bits per value"), (80, "median"), (120, "top-1, 95 %"), (200, None)]
)
def test_a_terminal_shows_as_many_columns_as_it_has_room_for(
    result: quality_run.Result, width: int, last: str | None
) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(quality_report.table(result, width))
    shown = console.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert ("A wider terminal" in " ".join(shown.split())) == (last is not None)
    names = quality_report._PRINTED
    count = len(names) if last is None else 1 + names.index(last)
    for row in result.rows:
        [line] = [line for line in shown.splitlines() if f"│ {row.scheme} " in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        wanted = [quality_report.COLUMNS[name](row) for name in names[:count]]
        assert cells == [row.scheme, *wanted]


def test_legend_is_about_the_columns_that_are_shown() -> None:
    """Each column has its explanation, and no other comes."""
    assert quality_report.legend(["scheme", "exact tokens"]) == []  # the title has these
    for name in quality_report.COLUMNS:
        if name == "exact tokens":
            continue
        [said] = quality_report.legend([name])
        key = "95 %" if name.endswith("95 %") else name
        assert key in said.partition(":")[0]
    found = quality_report.legend(["KL", "PPL"])
    assert found[0].endswith("in nats.")
    assert found[1:] == ["PPL: perplexity."]


def test_columns_of_continuations_are_shown_where_there_are_any(
    result: quality_run.Result,
) -> None:
    """In Markdown, in HTML and in their legends."""
    sampled = {"sampled", "sampled, 95 %", "never differ", "never, 95 %"}
    for written, absent in (
        (replace(result.written, greedy=0), {"greedy"}),
        (replace(result.written, seeds=0), sampled),
        (replace(result.written, sampled=0), sampled),
    ):
        without = replace(result, written=written)
        header = quality_report.markdown(without).split("\n\n")[2].split("\n")[0]
        columns = {"scheme", *quality_report.COLUMNS}
        assert {cell.strip() for cell in header.strip("|").split("|")} == columns - absent
        page = quality_report.html(without, {})
        assert not any(f"<th>{name}</th>" in page for name in absent)
        assert not any(f"<li>{name}:" in page for name in absent)
        assert "<th>KL</th>" in page
        assert "<li>PPL: perplexity.</li>" in page


@pytest.mark.parametrize("width", [60, 120])
def test_command_explains_the_columns_it_shows(
    result: quality_run.Result, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(measure, "wide_console", lambda: console)
    measure._quality_table(result)
    printed = " ".join(console.file.getvalue().split())
    assert ("top-1: how often" in printed) == (width == 120)
    assert "attention top-1" not in printed
    assert "bits per value: bits of a compressed value" in printed


@pytest.mark.parametrize(
    ("form", "top"), [("terminal", "┏"), ("markdown", "|"), ("html", "<table")]
)
def test_every_table_says_which_tokens_stay_exact(
    result: quality_run.Result, form: str, top: str
) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(quality_report.table(result, 120))
    made = {
        "terminal": console.export_text(),
        "markdown": quality_report.markdown(result),
        "html": unescape(quality_report.html(result, {})),
    }
    above, table = made[form].split(top, 1)
    assert quality_report.EXACT_TOKENS in " ".join(above.split())
    for name, rule in zip(SCHEMES, ("4 + 64", "0 + 0", "4 + 64", "0 + 0", "0 + 0"), strict=True):
        row = re.compile(rf"(?<![-\w]){re.escape(name)}\W.*\D{re.escape(rule)}\D")
        assert any(map(row.search, table.splitlines()))


def test_markdown_has_every_number(result: quality_run.Result) -> None:
    lines = quality_report.markdown(result).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in SCHEMES]
    assert {len(row) for row in rows[1:]} == {1 + len(quality_report.COLUMNS)}
    kl = 1 + list(quality_report.COLUMNS).index("KL")
    assert [row[kl] for row in rows] == [f"{row.kl:.4f}" for row in result.rows]


def test_command_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:2000])
    argv = ["quality", path, "--schemes", "k4v4 kivi-k4v4", "--tokens", "270", "--greedy", "3"]
    argv += ["--sampled", "4", "--seeds", "2", "--temperature", "0.5"]
    argv += [
        "--dtype",
        "bfloat16",
        "--text",
        str(text),
        "--all-packed",
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["rotormlx", *argv])
    done = CliRunner().invoke(main.app, argv)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [row["scheme"] for row in found["rows"]] == ["k4v4:bare", "kivi-k4v4:bare"]
    assert found["texts"] == ["text.txt"]
    assert found["start"] == 64
    assert found["dtype"] == "bfloat16"
    assert found["written"] == {"greedy": 3, "sampled": 4, "seeds": 2, "temperature": 0.5}
    # A log has no bar: a line a scheme.
    said = re.findall(r"quality: text.txt: (\S+): (\d+) % done, \d+ min \d+ s left", done.stderr)
    assert said == [("k4v4:bare", "67"), ("kivi-k4v4:bare", "100")]
    assert found["model"] == "model"
    assert found["command"].startswith(f"rotormlx quality {path} --schemes 'k4v4 kivi-k4v4'")
    assert (tmp_path / "out" / "quality.md").read_text().count("\n| `k") == 2
    assert "kivi-k4v4:bare" in (tmp_path / "out" / "quality.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quality", "--schemes", "k4v4 k9"], "A scheme must be exact or"),
        (["quality", "nowhere/at/all"], "[load] A model directory"),
        (["quality", "--text", "nowhere.txt"], "A text file in UTF-8 is required"),
        (["needle", "--lengths", "5x"], "--lengths must be whole numbers"),
        (["bench", "--contexts", "-3"], "--contexts must be whole numbers"),
    ],
)
def test_commands_refuse(argv: list[str], message: str) -> None:
    done = CliRunner().invoke(main.app, argv)
    assert done.exit_code == 2
    assert f"rotormlx: {message}" in done.output or message in done.output


# ---- other models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "layers"),
    # With logits of a sink in every layer, every other a sliding window; and windows alone.
    [("gpt_oss", [1]), ("gemma3_text", [1, 3])],
)
def test_models_with_sinks_and_sliding_windows(model_type: str, layers: list[int]) -> None:
    """What is measured are the layers that see the whole text; more bits lose less."""
    model = tiny_models.build(model_type, seed=3)
    if model_type == "gpt_oss":
        for layer in model.layers:
            assert layer.self_attn.sinks.shape == (4,)
            layer.self_attn.sinks = mx.array([1.0, 3.0, -2.0, 0.5])
    names = ["k8v8", "k4v4", "k2v2", "kivi-k2v2"]
    options: dict[str, Any] = {"model_name": "tiny", "command": "x", "tokens": TOKENS}
    found = quality_run.run(model, Bytes(), names, written=WRITTEN, **options)
    ids = Bytes().encode(default_text())[:TOKENS]
    exact, _ = read(model, "exact", ids)
    assert found.exact_ppl == pytest.approx(exact.perplexity(192), rel=1e-5)
    for row in found.rows:
        scores, _ = read(model, row.scheme, ids)
        compared = scoring.compare(exact, scores, start=192)
        # numpy multiplies in another order than MLX: 1e-6 of logits.
        assert row.kl == pytest.approx(compared.kl_mean, rel=0.02, abs=5e-7)
        assert [error.layer for error in row.layers] == layers
        assert len(row.sampled_tokens) == WRITTEN.seeds
    eight, four, two, _ = (row.kl for row in found.rows)
    # Fewer bits may happen to change the choice of experts less.
    assert eight < min(four, two) / 4


def test_sinks_change_what_is_measured() -> None:
    """A sink that takes all attention leaves nothing for a cache to lose."""
    model = tiny_models.build("gpt_oss", seed=3)
    divergence = []
    for sink in (0.0, 30.0):
        for layer in model.layers:
            layer.self_attn.sinks = mx.full((4,), sink)
        options: dict[str, Any] = {"model_name": "", "command": "", "tokens": 270}
        found = quality_run.run(model, Bytes(), ["k2v2"], written=NOTHING, **options)
        divergence.append(found.rows[0].kl)
    assert divergence[0] > 1e-5
    assert divergence[1] < 1e-9


@pytest.mark.parametrize(
    ("model_type", "name", "why"),
    [
        ("gpt_oss", "affine-k4v4", "Quantized SDPA does not support attention sinks"),
        ("gemma3_text", "affine-k4v4", "divisible"),
        ("mamba2", "k3v3", "there is nothing to compress"),
    ],
)
def test_a_scheme_that_a_model_cannot_have_is_refused_before_the_work(
    model_type: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_run.reading, "exact", lambda *a, **k: pytest.fail("read"))
    size = {"head_dim": 64} if model_type == "gpt_oss" else {}
    model = tiny_models.build(model_type, seed=3, **size)
    with pytest.raises(ValueError, match=rf"\[quality\] .* but {name} failed: .*{why}.*; leave it"):
        quality_run.run(model, Bytes(), [name], model_name="", command="", tokens=270)


def test_sampled_continuations_are_counted_up_to_the_first_difference(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[9, 9, 9, 9, 9], [1, 2, 3, 4], [5, 6, 7, 8], [5, 5, 5, 5]]
    other = [[9, 9, 9, 9, 8], [1, 2, 3, 4], [5, 6, 0, 8], [0, 5, 5, 5]]
    both = iter([answers, other])
    monkeypatch.setattr(
        quality_run.reading.free_running, "continuations", lambda *_, **__: next(both)
    )
    options: dict[str, Any] = {"model_name": "", "command": "", "tokens": 270}
    [row] = quality_run.run(model, Bytes(), ["k4v4"], written=WRITTEN, **options).rows
    assert (row.greedy_tokens, row.sampled_tokens, row.sampled_median) == (4, (4, 2, 0), 2)
    assert row.sampled_never == pytest.approx(1 / 3)
    # Wilson: k = 1, n = 3.
    assert row.sampled_never_interval == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert row.sampled_interval is None  # of three
    cells = {name: quality_report.COLUMNS[name](row) for name in quality_report.COLUMNS}
    assert (cells["sampled"], cells["never differ"], cells["never, 95 %"]) == (
        "2", "33%", "6% to 79%",
    )  # fmt: skip


def test_an_interval_that_ends_at_the_largest_says_or_more(result: quality_run.Result) -> None:
    row = replace(result.rows[0], kl_p999_interval=(0.1, 0.25), kl_max=0.25)
    cells = quality_report.COLUMNS["99.9 %, 95 %"]
    assert cells(row) == "0.100 or more"
    assert cells(replace(row, kl_max=0.26)) == "0.100 to 0.250"
