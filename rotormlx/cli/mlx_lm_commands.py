"""Runs a command of mlx-lm with compressed caches, and reports their memory.

The command's own ``main`` runs, with its own options. The functions of a :class:`Session` replace
those that load a model, and those that make, load or save a prompt cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

import mlx.core as mx
from jinja2 import TemplateError
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import sharded_load
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from rotormlx.cli import outputs, prompts, rules, server_guard, serving, usage
from rotormlx.cli.refusal import Refusal, refusing, sentence
from rotormlx.config import RotorConfig
from rotormlx.measure import perplexity
from rotormlx.mlx import backends, integration, prompt_cache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.report import Report, megabytes

# Options of mlx-lm for another kind of cache. They would have no effect, so they are refused.
REFUSED = ("kv_bits", "kv_group_size", "quantized_kv_start")
# How rotormlx's own error messages start that pass through mlx-lm's commands.
_OURS = tuple(
    f"[{where}]"
    for where in ("apply", "calibration", "hook", "perplexity", "prompt cache", "speculation")
)


def run(
    name: str,
    argv: list[str],
    config: RotorConfig,
    calibration: Path | None = None,
    given_options: dict[str, str] | None = None,
    sliding_windows: bool = True,
) -> None:
    """Run ``mlx_lm <name>`` with compressed caches.

    Args:
        name: A command of mlx-lm, such as ``generate``.
        argv: The options of the command.
        config: How keys and values are compressed.
        calibration: A calibration file instead of the one stored for the model.
        given_options: The options of ``config`` that the user gave: from field to option name.
        sliding_windows: Whether sliding windows are compressed where possible.

    Raises:
        Refusal: If the options, the model or a file cannot be used.
    """
    tool = tool_module(name)
    args, given = parse(parser_of(tool), name, argv)
    session = Session(config, calibration, given_options, sliding_windows)
    session.prepare(name, args, given)
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [f"mlx_lm {name}", *argv]))
        offered: dict[str, Any] = {
            "load": session.load,
            "sharded_load": session.sharded_load,
            "make_prompt_cache": session.make_prompt_cache,
            "load_prompt_cache": session.load_prompt_cache,
            "save_prompt_cache": session.save_prompt_cache,
        }
        for key, value in offered.items():
            if hasattr(tool, key):
                stack.enter_context(patch.object(tool, key, value))
        if name == "benchmark":
            # mlx_lm benchmark generates through mlx_lm.generate, which makes the caches.
            generate = tool_module("generate")
            stack.enter_context(
                patch.multiple(generate, make_prompt_cache=session.make_prompt_cache)
            )
        if name == "perplexity":
            for key, value in perplexity.replacements(tool, session, say).items():
                stack.enter_context(patch.object(tool, key, value))
        if name == "server":
            sizes = stack.enter_context(serving.measured(tool, lambda: session.reports))
            sizes.restarts = stack.enter_context(server_guard.guarded(tool, session.probe))
        if name == "evaluate":
            stack.enter_context(outputs.folder(name, Path(args.output_dir)))
        stack.enter_context(_refusing_input(name))
        try:
            tool.main()
        except KeyboardInterrupt:
            session.print_usage()
            raise
        except EOFError:  # Ctrl-D ends a chat
            if name != "chat":
                raise
    session.print_usage()


@contextmanager
def _refusing_input(name: str) -> Iterator[None]:
    """Turn errors of mlx-lm about its input into refusals of one sentence."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError, TemplateError) as error:
        text = sentence(error)
        if text.startswith(_OURS):
            raise Refusal(text) from error
        if "allocate" in text or isinstance(error, MemoryError):
            raise Refusal(f"[{name}] There is not enough memory: {text}.") from error
        if re.match(r"\[[\w:]+\] ", text):  # an error in an MLX operation is a bug
            raise
        raise Refusal(f"[{name}] mlx_lm {name} stopped: {text.rstrip('.')}.") from error


