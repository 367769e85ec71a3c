"""The command line: commands of mlx-lm with compressed caches, and commands of rotormlx."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand

from rotormlx import __version__
from rotormlx.cli import measure, memory_plan, outputs, report_tables
from rotormlx.cli.options import CalibrationFile, SlidingWindows, count, given_options, takes_config
from rotormlx.cli.refusal import Refusal, RefusingGroup, refusing
from rotormlx.config import RotorConfig

# Commands of mlx-lm that run with compressed caches, and what each does.
MLX_LM_COMMANDS = {
    "generate": "Generate text.",
    "chat": "Chat with a model.",
    "server": "Serve a model over HTTP with an API like OpenAI's.",
    "cache_prompt": "Read a prompt and save its compressed cache.",
    "evaluate": "Evaluate a model on tasks of lm_eval.",
    "benchmark": "Measure prompt and generation speed.",
    "perplexity": "Measure perplexity of a text read through the compressed cache.",
}

app = typer.Typer(
    no_args_is_help=True,
    cls=RefusingGroup,
    # A refusal prints one sentence; an unexpected error keeps Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class PassThrough(TyperCommand):
    """A command whose unknown options belong to the mlx-lm command of the same name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print rotormlx's options, then mlx-lm's."""
        super().format_help(ctx, formatter)
        console = Console()
        session = _session()
        parser = session.parser_of(session.tool_module(ctx.info_name))
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=console.width - 4)
        parser.description, parser.usage = None, argparse.SUPPRESS
        for action in parser._actions:
            if action.dest in ("help", *session.REFUSED):
                action.help = argparse.SUPPRESS
        text = Text.from_ansi(parser.format_help().partition("\n")[2])
        console.print(Panel(text, title=f"Options of mlx_lm {ctx.info_name}", title_align="left"))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Generate text with mlx-lm and a compressed KV cache."""
    # The switch would compress every model that a command loads, even one loaded for comparison.
    os.environ.pop("ROTORMLX", None)
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _add_mlx_lm_command(name: str, does: str) -> None:
    @app.command(
        name,
        cls=PassThrough,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        help=f"{does} Takes every option of mlx_lm {name}.",
    )
    @takes_config
    def command(
        ctx: typer.Context,
        *,
        config: RotorConfig,
        calibration: CalibrationFile = None,
        sliding_windows: SlidingWindows = True,
    ) -> None:
        _session().run(
            name, ctx.args, config, calibration, given_options(ctx), sliding_windows=sliding_windows
        )


for _name, _does in MLX_LM_COMMANDS.items():
    _add_mlx_lm_command(_name, _does)


class VlmCommand(StrEnum):
    """Commands of mlx-vlm that run with compressed caches."""

    GENERATE = "generate"
    CHAT = "chat"
    SERVER = "server"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@takes_config
def vlm(
    ctx: typer.Context,
    name: Annotated[VlmCommand, typer.Argument(help="The command of mlx-vlm.")],
    *,
    config: RotorConfig,
    sliding_windows: SlidingWindows = True,
) -> None:
    """Run a command of mlx-vlm, for models that read images. Takes every option of mlx-vlm."""
    commands = importlib.import_module("rotormlx.cli.mlx_vlm_commands")
    commands.run(name.value, ctx.args, config, sliding_windows=sliding_windows)


@app.command()
@takes_config
def batch(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="A text file with one prompt per line. In a .jsonl file, each line is a prompt or "
            "a list of chat messages."
        ),
    ],
    *,
    model: Annotated[str, typer.Option(help="A directory or the name of a repository.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; standard output by default.")
    ] = None,
    max_tokens: Annotated[int, count("Maximum number of tokens per answer.")] = 256,
    batch_size: Annotated[int, count("Maximum number of prompts at once.")] = 32,
    temp: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0)] = 0.0,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Do not apply the model's chat template.")
    ] = False,
    config: RotorConfig,
    calibration: CalibrationFile = None,
    sliding_windows: SlidingWindows = True,
) -> None:
    """Answer the prompts of a file, many at once. Writes one JSON object per line."""
    if not math.isfinite(temp):
        raise Refusal(f"[batch] --temp must be a finite number, but {temp} was given.")
    session, batching = _session(), importlib.import_module("rotormlx.cli.batching")
    texts = batching.read_prompts(prompts)
    with outputs.lines("batch", output, prompts) as write:
        batching.answer(
            session.Session(config, calibration, sliding_windows=sliding_windows),
            model,
            texts,
            max_tokens=max_tokens,
            batch_size=batch_size,
            temp=temp,
            use_chat_template=not ignore_chat_template,
            write=lambda answer: write(json.dumps(answer, ensure_ascii=False)),
        )


