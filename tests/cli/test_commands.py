import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache, save_prompt_cache
from typer.testing import CliRunner, Result

from rotormlx.cli import demo, demo_long, main, mlx_lm_commands
from rotormlx.config import RotorConfig
from rotormlx.mlx import backends, hosts, integration
from rotormlx.mlx.backends import describe
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.storage import calibration as calibration_file
from tests.support import models as tiny

# The attribute mlx_lm.generate is the function of that name.
tool = importlib.import_module("mlx_lm.generate")

LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 6  # a token a byte
SHORT = ["--prompt", "Once upon a time", "--max-tokens", "30"]
LONG = ["--prompt", LONG_PROMPT, "--max-tokens", "5"]
QUIET = ["--verbose", "False"]


@pytest.fixture(autouse=True)
def clean():
    hosts.MLX_LM.remove()
    yield
    hosts.MLX_LM.remove()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(directory: Path) -> str:
    return tiny.save(directory / "llama")


@pytest.fixture
def no_load(monkeypatch) -> None:
    """Fail if anything loads a model."""

    def load(*args, **kwargs):
        pytest.fail(f"a model was loaded: {args}")

    monkeypatch.setattr(mlx_lm, "load", load)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main.app, list(arguments))


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2, one sentence on standard error, nothing else."""
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"rotormlx: \[[\w ]+\] .*\.\n", result.stderr), result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


# ---- generate -----------------------------------------------------------------------------------


def test_generate_gives_the_text_of_mlx_lm(llama: str) -> None:
    model, tokenizer = mlx_lm.load(llama)
    want = mlx_lm.generate(model, tokenizer, SHORT[1], max_tokens=30)
    assert len(set(want)) > 1
    result = run("generate", "--model", llama, *SHORT, *QUIET)
    assert result.exit_code == 0, result.output
    assert result.stdout == want + "\n"


@pytest.mark.parametrize(
    ("options", "name", "bits"),
    [
        # head_dim 64. Keys: code, 16 / 64 scale, 16 / 64 centre. Values: code, 16 / 64 scale.
        ([], "K4 V4 cascade", (4.5 + 4.25) / 2),
        (["--key-bits", "3", "--value-bits=2", "--rotation", "dense"], "K3 V2 dense", 2.875),
        (["--quality", "balanced"], "K3 V3 cascade", 3.375),
        (["--quality", "small", "--key-bits", "4"], "K4 V2 cascade", 3.375),
    ],
)
def test_generate_says_what_it_compressed(llama: str, options, name: str, bits: float) -> None:
    result = run("generate", *options, "--model", llama, *LONG, *QUIET)
    assert result.exit_code == 0, result.output
    first, second, peak, last = result.stderr.splitlines()
    assert last == f"rotormlx: backend {describe()}"
    # What float16 would have taken more is what the caches would have.
    sizes = re.fullmatch(
        r"rotormlx: peak memory ([\d.]+) MB, about ([\d.]+) MB with a float16 cache", peak
    )
    assert first == f"rotormlx: llama: 2 of 2 caches compressed, {name}, {bits:.3f} bits per value"
    tokens = len(LONG_PROMPT) + 5
    match = re.fullmatch(
        r"rotormlx: 192 of (\d+) tokens packed; cache ([\d.]+) MB against ([\d.]+) MB in "
        r"float16, ([\d.]+)x smaller",
        second,
    )
    # mlx-lm computes a token ahead of the last one it prints.
    assert tokens - 1 <= int(match[1]) <= tokens + 1
    # 2 layers, 2 KV heads; the exact part is float32 in this model.
    used = 2 * 2 * 128 * (192 * bits / 8 + (int(match[1]) - 192) * 4 + 4)  # and a channel scale
    plain = 2 * 2 * 128 * int(match[1]) * 2
    assert (match[2], match[3]) == (f"{used / 1e6:.2f}", f"{plain / 1e6:.2f}")
    assert float(match[4]) == pytest.approx(plain / used, abs=0.01)
    # Both figures are rounded to 0.01 MB.
    assert float(sizes[2]) - float(sizes[1]) == pytest.approx((plain - used) / 1e6, abs=0.011)


def test_generate_says_when_nothing_was_packed(llama: str) -> None:
    result = run("generate", "--model", llama, *SHORT, *QUIET, "--window", "80")
    assert "0 of 46 tokens packed (all exact: packing starts at 148 tokens)" in result.stderr
    assert "smaller" not in result.stderr


def test_generate_compresses_a_draft_model_too(directory: Path, llama: str) -> None:
    draft = tiny.save(directory / "qwen2", "qwen2", seed=4)
    result = run("generate", "--model", llama, *LONG, *QUIET, "--draft-model", draft)
    assert result.exit_code == 0, result.output
    assert "llama: 2 of 2 caches compressed" in result.stderr
    assert "qwen2: 2 of 2 caches compressed" in result.stderr
    assert result.stderr.count("192 of") == 2
    # The draft changes the speed, not the text.
    assert result.stdout == run("generate", "--model", llama, *LONG, *QUIET).stdout


def test_generate_passes_every_other_option_on(monkeypatch, llama: str, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "i.png").write_bytes(b"")
    always = {"--model": [llama], "--key-bits": ["3"], "--rotation-seed": ["9"]}
    # No two of a group exclude each other.
    groups: list[dict[str, list[str]]] = [
        {
            "--trust-remote-code": [],
            "--adapter-path": [str(tmp_path)],
            "--extra-eos-token": ["x", "y"],
            "--system-prompt": ["be brief"],
            "-p": ["hello - there"],
            "--prefill-response": [""],
            "-m": ["7"],
            "--temp": ["0.5"],
            "--top-p": ["0.9"],
            "--min-p": ["0.1"],
            "--top-k": ["3"],
            "--xtc-probability": ["0.1"],
            "--xtc-threshold": ["0.2"],
            "--min-tokens-to-keep": ["2"],
            "--seed": ["3"],
            "--use-default-chat-template": [],
            "--chat-template-config": ['{"a": 1}'],
            "--verbose": ["F"],
            "--prefill-step-size": ["16"],
            "-qa": [],
            "--draft-model": [llama],
            "--num-draft-tokens": ["2"],
        },
        {
            "--image": [str(tmp_path / "i.png")],
            "--ignore-chat-template": [],
            "--max-kv-size": ["512"],
        },
    ]
    parser = tool.setup_arg_parser()
    options = {option: a.dest for a in parser._actions for option in a.option_strings}
    # A new option of mlx-lm must be added here, or be refused.
    others = {"help", "prompt_cache_file", *mlx_lm_commands.REFUSED}
    given = {options[option] for group in groups for option in group} | {"model"}
    assert given == set(options.values()) - others

    for group in groups:
        seen: list[list[str]] = []
        monkeypatch.setattr(tool, "main", lambda seen=seen: seen.append(sys.argv[1:]))
        argv = [part for option, value in group.items() for part in (option, *value)]
        ours = [part for option, value in always.items() for part in (option, *value)]
        before = sys.argv
        result = run("generate", *argv[:3], *ours, *argv[3:])
        assert result.exit_code == 0, result.stderr
        assert seen == [[*argv[:3], "--model", llama, *argv[3:]]]
        assert sys.argv is before


def test_generate_restores_mlx_lm_after_an_error_and_keeps_its_traceback(monkeypatch) -> None:
    names = ("load", "load_prompt_cache", "make_prompt_cache")
    before = [getattr(tool, name) for name in names]

    def main() -> None:
        assert tool.load is not before[0]
        raise LookupError("nobody expected this")

    monkeypatch.setattr(tool, "main", main)
    result = run("generate", "--model", "m")
    assert isinstance(result.exception, LookupError)
    assert [getattr(tool, name) for name in names] == before


def test_generate_help_has_all_options() -> None:
    text = run("generate", "--help").stdout
    parser = tool.setup_arg_parser()
    for action in parser._actions:
        refused = action.dest in mlx_lm_commands.REFUSED
        assert (action.option_strings[0] in text) != refused, action.option_strings
    for option in ("key-bits", "value-bits", "rotation", "channel-scale", "sink", "window"):
        assert f"--{option}" in text
    assert "rotor3" in text
    assert "--rotation-seed" in text


# ---- refusals before any work -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--kv-bits", "4"], "--kv-bits 4 asks mlx-lm for another cache"),
        (["--kv-bits=8"], "--kv-bits 8"),
        (["--kv-b", "4"], "--kv-bits 4"),
        (["--max-kv-size", "194"], "max_kv_size must be at least 195 with sink 4 and window 64"),
        (["--max-k=100", "--window", "0"], "at least 131 with sink 4 and window 0, but 100"),
        (["--kv-group-size", "32"], "--kv-group-size 32"),
        (["--quantized-kv-start", "0"], "--quantized-kv-start 0"),
        (["--rotation", "spiral"], "rotation must be one of cascade, rotor3"),
        (["--key-bits", "5"], "key_bits must be one of 2, 3, 4, 8"),
        (["--quality", "best"], "quality must be one of high, balanced, small, but 'best'"),
        (["--value-bits", "16"], "value_bits must be one of 2, 3, 4, 8"),
        (["--channel-scale", "all"], "channel_scale must be one of none, prefill"),
        (["--window", "-1"], "window must be an integer from 0"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--max-tokens", "many"], "argument --max-tokens/-m: invalid int value: 'many'"),
        (["--model"], "argument --model: expected one argument"),
        (["--prompt-cache-file", "/no/such/file"], "/no/such/file"),
        (["--seed", "-3"], "--seed must be from 0"),
        (["--max-tokens", "0"], "--max-tokens must be from 1"),
        (["--image", "/no/such/cat.png"], "No such image file: /no/such/cat.png"),
        (["--draft-model", "d", "--max-kv-size", "512"], "--draft-model and --max-kv-size"),
        (["--draft-model", "d", "--max-tokens", "-1"], "--draft-model needs a --max-tokens"),
        (["--draft-model", "d", "--prompt-cache-file", "f"], "no cache of the draft model"),
        (["--num-draft-tokens", "2"], "--num-draft-tokens has no effect without --draft-model"),
        (["--top-p", "0.5"], "--top-p has no effect at --temp 0"),
        (["--temp", "1", "--xtc-threshold", "0.2"], "no effect without --xtc-probability"),
        (["--system-prompt", "x", "--ignore-chat-template"], "with --ignore-chat-template"),
        (["--rotation", "identity", "--rotation-seed", "1"], "--rotation-seed 1 has no effect"),
        (["--calibration", "f", "--channel-scale", "none"], "--calibration f brings its own"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_refused_before_any_work(no_load, arguments, part: str) -> None:
    assert_refused(run("generate", "--prompt", "x", *arguments), part)


@pytest.mark.parametrize("command", ["generate", "info", "demo"])
def test_a_missing_model_is_refused(no_load, tmp_path, command: str) -> None:
    path = str(tmp_path / "nothing")
    options = [path] if command == "info" else ["--model", path]
    assert_refused(run(command, *options), "[load]", f"but {path} is neither")


@pytest.mark.parametrize("command", ["generate", "info", "demo"])
def test_a_model_with_nothing_to_compress_is_refused(directory: Path, command: str) -> None:
    path = tiny.save(directory / "mamba2", "mamba2", num_heads=16)
    options = [path] if command == "info" else ["--model", path]
    assert_refused(run(command, *options), "[apply] mamba2 cannot be compressed")


def test_a_draft_model_with_nothing_to_compress_is_refused(directory: Path, llama: str) -> None:
    path = tiny.save(directory / "mamba2", "mamba2", num_heads=16)
    result = run("generate", "--model", llama, *SHORT, "--draft-model", path)
    assert_refused(result, "[apply] mamba2 cannot be compressed")


def test_a_directory_without_a_model_is_refused(tmp_path) -> None:
    result = run("info", str(tmp_path))
    assert_refused(result, "[load] A model that mlx-lm can load is required", "config.json")


def test_damaged_weights_are_refused(tmp_path) -> None:
    path = Path(tiny.save(tmp_path))
    (path / "model.safetensors").write_bytes(b"no weights")
    assert_refused(run("info", str(path)), "[load] A model that mlx-lm can load is required")


def test_an_incompatible_mlx_lm_is_refused(monkeypatch, llama: str) -> None:
    monkeypatch.setattr(mlx_lm, "__version__", "0.30.0")
    monkeypatch.delattr("mlx_lm.models.base.scaled_dot_product_attention")
    assert_refused(run("generate", "--model", llama), "[hook]", "mlx-lm 0.30.0 has none")


# ---- prompt cache files -------------------------------------------------------------------------


def save_cache(path: Path, model_path: str, config: RotorConfig | None, **metadata: str) -> Path:
    """A file of the first 200 bytes of the prompt, compressed unless config is None."""
    model, tokenizer = mlx_lm.load(model_path)
    if config is not None:
        integration.apply(model, config)
    caches = make_prompt_cache(model)
    tiny.logits(model, mx.array([tokenizer.encode(LONG_PROMPT[:200])]), caches)
    save_prompt_cache(str(path), caches, {"model": model_path, "tokenizer_config": "{}"} | metadata)
    integration.remove(model)
    return path


@pytest.mark.parametrize("config", [None, RotorConfig()], ids=["plain", "compressed"])
def test_generate_continues_a_prompt_cache(tmp_path, llama: str, config) -> None:
    path = save_cache(tmp_path / "c.safetensors", llama, config)
    before = path.read_bytes()
    rest = ["--prompt", LONG_PROMPT[200:], "--max-tokens", "5"]
    result = run("generate", "--prompt-cache-file", str(path), *rest, *QUIET)
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == before
    assert "192 of 2" in result.stderr
    said = "2 uncompressed layers of the prompt cache were compressed" in result.stderr
    assert said == (config is None)
    assert result.stdout == run("generate", "--model", llama, *LONG, *QUIET).stdout


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: Path) -> None:
    mx.save_safetensors(str(path), {"weight": mx.zeros(4)})


def another_version(path: Path) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays["0.0"] = mx.array(99)  # the first field of the first cache
    mx.save_safetensors(str(path), arrays, metadata)


def without_metadata(path: Path) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    del metadata["0.model"]
    mx.save_safetensors(str(path), arrays, metadata)


def as_it_is(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "options", "part"),
    [
        (truncate, [], "it is damaged"),
        (foreign, [], "another safetensors file"),
        (another_version, [], "99"),
        (without_metadata, [], "no model"),
        (as_it_is, ["--model", "another/model"], "--model another/model was given"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bad_prompt_cache_is_refused_before_a_model_is_loaded(
    tmp_path, llama: str, monkeypatch, damage, options, part: str
) -> None:
    path = save_cache(tmp_path / "c.safetensors", llama, RotorConfig())
    damage(path)
    before = path.read_bytes()
    monkeypatch.setattr(mlx_lm, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    result = run("generate", "--prompt-cache-file", str(path), *SHORT, *options)
    assert_refused(result, "[prompt cache]", part)
    assert path.read_bytes() == before


def test_a_prompt_cache_goes_on_as_it_was_made(tmp_path, llama: str) -> None:
    """Options that say the same are taken, others are refused and not dropped."""
    path = save_cache(tmp_path / "c.safetensors", llama, RotorConfig(key_bits=3))
    options = ["--prompt-cache-file", str(path), *SHORT]
    for same in ([], ["--key-bits", "3"], ["--channel-scale", "prefill"]):
        result = run("generate", *options, *same)
        assert result.exit_code == 0, result.output
        assert "K3 V4 cascade" in result.stderr
    # 4 is the default, but the user asked for it.
    for other, made in (("--key-bits 4", "3"), ("--channel-scale none", "prefill")):
        result = run("generate", *options, *other.split())
        assert_refused(result, f"[prompt cache] {path} keeps {other.split()[0]} {made}")
        assert f"{other} was given" in result.output
    result = run("generate", *options, "--quality", "small")
    assert_refused(
        result, "keeps --key-bits 3, the setting it was made with, but --quality, --key-bits 2,"
    )
    assert "leave --quality out" in result.output
    fits = ["--quality", "high", "--key-bits", "3"]
    assert "K3 V4 cascade" in run("generate", *options, *fits).stderr


def test_a_prompt_cache_goes_on_with_its_bits_by_layer(tmp_path, llama: str) -> None:
    model, tokenizer = mlx_lm.load(llama)
    integration.apply(model)
    caches = [RotorKVCache(RotorConfig(bits), layer) for layer, bits in enumerate((3, 8))]
    tiny.logits(model, mx.array([tokenizer.encode(LONG_PROMPT[:200])]), caches)
    path = str(tmp_path / "c.safetensors")
    save_prompt_cache(path, caches, {"model": llama, "tokenizer_config": "{}"})
    integration.remove(model)
    options = ["--prompt-cache-file", path, *SHORT]
    assert (
        "caches compressed, bits by layer, cascade, 5.125 bits" in run("generate", *options).stderr
    )
    result = run("generate", *options, "--key-bits", "3")
    assert_refused(result, f"{path} keeps bits by layer", "made with, but --key-bits 3")
    assert run("generate", *options, "--window", "64").exit_code == 0


def test_a_model_may_be_named_by_any_path_to_its_folder(tmp_path, llama: str, monkeypatch) -> None:
    path = save_cache(tmp_path / "c.safetensors", llama, RotorConfig())
    (tmp_path / "link").symlink_to(llama)
    shutil.copytree(llama, tmp_path / "other")
    monkeypatch.chdir(Path(llama).parent)
    options = ["--prompt-cache-file", str(path), *SHORT]
    for same in (llama, f"./{Path(llama).name}/", str(tmp_path / "link")):
        result = run("generate", *options, "--model", same)
        assert result.exit_code == 0, result.output
    result = run("generate", *options, "--model", str(tmp_path / "other"))
    assert_refused(result, "[prompt cache]", f"{llama}", f"--model {tmp_path / 'other'} was given")


@pytest.mark.parametrize("kind", [KVCache, lambda: RotatingKVCache(64)], ids=["fewer", "rotating"])
def test_a_prompt_cache_of_another_model_is_refused(tmp_path, llama: str, kind) -> None:
    caches = [kind()] if kind is KVCache else [kind(), kind()]
    for cache in caches:
        cache.update_and_fetch(mx.zeros((1, 2, 5, 64)), mx.zeros((1, 2, 5, 64)))
    path = str(tmp_path / "c.safetensors")
    save_prompt_cache(path, caches, {"model": llama, "tokenizer_config": "{}"})
    result = run("generate", "--prompt-cache-file", path, *SHORT)
    assert_refused(result, "[prompt cache] The model llama requires")


# ---- a limit ------------------------------------------------------------------------------------


def test_generate_honours_max_kv_size(llama: str) -> None:
    result = run("generate", "--model", llama, *LONG, *QUIET, "--max-kv-size", "240")
    assert result.exit_code == 0, result.output
    # 240 tokens: 4 + 127 beside one block of 64.
    assert re.search(r"64 of 1\d\d tokens packed", result.stderr), result.stderr


def test_a_limit_for_a_loaded_prompt_cache_is_refused(tmp_path, llama: str) -> None:
    path = str(save_cache(tmp_path / "c.safetensors", llama, RotorConfig()))
    result = run("generate", "--prompt-cache-file", path, *SHORT, "--max-kv-size", "300")
    assert_refused(result, "keeps the limit it was made with")


# ---- every command of mlx-lm --------------------------------------------------------------------

OTHERS = [name for name in main.MLX_LM_COMMANDS if name not in ("generate", "evaluate")]


@pytest.mark.parametrize("command", OTHERS)
def test_help_of_a_command_has_all_options_of_mlx_lm(command: str) -> None:
    text = run(command, "--help").stdout
    parser = mlx_lm_commands.parser_of(mlx_lm_commands.tool_module(command))
    assert len(parser._actions) > 5
    for action in parser._actions:
        refused = action.dest in mlx_lm_commands.REFUSED
        assert (action.option_strings[0] in text) != refused, action.option_strings
    assert "--value-bits" in text


@pytest.mark.parametrize("command", OTHERS)
def test_a_bad_option_of_a_command_is_refused(no_load, command: str) -> None:
    assert_refused(run(command, "--no-such-option"), f"[{command}]", f"rotormlx {command} --help")


def test_evaluate_without_its_package_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.evaluate", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(run("evaluate", "--tasks", "x"), "[evaluate] mlx_lm evaluate needs the package")


def test_evaluate_makes_compressed_caches(monkeypatch, llama: str) -> None:
    """A task of our own in place of lm_eval's: a likelihood, and batches of answers."""
    fake = types.ModuleType("lm_eval")
    model_module, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("registry")
    model_module.LM = type("LM", (), {"__init__": lambda self: None})
    registry.register_model = lambda name: lambda kind: kind
    seen = {}

    def simple_evaluate(model, **options):
        request = types.SimpleNamespace(args=(LONG_PROMPT, "and so on"))
        seen["score"] = model.loglikelihood([request])[0][0]
        seen["caches"] = {type(c) for c in model._process_prompt([1] * 200)[1]}
        return {"results": {"task": {"score": seen["score"]}}}

    fake.simple_evaluate = simple_evaluate
    modules = {"lm_eval": fake, "lm_eval.api": types.ModuleType("lm_eval.api")}
    modules |= {"lm_eval.api.model": model_module, "lm_eval.api.registry": registry}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as directory:
        options = ["--model", llama, "--tasks", "task", "--output-dir", directory]
        result = run("evaluate", *options, "--no-apply-chat-template")
    sys.modules.pop("mlx_lm.evaluate", None)
    assert result.exit_code == 0, result.output
    assert seen["caches"] == {RotorKVCache}
    assert seen["score"] < 0
    assert "llama: 2 of 2 caches compressed" in result.stderr


