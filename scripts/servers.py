"""Compare the texts of a server with its own exact caches and with compressed ones.

    python scripts/servers.py vllm-mlx --env DIR

DIR is the environment in which the server and rotormlx are installed (docs/SERVERS.md has the
commands). The script makes a small model whose answers depend only on the cache: its last layer is
solved so that every conversation below has its own answer, eight random letters. The server runs
twice, without and with ROTORMLX, and gets the same 30 requests; nothing else changes.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import re
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DOCUMENTS = 5
QUESTIONS = ("What is it for?", "What does it raise?", "Who may use it?")
ANSWER_TOKENS = 8
DOCUMENT_LETTERS = 400
START_SECONDS = 300

# Tokens are bytes. Each message ends with a newline, which no text contains.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Runs in every process of the server. It records each layer cache when it is made, and writes how
# many bytes all of them hold now, and the most that they have held.
PROBE = """
import json, os, sys, threading, time, weakref

BASES = {
    "mlx_lm.models.cache": "_BaseCache",
    "mlx_vlm.models.cache": "_BaseCache",
    "rotormlx.mlx.cache.base": "StoredCache",
}
made = weakref.WeakSet()

def new(kind, *args, **kwargs):
    cache = object.__new__(kind)
    made.add(cache)
    return cache

def bytes_of(cache):
    try:
        return sum(getattr(array, "nbytes", 0) for array in (cache.keys, cache.values))
    except AttributeError:
        return cache.nbytes

def held():
    found = {}
    for cache in list(made):
        kind = type(cache).__name__
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + bytes_of(cache)
    return found

def watch():
    most = 0
    path = os.path.join(os.environ["CACHE_BYTES"], str(os.getpid()))
    while True:
        time.sleep(0.1)
        for module, name in BASES.items():
            base = getattr(sys.modules.get(module), name, None)
            if base is not None and base.__new__ is not new:
                base.__new__ = new
        try:
            now = held()
        except RuntimeError:  # another thread made a cache meanwhile
            continue
        most = max(most, sum(size for _, size in now.values()))
        with open(path + ".new", "w") as file:
            json.dump({"now": now, "most": most}, file)
        os.replace(path + ".new", path)

threading.Thread(target=watch, daemon=True).start()
"""


@dataclass(frozen=True)
class Server:
    """The command of a server, and the files and pages that belong to it.

    Args:
        command: Program and options; ``{model}`` and ``{port}`` are filled in.
        name: Name of the model in requests.
        files: Names and contents of files that the server reads from its working folder.
        stored: Subfolder of that folder with the prompt caches on disk, if the server has one.
        stats: Path of the server's own page about its caches.
    """

    command: tuple[str, ...]
    name: str = "{model}"
    files: tuple[tuple[str, str], ...] = ()
    stored: str | None = None
    stats: str | None = None


MLX_SERVE = """
manager_port: {port}
mlx_port: {inner_port}
startup_timeout_seconds: 300
models:
  - {{name: tiny, type: text, hf_path: {model}}}
"""
SERVERS = {
    "vllm-mlx": Server(
        ("vllm-mlx", "serve", "{model}", "--port", "{port}", "--continuous-batching", "--offline"),
        stats="/v1/cache/stats",
    ),
    "rapid-mlx": Server(
        ("rapid-mlx", "serve", "{model}", "--port", "{port}", "--no-preflight", "--yes"),
        stats="/v1/cache/stats",
    ),
    "mlx-openai-server": Server(
        (
            *("mlx-openai-server", "launch", "--model-path", "{model}", "--model-type", "lm"),
            *("--served-model-name", "tiny", "--port", "{port}", "--prompt-cache-dir", "stored"),
        ),
        name="tiny",
        stored="stored",
    ),
    "mlx-vlm": Server(
        ("mlx_vlm.server", "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
    ),
    "mlx-serve": Server(
        ("mlx-serve", "start", "--host", "127.0.0.1", "--port", "{port}"),
        name="tiny",
        files=(("models.yaml", MLX_SERVE),),
    ),
}


def main() -> None:
    """Run one server twice, and compare its texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument(
        "--env", type=Path, required=True, help="environment in which the server is installed"
    )
    parser.add_argument("--setting", default="8,window=0", help="ROTORMLX of the second run")
    parser.add_argument(
        "--option", action="append", default=[], help="one more option of the server"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work / "model")
        answers = []
        for setting in (None, args.setting):
            run = work / ("exact" if setting is None else "compressed")
            run.mkdir()
            server = SERVERS[args.server]
            with running(server, args.env, model, run, setting, args.option) as ask:
                began = time.time()
                answers.append(talk(ask))
                took = time.time() - began
                time.sleep(2)  # lets the probe look at the caches once more
                print(f"ROTORMLX={setting or ''}: {len(answers[-1])} requests, {took:.0f} s")
                report(server, run, ask, setting)
    compare(*answers)