@app.command()
@takes_config
def info(
    model: Annotated[str, typer.Argument(help="A directory or the name of a repository.")],
    *,
    config: RotorConfig,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Show the longest context that fits into this memory with the weights, e.g. 16GB."
        ),
    ] = None,
    calibration: CalibrationFile = None,
    sliding_windows: SlidingWindows = True,
) -> None:
    """Show which layers of a model are compressed, and how much memory that saves."""
    budget = None if memory is None else memory_plan.size_of(memory)
    loaded = _session().load_lazily(model, config, calibration, sliding_windows=sliding_windows)
    report = importlib.import_module("rotormlx.mlx.integration").model_report(loaded[0])
    tables = [report_tables.layer_table(report), report_tables.memory_table(report)]
    if budget is not None:
        weights = sum(weight.nbytes for weight in _session().weights_of(loaded[0]))
        tables.append(memory_plan.table(report, weights, budget))
    console = Console()
    for table in tables:
        console.print(table)
    backends = importlib.import_module("rotormlx.mlx.backends")
    console.print(f"Backend: {backends.describe()}", highlight=False)
    for name, way in backends.ways().items():
        console.print(f"Fastest {name} here: {way}", highlight=False)


@app.command()
def doctor(
    *,
    output: Annotated[
        Path, typer.Option(help="The file for the report, to attach to an issue.")
    ] = Path("rotormlx-doctor.json"),
    time: Annotated[
        bool, typer.Option(help="Time attention and compare it with MLX's own.")
    ] = True,
    runs: Annotated[int, count("Number of timed runs of each kernel.")] = 5,
) -> None:
    """Check the kernels on this machine, time them, and say whether to use rotormlx here.

    Exits with status 1 if a kernel is wrong; rotormlx then uses MLX's operations instead.
    """
    outputs.check_file("doctor", output)
    found = importlib.import_module("rotormlx.cli.doctor").run(output, timed=time, runs=runs)
    raise typer.Exit(1 if found.wrong else 0)


@app.command()
def demo(
    *,
    model: Annotated[
        str | None, typer.Option(help="A model to use instead of SmolLM2-135M-Instruct.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A question about the passage, instead of the default one.")
    ] = None,
    max_tokens: Annotated[int | None, count("Maximum number of tokens per answer.")] = None,
    score_tokens: Annotated[int | None, count("Number of tokens of the passage.")] = None,
    long: Annotated[
        bool,
        typer.Option("--long", help="Instead, ask for numbers that are hidden in 4,096 tokens."),
    ] = False,
) -> None:
    """Read a passage and answer a question through four caches, and compare them."""
    if model is not None:
        _session().load_lazily(model, RotorConfig())  # refuses early; reads no weights
    options = {"prompt": prompt, "max_tokens": max_tokens, "score_tokens": score_tokens}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    with refusing(
        ValueError,
        RuntimeError,
        where=("[demo]", "[smollm2]", "[apply]", "[hook]", "[assert_packed]", "[needle]"),
    ):
        if long:
            _long_demo(model, given)
            return
        importlib.import_module("rotormlx.cli.demo").run(model=model, console=Console(), **given)


def _long_demo(model: str | None, given: dict[str, Any]) -> None:
    for name in given:
        raise Refusal(
            f"[demo] --{name.replace('_', '-')} has no effect with --long, which has its own text "
            "and questions; leave it out."
        )
    importlib.import_module("rotormlx.cli.demo_long").run(model=model, console=Console())


measure.register(app)


def main() -> None:
    """Entry point of the ``rotormlx`` command."""
    app(prog_name="rotormlx")


def _session() -> ModuleType:
    # Importing mlx-lm takes two seconds, and --help and --version do not need it.
    return importlib.import_module("rotormlx.cli.mlx_lm_commands")
