"""transformers' models: each is compressed, or refused by name; none crashes or is left in silence.

``scripts/coverage.py transformers`` asks all of them; here a sample of every kind.
"""

from __future__ import annotations

import pytest
import transformers

from scripts import coverage_torch
from scripts.coverage_table import VERDICTS, Result, verdicts
from tests.support import torch_zoo
from tests.support.verdicts import check_verdict

pytestmark = pytest.mark.usefixtures("one_thread")

# A block is packed before the chunk of 9 and the last token, which read it.
STEPS = (66, 9, 1)
WORK = {
    "plain": ("llama", "qwen3", "gpt2", "phi3"),
    "experts": ("mixtral", "gpt_oss"),
    "sliding windows": ("gemma3_text", "llama4_text"),
    "head_dim by layer": ("gemma4_text",),
    "layers that share a cache": ("gemma3n_text",),
    "layers that are repeated": ("dory",),
    "linear attention": ("qwen3_5", "lfm2_moe"),
    "state spaces": ("jamba", "nemotron_h"),
    "encoder-decoder": ("seq2seq/bart", "seq2seq/marian", "speech/canary"),
    "latent attention": ("deepseek_v3", "minicpm3"),
    "images": ("image/llava", "image/qwen2_5_vl", "image/paligemma"),
}
REFUSED = {
    "differential attention": ("diffllama",),
    "keys that are changed": ("doge", "jetmoe"),
    "a cache of its own": ("minimax", "rwkv", "mamba"),
    "a generate that reads the cache": ("speech/whisper",),
    "position biases": ("seq2seq/t5",),
    "capped scores": ("gemma2",),
    "no mask, and not causal": ("bigbird_pegasus",),
    "an attention that cannot be set": ("bloom",),
}
SAMPLE = [
    pytest.param(verdict, name, id=f"{kind}: {name}")
    for verdict, kinds in (("works", WORK), ("refused", REFUSED))
    for kind, names in kinds.items()
    for name in names
]


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The verdicts of docs/COVERAGE_TORCH.md."""
    return verdicts(coverage_torch.Transformers.path)


@pytest.mark.filterwarnings("ignore")  # what transformers' models warn of is not ours
@pytest.mark.parametrize(("verdict", "model_type"), SAMPLE)
def test_model(verdict: str, model_type: str, documented: dict[str, str]) -> None:
    check_verdict(coverage_torch.examine(model_type, STEPS), verdict, documented)


def test_every_model_type_is_in_the_table(documented: dict[str, str]) -> None:
    """And none crashes or differs."""
    text = coverage_torch.Transformers.path.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip(f"the table is not of transformers {transformers.__version__}")
    assert sorted(documented) == sorted(torch_zoo.model_types())
    found = list(documented.values())
    assert set(found) <= set(VERDICTS)
    assert found.count("works") >= 232
    works, refused = (found.count(verdict) for verdict in ("works", "refused"))
    assert f"{works} of {len(found)} model types work. " in text
    assert f"Refused with the reason: {refused}. " in text


# ---- the script finds what is wrong -------------------------------------------------------------


def examined(monkeypatch, function, replacement) -> Result:
    monkeypatch.setattr(coverage_torch.rotormlx.torch, function, replacement)
    return coverage_torch.examine("llama", STEPS)


def test_a_promise_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    report = coverage_torch.rotormlx.torch.report
    result = examined(monkeypatch, "apply", report)
    assert (result.verdict, result.note) == ("differs", "a cache that must be packed is not")


def test_a_model_that_stays_compressed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    result = examined(monkeypatch, "remove", lambda model: None)
    assert (result.verdict, result.note) == ("differs", "remove does not restore the model")
