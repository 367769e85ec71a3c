"""The longest context that fits into a memory: ``rotormlx info MODEL --memory 16GB``."""

import re

import pytest
from typer.testing import CliRunner

from rotormlx.cli import main, memory_plan
from rotormlx.cli.refusal import Refusal
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts, integration
from tests.support import models as tiny


@pytest.fixture(autouse=True)
def original_code():
    yield
    hosts.MLX_LM.remove()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("1.5 gb", 1_500_000_000),
        (" 512MiB ", 2**29),
        ("2TiB", 2**41),
        ("1 TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_plan.size_of(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "16 kB", "1e9GB", "sixteen", "", "1GBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match=r"^\[info\] --memory must be a number and a unit"):
        memory_plan.size_of(text)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1", "deepseek_v3"])
def test_the_longest_context_fits_and_a_longer_one_does_not(model_type: str) -> None:
    report = integration.apply(tiny.build(model_type), RotorConfig(3, 4))
    budget = 3_000_000
    made = memory_plan.choices(report, budget)
    assert [name for name, _ in made] == ["float16", "8 bits", "4 bits", "3 bits", "2 bits"]
    sizes = [report.float_bytes, *(report.with_bits(b, b).compressed_bytes for b in (8, 4, 3, 2))]
    lengths = [tokens for _, tokens in made]
    assert lengths == sorted(lengths)
    for tokens, size in zip(lengths, sizes, strict=True):
        assert size(tokens) <= budget
        # Up to 63 tokens are exact before they are packed together.
        assert size(tokens + 64) > budget
    # The bits are those of the choice, not of the report.
    bits = report.with_bits(8, 8).bits_per_value
    assert bits > report.bits_per_value
    assert report.with_bits(2, 2).bits_per_value < report.bits_per_value


def test_a_cache_of_bounded_size_has_no_longest_context() -> None:
    assert memory_plan.longest(lambda tokens: min(tokens, 5000), 5000) is None
    assert memory_plan.longest(lambda tokens: min(tokens, 5000), 4999) == 4999
    assert memory_plan.longest(lambda tokens: 8 + tokens, 7) == 0


def test_info_shows_a_row_for_each_cache(tmp_path) -> None:
    path = tiny.save(tmp_path / "llama")
    result = CliRunner().invoke(main.app, ["info", path, "--memory", "5 MB"])
    assert result.exit_code == 0, result.output
    rows = re.findall(r"│ (float16|\d bits) +│ +([\d,]+) │ (█[^│]*)│", result.stdout)
    assert [name for name, *_ in rows] == ["float16", "8 bits", "4 bits", "3 bits", "2 bits"]
    lengths = [int(tokens.replace(",", "")) for _, tokens, _ in rows]
    # Two layers of two heads of 64, keys and values in float16, beside the weights in float32.
    assert lengths[0] == (5_000_000 - 673_536) // 1024
    widths = [len(bar.rstrip()) for *_, bar in rows]
    assert widths == sorted(widths)
    assert widths[-1] == 40


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    path = tiny.save(tmp_path / "llama")
    result = CliRunner().invoke(main.app, ["info", path, "--memory", "0.1MB"])
    assert result.exit_code == 2
    assert "[info] --memory must be more than the weights of the model" in result.stderr
    assert "┃" not in result.stdout
