"""Runs a command of mlx-lm with compressed caches, and says afterwards what they took.

The command's own ``main`` runs, with its own options. Where it loads a model, makes, loads or saves
a prompt cache, it gets the functions of a :class:`Session` instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import sharded_load
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from rotormlx.cli import serving, usage
from rotormlx.cli.refusal import Refusal, refusing
from rotormlx.config import RotorConfig
from rotormlx.measure import perplexity
from rotormlx.mlx import backends, integration, prompt_cache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.report import Report, megabytes

# Options of mlx-lm for another kind of cache. They would change nothing, so they are refused.
REFUSED = ("kv_bits", "kv_group_size", "quantized_kv_start")


def run(name: str, argv: list[str], config: RotorConfig, calibration: Path | None = None) -> None:
    """Run ``mlx_lm <name>`` with compressed caches.

    Args:
        name: A command of mlx-lm, such as ``generate``.
        argv: Its options.
        config: How keys and values are compressed.
        calibration: A calibration file instead of the one that is kept for the model.

    Raises:
        Refusal: If the options, the model or a file cannot be used.
    """
    tool = tool_module(name)
    args = parse(parser_of(tool), name, argv)
    session = Session(config, calibration)
    session.prepare(name, args)
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
            # It generates with mlx_lm.generate, which makes the caches.
            generate = tool_module("generate")
            stack.enter_context(
                patch.multiple(generate, make_prompt_cache=session.make_prompt_cache)
            )
        if name == "perplexity":
            for key, value in perplexity.replacements(tool, session).items():
                stack.enter_context(patch.object(tool, key, value))
        if name == "server":
            stack.enter_context(serving.measured(tool, lambda: session.reports))
        tool.main()
    session.print_usage()


class Session:
    """What mlx-lm's commands get in place of their own functions, and what came of it.

    Args:
        config: How keys and values are compressed.
        calibration: A calibration file instead of the one that is kept for a model.
    """

    def __init__(self, config: RotorConfig, calibration: Path | None = None) -> None:
        self.config = config
        self.calibration = calibration
        # Not the models themselves: a server drops one before it loads another.
        self._models: list[tuple[weakref.ref[Module], Report]] = []
        self._caches: dict[int, list[Any]] = {}  # the latest of each model, by the id of its report
        self.foreseen = (0, 0)  # tokens of a sequence and sequences, where no cache is left
        # Of a file: mlx-lm asks for it, and looks at the first, before it loads the model, without
        # which we read no cache. Filled by load.
        self._prompt_cache: list[Any] = [None]
        self._metadata: dict[str, str] = {}
        self._file = ""

    def prepare(self, name: str, args: argparse.Namespace) -> None:
        """Refuse what can be refused before a model is loaded.

        Raises:
            Refusal: If the prompt cache file, the limit or the model cannot be used.
        """
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
                    f"{limit} was given with --prompt-cache-file; give it to cache_prompt."
                )
        if name == "server" and args.model is not None:
            self._load(args.model)  # reads no weights: only to refuse early
        if name == "benchmark" and args.batch_size > 1:
            self.foreseen = (args.prompt_tokens + args.generation_tokens, args.batch_size)

    @property
    def reports(self) -> list[Report]:
        """One report a model in use, in the order in which they were loaded."""
        return [report for model, report in self._models if model() is not None]

    def load(self, path: str, **kwargs: Any) -> tuple[Any, ...]:
        """``mlx_lm.load`` with compressed caches; refuses before it reads weights."""
        loaded = self._load(path, **kwargs)
        is_first = not self._models
        if is_first and self._file:  # not for a draft model
            with refusing(ValueError):
                caches, self._metadata = prompt_cache.read_prompt_cache(self._file, loaded[0])
                converted = prompt_cache.adopt_prompt_cache(loaded[0], caches)
            self._prompt_cache[:] = caches
            if converted:
                say(f"{converted} uncompressed layers of the prompt cache were compressed")
            self._caches[id(integration.model_report(loaded[0]))] = self._prompt_cache
        read_weights(loaded[0])
        report = integration.model_report(loaded[0])
        if is_first and self._file:
            with refusing(ValueError):
                prompt_cache.check_fingerprint(
                    self._file, self._metadata, loaded[0], report.model_type
                )
        self._models.append((weakref.ref(loaded[0]), report))
        return loaded

    def sharded_load(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """``mlx_lm.utils.sharded_load`` with compressed caches: a rank's are of its own heads."""
        loaded: tuple[Any, ...] = sharded_load(*args, **kwargs)
        with refusing(ValueError, RuntimeError):
            report = integration.apply(loaded[0], self.config)
        self._models.append((weakref.ref(loaded[0]), report))
        return loaded

    def make_prompt_cache(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm's function of that name; remembers the latest caches of each model."""
        caches: list[Any] = mlx_lm_cache.make_prompt_cache(model, max_kv_size)
        self._caches[id(integration.model_report(model))] = caches
        return caches

    def load_prompt_cache(self, path: str, return_metadata: bool = False) -> Any:
        """The list that :meth:`load` fills."""
        return (self._prompt_cache, self._metadata) if return_metadata else self._prompt_cache

    def save_prompt_cache(
        self, path: str, caches: list[Any], metadata: dict[str, str] | None = None
    ) -> None:
        """mlx-lm's function of that name: whole or not at all, with checksum and fingerprint."""
        model = self._models[0][0]()
        if model is None:
            raise RuntimeError("[session] The model is gone; save its caches while it is in use.")
        with refusing(ValueError, OSError):
            prompt_cache.save_prompt_cache(path, model, caches, metadata)

    def print_usage(self) -> None:
        """Say what was compressed, what the caches take, and the peak memory."""
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
        """Say how much memory was needed, and which backend did the work."""
        say(usage.describe_peak(total, mx.get_peak_memory()))
        say(f"backend {backends.describe()}")

    def _open_prompt_cache(self, path: str, model: str | None) -> None:
        with refusing(ValueError, RuntimeError):
            self._metadata = prompt_cache.read_metadata(path)
        self._file = path
        missing = {"model", "tokenizer_config"} - set(self._metadata)
        if missing:
            raise Refusal(
                f"[prompt cache] {path} must name its model and tokenizer_config, but its metadata "
                f"has no {' and no '.join(sorted(missing))}; pass them to save_prompt_cache."
            )
        _check_tokenizer_config(path, self._metadata["tokenizer_config"])
        if model is not None and model != self._metadata["model"]:
            raise Refusal(
                f"[prompt cache] {path} was made with {self._metadata['model']!a}, but --model "
                f"{model} was given; give the same model or leave --model out."
            )

    def _load(self, path: str, **kwargs: Any) -> tuple[Any, ...]:
        return load_lazily(path, self.config, self.calibration, **kwargs)


def _check_tokenizer_config(path: str, text: str) -> None:
    """Let a file say no more to the tokenizer than what mlx-lm writes."""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    kinds = {"trust_remote_code": bool, "eos_token": str}
    if type(options) is not dict or any(type(v) is not kinds.get(k) for k, v in options.items()):
        raise Refusal(
            f"[prompt cache] {path} must have a tokenizer_config of {' and '.join(kinds)} in JSON, "
            f"but it has {text[:80]!a}; make it again."
        )


def load_lazily(
    path: str, config: RotorConfig, calibration: Path | None = None, **kwargs: Any
) -> tuple[Any, ...]:
    """Load a model without reading its weights, unless there is a calibration to compare with.

    Raises:
        Refusal: If there is no such model, or it cannot be compressed.
    """
    if not Path(path).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise Refusal(
            f"[load] A model directory or the name of a repository is required, but {path} is "
            "neither; check the path."
        )
    try:
        return integration.load(path, config, calibration, lazy=True, **kwargs)
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
        if not message.startswith(("[apply]", "[hook]", "[calibration]")):
            first = message.splitlines()[0] if message else type(error).__name__
            message = (
                f"[load] A model that mlx-lm can load is required, but {path} gave: "
                f"{first.rstrip('.')}; check the path or the name."
            )
        raise Refusal(message) from error


def read_weights(model: Any) -> None:
    """Read the weights of a lazily loaded model, with a progress bar on a terminal."""
    weights: list[mx.array] = [pair[1] for pair in tree_flatten(model.parameters())]  # type: ignore[misc]
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
    """The module of a command of mlx-lm.

    Raises:
        Refusal: If it needs a package that is not installed.
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
    """The argument parser of a command; some build it only inside their ``main``."""
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


def parse(parser: argparse.ArgumentParser, name: str, argv: list[str]) -> argparse.Namespace:
    """Parse as mlx-lm will, abbreviations included.

    Raises:
        Refusal: If an option is wrong or asks for another kind of cache.
    """

    def error(message: str) -> NoReturn:
        raise Refusal(f"[{name}] {message}; see rotormlx {name} --help.")

    parser.error = error  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    for dest in REFUSED:
        if getattr(args, dest, None) != parser.get_default(dest):
            option = "--" + dest.replace("_", "-")
            raise Refusal(
                f"[{name}] rotormlx compresses the cache itself, but {option} "
                f"{getattr(args, dest)} asks mlx-lm for another cache; leave {option} out and use "
                "--key-bits and --value-bits."
            )
    return args


def say(message: str) -> None:
    """Tell the user, line by line; standard output belongs to the generated text."""
    if mx.distributed.init().rank() == 0:
        for line in message.splitlines():
            print(f"rotormlx: {line}", file=sys.stderr)