class Session:
    """The functions that replace those of mlx-lm's commands, and their results.

    Args:
        config: How keys and values are compressed.
        calibration: A calibration file instead of the one stored for a model.
        given_options: The options of ``config`` that the user gave: from field to option name.
        sliding_windows: Whether sliding windows are compressed where possible.
    """

    def __init__(
        self,
        config: RotorConfig,
        calibration: Path | None = None,
        given_options: dict[str, str] | None = None,
        sliding_windows: bool = True,
    ) -> None:
        self.config = config
        self.sliding_windows = sliding_windows
        self.calibration = calibration
        self._given_options = given_options or {}
        # Weak references, because a server drops one model before it loads another.
        self._models: list[tuple[weakref.ref[Module], Report]] = []
        self._caches: dict[int, list[Any]] = {}  # each model's latest, by its report's id
        # Tokens per sequence and number of sequences, for runs that leave no cache to measure.
        self.foreseen = (0, 0)
        # The caches of a file. mlx-lm asks for this list, and reads its first element, before it
        # loads the model; rotormlx needs the model to read the file. So load() fills the list.
        self._prompt_cache: list[Any] = [None]
        self._metadata: dict[str, str] = {}
        self._file = ""
        # The command of mlx-lm and its options, set by prepare().
        self._command = ""
        self._args: argparse.Namespace | None = None
        self._given: Collection[str] = ()

    def prepare(self, name: str, args: argparse.Namespace, given: Collection[str]) -> None:
        """Check options before a model is loaded.

        Args:
            name: The command of mlx-lm.
            args: The options of the command.
            given: The names of the options that the user gave.

        Raises:
            Refusal: If an option, the prompt cache file, the limit or the model cannot be used.
        """
        self._command, self._args, self._given = name, args, given
        rules.check(name, args, given, processes())
        if processes() > 1 and self.calibration is not None:
            raise Refusal(
                f"[{name}] A calibration needs a whole model, but --calibration was given in a run "
                "of several processes, each with some of the heads; leave it out."
            )
        limit = getattr(args, "max_kv_size", None)
        if limit is not None:
            with refusing(ValueError):
                RotorKVCache(self.config, max_size=limit)
        path = getattr(args, "prompt_cache_file", None)
        if name == "generate" and path is not None:
            self._open_prompt_cache(path, args.model)
            if limit is not None:
                raise Refusal(
                    f"[{name}] A prompt cache keeps the limit it was made with, but --max-kv-size "
                    f"{limit} was given with --prompt-cache-file; pass it to cache_prompt instead."
                )
        if name == "cache_prompt" and path is not None:
            is_whole = path.endswith(".safetensors") or rules.is_folder(path)
            outputs.check_file(name, Path(path if is_whole else f"{path}.safetensors"))
        draft = getattr(args, "draft_model", None)
        if draft is not None:
            check_model_name(draft)
        if name == "server" and args.model is not None:
            self.probe(args.model, args.adapter_path)
            if draft is not None:
                self.probe(draft)
        if name == "benchmark" and args.batch_size > 1:
            self.foreseen = (args.prompt_tokens + args.generation_tokens, args.batch_size)

    def probe(self, path: str, adapter_path: str | None = None) -> None:
        """Refuse a model that cannot be loaded and compressed, without reading its weights."""
        if processes() == 1:
            integration.remove(self._load(path, adapter_path=adapter_path)[0])

    @property
    def reports(self) -> list[Report]:
        """Reports of the models in use, in the order of loading."""
        return [report for model, report in self._models if model() is not None]

    def load(self, path: str, **kwargs: Any) -> tuple[Any, ...]:
        """Load as ``mlx_lm.load`` does, with compressed caches; refuse before reading weights."""
        loaded = self._load(path, **kwargs)
        is_first = not self._models
        if is_first and self._args is not None:
            prompts.check(self._command, self._args, self._given, loaded)
        report = integration.model_report(loaded[0])
        if is_first and self._file:  # not for a draft model
            report = self._read_prompt_cache(loaded[0])
            self._caches[id(report)] = self._prompt_cache
        read_weights(loaded[0])
        if is_first and self._file:
            with refusing(ValueError):
                prompt_cache.check_model(self._file, self._metadata, loaded[0])
        if self._command == "server":  # a server replaces one model by another
            self._models = [pair for pair in self._models if pair[0]() is not None]
            kept = {id(kept) for _, kept in self._models}
            self._caches = {key: value for key, value in self._caches.items() if key in kept}
        self._models.append((weakref.ref(loaded[0]), report))
        return loaded

    def sharded_load(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Load as ``mlx_lm.utils.sharded_load`` does; each rank's caches hold its own heads."""
        loaded: tuple[Any, ...] = sharded_load(*args, **kwargs)
        with refusing(ValueError, RuntimeError):
            report = integration.apply(loaded[0], self.config, sliding_windows=self.sliding_windows)
        self._models.append((weakref.ref(loaded[0]), report))
        return loaded

    def make_prompt_cache(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        """Make caches as mlx-lm does, and keep the latest ones of each model for the report."""
        caches: list[Any] = mlx_lm_cache.make_prompt_cache(model, max_kv_size)
        # A copy: mlx-lm's server appends the caches of a draft model to the list.
        self._caches[id(integration.model_report(model))] = caches[:]
        return caches

    def load_prompt_cache(self, path: str, return_metadata: bool = False) -> Any:
        """Return the list that :meth:`load` fills."""
        return (self._prompt_cache, self._metadata) if return_metadata else self._prompt_cache

    def save_prompt_cache(
        self, path: str, caches: list[Any], metadata: dict[str, str] | None = None
    ) -> None:
        """Save caches in mlx-lm's format, atomically, with checksum and fingerprint."""
        model = self._models[0][0]()
        if model is None:
            raise RuntimeError("[session] The model is gone; save its caches while it is in use.")
        with refusing(ValueError, OSError):
            prompt_cache.save_prompt_cache(path, model, caches, metadata)

    def print_usage(self) -> None:
        """Print which layers were compressed, the size of the caches, and the peak memory."""
        total = usage.Usage()
        for _, report in self._models:
            caches = self._caches.get(id(report))
            measured = usage.Usage() if caches is None else usage.measure(report, caches)
            tokens, rows = self.foreseen
            if caches is not None and measured.tokens:
                say(usage.describe(report, caches))
            elif tokens:
                before, after = report.float_bytes(tokens), report.compressed_bytes(tokens)
                measured = usage.Usage(tokens, 0, rows * after, rows * before)
                say(
                    f"{report.summary}\n{rows} sequences of {tokens:,} tokens take "
                    f"{megabytes(rows * after)} against {megabytes(rows * before)} in float16"
                )
            else:
                say(report.summary)
            total += measured
        self.print_peak(total)

    def print_peak(self, total: usage.Usage) -> None:
        """Print the peak memory and the backend."""
        say(usage.describe_peak(total, mx.get_peak_memory()))
        say(f"backend {backends.describe()}")

    def _open_prompt_cache(self, path: str, model: str | None) -> None:
        try:
            with refusing(ValueError, RuntimeError):
                self._metadata = prompt_cache.read_metadata(path)
        except OSError as error:
            raise Refusal(
                f"[prompt cache] {path[:200]} cannot be read: {error.strerror}; check the path."
            ) from error
        self._file = path
        missing = {"model", "tokenizer_config"} - set(self._metadata)
        if missing:
            raise Refusal(
                f"[prompt cache] {path} must name its model and tokenizer_config, but its metadata "
                f"has no {' and no '.join(sorted(missing))}; pass them to save_prompt_cache."
            )
        _check_tokenizer_config(path, self._metadata["tokenizer_config"])
        made_with = self._metadata["model"]
        if model is not None and not rules.is_same_model(model, made_with):
            raise Refusal(
                f"[prompt cache] {path} was made with {made_with!a}, but --model {model} was "
                "given; give the same model or leave --model out."
            )
        if model is not None:
            self._metadata["model"] = model  # mlx-lm compares the strings

    def _read_prompt_cache(self, model: Any) -> Report:
        """Read the caches of the file, and return the report of the model with them."""
        with refusing(ValueError):
            caches, self._metadata = prompt_cache.read_prompt_cache(self._file, model)
            converted = prompt_cache.adopt_prompt_cache(self._file, model, caches)
        own, report = integration.model_report(model), prompt_cache.report_of(model, caches)
        if report is not own:
            rules.check_saved(self._file, self.config, self._given_options, report)
            if self.calibration is not None:
                raise Refusal(
                    f"[prompt cache] {self._file} keeps the settings it was made with, but "
                    f"--calibration {self.calibration} differs from them; leave it out."
                )
        self._prompt_cache[:] = caches
        if converted:
            say(f"{converted} uncompressed layers of the prompt cache were compressed")
        return report

    def _load(self, path: str, **kwargs: Any) -> tuple[Any, ...]:
        given = {"sliding_windows": self.sliding_windows, **kwargs}
        return load_lazily(path, self.config, self.calibration, **given)


def _check_tokenizer_config(path: str, text: str) -> None:
    """Refuse a file whose tokenizer settings mlx-lm could not have written."""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    kinds = {"trust_remote_code": bool, "eos_token": str}
    if type(options) is not dict or any(type(v) is not kinds.get(k) for k, v in options.items()):
        raise Refusal(
            f"[prompt cache] {path} must have a tokenizer_config of {' and '.join(kinds)} in JSON, "
            f"but it has {text[:80]!a}; make the file again."
        )


def check_model_name(path: str) -> None:
    """Require an existing path or the name of a repository."""
    try:
        exists = bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or with a forbidden character
        exists = False
    if not exists and not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", path):
        raise Refusal(
            f"[load] A model directory or the name of a repository is required, but {path[:200]} "
            "is neither; check the path."
        )


def load_lazily(
    path: str, config: RotorConfig, calibration: Path | None = None, **kwargs: Any
) -> tuple[Any, ...]:
    """Load a model without its weights; they are read only to check a calibration against them.

    Raises:
        Refusal: If there is no such model, or it cannot be compressed.
    """
    check_model_name(path)
    try:
        loaded = integration.load(path, config, calibration, lazy=True, **kwargs)
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
        if not message.startswith(("[apply]", "[hook]", "[calibration]")):
            first = message.splitlines()[0] if message else type(error).__name__
            message = (
                f"[load] A model that mlx-lm can load is required, but loading {path} failed: "
                f"{first.rstrip('.')}; check the path or the name."
            )
        raise Refusal(message) from error
    return loaded


def weights_of(model: Any) -> list[mx.array]:
    """Return the weights of a model."""
    return [pair[1] for pair in tree_flatten(model.parameters())]  # type: ignore[misc]


def read_weights(model: Any) -> None:
    """Read the weights of a lazily loaded model, with a progress bar on a terminal."""
    weights = weights_of(model)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("Reading weights", total=sum(w.nbytes for w in weights))
        for weight in weights:
            mx.eval(weight)
            progress.advance(task, weight.nbytes)


# ---- commands of mlx-lm -------------------------------------------------------------------------


def tool_module(name: str) -> ModuleType:
    """Return the module of a command of mlx-lm.

    Raises:
        Refusal: If the module needs a package that is not installed.
    """
    try:
        return importlib.import_module(f"mlx_lm.{name}")
    except ModuleNotFoundError as error:
        raise Refusal(
            f"[{name}] mlx_lm {name} needs the package {error.name}, but it is not installed; "
            f"install it, or mlx-lm with its extra for {name}."
        ) from error


class _Captured(Exception):
    pass


def parser_of(tool: ModuleType) -> argparse.ArgumentParser:
    """Return the argument parser of a command; some commands build it only inside ``main``."""
    setup = getattr(tool, "setup_arg_parser", None)
    if setup is not None:
        parser: argparse.ArgumentParser = setup()
        return parser

    def capture(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Captured(parser)

    try:
        with patch.object(argparse.ArgumentParser, "parse_args", capture):
            tool.main()
    except _Captured as captured:
        own: argparse.ArgumentParser = captured.args[0]
        return own
    raise RuntimeError(f"[session] {tool.__name__}.main parses no arguments; update rotormlx.")


def parse(
    parser: argparse.ArgumentParser, name: str, argv: list[str]
) -> tuple[argparse.Namespace, set[str]]:
    """Parse options as mlx-lm does, abbreviations included.

    Returns:
        The options, and the names of those that were given.

    Raises:
        Refusal: If an option is wrong or asks for another kind of cache.
    """

    def error(message: str) -> NoReturn:
        raise Refusal(f"[{name}] {message}; see rotormlx {name} --help.")

    parser.error = error  # type: ignore[method-assign]
    try:
        args = parser.parse_args(argv)
        # argparse sets a default only if the namespace lacks the name: this finds the given ones.
        nothing = object()
        names = [action.dest for action in parser._actions]
        marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, nothing)))
    except (ArithmeticError, LookupError, RecursionError, ValueError) as problem:
        raise Refusal(
            f"[{name}] The value of an option cannot be read ({sentence(problem) or 'empty'}); "
            f"see rotormlx {name} --help."
        ) from problem
    given = {dest for dest, value in vars(marked).items() if value is not nothing}
    for dest in REFUSED:
        if getattr(args, dest, None) != parser.get_default(dest):
            option = "--" + dest.replace("_", "-")
            raise Refusal(
                f"[{name}] rotormlx compresses the cache itself, but {option} "
                f"{getattr(args, dest)} asks mlx-lm for another cache; leave {option} out and use "
                "--key-bits and --value-bits."
            )
    return args, given


def processes() -> int:
    """Return how many processes share the work."""
    return int(mx.distributed.init().size())


def say(message: str) -> None:
    """Print lines to standard error; standard output is for the generated text."""
    if mx.distributed.init().rank() == 0:
        for line in message.splitlines():
            print(f"rotormlx: {line}", file=sys.stderr)
