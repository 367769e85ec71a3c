"""``rotormlx vlm``: mlx-vlm's own commands with compressed caches."""

import re
import sys

import pytest
from typer.testing import CliRunner, Result

from rotormlx.cli import main
from rotormlx.mlx import hosts
from tests.support import models as tiny

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: pip install 'rotormlx[vlm]'")
from mlx_vlm.models import base

# 256 bytes with the chat template; the tokens of these models are bytes.
PROMPT = "hello " * 42


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return tiny.save(tmp_path_factory.mktemp("vlm") / "llama")


@pytest.fixture(autouse=True)
def original_code():
    code = base.scaled_dot_product_attention.__code__
    yield
    hosts.MLX_VLM.remove()
    assert base.scaled_dot_product_attention.__code__ is code


def run(*argv: str) -> Result:
    return CliRunner().invoke(main.app, ["vlm", *argv])


def test_generate_says_what_was_compressed_and_what_it_took(llama: str) -> None:
    options = ["--key-bits", "8", "--value-bits", "4"]
    result = run("generate", *options, "--model", llama, "--prompt", PROMPT, "--max-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "rotormlx: llama: 2 of 2 caches compressed, K8 V4 cascade" in result.stderr
    packed, held = map(int, re.search(r"(\d+) of (\d+) tokens packed", result.stderr).groups())
    # The prompt and two of the three tokens; what is not packed is sink, window and begun block.
    assert held >= len(PROMPT) + 2
    assert packed == (held - 4 - 64) // 64 * 64


def test_a_model_with_nothing_to_compress_is_refused(tmp_path) -> None:
    path = tiny.save(tmp_path / "mamba2", "mamba2")
    result = run("generate", "--model", path, "--prompt", "hi", "--max-tokens", "1")
    assert result.exit_code == 2
    assert "rotormlx: [apply] mamba2 cannot be compressed: it keeps a state" in result.stderr


@pytest.mark.parametrize("option", ["--kv-bits", "--kv-quant-scheme=uniform"])
def test_its_own_cache_quantization_is_refused(option: str) -> None:
    result = run("generate", "--model", "missing", option, "4")
    assert result.exit_code == 2
    assert f"but {option} asks mlx-vlm for another cache; leave it out" in result.stderr


def test_a_model_that_is_not_there_is_refused_in_a_sentence(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    result = run("generate", "--model", str(tmp_path), "--prompt", "hi")
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("rotormlx:"))
    assert line.startswith("rotormlx: [vlm] mlx_vlm generate stopped: ")


def test_without_mlx_vlm_it_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setattr(type(hosts.MLX_VLM), "is_available", False)
    result = run("chat")
    assert result.exit_code == 2
    assert "pip install 'rotormlx[vlm]'" in result.stderr