def compare(exact: list[str], compressed: list[str]) -> None:
    """Print how many texts are equal, and where the others first differ."""
    known = sum(text == answer for text, answer in zip(exact, expected(), strict=True))
    print(f"exact caches: {known} of {len(exact)} texts are the answers of the model")
    equal = sum(a == b for a, b in zip(exact, compressed, strict=True))
    print(f"compressed caches: {equal} of {len(exact)} texts equal those of exact caches")
    for number, (a, b) in enumerate(zip(exact, compressed, strict=True)):
        if a != b:
            pairs = enumerate(zip(a, b, strict=False))
            first = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
            print(f"  request {number}: {a!r}, {b!r}: equal up to character {first}")


# ---- the requests -------------------------------------------------------------------------------


def document(index: int) -> dict[str, str]:
    """Return the system prompt that all conversations about a document share."""
    topics = pydoc_data.topics.topics
    text = " ".join(topics[sorted(topics)[5 + 3 * index]].split())
    return {"role": "system", "content": re.sub(r"[^ -~]", " ", text)[:DOCUMENT_LETTERS]}


def conversation(index: int, *questions: int) -> list[dict[str, str]]:
    """Return a conversation about a document; all questions but the last are answered."""
    messages = [document(index)]
    for turn, question in enumerate(questions):
        messages.append({"role": "user", "content": QUESTIONS[question]})
        if turn + 1 < len(questions):
            before = answer(index, *questions[: turn + 1])
            messages.append({"role": "assistant", "content": before})
    return messages


def answer(*key: int) -> str:
    """Return the answer to a conversation: eight letters that depend only on ``key``."""
    letters = random.Random(repr(key)).choices(string.ascii_lowercase, k=ANSWER_TOKENS)
    return "".join(letters)


# A request: document and questions, and whether the answer is streamed.
Asked = tuple[tuple[int, ...], bool]
ONE_BY_ONE: list[Asked] = [
    ((index, *questions), stream)
    for index in range(DOCUMENTS)
    for questions, stream in (((0,), False), ((0,), True), ((1,), False), ((0, 1), True))
]
AT_ONCE: list[Asked] = [
    ((index, *questions), stream)
    for index in range(DOCUMENTS)
    for questions, stream in (((2,), True), ((1,), False))
]


def expected() -> list[str]:
    """Return the answers to all requests."""
    return [answer(*key) for key, _ in ONE_BY_ONE + AT_ONCE]