def test_chat_keeps_a_compressed_cache_over_turns(monkeypatch, directory: Path) -> None:
    path = tiny.save(directory / "chat")
    settings = Path(path) / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    lines = iter([LONG_PROMPT, "and then?", "q"])
    monkeypatch.setattr("mlx_lm.cli_ui.ChatUI.prompt", lambda ui: next(lines))
    result = run("chat", "--model", path, "--max-tokens", "20")
    assert result.exit_code == 0, result.output
    tokens = len(LONG_PROMPT) + len("and then?") + 40
    match = re.search(r"(\d+) of (\d+) tokens packed", result.stderr)
    # The last token of a turn may or may not have been read.
    assert tokens - 2 <= int(match[2]) <= tokens + 2
    assert int(match[1]) == (int(match[2]) - 68) // 64 * 64
    assert "peak memory" in result.stderr


@pytest.mark.slow
def test_cache_prompt_and_generate_in_other_processes(tmp_path, llama: str) -> None:
    """What one process saved another continues; weights of another model are refused."""
    path = str(tmp_path / "c.safetensors")
    options = ["--prompt-cache-file", path, "--key-bits", "8", "--value-bits", "8"]
    start = ["--model", llama, "--prompt", LONG_PROMPT[:200]]
    command = [sys.executable, "-m", "rotormlx", "cache_prompt", *start, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "128 of 200 tokens packed" in done.stderr
    rest = ["--prompt", LONG_PROMPT[200:], "--max-tokens", "5"]
    result = run("generate", *options, *rest, *QUIET)
    assert result.exit_code == 0, result.output
    whole = run("generate", "--model", llama, *LONG, *QUIET, *options[2:])
    assert result.stdout == whole.stdout

    tiny.save(Path(llama), seed=5)
    try:
        assert_refused(run("generate", *options, *rest, *QUIET), "other weights")
    finally:
        tiny.save(Path(llama))


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_benchmark_says_what_was_compressed(llama: str, batch_size: str) -> None:
    options = ["-p", "150", "-g", "10", "-n", "1", "-b", batch_size]
    result = run("benchmark", "--model", llama, *options)
    assert result.exit_code == 0, result.output
    assert "generation_tps" in result.stdout
    said = {
        "1": r"64 of 1(59|60|61) tokens packed; cache ([\d.]+) MB",
        "2": r"2 sequences of 160 tokens take ([\d.]+) MB against 0.33 MB in float16",
    }
    assert re.search(said[batch_size], result.stderr), result.stderr


def test_perplexity_is_read_through_the_cache(tmp_path, llama: str) -> None:
    """With coarse codes it differs from mlx-lm's, with fine ones and in float it is the same."""
    text = tmp_path / "text.txt"
    text.write_text(LONG_PROMPT * 3)
    options = ["--model", llama, "--data-path", str(text), "--sequence-length", "200"]

    def measure(*more: str) -> float:
        result = run("perplexity", *options, *more)
        assert result.exit_code == 0, result.output
        assert "128 of 199 tokens packed" in result.stderr
        return float(re.search(r"Perplexity: ([\d.]+)", result.stdout)[1])

    model, tokenizer = mlx_lm.load(llama)
    data = mx.array(tokenizer.encode(LONG_PROMPT * 3)[:800]).reshape(-1, 200)
    exact = importlib.import_module("mlx_lm.perplexity").eval_ppl(model, data)[0]
    none = ["--window", "0", "--sink", "0"]
    fine = measure("--key-bits", "8", "--value-bits", "8")
    # 8 bits change a logit of this model by a thousandth.
    assert fine == pytest.approx(exact, rel=2e-3)
    coarse = measure_coarse(options, none)
    assert abs(coarse / exact - 1) > 2 * abs(fine / exact - 1)
    result = run("perplexity", *options[:-1], "100000")
    assert "must have at least 100000 tokens" in str(result.exception) + result.stderr


def measure_coarse(options: list[str], more: list[str]) -> float:
    result = run("perplexity", *options, *more, "--key-bits", "2", "--value-bits", "2")
    assert "192 of 199 tokens packed" in result.stderr
    return float(re.search(r"Perplexity: ([\d.]+)", result.stdout)[1])


# ---- a file of prompts --------------------------------------------------------------------------


def test_batch_answers_every_prompt_as_generate_does(tmp_path, llama: str) -> None:
    prompts = ["Once upon a time", LONG_PROMPT, "x"]
    lines, path = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    lines.write_text("\n\n".join(prompts))
    bits = ["--key-bits", "8", "--value-bits", "8"]
    options = ["--model", llama, "--max-tokens", "12", *bits]
    result = run("batch", str(lines), *options, "--output", str(path))
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    assert all(a["tokens"] == 12 for a in answers)
    for answer in answers:
        want = run(
            "generate",
            "--model",
            llama,
            "--prompt",
            answer["prompt"],
            *QUIET,
            "--max-tokens",
            "12",
            *bits,
        )
        assert answer["text"] + "\n" == want.stdout
    assert "3 sequences, 192 of" in result.stderr
    as_json = tmp_path / "prompts.jsonl"
    as_json.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    again = run("batch", str(as_json), *options)
    assert [json.loads(line) for line in again.stdout.splitlines()] == answers


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("none.txt", None, "is not a file"),
        ("empty.txt", "\n \n", "has none"),
        ("bad.jsonl", '"good"\n{"text": 1}\n', "line 2 of"),
        ("bad.jsonl", "no json\n", "line 1 of"),
        ("chat.jsonl", '[{"role": "user"}]\n', "a list of messages with role and content"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(no_load, tmp_path, name, text, part) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert_refused(run("batch", str(tmp_path / name), "--model", "m"), "[batch]", part)


def test_messages_without_a_chat_template_are_refused(tmp_path, llama: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps([{"role": "user", "content": "hello"}]))
    assert_refused(run("batch", str(path), "--model", llama), "need a chat template")


# ---- the other commands -------------------------------------------------------------------------


def test_info_shows_the_backend_and_what_was_timed_on_it(monkeypatch, llama: str) -> None:
    timed = {"levels of keys of 4 and values of 4 bits": "pairs"}
    monkeypatch.setattr(backends, "ways", lambda: timed)
    result = run("info", llama)
    assert result.exit_code == 0, result.output
    *_, backend, way = result.stdout.splitlines()
    assert backend == f"Backend: {describe()}"
    assert way == "Fastest levels of keys of 4 and values of 4 bits here: pairs"


def test_info_shows_every_layer_and_the_memory(directory: Path) -> None:
    path = tiny.save(directory / "gemma3", "gemma3_text")
    result = run("info", path, "--key-bits", "8")
    assert result.exit_code == 0, result.output
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in result.stdout.splitlines()]
    rows = [row for row in rows if row]
    reason = "its window of 32 tokens is below 512"
    # head_dim 32, K8 V4: (8 + 16 / 32 + 16 / 64 + 4 + 16 / 32) / 2.
    assert [row for row in rows if row[0] in "0123"] == [
        ["0", "RotatingKVCache", "2", "32", "", reason],
        ["1", "KVCache", "2", "32", "6.625", ""],
        ["2", "RotatingKVCache", "2", "32", "", reason],
        ["3", "KVCache", "2", "32", "6.625", ""],
    ]
    table = {row[0]: row[1:] for row in rows if len(row) == 4}
    report = integration.apply(mlx_lm.load(path)[0], RotorConfig(key_bits=8))
    for tokens in (4096, 32768, 131072):
        plain, ours = report.float_bytes(tokens), report.compressed_bytes(tokens)
        want = [f"{plain / 1e6:.2f} MB", f"{ours / 1e6:.2f} MB", f"{plain / ours:.2f}x"]
        assert table[f"{tokens:,}"] == want
    assert "2 of 4 caches compressed" in result.stdout


def test_demo_hands_its_options_on(monkeypatch, llama: str) -> None:
    calls = []
    monkeypatch.setattr(demo, "run", lambda **options: calls.append(options))
    assert run("demo").exit_code == 0
    assert run("demo", "--model", llama, "--prompt", "p", "--max-tokens", "3").exit_code == 0
    for call in calls:
        assert call.pop("console") is not None
    assert calls == [{"model": None}, {"model": llama, "prompt": "p", "max_tokens": 3}]


def test_demo_refuses_in_a_sentence_and_keeps_other_tracebacks(monkeypatch) -> None:
    assert_refused(run("demo", "--score-tokens", "3"), "[demo]")

    def broken(**options) -> None:
        raise ValueError("[matmul] Shapes do not fit")

    monkeypatch.setattr(demo, "run", broken)
    assert isinstance(run("demo").exception, ValueError)


def test_long_demo_takes_a_model_and_nothing_else(monkeypatch, llama: str) -> None:
    calls = []
    monkeypatch.setattr(demo_long, "run", lambda **options: calls.append(options["model"]))
    monkeypatch.setattr(demo, "run", lambda **options: pytest.fail("the short demo ran"))
    assert run("demo", "--long").exit_code == 0
    assert run("demo", "--long", "--model", llama).exit_code == 0
    assert calls == [None, llama]
    for option in ("--prompt", "--max-tokens", "--score-tokens"):
        assert_refused(run("demo", "--long", option, "7"), "[demo]", f"{option} has no effect")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("rotormlx dem", ["demo"]),
        ("rotormlx generate --key", ["--key-bits"]),
        ("rotormlx --show", ["--show-completion"]),
    ],
)
def test_a_shell_completes_commands_and_options(typed: str, offered: list[str]) -> None:
    env = {
        "_ROTORMLX_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    result = CliRunner(env=env).invoke(main.app, [], prog_name="rotormlx")
    assert result.stdout.split() == offered


def test_version_is_the_installed_one() -> None:
    assert run("--version").stdout == importlib.metadata.version("rotormlx") + "\n"


def test_help_and_version_import_no_model_library() -> None:
    code = (
        "import sys, rotormlx.cli.main; sys.exit('mlx_lm' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_python_m_rotormlx_is_the_command() -> None:
    command = [sys.executable, "-m", "rotormlx", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Usage: rotormlx info" in result.stderr


# ---- calibrate ----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + n * n % 26) for n in range(600)))
    return str(path)


def test_calibrate_keeps_what_generate_then_uses(llama: str, text: str, monkeypatch, tmp_path):
    monkeypatch.setattr(calibration_file, "cache_dir", lambda: tmp_path)
    result = run("calibrate", llama, "--text", text, "--tokens", "200")
    assert result.exit_code == 0, result.output
    assert "scale of 2 layers from 200 tokens, 64 numbers per KV head" in result.stdout
    (kept,) = tmp_path.rglob("*-scale.safetensors")
    assert result.stderr == f"wrote {kept}\n"
    for options, name in (
        ([], "cascade with calibrated channel scales"),
        (["--channel-scale", "none"], "cascade with none"),
        (["--rotation", "dense"], "dense"),
    ):
        used = run("generate", *options, "--model", llama, *LONG, *QUIET)
        assert used.exit_code == 0, used.output
        assert (f"K4 V4 {name}," in used.stderr) == ("none" not in name), used.stderr
    kept.write_bytes(kept.read_bytes()[:-1])
    assert_refused(run("generate", "--model", llama, *LONG, *QUIET), "[calibration]", str(kept))


def test_a_prompt_cache_outlives_a_calibration(llama: str, text: str, monkeypatch, tmp_path):
    monkeypatch.setattr(calibration_file, "cache_dir", lambda: tmp_path)
    path, plain = (str(tmp_path / f"{name}.safetensors") for name in ("p", "none"))
    prompt = ["--model", llama, "--prompt", LONG_PROMPT]
    made = ["cache_prompt", *prompt, "--prompt-cache-file"]
    assert run(*made, path).exit_code == 0
    assert run(*made, plain, "--channel-scale", "none").exit_code == 0
    before = [run("generate", "--prompt-cache-file", file, *SHORT) for file in (path, plain)]
    assert run("calibrate", llama, "--text", text, "--tokens", "200").exit_code == 0
    scales = ("prefill", "none")
    for file, first, scale in zip((path, plain), before, scales, strict=True):
        for options in ([], ["--channel-scale", scale]):
            result = run("generate", "--prompt-cache-file", file, *SHORT, *options)
            assert result.exit_code == 0, result.output
            assert result.stdout.split("\n")[1] == first.stdout.split("\n")[1]
            assert "K4 V4 cascade," in result.stderr
    # A file made since has the calibration, and keeps it.
    assert run(*made, path).exit_code == 0
    (kept,) = tmp_path.rglob("*-scale.safetensors")
    kept.unlink()
    result = run("generate", "--prompt-cache-file", path, *SHORT)
    assert "K4 V4 cascade with calibrated channel scales," in result.stderr
    result = run("generate", "--prompt-cache-file", path, *SHORT, "--channel-scale", "none")
    assert_refused(result, f"{path} keeps --channel-scale calibrated", "none was given")


def test_calibrate_writes_a_file_that_commands_take(llama: str, text: str, tmp_path):
    path = tmp_path / "mine.safetensors"
    options = ["--tokens", "200", "--transform", "klt", "--output", str(path)]
    result = run("calibrate", llama, "--text", text, *options)
    assert result.exit_code == 0, result.output
    assert "4,096 numbers per KV head" in result.stdout
    used = run("generate", "--calibration", str(path), "--model", llama, *LONG, *QUIET)
    assert "K4 V4 calibrated rotations," in used.stderr
    assert "calibrated rotations" in run("info", llama, "--calibration", str(path)).stdout


def test_calibrate_measures_layers_and_info_shows_their_bits(llama: str, text: str, tmp_path):
    path = tmp_path / "mine.safetensors"
    result = run(
        "calibrate", llama, "--layers", "--text", text, "--tokens", "200", "--output", str(path)
    )
    assert result.exit_code == 0, result.output
    assert "scale and losses of 2 layers from 200 tokens" in result.stdout
    shown = run("info", llama, "--key-bits", "3", "--value-bits", "3", "--calibration", str(path))
    assert "K3 V3 on average, by layer," in " ".join(shown.stdout.split())
    used = run("generate", "--calibration", str(path), "--model", llama, *LONG, *QUIET)
    assert "K4 V4 on average, by layer," in used.stderr


def test_calibrate_refuses_in_one_sentence(llama: str, text: str, directory: Path):
    assert_refused(run("calibrate", llama, "--transform", "pca"), "scale, rotors, klt", "'pca'")
    assert_refused(
        run("calibrate", llama, "--text", text, "--tokens", "2000"), "2000 tokens", "600"
    )
    assert_refused(run("calibrate", llama, "--text", "nowhere.txt"), "nowhere.txt")
    assert_refused(
        run("generate", "--rotation", "calibrated", "--model", llama, *LONG),
        "rotormlx calibrate MODEL --transform klt",
    )
