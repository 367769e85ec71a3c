"""mlx-lm's models: each is compressed, or refused by name; none crashes or changes in silence."""

from __future__ import annotations

import re

import pytest

from rotormlx.mlx import hosts
from scripts.coverage_mlx import CONFIGS, MlxLm
from scripts.coverage_table import VERDICTS, verdicts

pytestmark = pytest.mark.slow

# A block is packed before the chunk of 9 and the last token, which read it.
STEPS = (66, 9, 1)


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The verdicts of docs/COVERAGE.md."""
    return verdicts(MlxLm.path)


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[int, int, str]]:
    """Of docs/COVERAGE.md: caches compressed, caches, and how some of them are read."""
    text = MlxLm.path.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| works \| (\d+) of (\d+)(?: \((.*?)\))? \|", text, re.MULTILINE)
    return {name: (int(done), int(of), otherwise) for name, done, of, otherwise in rows}


@pytest.fixture(autouse=True)
def clean():
    hosts.MLX_LM.remove()
    yield
    assert not hosts.MLX_LM.installed(), "a model was left compressed"


@pytest.mark.filterwarnings("ignore")  # what mlx-lm's models warn of is not ours
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_model(model_type: str, documented: dict[str, str], counts: dict) -> None:
    result = MlxLm().examine(model_type, STEPS)
    # Models whose mlx-lm code needs a Metal GPU or a missing package are "not run".
    assert result.verdict in VERDICTS, result
    assert result.verdict == documented[model_type], result
    if result.verdict == "works":
        assert result.compressed > 0
        assert (result.compressed, result.caches, result.otherwise) == counts[model_type], result
        # Zero would mean that nothing was read from packed bytes.
        assert result.error > 0 or result.flips
    else:
        assert len(result.note) > 10


def test_most_models_work(documented: dict[str, str]) -> None:
    """And every one that mlx-lm has is in the table."""
    assert sorted(documented) == MlxLm().model_types()
    found = list(documented.values())
    assert set(found) <= set(VERDICTS)
    assert found.count("works") + found.count("nothing to compress") >= 115


def test_a_refusal_is_for_users_to_read() -> None:
    """No kind of error stands in the table, but where mlx-lm fails by itself."""
    text = MlxLm.path.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    unclear = [row for row in rows if "Error" in row and "mlx-lm itself does not run" not in row]
    assert unclear == []