class Client:
    """A client of a server.

    Args:
        port: Port of the server.
        model: Name of the model in requests.
    """

    def __init__(self, port: int, model: str) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.model = model

    def __call__(self, asked: Asked) -> str:
        """Return the text that the server gives for one request."""
        key, stream = asked
        body = {
            "model": self.model,
            "messages": conversation(*key),
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            if not stream:
                return str(json.load(response)["choices"][0]["message"]["content"])
            lines = [line.decode().strip() for line in response]
        parts = [json.loads(s[6:]) for s in lines if s.startswith("data: {")]
        choices = [part["choices"][0]["delta"] for part in parts if part.get("choices")]
        return "".join(delta.get("content") or "" for delta in choices)

    def get(self, path: str) -> str:
        """Return a page of the server."""
        with urllib.request.urlopen(self.address + path, timeout=START_SECONDS) as response:
            return str(response.read().decode())


def talk(ask: Client) -> list[str]:
    """Return the texts of all requests: first one by one, then those sent at once."""
    one_by_one = [ask(asked) for asked in ONE_BY_ONE]
    with ThreadPoolExecutor(len(AT_ONCE)) as threads:
        return one_by_one + list(threads.map(ask, AT_ONCE))


# ---- the server ---------------------------------------------------------------------------------


@contextmanager
def running(
    server: Server, env: Path, model: str, run: Path, setting: str | None, options: list[str]
) -> Iterator[Client]:
    """Run a server in its own folder, which is also its home, and yield a client of it."""
    port, inner_port = free_port(), free_port()
    filled = {"model": model, "port": port, "inner_port": inner_port}
    program, *arguments = (part.format(**filled) for part in server.command)
    for name, text in server.files:
        (run / name).write_text(text.format(**filled), encoding="utf-8")
    for name in ("probe", "bytes"):
        (run / name).mkdir()
    (run / "probe" / "sitecustomize.py").write_text(PROBE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "ROTORMLX"}
    environment |= {
        "HOME": str(run),  # some servers keep prompt caches there; the other run must not find them
        "TMPDIR": str(run),
        "PYTHONPATH": str(run / "probe"),
        "CACHE_BYTES": str(run / "bytes"),
        "HF_HUB_OFFLINE": "1",
        "RAPID_MLX_TELEMETRY": "0",
        "PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    if setting is not None:
        environment["ROTORMLX"] = setting
    command = [str(env / "bin" / program), *arguments, *options]
    print("$", f"ROTORMLX={setting}" if setting else "", " ".join([program, *arguments, *options]))
    with (run / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=run,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            client = Client(port, server.name.format(**filled))
            wait(client, process, run)
            yield client
        finally:
            stop(process)


def wait(client: Client, process: subprocess.Popen[bytes], run: Path) -> None:
    """Wait until a server lists its models."""
    end = time.time() + START_SECONDS
    while time.time() < end and process.poll() is None:
        try:
            client.get("/v1/models")
            return
        except OSError:
            time.sleep(0.5)
    log = (run / "server.log").read_text(errors="replace").splitlines()
    sys.exit("The server must listen, but it does not:\n" + "\n".join(log[-20:]))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def report(server: Server, run: Path, ask: Client, setting: str | None) -> None:
    """Print the log lines of rotormlx and the sizes of caches; exit if compression is wrong."""
    compressed = False
    for log in sorted(run.rglob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        for line in lines:
            if line.startswith("rotormlx:") or "[prefix store]" in line:
                print(f"  {log.name}: {line}")
                compressed |= "caches compressed" in line
    if compressed == (setting is None):
        sys.exit("Caches must be compressed in the second run only, but the log says otherwise.")
    for path in sorted((run / "bytes").iterdir()):
        if path.suffix != ".new":
            seen = json.loads(path.read_text())
            now = ", ".join(f"{n} {kind} {size} bytes" for kind, (n, size) in seen["now"].items())
            if seen["most"]:
                print(f"  caches at the end: {now or 'none'}; at most {seen['most']} bytes")
    if server.stored is not None:
        files = [path.stat().st_size for path in (run / server.stored).rglob("*.pkl")]
        print(f"  prompt caches on disk: {len(files)} of {sum(files)} bytes")
    if server.stats is not None:
        print(f"  {server.stats}: {ask.get(server.stats)[:600]}")


# ---- the model ----------------------------------------------------------------------------------


def make_model(directory: Path) -> str:
    """Write a random model whose last layer gives each conversation its answer.

    The hidden states of a random model differ between conversations because its attention reads
    different caches. The weights of the last layer are the least-squares solution for which the
    next letter of the answer scores one and all other tokens score zero.
    """
    import mlx.core as mx  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from mlx.utils import tree_flatten  # noqa: PLC0415
    from tokenizers import Tokenizer  # noqa: PLC0415

    from tests.support import models  # noqa: PLC0415

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    model = models.build("llama", **sizes)
    for layer in model.layers:  # so that the hidden states depend more on the cache
        attention = layer.self_attn
        attention.q_proj.weight = attention.q_proj.weight * 4
        attention.o_proj.weight = attention.o_proj.weight * 8
    path = models.save(directory, "llama", **sizes)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    states, letters = [], []
    for key in sorted({key for key, _ in ONE_BY_ONE + AT_ONCE}):
        prompt = "".join(f"{m['role'][0]}:{m['content']}\n" for m in conversation(*key)) + "a:"
        text = tokenizer.encode(answer(*key)).ids
        tokens = mx.array([[*tokenizer.encode(prompt).ids, *text[:-1]]])
        states.append(np.array(model.model(tokens)[0, -len(text) :], np.float64))
        letters += text
    wanted = np.zeros((len(letters), models.VOCABULARY))
    wanted[np.arange(len(letters)), letters] = 1
    solved = np.linalg.lstsq(np.concatenate(states), wanted, rcond=None)[0]
    model.lm_head.weight = mx.array(solved.T.astype(np.float32))

    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (directory / "config.json").write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    main()
