"""Send malformed requests to ``rotormlx server``: none ends it, and all memory is freed.

    python scripts/server_fuzz.py [--requests 2000] [--model PATH] [--draft-model PATH]

Without --model, the script makes a tiny random model. It only contacts a server on the loopback
address that it starts itself. Requests are drawn from a seed: bodies that are not JSON, every
parameter with values of every type, absurd lengths, other models, raw bytes in place of HTTP. After
every 50 requests, a well-formed request must get the same text as at the start.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import server_load

TIMEOUT_S = 120
GOOD = {"prompt": "rotor turns a block of keys", "max_tokens": 4, "temperature": 0.0}
PATHS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
# The names of parameters that mlx-lm's server reads.
PARAMETERS = (
    *("prompt", "messages", "model", "draft_model", "adapters", "stream", "stream_options"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty", "stop", "tools"),
    *("presence_context_size", "frequency_penalty", "frequency_context_size", "logit_bias"),
    *("xtc_probability", "xtc_threshold", "logprobs", "top_logprobs", "num_draft_tokens"),
    *("chat_template_kwargs", "role_mapping"),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, 1e-308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "\ud800", "\0", "a" * 5000),
    *([], {}, [[]], [0], [""], [None], {"a": 1}, {"0": 1}, {"-1": 5.0}, {"999999999": 5.0}),
    *({"0": None}, {"x": []}, [{}], [{"role": "user"}], [{"role": 5, "content": []}]),
    *([{"role": "user", "content": [{"type": "image_url"}]}], [{"content": "x"}], "default_model"),
    *({"include_usage": "yes"}, {"include_usage": True}, ["a", "b"], "/no/such/model", "../.."),
)
BODIES = (
    *(b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 20000),
    *(b'{"prompt": ' + b"1" * 5000 + b"}", b'{"prompt": "x", "prompt": ""}', b'{"a": 1e999}'),
)
RAW = (
    b"GARBAGE\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: five\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /v1/models/nobody/nothing HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"DELETE / HTTP/1.1\r\n\r\n",
    b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n",
)


@dataclass
class Result:
    """The outcome of the requests.

    Args:
        statuses: Number of requests by status; 0 means no answer.
        failed: Requests after which the server did not behave as required.
        before: Memory before the requests, from ``/health``.
        after: Memory after the requests, from ``/health``.
        seconds: Time that the requests took.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    seconds: float = 0.0


def post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """Send a body; return status and answer, with status 0 if the connection closed without one."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (HTTPException, ConnectionError):
        return 0, b""
    finally:
        connection.close()


def send_raw(port: int, request: bytes) -> int:
    """Send bytes and close this side; return the status, 0 for none."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.makefile("rb").read()
        except ConnectionError:
            return 0
    parts = answer.split(b" ", 2)
    return int(parts[1]) if answer.startswith(b"HTTP/") and len(parts) > 2 else 0


def malformed(chance: random.Random) -> tuple[str, bytes]:
    """Return a path and a body with one to three likely wrong parameters, mostly one."""
    path = chance.choice(PATHS)
    if chance.random() < 0.1:
        return path, chance.choice(BODIES)
    body: dict = {"prompt": "hi", "max_tokens": 2}
    body["messages"] = [{"role": "user", "content": "hi"}]
    for name in chance.sample(PARAMETERS, chance.choice((1, 1, 1, 2, 3))):
        body[name] = chance.choice(VALUES)
    if isinstance(body["max_tokens"], int) and 2 < body["max_tokens"] <= 2**20:
        body["max_tokens"] = 2  # well-formed, but slow
    return path, json.dumps(body).encode()


def fuzz(
    port: int, *, requests: int, seed: int = 0, every: int = 50, same_text: bool = True
) -> Result:
    """Send malformed requests, and a good request at regular intervals.

    Args:
        port: Port of the server.
        requests: Number of malformed requests.
        seed: Seed of the requests.
        every: Number of malformed requests between two good ones.
        same_text: Whether good requests must get the same text each time. With a draft model and
            prompt caches they do not, even without rotormlx (docs/MLX_LM.md).
    """
    chance, result = random.Random(seed), Result()
    good = json.dumps(GOOD).encode()
    _, first = post(port, PATHS[0], good)
    text = json.loads(first)["choices"][0]["text"]
    result.before = server_load.health(port)["rotormlx"]
    start = time.monotonic()
    for number in range(requests):
        if chance.random() < 0.05:
            request = chance.choice(RAW)
            status = send_raw(port, request)
        else:
            path, request = malformed(chance)
            status, _ = post(port, path, request)
            if status == 0 or status >= 500:
                result.failed.append(f"{status}: {path} {request[:300]!r}")
        result.statuses[status] += 1
        if number % every == every - 1:
            status, answer = post(port, PATHS[0], good)
            is_same = status == 200 and json.loads(answer)["choices"][0]["text"] == text
            if status != 200 or (same_text and not is_same):
                result.failed.append(f"after {number + 1}: a good request got {status} {answer!r}")
    result.seconds = time.monotonic() - start
    time.sleep(1)  # the last batch is freed after its last answer
    result.after = server_load.health(port)["rotormlx"]
    if result.after["restarts"]:
        result.failed.append(f"generation restarted {result.after['restarts']} times")
    return result


def main() -> int:
    """Fuzz a server, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, help="directory of a model; a tiny random model by default"
    )
    parser.add_argument("--draft-model", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model
        if model is None:
            from tests.support import models as tiny_models  # noqa: PLC0415

            model = Path(tiny_models.save(Path(directory) / "llama"))
        draft = () if args.draft_model is None else ("--draft-model", str(args.draft_model))
        with server_load.serving(model, *draft) as port:
            options = {"same_text": not draft}
            fuzz(port, requests=args.requests // 5, seed=args.seed + 1, **options)  # fills caches
            result = fuzz(port, requests=args.requests, seed=args.seed, **options)
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(result.statuses.items()))
    print(f"{args.requests} malformed requests in {result.seconds:.0f} s: {statuses}")
    print(f"failed: {len(result.failed)}")
    for line in result.failed:
        print(" ", line)
    for name, sizes in (("before", result.before), ("after", result.after)):
        print(
            f"{name}: {sizes['memory_bytes'] / 1e6:.2f} MB in use, of which "
            f"{sizes['allocated_bytes'] / 1e6:.2f} MB in {sizes['prompt_caches']} prompt caches"
        )
    return int(bool(result.failed))


if __name__ == "__main__":
    sys.exit(main())
