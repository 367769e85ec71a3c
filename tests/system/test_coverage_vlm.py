"""mlx-vlm's models: each is compressed, or refused by name; none crashes or changes in silence.

``scripts/coverage.py mlx-vlm`` asks all of them; here a sample of every kind.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import rotormlx
from rotormlx.mlx import hosts
from rotormlx.report import Report
from scripts.coverage_table import VERDICTS, verdicts
from scripts.coverage_vlm import MlxVlm
from tests.support.verdicts import check_verdict

# A block is packed before the chunk of 9 and the last token, which read it.
STEPS = (66, 9, 1)
WORK = {
    "text": ("llama", "mixtral"),
    "sliding windows": ("gemma3", "gpt_oss"),
    "positions in three directions": ("qwen2_vl", "paddleocr_vl"),
    "linear attention": ("qwen3_5", "lfm2_vl"),
    "state spaces": ("falcon_h1",),
    "a model that is its own language model": ("molmo_point",),
    "latents": ("deepseek_v3",),
    "keys and values that the model computes with": ("gemma2", "inkling"),
}
NOTHING = {"no keys and values": ("mamba", "rwkv7")}
REFUSED = {
    "an encoder-decoder's caches": ("florence2",),
    "keys and values from the state of a cache": ("gemma3n",),
}
NOT_RUN = {"no language model": ("rfdetr",)}
SAMPLE = [
    pytest.param(verdict, name, id=f"{kind}: {name}")
    for verdict, kinds in zip(VERDICTS, (WORK, NOTHING, REFUSED, NOT_RUN), strict=True)
    for kind, names in kinds.items()
    for name in names
]


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The verdicts of docs/COVERAGE_VLM.md."""
    return verdicts(MlxVlm.path)


@pytest.fixture(autouse=True)
def clean():
    hosts.MLX_VLM.remove()
    yield
    assert not hosts.MLX_VLM.installed(), "a model was left compressed"


@pytest.mark.filterwarnings("ignore")  # what mlx-vlm's models warn of is not ours
@pytest.mark.parametrize(("verdict", "model_type"), SAMPLE)
def test_model(verdict: str, model_type: str, documented: dict[str, str]) -> None:
    check_verdict(MlxVlm().examine(model_type, STEPS), verdict, documented)


def test_every_model_type_is_in_the_table(documented: dict[str, str]) -> None:
    """And none crashes or differs."""
    text = MlxVlm.path.read_text(encoding="utf-8")
    if f"mlx-vlm {MlxVlm.version}:" not in text:
        pytest.skip(f"the table is not of mlx-vlm {MlxVlm.version}")
    assert sorted(documented) == MlxVlm().model_types()
    found = list(documented.values())
    assert set(found) <= set(VERDICTS)
    works, nothing, refused, not_run = (found.count(verdict) for verdict in VERDICTS)
    assert works + nothing + refused >= 180
    assert works >= 160
    assert f"{works} of {len(found)} model types work. Nothing to compress: {nothing}. " in text
    assert f"Refused with the reason: {refused}. Not run: {not_run}." in text


def test_a_promise_that_is_not_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = rotormlx.apply

    def promise(model: Any, config: rotormlx.RotorConfig) -> Report:
        report = apply(model, config)
        rotormlx.remove(model)
        return report

    monkeypatch.setattr(rotormlx, "apply", promise)
    result = MlxVlm().examine("llama", STEPS)
    assert (result.verdict, result.note) == ("differs", "a cache that must be packed is not")


def test_a_model_that_stays_compressed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rotormlx, "remove", lambda model: None)
        result = MlxVlm().examine("llama", STEPS)
    hosts.MLX_VLM.remove()
    assert (result.verdict, result.note) == ("differs", "remove does not restore the model")
