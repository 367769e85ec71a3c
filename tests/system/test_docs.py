"""That commands and Python of quickstart, tutorial and README run, and that the site is complete.

The blocks of a page run in its order, in one shell and one Python, with a tiny model in place of
the page's. A ``text`` block is the output of the block before it; its lines must occur there in
that order, whatever their numbers. A ``text`` block with a title is a model's own words, which no
other model writes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

import rotormlx
from tests.support import models

CLONE = Path(__file__).resolve().parents[2]
DOCS = CLONE / "docs"
SITE = DOCS / "site" / "mkdocs.yml"
pytestmark = pytest.mark.skipif(not SITE.exists(), reason="docs/ is not here")

DEMO_MODEL = "~/.cache/rotormlx/smollm2-135m-instruct-bfloat16"
PORT = "8123"
DONE = "-- block done --"
LIMIT_S = 600  # of a page; a block that never ends would never fail
RUN_BLOCKS = (
    "import json, sys\n"
    "space = {'__name__': '__main__'}\n"
    "for line in sys.stdin:\n"
    "    exec(compile(json.loads(line), 'block', 'exec'), space)\n"
    f"    print('\\n{DONE}', flush=True)\n"
)


def blocks(page):
    """``(language, rest of the opening line, text)`` of every fenced block."""
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [(language, more.strip(), text) for language, more, text in found]


def normal(line):
    """A line without what depends on the machine and the model."""
    line = re.sub(r"\S*/calibrations/\w+", "calibrations/", line)
    line = re.sub(r"(\bbackend) .*", r"\1", line)
    line = re.sub(r"\d[\d,.]*", "#", line)
    line = re.sub(r"# [kMG]?B\b", "# bytes", line)
    return re.sub(r"[\s\u2500-\u257f]+", " ", line).strip()  # what tables are drawn with


def not_shown(expected, output):
    """The first line of ``expected`` that is missing in the output after the lines before it.

    Where the output breaks a line does not count: the numbers of a tiny model are shorter.
    """
    rest = " ".join(map(normal, output.splitlines()))
    for line in expected.splitlines():
        wanted = normal(line)
        if wanted in ("", "..."):
            continue
        _, found, rest = rest.partition(wanted)
        if not found:
            return line
    return None


class Terminal:
    """A program that runs one block after the other and keeps what they have set."""

    def __init__(self, command, **settings):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **settings,
        )
        self._limit = threading.Timer(LIMIT_S, self._kill)
        self._limit.start()

    def _kill(self):
        """End the program and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def run(self, block):
        """What a block prints; fails where it does."""
        self._process.stdin.write(block + "\n")
        self._process.stdin.flush()
        output = []
        for line in self._process.stdout:
            if line.rstrip("\n").endswith(DONE):
                return "".join(output)
            output.append(line)
        raise AssertionError(f"a block ended with {self._process.wait()}:\n{''.join(output)}")

    def close(self):
        self._limit.cancel()
        self._kill()
        self._process.communicate()


def run_page(text, folder):
    """Run the shell and Python blocks of a page in a folder.

    Blocks without a language, which install something, do not run.

    Returns:
        Each block that ran with its output, and the output blocks that follow it.
    """
    (folder / "bin").mkdir()
    command = folder / "bin" / "rotormlx"
    command.write_text(
        f"#!{sys.executable}\nfrom rotormlx.cli.main import main\nif __name__ == '__main__':\n"
        "    main()\n"
    )
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(CLONE),
        "ROTORMLX_CACHE": str(folder / "cache"),
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
    }
    settings = {"cwd": folder, "env": environment}
    shell = Terminal(["bash", "-e"], **settings)
    python = Terminal([sys.executable, "-u", "-c", RUN_BLOCKS], **settings)
    ran = []
    try:
        for language, title, block in blocks(text):
            if language == "sh":
                ran.append((block, shell.run(f"{block}\necho; echo '{DONE}'"), []))
            elif language == "python":
                ran.append((block, python.run(json.dumps(block)), []))
            elif language == "text":
                ran[-1][2].append((title, block))
            elif language:
                raise AssertionError(f"a block must be sh, python or text, not {language!r}")
    finally:
        shell.close()
        python.close()
    return ran


def tiny_model(folder):
    """A model that chats, with the attention of SmolLM2."""
    path = folder / Path(DEMO_MODEL).name
    models.save(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("name", "not_run", "outputs"), [("quickstart", 1, 3), ("tutorial", 0, 11)]
)
def test_a_page_runs_and_shows_what_comes(name, not_run, outputs, tmp_path):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert DEMO_MODEL in page
    assert (PORT in page) == (name == "tutorial")
    assert [language for language, _, _ in blocks(page)].count("") == not_run
    page = page.replace(DEMO_MODEL, tiny_model(tmp_path)).replace(PORT, free_port())
    ran = run_page(page, tmp_path)
    assert sum(bool(shown) for _, _, shown in ran) >= outputs
    for block, output, shown in ran:
        for title, expected in shown:
            missing = None if title else not_shown(expected, output)
            assert missing is None, f"not shown: {missing}\n{block}\nshows\n{output}"


def test_the_readmes_commands_and_python_run(tmp_path):
    """Those that set up an environment stand without a language; ``.ci/run`` has one of them."""
    page = (CLONE / "README.md").read_text(encoding="utf-8")
    assert [language for language, _, _ in blocks(page)].count("") == 2
    model = tiny_model(tmp_path)
    named = re.sub(r'((?:load|from_pretrained)\()"[^"]+"', rf'\1"{model}"', page)
    named, commands = re.subn(r"^M=\S+$", f"M={model}", named, flags=re.MULTILINE)
    assert commands == 1
    assert named.count(model) >= 3  # mlx-lm, transformers, commands
    ran = run_page(re.sub(r"max_tokens=\d+", "max_tokens=3", named), tmp_path)
    outputs = [output for _, output, _ in ran]
    assert "compressed" in outputs[0]
    for shown in ("tokens packed", "longest context", "calibrat"):
        assert shown in outputs[-1], outputs[-1]


# ---- the site ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages(entry):
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [page for part in below for page in pages(part)]


def test_every_page_is_in_the_navigation_once():
    found = pages(yaml.load(SITE.read_text(encoding="utf-8"), _Loader)["nav"])
    assert len(set(found)) == len(found)
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(found)


@pytest.mark.parametrize("module", ["rotormlx", "rotormlx.torch"])
def test_the_reference_has_every_public_name(module):
    text = (CLONE / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    names = re.findall(r'"(\w+)"', re.search(r"^__all__ = \[(.*?)\]", text, re.DOTALL | re.M)[1])
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(names)
    if module == "rotormlx":
        assert names == rotormlx.__all__
