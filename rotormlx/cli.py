"""The command line: ``rotormlx generate``, ``rotormlx info``, ``rotormlx demo``."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn

import mlx.core as mx
import typer
from mlx.utils import tree_flatten
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text
from typer.core import TyperCommand

from rotormlx import __version__
from rotormlx.config import BITS, CHANNEL_SCALES, ROTATIONS, RotorConfig

# Options of mlx-lm for another kind of cache. They would change nothing, so they are refused.
REFUSED = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start")

DEFAULT = RotorConfig()
PANEL = "Options of rotormlx"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # A refusal is one sentence; what nobody expected keeps Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _choices(choices: tuple[object, ...]) -> str:
    return ", ".join(map(str, choices))


KeyBits = Annotated[
    int, typer.Option(help=f"Bits of a key: {_choices(BITS)}.", rich_help_panel=PANEL)
]
ValueBits = Annotated[
    int, typer.Option(help=f"Bits of a value: {_choices(BITS)}.", rich_help_panel=PANEL)
]
RotationName = Annotated[str, typer.Option(help=f"{_choices(ROTATIONS)}.", rich_help_panel=PANEL)]
ChannelScale = Annotated[
    str | None,
    typer.Option(
        help=f"{_choices(CHANNEL_SCALES)}; by default the one that suits the rotation.",
        rich_help_panel=PANEL,
    ),
]
Sink = Annotated[int, typer.Option(help="First tokens that stay exact.", rich_help_panel=PANEL)]
Window = Annotated[int, typer.Option(help="Latest tokens that stay exact.", rich_help_panel=PANEL)]
RotationSeed = Annotated[int, typer.Option(help="Selects the rotations.", rich_help_panel=PANEL)]


class PassThrough(TyperCommand):
    """A command whose unknown options belong to the mlx-lm command of the same name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print our options, then mlx-lm's."""
        super().format_help(ctx, formatter)
        console = Console()
        parser = _tool(str(ctx.info_name)).setup_arg_parser()
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=console.width - 4)
        parser.description, parser.usage = None, argparse.SUPPRESS
        for action in parser._actions:
            if action.dest in ("help", *REFUSED):
                action.help = argparse.SUPPRESS
        text = Text.from_ansi(parser.format_help().partition("\n")[2])
        console.print(Panel(text, title=f"Options of mlx_lm {ctx.info_name}", title_align="left"))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Generate text with mlx-lm and a compressed KV cache."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    cls=PassThrough,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def generate(
    ctx: typer.Context,
    *,
    key_bits: KeyBits = DEFAULT.key_bits,
    value_bits: ValueBits = DEFAULT.value_bits,
    rotation: RotationName = DEFAULT.rotation,
    channel_scale: ChannelScale = DEFAULT.channel_scale,
    sink: Sink = DEFAULT.sink,
    window: Window = DEFAULT.window,
    rotation_seed: RotationSeed = DEFAULT.seed,
) -> None:
    """Generate text; takes every option of mlx_lm generate, such as --model and --prompt."""
    config = _config(key_bits, value_bits, rotation, channel_scale, sink, window, rotation_seed)
    tool = _tool("generate")
    args = _parse(tool.setup_arg_parser(), "generate", ctx.args)
    session = _Session(config)
    if args.prompt_cache_file is not None:
        session.open_prompt_cache(args.prompt_cache_file, args.model)
    with (
        _patched(
            tool,
            load=session.load,
            load_prompt_cache=session.load_prompt_cache,
            make_prompt_cache=session.make_prompt_cache,
        ),
        _patched(sys, argv=["mlx_lm generate", *ctx.args]),
    ):
        tool.main()
    session.print_usage()


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A directory or the name of a repository.")],
    *,
    key_bits: KeyBits = DEFAULT.key_bits,
    value_bits: ValueBits = DEFAULT.value_bits,
    rotation: RotationName = DEFAULT.rotation,
    channel_scale: ChannelScale = DEFAULT.channel_scale,
    sink: Sink = DEFAULT.sink,
    window: Window = DEFAULT.window,
    rotation_seed: RotationSeed = DEFAULT.seed,
) -> None:
    """Show what of a model would be compressed, and the memory that saves."""
    config = _config(key_bits, value_bits, rotation, channel_scale, sink, window, rotation_seed)
    loaded = _load(model, config)
    report = _integration().model_report(loaded[0])
    console = Console()
    console.print(report.layer_table())
    console.print(report.memory_table())
    console.print(f"Backend: {_backends().describe()}", highlight=False)


