"""The server of mlx-lm with compressed caches: many clients at once, and the memory it tells."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from scripts import server_fuzz, server_load
from tests.support import models as tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny.save(directory / "llama", max_position_embeddings=4096)
    tiny.save(directory / "draft", seed=4)
    return directory


@pytest.fixture(scope="module")
def server(models: Path):
    with server_load.serving(models / "llama", "--key-bits", "8", "--value-bits", "8") as port:
        yield port


def get(port: int, path: str) -> tuple[int, dict]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_many_clients_get_the_text_of_a_run_alone(server: int) -> None:
    """Streams of mixed lengths with shared beginnings, some cancelled, some malformed."""
    result = server_load.load(server, requests=40, clients=16, seed=1)
    assert result.mixed_up == []
    assert result.failed == []
    # All kinds of requests were among them, and prompts were found in the prompt cache.
    assert min(result.completed, result.cancelled, result.refused, result.reused) > 0
    assert result.completed + result.cancelled + result.refused == 40


def test_health_tells_sizes_and_memory_comes_back(server: int, models: Path) -> None:
    server_load.load(server, requests=6, clients=3, seed=2)
    # A variable of mlx-lm's loop keeps the cache of the last prompt: make that a small one.
    server_load.stream(server, "?", 1)
    status, health = get(server, "/health")
    assert (status, health["status"]) == (200, "ok")
    time.sleep(1)  # the last batch goes after its last answer
    _, health = get(server, "/health")
    sizes = health["rotormlx"]
    assert sizes["compressed"] == [
        "llama: 2 of 2 caches compressed, K8 V8 cascade, 8.375 bits per value"
    ]
    # mlx-lm keeps ten prompt caches by default.
    assert 0 < sizes["prompt_caches"] <= 10
    assert 0 < sizes["packed_tokens"] < sizes["tokens"]
    # 2 layers, 2 KV heads, 64 + 64 numbers; what is exact is float32 in this model.
    exact = sizes["tokens"] - sizes["packed_tokens"]
    assert sizes["float16_bytes"] == sizes["tokens"] * 2 * 2 * 128 * 2
    blocks = -(-sizes["packed_tokens"] // 64) * 64
    least = 512 * (exact * 4 + sizes["packed_tokens"] * 8.375 / 8)
    most = 512 * (exact * 4 + (blocks + 64 * 10) * 8.375 / 8)
    assert least <= sizes["cache_bytes"] <= most
    # Weights and prompt caches are all that is left, and the last logits and small arrays: the
    # cache of a single one of 46 requests, left behind, would be more than that.
    assert sizes["cache_bytes"] <= sizes["allocated_bytes"]
    weights = (models / "llama" / "model.safetensors").stat().st_size
    rest = sizes["memory_bytes"] - sizes["allocated_bytes"] - weights
    assert abs(rest) < sizes["allocated_bytes"] / sizes["prompt_caches"]


def test_a_shared_beginning_is_read_again_where_its_window_was_packed(server: int) -> None:
    shared = "A prompt that two clients share. " * 10  # 330 tokens
    first = server_load.stream(server, shared + "And a long end of the first one. " * 6, 4)
    assert not first["usage"]["prompt_tokens_details"]["cached_tokens"]
    second = server_load.stream(server, shared + "Another end.", 4)
    # 4 of the sink and the blocks before the window of 64.
    kept = 4 + (331 - 4 - 64) // 64 * 64
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == kept


def test_a_prompt_that_is_an_earlier_one_and_its_answer_is_answered(server, models) -> None:
    vocabulary = json.loads((models / "llama" / "tokenizer.json").read_text())["model"]["vocab"]
    body = {"max_tokens": 3, "logit_bias": {str(vocabulary["a"]): 100}}

    def answer(prompt: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", server, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body | {"prompt": prompt}))
        response = connection.getresponse()
        said = json.loads(response.read())
        return response.status, said["choices"][0]["text"] if "choices" in said else said

    assert answer("Whatever comes:") == (200, "aaa")
    assert answer("Whatever comes:aaa") == (200, "aaa")


def test_a_draft_model_is_compressed_too(models: Path) -> None:
    """Requests are then served one by one; the text is that of the model alone.

    Without prompt caches: with them and a draft model, mlx-lm's own server gives other texts too.
    """
    draft = ["--draft-model", str(models / "draft"), "--prompt-cache-size", "0"]
    bits = ["--key-bits", "8", "--value-bits", "8"]
    with server_load.serving(models / "llama", *bits, *draft) as port:
        result = server_load.load(port, requests=6, clients=3, seed=3)
        _, health = get(port, "/health")
    assert (result.mixed_up, result.failed) == ([], [])
    assert result.completed > 0
    summary = "llama: 2 of 2 caches compressed, K8 V8 cascade, 8.375 bits per value"
    assert health["rotormlx"]["compressed"] == [summary, summary]


def test_malformed_requests_do_not_end_the_server(server: int, figure) -> None:
    """The long run is ``python scripts/server_fuzz.py``."""
    result = server_fuzz.fuzz(server, requests=250, seed=3, every=25)
    assert result.failed == []
    assert result.statuses[200] > 0
    assert result.statuses[400] > 100
    # Beside ten prompt caches at most, what is left is the last logits and small arrays.
    before, after = (
        sizes["memory_bytes"] - sizes["allocated_bytes"] for sizes in (result.before, result.after)
    )
    assert after - before < 1e6
    figure(
        f"server: 250 malformed requests in {result.seconds:.0f} s, statuses "
        f"{dict(sorted(result.statuses.items()))}, memory beside prompt caches {before / 1e6:.2f} "
        f"MB before, {after / 1e6:.2f} MB after"
    )


@pytest.mark.parametrize(
    ("wrong", "status", "part"),
    [
        ({"prompt": ""}, 400, "prompt must not be empty"),
        ({"stop": 5}, 400, "stop must be a string"),
        ({"temperature": 1.0, "top_k": 257}, 400, "top_k must be less than"),
        ({"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.9}, 400, "xtc_threshold"),
        ({"logit_bias": {"257": 1.0}}, 400, "logit_bias must name tokens from 0 to 256"),
        ({"max_tokens": 10**9}, 400, "max_tokens must be at most"),
        ({"seed": 2**64}, 400, "seed must be"),
        ({"model": "/no/such/model"}, 404, "/no/such/model"),
        ({"model": ""}, 404, "[load]"),
        ({"draft_model": "/no/such/draft"}, 404, "/no/such/draft"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_answered_and_so_is_the_next_one(server, wrong, status, part) -> None:
    fine = {"prompt": "hello", "max_tokens": 2}
    got, answer = server_fuzz.post(server, "/v1/completions", json.dumps(fine | wrong).encode())
    assert (got, part in json.loads(answer)["error"]) == (status, True), answer
    got, answer = server_fuzz.post(server, "/v1/completions", json.dumps(fine).encode())
    assert got == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 2
    assert get(server, "/health")[1]["rotormlx"]["restarts"] == 0


@pytest.mark.parametrize("draft", [False, True], ids=["alone", "draft"])
def test_ctrl_c_ends_a_server_with_its_usage(models: Path, tmp_path: Path, draft: bool) -> None:
    """During a long answer; ``/v1/models`` is asked before, without a cache of the hub."""
    options = ["--draft-model", str(models / "draft")] if draft else []
    command = [sys.executable, "-m", "rotormlx", "server", "--model", str(models / "llama")]
    with server_load.free_port() as port:
        pass
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "none")}
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    for _ in range(360):
        try:
            status, listed = get(port, "/v1/models")
            break
        except ConnectionRefusedError:
            time.sleep(0.5)
    else:
        process.kill()
        pytest.fail(f"the server did not start: {process.communicate()[1]}")
    assert status == 200
    assert [model["id"] for model in listed["data"]] == [str(models / "llama")]
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    # Without its end token the answer would take minutes.
    body = {"prompt": "hello", "max_tokens": 100_000, "stream": True, "logit_bias": {"256": -1e9}}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    while b'"text"' not in answer.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    connection.close()
    assert process.returncode == 0, error
    assert "Traceback" not in error, error
    lines = [line for line in error.splitlines() if line.startswith("rotormlx: ")]
    assert sum("2 of 2 caches compressed" in line for line in lines) == 1 + draft, error
    assert re.match("rotormlx: backend ", lines[-1])


def test_a_model_that_cannot_be_compressed_is_refused_before_serving(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "mamba2", "mamba2", num_heads=16)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rotormlx", "server", "--model", path, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, (done.stderr, time.monotonic() - start)
    assert done.stderr.startswith("rotormlx: [apply] mamba2 cannot be compressed: ")
