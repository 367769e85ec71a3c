"""Load ``rotormlx server`` with many clients: no crash, no mixed-up text, all memory freed.

    python scripts/server_load.py [--requests 200] [--clients 32] [--model PATH]

Without --model, the script makes a tiny random model. Each client streams completions over HTTP,
with prompts of 5 to 600 tokens. Many prompts continue an earlier one, so that the prompt cache is
used. Some requests are cancelled in the middle, and some are malformed. Every prompt first runs
alone, which gives the text that later runs must match.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

WORDS = ("rotor", "turns", "a", "block", "of", "keys", "while", "long", "streams", "go", "by")
TIMEOUT_S = 300


@dataclass
class Result:
    """The outcome of the requests.

    Args:
        completed: Number of streams read to the end.
        cancelled: Number of streams that the client closed in the middle.
        refused: Number of malformed requests that got a status of 4xx.
        reused: Number of completed streams that found tokens in the prompt cache.
        mixed_up: Streams whose text differs from that of the prompt run alone.
        failed: All other failures.
        tokens: Number of tokens generated in completed streams.
        seconds: Time from the first request to the last answer.
    """

    completed: int = 0
    cancelled: int = 0
    refused: int = 0
    reused: int = 0
    mixed_up: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@contextmanager
def free_port() -> Iterator[int]:
    """Yield a port of the loopback address that is free when this context ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield int(free.getsockname()[1])


@contextmanager
def serving(model: Path, *options: str) -> Iterator[int]:
    """Run a server in its own process, and yield its port."""
    with free_port() as port:
        pass
    command = [sys.executable, "-m", "rotormlx", "server", "--model", str(model)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(TIMEOUT_S):
                if process.poll() is not None:
                    break
                try:
                    if health(port)["status"] == "ok":
                        yield port
                        return
                except OSError:
                    time.sleep(0.5)
            log.seek(0)
            raise RuntimeError(
                f"[server_load] The server must start, but it did not:\n{log.read()}"
            )
        finally:
            process.terminate()
            process.wait(30)


def health(port: int) -> dict:
    """Return the answer of the server at ``/health``."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("GET", "/health")
    answer: dict = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def stream(port: int, prompt: str, max_tokens: int, leave_after: int | None = None) -> dict:
    """Stream one completion; stop after ``leave_after`` pieces if that is given."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()[:200]!r}")
    text, pieces, usage, done = "", 0, {}, False
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            done = True
            break
        if not line.startswith("data: "):
            continue
        piece = json.loads(line.removeprefix("data: "))
        usage = piece.get("usage") or usage
        text += "".join(choice.get("text") or "" for choice in piece.get("choices", []))
        pieces += 1
        if leave_after is not None and pieces >= leave_after:
            break
    connection.close()
    return {"text": text, "usage": usage, "done": done}


MALFORMED = (
    b"{",
    b"[]",
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"max_tokens": 5}',
)


def malformed(port: int, body: bytes) -> int:
    """Send a malformed request, and return the status."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", "/v1/completions", body)
    status = connection.getresponse().status
    connection.close()
    return status


def load(port: int, *, requests: int, clients: int, seed: int = 0) -> Result:
    """Send requests from several clients at once and compare every text with that of a run alone.

    Args:
        port: Port of the server.
        requests: Number of requests of all kinds.
        clients: Number of clients at a time.
        seed: Seed of prompts and lengths.
    """
    chance = random.Random(seed)
    shared = [" ".join(chance.choices(WORDS, k=chance.randint(20, 90))) for _ in range(3)]
    prompts = []
    for _ in range(max(2, requests // 8)):
        own = f"{chance.randint(0, 999)} " + " ".join(
            chance.choices(WORDS, k=chance.randint(1, 30))
        )
        prompts.append(chance.choice([*shared, ""]) + own)
    # Each prompt alone with the most tokens: a run with fewer tokens gives a prefix of it.
    longest = 40
    alone = [stream(port, prompt, longest)["text"] for prompt in prompts]

    result = Result()
    start = time.monotonic()

    def request(number: int) -> None:
        kind = number % 10
        own = random.Random(seed * 1000 + number)
        try:
            if kind == 3:
                status = malformed(port, MALFORMED[number // 10 % len(MALFORMED)])
                result.refused += 400 <= status < 500
                if not 400 <= status < 500:
                    result.failed.append(f"a malformed request got {status}")
                return
            index = own.randrange(len(prompts))
            count = own.randint(3, longest)
            leave = own.randint(1, 5) if kind == 7 else None
            got = stream(port, prompts[index], count, leave)
            matches = alone[index].startswith(got["text"].rstrip("\ufffd"))
            if not matches:
                result.mixed_up.append(f"{prompts[index][-40:]!r}: {got['text']!r}")
            if leave is not None:
                result.cancelled += 1
                return
            if not got["done"]:
                result.failed.append(f"{prompts[index][-40:]!r}: the stream broke off")
                return
            result.completed += 1
            result.tokens += got["usage"].get("completion_tokens", 0)
            details = got["usage"].get("prompt_tokens_details") or {}
            result.reused += bool(details.get("cached_tokens"))
        except (OSError, RuntimeError, ValueError) as error:
            result.failed.append(repr(error))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(request, range(requests)))
    result.seconds = time.monotonic() - start
    return result


def main() -> int:
    """Load a server, and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--model", type=Path, help="directory of a model; a tiny random model by default"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model
        if model is None:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.support import models as tiny_models  # noqa: PLC0415

            model = Path(tiny_models.save(Path(directory) / "llama"))
        with serving(model, "--key-bits", "8", "--value-bits", "8") as port:
            load(port, requests=args.clients, clients=args.clients, seed=9)
            before = health(port)["rotormlx"]
            result = load(port, requests=args.requests, clients=args.clients)
            time.sleep(2)
            after = health(port)["rotormlx"]
    print(
        f"{args.requests} requests, {args.clients} clients, {result.seconds:.0f} s: "
        f"{result.completed} completed ({result.reused} with a prompt from the cache, "
        f"{result.tokens} tokens), {result.cancelled} cancelled, {result.refused} malformed refused"
    )
    print(f"mixed up: {len(result.mixed_up)}, failed: {len(result.failed)}")
    for line in [*result.mixed_up, *result.failed]:
        print(" ", line)
    for name, sizes in (("before", before), ("after", after)):
        print(
            f"{name}: {sizes['memory_bytes'] / 1e6:.2f} MB in use, of which "
            f"{sizes['allocated_bytes'] / 1e6:.2f} MB in {sizes['prompt_caches']} prompt caches, "
            f"{(sizes['memory_bytes'] - sizes['allocated_bytes']) / 1e6:.2f} MB elsewhere"
        )
    return int(bool(result.mixed_up or result.failed))


if __name__ == "__main__":
    sys.exit(main())
