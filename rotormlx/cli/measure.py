"""The commands that measure: ``quality``, ``needle``, ``bench`` and ``calibrate``."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from rotormlx.cli import outputs
from rotormlx.cli.options import count
from rotormlx.cli.refusal import Refusal, refusing, sentence
from rotormlx.cli.terminal import wide_console
from rotormlx.config import RotorConfig

QUALITY = (
    "k4v4 k3v3 hadamard-k4v4 dense-k4v4 rotor3-k4v4 affine-k4v4 affine-k8v8 kivi-k4v4 "
    "turboquant-k4v4 turboquant-k4v4:bare rotorquant-k4v4:bare"
)
NEEDLE = "k4v4 k3v3 affine-k4v4 rotorquant-k4v4:bare"
BENCH = "exact affine-k4v4 affine-k8v8 k4v4 k3v3"

_LONGEST = 2**24  # tokens of a text

Model = Annotated[
    str | None,
    typer.Argument(
        help="A directory or the name of a repository. By default, SmolLM2-135M-Instruct."
    ),
]
Schemes = Annotated[
    str,
    typer.Option(
        help="Schemes, separated by spaces: exact, or [FAMILY-]kBITSvBITS[:OPTION,...]. Families: "
        "the rotations, affine (mlx-lm's own), kivi, turboquant, rotorquant, kvarn, exl3, nvfp4. "
        "Options: sink=N, window=N, seed=N, scale=NAME, calibrated=TRANSFORM, layers (bits per "
        "layer, as measured by calibrate --layers), bare (no sink and no window), qjl and centred "
        "(turboquant), group=N (kvarn), compander (exl3)."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="The dtype to compute in: float32, bfloat16 or float16. By default, the model's own."
    ),
]
Output = Annotated[Path | None, typer.Option(help="A directory for the result files.")]


def register(app: typer.Typer) -> None:
    """Add the commands that measure to ``app``."""
    for command in (quality, needle, bench, calibrate):
        app.command()(command)


def quality(
    model: Model = None,
    *,
    schemes: Schemes = QUALITY,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file. Give the option again for several.")
    ] = None,
    tokens: Annotated[int, count("Number of tokens to read of each text.")] = 1217,
    greedy: Annotated[
        int, count("Length of the greedy continuation of each text, in tokens.", 0)
    ] = 64,
    sampled: Annotated[int, count("Length of each sampled continuation, in tokens.", 0)] = 64,
    seeds: Annotated[int, count("Number of sampled continuations of each text.", 0)] = 4,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the sampled continuations.")
    ] = 0.8,
    tasks: Annotated[
        int,
        count(
            "Number of questions per generated task, e.g. 100. Each scheme then takes a minute or "
            "more.",
            0,
        ),
    ] = 0,
    dtype: Dtype = None,
    all_packed: Annotated[
        bool, typer.Option("--all-packed", help="Use no sink and no window in any scheme.")
    ] = False,
    output: Output = None,
) -> None:
    """Measure how much each scheme changes a model's predictions.

    Writes JSON, Markdown and one HTML page. After an interrupt, the same command continues.
    """
    grammar, run, report = _module("schemes"), _module("quality_run"), _module("quality_report")
    plots = _plots()

    def files(result: Any) -> dict[str, str]:
        shown = {} if plots is None else plots.of_quality(result)
        return {
            **_files("quality", report)(result),
            "quality.html": report.html(result, shown),
        }

    kept = _Kept("quality", output or Path(), files, _quality_table)
    where = ("[quality]", "[scheme]", "[needle]", "[RotorConfig]", "[smollm2]")
    with refusing(ValueError, RuntimeError, where=where), kept:
        names = [grammar.all_packed(n) if all_packed else n for n in schemes.split()]
        list(map(grammar.scheme, names))  # refuse a bad name before a model is loaded
        written = _module("free_running").Settings(greedy, sampled, seeds, temperature)
        texts = None if text is None else _read_all(text)
        console, path, loaded = _load(model)
        with _progress(console) as progress:

            def keep(result: Any) -> None:
                kept.keep(result)
                if not console.is_terminal:  # a log shows no progress bar
                    typer.echo(_step(result, progress), err=True)

            result = run.run(
                *loaded,
                names,
                model_name=path.name,
                command=_command(),
                texts=texts,
                tokens=tokens,
                written=written,
                items=tasks,
                dtype=dtype,
                output=output or Path(),
                progress=progress,
                keep=keep,
            )
        kept.finish(result)


def _step(result: Any, progress: Progress) -> str:
    """Return the log line for a scheme that is complete."""
    task = progress.tasks[-1]
    seconds = round(task.time_remaining or 0)
    row = result.rows[-1]
    return (
        f"quality: {task.description}: {task.percentage:.0f} % done, {seconds // 60} min "
        f"{seconds % 60} s left; KL of {row.scheme} so far {row.kl:.4f}"
    )


def _quality_table(result: Any) -> None:
    report, console = _module("quality_report"), wide_console()
    table = report.table(result, console.width)
    console.print(table)
    shown = report.legend(str(column.header) for column in table.columns)
    console.print(" ".join(shown), highlight=False)
    if result.exact_tasks:
        console.print(report.task_table(result))
        console.print(report.TASK_LEGEND, highlight=False)


def needle(
    model: Model = None,
    *,
    schemes: Schemes = NEEDLE,
    lengths: Annotated[
        str, typer.Option(help="Lengths of the texts in tokens, separated by commas.")
    ] = ("512,1024"),
    trials: Annotated[int, count("Minimum number of trials per kind and scheme.")] = 200,
    needles: Annotated[int, count("Maximum number of needles per text.")] = 20,
    kinds: Annotated[
        str, typer.Option(help="Kinds of task, separated by commas: fact, copy, chain.")
    ] = "fact,copy,chain",
    seed: Annotated[int, count("Seed of the texts and answers.", 0)] = 0,
    output: Output = None,
) -> None:
    """Test recall of facts and copies in long texts, and chains of sums, through each scheme."""
    module, grammar = _module("needle"), _module("schemes")
    kept = _Kept("needle", output, _files("needle", module), _table(module))
    where = ("[needle]", "[scheme]", "[RotorConfig]", "[measure]", "[smollm2]")
    with refusing(ValueError, RuntimeError, where=where), kept:
        counts = _numbers("lengths", lengths)
        list(map(grammar.scheme, schemes.split()))
        console, path, loaded = _load(model)
        with _progress(console) as progress:
            result = module.run(
                *loaded,
                schemes.split(),
                model_name=path.name,
                command=_command(),
                lengths=counts,
                trials=trials,
                needles=needles,
                kinds=kinds.split(","),
                seed=seed,
                progress=progress,
                keep=kept.keep,
            )
        kept.finish(result)


def bench(
    model: Model = None,
    *,
    schemes: Schemes = BENCH,
    contexts: Annotated[
        str, typer.Option(help="Lengths of the prompts in tokens, separated by commas.")
    ] = ("1024,4096"),
    repeats: Annotated[int, count("Number of runs per scheme and context.")] = 3,
    decode_tokens: Annotated[int, count("Number of tokens to generate per run.")] = 32,
    numpy: Annotated[
        bool,
        typer.Option(
            "--numpy",
            help="On a CPU, let numpy multiply in linear layers, as quality does. That is faster, "
            "but not the speed of mlx-lm.",
        ),
    ] = False,
    dtype: Dtype = None,
    output: Output = None,
) -> None:
    """Measure speed and memory of each scheme, in turn in one process."""
    module, grammar = _module("bench"), _module("schemes")
    plots = _plots() if output is not None else None

    def files(result: Any) -> dict[str, str]:
        plot = {} if plots is None else {"bench.svg": plots.of_bench(result)}
        return _files("bench", module)(result) | plot

    kept = _Kept("bench", output, files, _table(module))
    where = ("[bench]", "[quality]", "[scheme]", "[RotorConfig]", "[measure]", "[smollm2]")
    with refusing(ValueError, RuntimeError, where=where), kept:
        counts = _numbers("contexts", contexts)
        list(map(grammar.scheme, schemes.split()))
        console, path, loaded = _load(model)
        with _progress(console) as progress:
            result = module.run(
                *loaded,
                schemes.split(),
                model_name=path.name,
                command=_command(),
                contexts=counts,
                repeats=repeats,
                decode_tokens=decode_tokens,
                numpy=numpy,
                dtype=dtype,
                progress=progress,
                keep=kept.keep,
            )
        kept.finish(result)


def calibrate(
    model: Model = None,
    *,
    transform: Annotated[
        str,
        typer.Option(
            help="scale: one factor per channel; rotors: one factor per channel and learned "
            "rotors; klt: one matrix per KV head."
        ),
    ] = "scale",
    text: Annotated[
        Path | None,
        typer.Option(help="A text file. By default, prose from CPython's documentation."),
    ] = None,
    tokens: Annotated[int, count("Number of tokens to read, from the end of the text.")] = 512,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also measure the loss of each layer, in float32, to distribute the bits.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .safetensors file to write. By default, the one that rotormlx looks up for "
            "the model."
        ),
    ] = None,
) -> None:
    """Measure a model on a short text, and store the transform that compresses its cache best."""
    where = ("[calibration]", "[smollm2]", "[hook]")
    with refusing(ValueError, RuntimeError, where=where):
        if output is not None:
            outputs.check_file("calibrate", output)
        words = None if text is None else _read("calibrate", text)
        console, path, (loaded, tokenizer) = _load(model)
        if output is None:
            kept = importlib.import_module("rotormlx.mlx.calibration")
            output = kept.default_path(loaded, transform)
            with outputs.folder("calibrate", output.parent):
                pass
        with _progress(console) as progress:
            depth = len(loaded.layers)
            total = tokens + depth + layers * (2 * depth + 1) * tokens
            task = progress.add_task(f"Calibrating {path.name}", total=total)
            calibration = _module("calibrate").calibrate(
                loaded,
                tokenizer,
                transform=transform,
                text=words,
                tokens=tokens,
                layers=layers,
                progress=lambda n: progress.advance(task, n),
            )
        _save_calibration(calibration, output)
    console.print(
        f"{path.name}: {transform} {'and losses ' if layers else ''}of {len(calibration.layers)} "
        f"layers from {calibration.tokens} tokens, {calibration.numbers_a_head:,} numbers per KV "
        f"head, {output.stat().st_size / 1e6:.2f} MB",
        highlight=False,
    )
    typer.echo(f"wrote {output}", err=True)


def _save_calibration(calibration: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
    except OSError as error:
        raise Refusal(f"[calibrate] {path} cannot be written: {sentence(error)}.") from error


def _load(model: str | None) -> tuple[Console, Path, tuple[Any, Any]]:
    """Return a console, the path of the model, and the model with its tokenizer."""
    session = importlib.import_module("rotormlx.cli.mlx_lm_commands")
    console = wide_console()
    if model is None:
        with _progress(console) as progress:
            model = str(importlib.import_module("rotormlx.cli.demo_model").fetch(progress))
    loaded = session.load_lazily(model, RotorConfig())
    importlib.import_module("rotormlx.mlx.integration").remove(loaded[0])
    session.read_weights(loaded[0])
    return console, Path(model), loaded[:2]


def _module(name: str) -> Any:
    return importlib.import_module(f"rotormlx.measure.{name}")


def _plots() -> Any:
    """Return the plotting module; None, with a line on standard error, without matplotlib."""
    try:
        return _module("plots")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo(
            "rotormlx: the files will have no plots, because matplotlib is not installed; install "
            "it with: pip install 'rotormlx[bench]' (in a clone: pip install -e '.[bench]')",
            err=True,
        )
        return None


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part[:20]) <= _LONGEST for part in parts):
        raise Refusal(
            f"[measure] --{option} must be whole numbers up to {_LONGEST}, separated by commas, "
            f"but {text!r} was given."
        )
    return [int(part) for part in parts]


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Refusal(
            f"[{name}] A text file in UTF-8 is required, but reading {path} failed: {why}."
        ) from error


def _read_all(paths: list[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise Refusal(
                f"[quality] Every text must have a different name, but {path} is the second "
                f"{path.name}; rename one."
            )
        texts[path.name] = _read("quality", path)
    return texts


def _command() -> str:
    return f"rotormlx {shlex.join(sys.argv[1:])}"


class _Kept:
    """A context that keeps the results so far, and stores them if a folder is given.

    The folder is made before the work. ``NAME.json`` is written after every step, so that a crash
    loses nothing. The other files and the table are written at the end, also after an interrupt.

    Args:
        name: The command; its files are named after it.
        output: The folder, or None.
        files: Returns the text of each file for a result, by file name.
        show: Prints a result.
    """

    def __init__(
        self,
        name: str,
        output: Path | None,
        files: Callable[[Any], dict[str, str]],
        show: Callable[[Any], None],
    ) -> None:
        self.name, self.output, self.files, self.show = name, output, files, show
        self._latest: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> _Kept:
        if self.output is not None:
            self._stack.enter_context(outputs.folder(self.name, self.output))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None and self._latest is not None:
                typer.echo(
                    f"rotormlx: {self.name} ended early; these are the results so far", err=True
                )
                self.finish(self._latest)

    def keep(self, result: Any) -> None:
        """Store the results so far."""
        self._latest = result
        if self.output is not None:
            text = json.dumps(result.as_dict(), indent=1) + "\n"
            self._write(f"{self.name}.json", text)

    def finish(self, result: Any) -> None:
        """Print a result and write all of its files."""
        self._latest = None
        self.show(result)
        if self.output is None:
            return
        for name, text in self.files(result).items():
            self._write(name, text)
            typer.echo(f"wrote {self.output / name}", err=True)

    def _write(self, name: str, text: str) -> None:
        assert self.output is not None
        try:
            outputs.write_whole(self.output / name, text)
        except OSError as error:
            raise Refusal(
                f"[{self.name}] {self.output / name} cannot be written: {sentence(error)}."
            ) from error


def _files(name: str, module: Any) -> Callable[[Any], dict[str, str]]:
    return lambda result: {
        f"{name}.json": json.dumps(result.as_dict(), indent=1) + "\n",
        f"{name}.md": module.markdown(result),
    }


def _table(module: Any) -> Callable[[Any], None]:
    return lambda result: wide_console().print(module.table(result))


def _progress(console: Console) -> Progress:
    bar, left = (BarColumn(), TaskProgressColumn()), TimeRemainingColumn()
    return Progress(
        *(SpinnerColumn(), TextColumn("{task.description}"), *bar, left),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=300,  # in seconds: a chunk of a long text takes several
    )
