"""Models spread over ranks: every rank compresses what it has, and the text stays that of one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest

from tests.support import models as tiny

pytestmark = pytest.mark.slow

WORKER = """
import json, sys
import mlx.core as mx
import mlx_lm, rotormlx
from mlx_lm.utils import sharded_load

path, kind, prompt_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
group = mx.distributed.init(strict=True, backend="ring") if kind != "alone" else None
if kind == "alone":
    model, tokenizer = mlx_lm.load(path)
else:
    model, tokenizer = sharded_load(
        path, *((group, None) if kind == "pipeline" else (None, group))
    )
report = rotormlx.apply(model, rotormlx.RotorConfig(8, 8))
prompt = mx.random.randint(0, 255, (prompt_tokens,), key=mx.random.key(1)).tolist()
caches = mlx_lm.models.cache.make_prompt_cache(model)
out = [
    r.token
    for r in mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=40, prompt_cache=caches, prefill_step_size=64
    )
]
used = [c for c in caches if not c.empty()]
print(json.dumps({
    "rank": group.rank() if group else 0,
    "tokens": out,
    "heads": [c.keys_and_values()[0].shape[1] for c in used],
    "packed": [c.packed_tokens for c in used],
    "kinds": [type(c).__name__ for c in caches],
}))
"""


def run(path: Path, kind: str, ranks: int, prompt_tokens: int = 200) -> list[dict]:
    """What each rank found; ranks talk over localhost with MLX's ring."""
    with tempfile.TemporaryDirectory() as directory:
        hosts = Path(directory) / "hosts.json"
        sockets = [socket.socket() for _ in range(ranks)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
        for s in sockets:
            s.close()
        command = [sys.executable, "-c", WORKER, str(path), kind, str(prompt_tokens)]
        processes = []
        for rank in range(ranks):
            environment = {"PATH": "/usr/bin:/bin", "MLX_RANK": str(rank)}
            if ranks > 1:
                environment["MLX_HOSTFILE"] = str(hosts)
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        found = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
                found.append(json.loads(out.splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that mlx-lm can split either way."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    tiny.save(path, "qwen2", num_hidden_layers=4, tie_word_embeddings=False)
    # A pipeline reads from an index which file holds which weight.
    names = mx.load(str(path / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def alone(model: Path) -> dict:
    (found,) = run(model, "alone", 1)
    assert found["heads"] == [2] * 4
    assert len(set(found["tokens"])) > 3
    return found


@pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX without its ring backend")
def test_two_ranks_of_half_the_heads_give_the_text_of_one(model: Path, alone: dict) -> None:
    first, second = run(model, "tensor", 2)
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    for rank in (first, second):
        assert rank["heads"] == [1] * 4
        assert rank["packed"] == alone["packed"] == [128] * 4
        assert set(rank["kinds"]) == {"RotorKVCache"}


@pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX without its ring backend")
def test_a_pipeline_of_two_ranks_gives_the_text_of_one(model: Path, alone: dict) -> None:
    first, second = run(model, "pipeline", 2)
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    for rank in (first, second):
        assert rank["heads"] == [2] * 2
        assert rank["packed"] == [128] * 2
