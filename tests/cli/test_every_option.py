"""Every option of every command, with values that a user might get wrong: no traceback.

The commands and their options are read from the command line itself and from mlx-lm's parsers, so a
new option is tried without a change here.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import CliRunner, Result
from huggingface_hub import constants

from rotormlx.cli import main, mlx_lm_commands
from rotormlx.measure import doctor
from rotormlx.mlx import hosts
from tests.support import models as tiny

# Made once: typer makes all commands anew for each call of its own runner.
GROUP: Any = typer.main.get_command(main.app)
COMMANDS: dict[str, Any] = GROUP.commands
TEXT = "The quick brown fox jumps over the lazy dog. " * 20
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Paths that the commands and the values below name."""
    directory = tmp_path_factory.mktemp("options")
    model = tiny.save(directory / "llama")
    settings = Path(model) / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    (directory / "text.txt").write_text(TEXT)
    (directory / "prompts.txt").write_text("hi\n")
    (directory / "binary").write_bytes(bytes(range(128, 256)))
    return {
        "model": model,
        "text": str(directory / "text.txt"),
        "prompts": str(directory / "prompts.txt"),
        "binary": str(directory / "binary"),
        "directory": str(directory),
    }


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path, files):
    """No hub, no lm_eval, no server, no kernels: what is tried is what stands before them."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_lm.server.run", lambda *args: None)
    monkeypatch.setattr(doctor, "operations", list)
    monkeypatch.setattr(doctor, "CONTEXTS", ())
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    lm_eval = sys.modules["lm_eval"]
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {"__init__": lambda self: None})
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda kind: kind
    lm_eval.simple_evaluate = lambda model, **options: {"results": {}}
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield
    sys.modules.pop("mlx_lm.evaluate", None)
    hosts.MLX_LM.remove()


def base(command: str, files: dict[str, str]) -> list[str]:
    """Arguments with which a command does the least that it can."""
    model = ["--model", files["model"]]
    measured = ["--schemes", "k4v4"]
    return {
        "generate": [*model, "--prompt", "hi", "--max-tokens", "1", "--verbose", "False"],
        "chat": [*model, "--max-tokens", "1"],
        "server": [*model, "--port", "0"],
        "cache_prompt": [*model, "--prompt", "hi", "--prompt-cache-file", "c.safetensors"],
        "evaluate": [*model, "--tasks", "x"],
        "benchmark": [*model, "-p", "2", "-g", "1", "-n", "1"],
        "perplexity": [
            *model, "--data-path", files["text"], "--sequence-length", "8", "--num-samples", "1",
        ],
        "batch": [files["prompts"], *model, "--max-tokens", "1"],
        "vlm": ["generate", *model, "--prompt", "hi", "--max-tokens", "1"],
        "info": [files["model"]],
        "doctor": ["--output", "c.json"],
        "demo": [*model, "--score-tokens", "256", "--max-tokens", "1"],
        "quality": [
            files["model"], *measured, "--text", files["text"], "--tokens", "200", "--greedy", "1",
            "--sampled", "1", "--seeds", "1",
        ],
        "needle": [
            files["model"], *measured, "--kinds", "copy", "--lengths", "512", "--trials", "1",
            "--needles", "1",
        ],
        "bench": [
            files["model"], *measured, "--contexts", "8", "--repeats", "1", "--decode-tokens", "1",
        ],
        "calibrate": [
            files["model"], "--text", files["text"], "--tokens", "140", "--output", "c.safetensors",
        ],
    }[command]  # fmt: skip


HUGE = str(10**12)
NUMBERS = ("", "x", "0", "-1", "-7", HUGE, str(2**70), "1.5", "nan", "inf", "-1e400")
TEXTS = (
    "",
    "x",
    "nowhere/at/all",
    "../..",
    "x" * 5000,
    "[1]",
    "{",
    "5",
    "null",
    "-1",
    "\U0001f642",
)


def values(kind: str, files: dict[str, str]) -> list[list[str]]:
    """Values to try for an option of a kind; the empty list leaves its value out."""
    if kind == "flag":
        return [[]]
    if kind == "number":
        return [[], *([value] for value in NUMBERS)]
    paths = (
        *(files["directory"], files["binary"], f"{files['binary']}/file", "/proc/nowhere/file"),
        "missing.txt",
    )
    return [[], *([value] for value in (*TEXTS, *paths))]


def options(command: str) -> list[tuple[str, str]]:
    """Options of a command, ours and those of mlx-lm, with the kind of their values."""
    found = []
    for parameter in COMMANDS[command].params:
        name = parameter.opts[-1]
        if name == "--help" or not name.startswith("--"):
            continue
        number = parameter.type_descriptor.annotation in (int, float)
        kind = "flag" if parameter.is_flag else "number" if number else "text"
        found.append((name, kind))
    if command in main.MLX_LM_COMMANDS:
        tool = mlx_lm_commands.tool_module(command)
        for action in mlx_lm_commands.parser_of(tool)._actions:
            if action.dest != "help":
                number = action.type in (int, float)
                is_flag = action.nargs == 0
                kind = "flag" if is_flag else "number" if number else "text"
                found.append((action.option_strings[0], kind))
    return found


def invoke(command: str, arguments: list[str]) -> Result:
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(GROUP, [command, *arguments], input="q\n")


def listing(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def fault(command: str, arguments: list[str], directories: list[Path]) -> tuple[str, bool]:
    """What is wrong with the answer to some arguments, and whether they were refused."""
    before = [listing(directory) for directory in directories]
    result = invoke(command, arguments)
    if not (result.exception is None or isinstance(result.exception, SystemExit)):
        return f"a traceback: {result.exception!r}", False
    if result.exit_code not in (0, 2):
        return f"exit status {result.exit_code}", False
    if result.exit_code == 2:
        if not re.fullmatch(r"rotormlx: \[[\w ]+\] .*\.\n", result.stderr):
            return f"no single sentence: {result.stderr[-300:]!r}", True
        if [listing(directory) for directory in directories] != before:
            return "something was written", True
    return "", result.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_refuses_wrong_values_in_a_sentence(command: str, files, figure) -> None:
    result = invoke(command, base(command, files))
    assert result.exit_code == 0, (result.output, result.exception)
    directories = [Path.cwd(), Path(files["directory"])]
    names, tried, refused, faults = options(command), 0, 0, []
    for name, kind in names:
        for value in values(kind, files):
            wrong, is_refused = fault(command, [*base(command, files), name, *value], directories)
            tried, refused = tried + 1, refused + is_refused
            if wrong:
                faults.append(f"{command} {name} {[v[:60] for v in value]}: {wrong}")
    assert not faults, "\n".join(faults)
    figure(
        f"{command}: {len(names)} options, {tried} values tried, {refused} refused in a sentence, "
        "0 tracebacks"
    )
    # Each option but the flags has at least one value that is wrong: none at all.
    assert refused >= sum(kind != "flag" for _, kind in names)