@app.command()
def demo(
    *,
    model: Annotated[
        str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Another question about the passage that is read.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    score_tokens: Annotated[int | None, typer.Option(help="Length of the passage.")] = None,
) -> None:
    """Read a passage and answer a question with four caches, and compare them."""
    if model is not None:
        _load(model, DEFAULT)  # reads no weights: only to refuse early
    options = {"prompt": prompt, "max_tokens": max_tokens, "score_tokens": score_tokens}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    with _refusing(
        ValueError,
        RuntimeError,
        where=("[demo]", "[smollm2]", "[apply]", "[hook]", "[assert_packed]"),
    ):
        importlib.import_module("rotormlx.demo").run(model=model, console=Console(), **given)


def main() -> None:
    """Entry point of the ``rotormlx`` command."""
    app(prog_name="rotormlx")


class _Session:
    """What mlx-lm's commands get in place of their own functions, and what came of it."""

    def __init__(self, config: RotorConfig) -> None:
        self.config = config
        self.prompt_cache: list[Any] | None = None
        self.metadata: dict[str, str] = {}
        self.made: list[tuple[Any, list[Any]]] = []
        self.models = 0

    def open_prompt_cache(self, path: str, model: str | None) -> None:
        with _refusing(ValueError, RuntimeError):
            self.prompt_cache, self.metadata = _prompt_cache().read_prompt_cache(path)
        missing = {"model", "tokenizer_config"} - set(self.metadata)
        if missing:
            _refuse(
                f"[prompt cache] {path} must name its model and tokenizer_config, but its metadata "
                f"has no {' and no '.join(sorted(missing))}; pass them to save_prompt_cache."
            )
        if model is not None and model != self.metadata["model"]:
            _refuse(
                f"[prompt cache] {path} was made with {self.metadata['model']}, but --model "
                f"{model} was given; give the same model or leave --model out."
            )

    def load_prompt_cache(self, path: str, return_metadata: bool = False) -> Any:
        return (self.prompt_cache, self.metadata) if return_metadata else self.prompt_cache

    def load(self, path: str, **kwargs: Any) -> tuple[Any, ...]:
        loaded = _load(path, self.config, **kwargs)
        self.models += 1
        if self.prompt_cache is not None and self.models == 1:  # not for a draft model
            with _refusing(ValueError):
                converted = _prompt_cache().adopt_prompt_cache(loaded[0], self.prompt_cache)
            if converted:
                _say(f"{converted} uncompressed layers of the prompt cache were compressed")
            self.made.append((loaded[0], self.prompt_cache))
        _read_weights(loaded[0])
        return loaded

    def make_prompt_cache(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        caches: list[Any] = model.make_cache()
        self.made.append((model, caches))
        return caches

    def print_usage(self) -> None:
        for model, caches in self.made:
            for line in _integration().model_report(model).usage(caches).splitlines():
                _say(line)
        _say(f"backend {_backends().describe()}")


def _config(*fields: Any) -> RotorConfig:
    with _refusing(ValueError):
        return RotorConfig(*fields)


def _parse(parser: argparse.ArgumentParser, name: str, argv: list[str]) -> argparse.Namespace:
    """Parse as mlx-lm will, abbreviations included, and refuse what cannot be combined."""

    def error(message: str) -> NoReturn:
        _refuse(f"[{name}] {message}; see rotormlx {name} --help.")

    parser.error = error  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    for dest in REFUSED:
        if getattr(args, dest, None) != parser.get_default(dest):
            option = "--" + dest.replace("_", "-")
            _refuse(
                f"[{name}] rotormlx compresses the cache itself, but {option} "
                f"{getattr(args, dest)} asks mlx-lm for another cache; leave {option} out and use "
                "--key-bits and --value-bits."
            )
    return args


def _load(path: str, config: RotorConfig, **kwargs: Any) -> tuple[Any, ...]:
    """Load a model without reading its weights, or refuse it."""
    if not Path(path).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        _refuse(
            f"[load] A model directory or the name of a repository is required, but {path} is "
            "neither; check the path."
        )
    try:
        return _integration().load(path, config, lazy=True, **kwargs)
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
        if not message.startswith(("[apply]", "[hook]")):
            first = message.splitlines()[0] if message else type(error).__name__
            message = (
                f"[load] A model that mlx-lm can load is required, but {path} gave: "
                f"{first.rstrip('.')}; check the path or the name."
            )
        _refuse(message)


def _read_weights(model: Any) -> None:
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


def _tool(name: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.{name}")


def _integration() -> ModuleType:
    # mlx-lm takes two seconds to import, and --help and --version need none of it.
    return importlib.import_module("rotormlx.integration")


def _backends() -> ModuleType:
    return importlib.import_module("rotormlx.backends")


def _prompt_cache() -> ModuleType:
    return importlib.import_module("rotormlx.prompt_cache")


@contextmanager
def _patched(module: ModuleType, **names: Any) -> Iterator[None]:
    """Give names in a module other values for a while."""
    before = {name: vars(module)[name] for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _refusing(*kinds: type[Exception], where: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Turn errors of these kinds, from these parts of rotormlx, into a refusal."""
    try:
        yield
    except kinds as error:
        if not str(error).startswith(where):
            raise
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    _say(message)
    raise typer.Exit(2)


def _say(message: str) -> None:
    # Standard output belongs to the generated text.
    typer.echo(f"rotormlx: {message}", err=True)
