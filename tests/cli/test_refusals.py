"""Options that do not fit together, outputs that cannot be written, and Ctrl-C in every command."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from typer.testing import CliRunner, Result

from rotormlx.cli import batching, main, mlx_lm_commands, server_guard, serving
from rotormlx.config import RotorConfig
from rotormlx.measure import bench, free_running, needle, quality_run
from rotormlx.mlx import hosts, integration
from tests.support import models as tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Commands that write files, with the option that names them, and arguments for little work.
WRITERS = ("batch", "quality", "needle", "bench", "calibrate", "cache_prompt")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    yield
    hosts.MLX_LM.remove()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    path = Path(tiny.save(tmp_path_factory.mktemp("models") / "chat"))
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return str(path)


def test_the_installed_command_is_a_function() -> None:
    project = Path(main.__file__).parents[2] / "pyproject.toml"
    module, name = tomllib.loads(project.read_text())["project"]["scripts"]["rotormlx"].split(":")
    assert getattr(importlib.import_module(module), name) is main.main


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main.app, list(arguments), **options)


def assert_refused(result: Result, part: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert re.fullmatch(r"rotormlx: \[[\w ]+\] .*\.\n", result.stderr), result.stderr
    assert part in result.stderr


def work(command: str, model: str) -> list[str]:
    """Arguments for little work; the path of the output follows."""
    Path("text.txt").write_text(TEXT)
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    scheme = ["--schemes", "k4v4 k3v3"]
    return {
        "batch": ["prompts.txt", "--model", model, "--max-tokens", "2", "--output"],
        "quality": [
            model, *scheme, "--text", "text.txt", "--tokens", "200", "--greedy", "1", "--sampled",
            "1", "--output",
        ],
        "needle": [
            model, *scheme, "--kinds", "copy", "--lengths", "512", "--trials", "2", "--needles",
            "1", "--output",
        ],
        "bench": [
            model, *scheme, "--contexts", "8", "--repeats", "2", "--decode-tokens", "1", "--output",
        ],
        "calibrate": [model, "--text", "text.txt", "--tokens", "140", "--output"],
        "cache_prompt": ["--model", model, "--prompt", "hi", "--prompt-cache-file"],
    }[command]  # fmt: skip


# ---- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("path", ["text.txt/x", "/proc/nowhere/x", "/proc", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command: str, path: str, llama: str, monkeypatch
) -> None:
    """Of a folder as well as of a file; ``.`` is a folder, so only files are refused there."""
    arguments = work(command, llama)
    if path == "." and command in ("quality", "needle", "bench"):
        path = "text.txt"
    monkeypatch.setattr(mlx_lm_commands, "load_lazily", lambda *a, **k: pytest.fail("loaded"))
    before = sorted(os.listdir())
    assert_refused(run(command, *arguments, path), path.split("/")[-1])
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("command", ["quality", "needle", "bench"])
def test_a_refusal_takes_the_folder_away_that_it_had_made(command: str, llama: str) -> None:
    arguments = work(command, llama)
    arguments[0] = "/no/such/model"
    assert_refused(run(command, *arguments, "new/folder"), "/no/such/model")
    assert not Path("new").exists()


def test_an_old_output_of_batch_survives_a_refusal(llama: str) -> None:
    arguments = work("batch", llama)
    Path("old.jsonl").write_text("kept\n")
    refused = [*arguments, "old.jsonl", "--model", "/no/such/model"]
    assert_refused(run("batch", *refused), "/no/such/model")
    assert Path("old.jsonl").read_text() == "kept\n"
    assert run("batch", *arguments, "old.jsonl").exit_code == 0
    assert len(Path("old.jsonl").read_text().splitlines()) == 3
    assert_refused(run("batch", *arguments, "prompts.txt"), "is also the input")


# ---- options that do not fit together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("chat", ["--calibration", "f"]),
        ("server", ["--calibration", "f"]),
        ("chat", ["--adapter-path", "adapter"]),
        ("server", ["--draft-model", "d"]),
        ("benchmark", ["-qa"]),
    ],
    ids=" ".join,
)
def test_options_that_sharded_runs_drop_are_refused(
    command: str, options: list[str], chat_model: str, monkeypatch
) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    monkeypatch.setattr(mlx_lm_commands, "processes", lambda: 2)
    result = run(command, "--model", chat_model, *options)
    assert_refused(result, "several processes")


def test_pipeline_in_one_process_is_refused(chat_model: str) -> None:
    assert_refused(run("chat", "--model", chat_model, "--pipeline"), "--pipeline has no effect")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate", "--prompt", ""], "at least one token"),
        (["generate", "--image", "i.png"], "takes text only"),
        (["generate", "--system-prompt", "x"], "without a chat template"),
        (["chat"], "chat template"),
        (["perplexity", "--data-path", "missing.txt"], "No such text file: missing.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_model_cannot_take_is_refused_before_its_weights_are_read(
    arguments: list[str], part: str, llama: str, monkeypatch
) -> None:
    Path("i.png").write_bytes(b"")
    monkeypatch.setattr(mlx_lm_commands, "read_weights", lambda model: pytest.fail("read"))
    assert_refused(run(*arguments, "--model", llama), part)


def test_calibrated_rotations_and_a_rotation_of_ones_own_are_refused(llama: str) -> None:
    arguments = [*work("calibrate", llama), "klt.safetensors", "--transform", "klt"]
    assert run("calibrate", *arguments).exit_code == 0
    options = ["--calibration", "klt.safetensors"]
    for other, said in (("--rotation dense", "rotation 'dense'"), ("--rotation-seed 3", "seed 3")):
        result = run("info", llama, *options, *other.split())
        assert_refused(result, f"klt.safetensors brings its own rotation, but {said} was given")


def test_two_texts_of_one_name_are_refused(llama: str) -> None:
    arguments = work("quality", llama)
    Path("other").mkdir()
    Path("other/text.txt").write_text(TEXT)
    result = run("quality", *arguments, "out", "--text", "other/text.txt")
    assert_refused(result, "other/text.txt is the second text.txt")


def speculated(model: Any, draft: Any, caches: list[Any] | None, tokens: int = 60) -> list[int]:
    steps = speculative_generate_step(
        tiny.tokens(150)[0], model, draft, max_tokens=tokens, prompt_cache=caches
    )
    return [token for token, _, _ in steps]


def test_speculation_over_a_limited_cache_is_right_or_refused() -> None:
    model, draft = tiny.build("llama"), tiny.build("llama", seed=4)
    integration.apply(model)
    integration.apply(draft)
    plain = [token for token, _ in generate_step(tiny.tokens(150)[0], model, max_tokens=60)]

    def limited(owner: Any, limit: int | None) -> list[Any]:
        return integration.make_prompt_cache(owner, max_kv_size=limit)

    assert speculated(model, draft, None) == plain
    assert speculated(model, draft, limited(model, 300) + limited(draft, 300)) == plain
    # 195 tokens fit before some are evicted. A draft that forgets changes no token.
    caches = limited(model, None) + limited(draft, 240)
    assert speculated(model, draft, caches) == plain
    assert caches[-1].counts.evicted
    # A window of one token does not hold the two of a draft.
    for owner in (model, draft):
        integration.apply(owner, RotorConfig(window=1))
    for limits in ((240, None), (None, 240)):
        caches = limited(model, limits[0]) + limited(draft, limits[1])
        with pytest.raises(ValueError, match=r"^\[speculation\] .* only for 196 more tokens"):
            speculated(model, draft, caches)
    with pytest.raises(ValueError, match=r"^\[speculation\] .* any number of tokens"):
        speculated(model, draft, limited(model, 300) + limited(draft, None), -1)


def test_speculation_over_a_sliding_window_that_fills_is_refused() -> None:
    model, draft = tiny.build("gemma3_text"), tiny.build("llama", seed=4)
    integration.apply(model)
    integration.apply(draft)
    with pytest.raises(ValueError, match=r"^\[speculation\] .* only for 32 more tokens"):
        speculated(model, draft, None)


# ---- Ctrl-C and Ctrl-D --------------------------------------------------------------------------


def after(calls: int, function: Any) -> Any:
    """The function, interrupted in place of its call number ``calls``."""
    left = [calls]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def assert_interrupted(result: Result) -> None:
    assert result.exit_code == 130, (result.output, result.exception)
    assert result.stderr.splitlines()[-1] == "rotormlx: interrupted", result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["generate", "chat", "cache_prompt", "benchmark"])
def test_ctrl_c_ends_a_command_of_mlx_lm_in_a_line(command, chat_model: str, monkeypatch) -> None:
    tool = importlib.import_module(f"mlx_lm.{command}")
    name = {"generate": "generate", "cache_prompt": "generate_step"}.get(command, "stream_generate")
    monkeypatch.setattr(tool, name, after(0, getattr(tool, name)))
    more = {"cache_prompt": ["--prompt", "x", "--prompt-cache-file", "f"]}.get(command, [])
    result = run(command, "--model", chat_model, *more, input="hello\n")
    assert_interrupted(result)
    assert "llama: 2 of 2 caches compressed" in result.stderr


def test_ctrl_d_ends_a_chat_as_q_does(chat_model: str) -> None:
    result = run("chat", "--model", chat_model, "--max-tokens", "2", input="hello\n")
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(r"0 of \d tokens packed", result.stderr)


def test_ctrl_c_in_perplexity_says_what_is_known(llama: str, monkeypatch) -> None:
    work("quality", llama)
    make = mlx_lm_commands.Session.make_prompt_cache
    monkeypatch.setattr(mlx_lm_commands.Session, "make_prompt_cache", after(2, make))
    options = ["--sequence-length", "50", "--batch-size", "1", "--data-path", "text.txt"]
    result = run("perplexity", "--model", llama, *options)
    assert_interrupted(result)
    assert re.search(r"perplexity [\d.]+ ± [\d.]+ over 2 of 18 samples", result.stderr)


def test_ctrl_c_in_batch_keeps_the_answers_that_are_known(llama: str, monkeypatch) -> None:
    arguments = [*work("batch", llama), "answers.jsonl", "--batch-size", "1"]
    monkeypatch.setattr(batching, "measure", after(2, batching.measure))
    result = run("batch", *arguments)
    assert_interrupted(result)
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]
    assert "2 of 3 prompts were answered" in result.stderr


@pytest.mark.parametrize(
    ("command", "owner", "name", "calls"),
    [
        ("quality", free_running, "continuations", 2),  # the exact cache and one scheme are through
        ("needle", needle, "search", 3),  # all schemes of the first of two texts
        ("bench", bench, "turn", 3),  # two turns to warm up and one that counts
    ],
)
def test_ctrl_c_keeps_what_was_measured(
    command: str, owner: Any, name: str, calls: int, llama: str, monkeypatch
) -> None:
    monkeypatch.setattr(owner, name, after(calls, getattr(owner, name)))
    result = run(command, *work(command, llama), "out")
    assert_interrupted(result)
    assert f"{command} ended early" in result.stderr
    assert "k4v4" in result.stdout
    kept = json.loads(Path(f"out/{command}.json").read_text())
    assert {"quality": "rows", "needle": "trials", "bench": "medians"}[command] in kept
    assert Path(f"out/{command}.md").is_file()


def test_quality_goes_on_after_ctrl_c(llama: str, monkeypatch) -> None:
    """The same command reads neither the exact cache nor the first scheme again."""
    arguments = [*work("quality", llama), "out"]
    with monkeypatch.context() as patch:
        patch.setattr(free_running, "continuations", after(2, free_running.continuations))
        assert_interrupted(run("quality", *arguments))
    assert Path("out/quality-unfinished").is_dir()
    # What writes behind a text is called once for each cache that is read.
    monkeypatch.setattr(free_running, "continuations", after(1, free_running.continuations))
    result = run("quality", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert sorted(os.listdir("out")) == ["quality.html", "quality.json", "quality.md"]
    rows = json.loads(Path("out/quality.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["k4v4", "k3v3"]


@pytest.mark.parametrize("command", ["quality", "needle", "bench"])
def test_results_are_in_the_file_before_the_work_is_done(command, llama: str, monkeypatch) -> None:
    """What a crash would leave: the file of the latest step."""
    seen = []
    module = {"quality": quality_run, "needle": needle, "bench": bench}[command]
    run_it = module.run

    def watched(*args: Any, keep: Any, **options: Any) -> Any:
        def kept(result: Any) -> None:
            keep(result)
            seen.append(json.loads(Path(f"out/{command}.json").read_text()))

        return run_it(*args, keep=kept, **options)

    monkeypatch.setattr(module, "run", watched)
    assert run(command, *work(command, llama), "out").exit_code == 0
    assert len(seen) >= 2
    assert seen[0] != seen[-1]


@pytest.mark.parametrize("command", ["info", "calibrate", "demo"])
def test_ctrl_c_in_the_other_commands_is_one_line(command, llama: str, monkeypatch) -> None:
    monkeypatch.setattr("mlx_lm.load", after(0, None))
    arguments = {"info": [llama], "demo": ["--model", llama]}.get(command)
    result = run(command, *(arguments or [*work(command, llama), "c.safetensors"]))
    assert_interrupted(result)
    assert not Path("c.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(chat_model: str) -> None:
    options = ["--model", chat_model, "--prompt", "hi", "--max-tokens", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rotormlx", "generate", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(12)  # it generates
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "rotormlx: interrupted"
    assert "tokens packed" not in error.splitlines()[-1]
    assert "Traceback" not in error


# ---- the server ---------------------------------------------------------------------------------


def test_telemetry_never_breaks_serving() -> None:
    """Whatever mlx-lm calls its parts, or they hold."""
    tool = importlib.import_module("mlx_lm.server")
    cache_class = tool.LRUPromptCache
    with serving.measured(tool, list) as usage:
        cache = tool.LRUPromptCache(3)
        for missing in ("_lru", "_trie"):
            kept = vars(cache).pop(missing)
            cache._measure()  # as if mlx-lm had renamed it
            vars(cache)[missing] = kept
        usage.reports = lambda: [1 / 0]  # type: ignore[assignment]
        tool.ResponseGenerator._log_cache_stats(type("Empty", (), {"prompt_cache": cache})())
        tool.ResponseGenerator._log_cache_stats(object())
    assert tool.LRUPromptCache is cache_class
    renamed = type(sys)("renamed")
    renamed.ResponseGenerator = renamed.APIHandler = renamed.ThreadingHTTPServer = object
    with serving.measured(renamed, list):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": 5}, {"stop": [[]]}, {"stop": [""]}, {"top_p": float("nan")}, {"max_tokens": True},
        {"max_tokens": 2**40}, {"seed": -1}, {"seed": 2**64}, {"xtc_threshold": 0.7},
        {"logit_bias": {"-1": 1}}, {"logit_bias": {"1": None}}, {"draft_model": []},
        {"stream_options": 1}, {"messages": {}}, {"messages": [5]}, {"prompt": ["a"]},
        {"prompt": "\ud800"}, {"tools": "x"}, {"role_mapping": []}, {"chat_template_kwargs": 1},
        {"temperature": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_a_parameter_that_mlx_lm_does_not_check_is_refused(wrong: dict[str, Any]) -> None:
    fine: dict[str, Any] = {
        "max_tokens": 5, "top_k": 0, "num_draft_tokens": 3, "top_logprobs": -1, "seed": None,
        "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "xtc_probability": 0.0,
        "xtc_threshold": 0.1, "repetition_penalty": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0, "repetition_context_size": 20, "presence_context_size": 20,
        "frequency_context_size": 20, "logit_bias": None, "requested_draft_model": "default_model",
    }  # fmt: skip
    server_guard.check_parameters(type("Given", (), fine)(), {"prompt": "x"})
    given = fine | {name.replace("draft_model", "requested_draft_model"): value
                    for name, value in wrong.items()}  # fmt: skip
    with pytest.raises(server_guard.BadRequest):
        server_guard.check_parameters(type("Given", (), given)(), {"prompt": "x"} | wrong)


def test_generation_begins_anew_after_an_exception(llama: str, monkeypatch) -> None:
    """A fault that no check foresees: the request gets 500, the next one its text."""
    tool = importlib.import_module("mlx_lm.server")
    faults = iter([True])

    def stumbling(*args: Any) -> list[Any]:
        if next(faults, False):
            raise LookupError("nobody expected this")
        return []

    monkeypatch.setattr(tool, "_make_logits_processors", stumbling)
    argv = ["server", "--model", llama, "--max-tokens", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    answers = []

    def ask(host: str, port: int, generator: Any, **options: Any) -> None:
        fine = mlx_lm_commands.parse(mlx_lm_commands.parser_of(tool), "server", argv[1:])[0]
        for _ in range(2):
            logits = tool.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20)
            arguments = tool.GenerationArguments(
                tool.ModelDescription("default_model", "default_model", None),
                tool.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1),
                logits, [], fine.max_tokens, 3, False, -1, None, None,
            )  # fmt: skip
            request = tool.CompletionRequest("text", "hello", [], None, None)
            try:
                _, pieces = generator.generate(request, arguments)
                answers.append(len(list(pieces)))
            except RuntimeError as error:
                answers.append(str(error))
        answers.append(generator.is_healthy)
        generator.stop_and_join()

    monkeypatch.setattr(tool, "_run_http_server", ask)
    result = run(*argv)
    assert result.exit_code == 0, (result.output, result.exception)
    assert answers == ["generation stopped: nobody expected this", 2, True]


def test_a_port_in_use_is_refused_before_a_model_is_loaded(llama: str, monkeypatch) -> None:
    monkeypatch.setattr(mlx_lm_commands, "load_lazily", lambda *a, **k: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("server", "--model", llama, "--port", str(taken.getsockname()[1]))
    assert_refused(result, "in use")


def test_an_error_of_the_http_server_does_not_leave_a_thread(llama: str, monkeypatch) -> None:
    """mlx-lm has started its generation thread by then, which would keep the process."""

    def broken(*args: Any, **options: Any) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("mlx_lm.server._run_http_server", broken)
    before = threading.active_count()
    assert_refused(run("server", "--model", llama, "--port", "0"), "in use")
    assert threading.active_count() == before
