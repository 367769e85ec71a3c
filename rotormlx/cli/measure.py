"""The commands that measure: ``quality``, ``needle``, ``bench`` and ``calibrate``."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rotormlx.cli.refusal import Refusal, refusing
from rotormlx.cli.terminal import wide_console
from rotormlx.config import RotorConfig

QUALITY = (
    "k4v4 k3v3 hadamard-k4v4 dense-k4v4 rotor3-k4v4 affine-k4v4 affine-k8v8 kivi-k4v4 "
    "turboquant-k4v4 turboquant-k4v4:bare rotorquant-k4v4:bare"
)
NEEDLE = "k4v4 k3v3 affine-k4v4 rotorquant-k4v4:bare"
BENCH = "exact affine-k4v4 affine-k8v8 k4v4 k3v3"

Model = Annotated[
    str | None,
    typer.Argument(help="A directory or the name of a repository; SmolLM2-135M-Instruct if none."),
]
Schemes = Annotated[
    str,
    typer.Option(
        help="Schemes, separated by spaces: exact, or [FAMILY-]kBITSvBITS[:OPTION,...]. Families: "
        "the rotations, affine (mlx-lm's own), kivi, turboquant, rotorquant. Options: sink=N, "
        "window=N, seed=N, scale=NAME, calibrated=TRANSFORM, layers (bits of their own, as "
        "calibrate --layers has measured them), bare (no sink and window), "
        "qjl, centred."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="What to compute in: float32, bfloat16 or float16; the model's own if none."),
]
Output = Annotated[Path | None, typer.Option(help="A directory for the files with the results.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (quality, needle, bench, calibrate):
        app.command()(command)


def quality(
    model: Model = None,
    *,
    schemes: Schemes = QUALITY,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; give it again for several.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text to read.")] = 1217,
    greedy: Annotated[int, typer.Option(help="Greedy tokens to try behind each text.")] = 64,
    dtype: Dtype = None,
    all_packed: Annotated[
        bool, typer.Option("--all-packed", help="No sink and no window in any scheme.")
    ] = False,
    output: Output = None,
) -> None:
    """Measure what schemes cost in quality; writes JSON, Markdown and one HTML page."""
    with refusing(
        ValueError,
        RuntimeError,
        where=(
            "[quality]",
            "[scheme]",
            "[assert_packed]",
            "[RotorConfig]",
            "[smollm2]",
        ),
    ):
        grammar = _module("schemes")
        run, report = _module("quality_run"), _module("quality_report")
        names = [grammar.all_packed(n) if all_packed else n for n in schemes.split()]
        list(map(grammar.scheme, names))  # refuses before a model is loaded
        texts = None if text is None else {path.name: _read(path) for path in text}
        console, path, loaded = _load(model)
        with _progress(console) as progress:
            result = run.run(
                *loaded,
                names,
                model_name=path.name,
                command=_command(),
                texts=texts,
                tokens=tokens,
                greedy=greedy,
                dtype=dtype,
                progress=progress,
            )
    console.print(report.table(result, console.width))
    console.print(report.LEGEND, highlight=False)
    for written in report.save(result, output or Path()):
        typer.echo(f"wrote {written}", err=True)


def needle(
    model: Model = None,
    *,
    schemes: Schemes = NEEDLE,
    lengths: Annotated[str, typer.Option(help="Tokens of the texts, separated by commas.")] = (
        "512,1024"
    ),
    trials: Annotated[int, typer.Option(help="Least trials of each kind and scheme.")] = 200,
    needles: Annotated[int, typer.Option(help="Most needles in one text.")] = 20,
    kinds: Annotated[
        str, typer.Option(help="Kinds of needle, separated by commas: fact, copy.")
    ] = "fact,copy",
    seed: Annotated[int, typer.Option(help="Selects texts and answers.")] = 0,
    output: Output = None,
) -> None:
    """Hide needles in long texts and ask for them through each scheme."""
    with refusing(
        ValueError,
        RuntimeError,
        where=(
            "[needle]",
            "[scheme]",
            "[RotorConfig]",
            "[measure]",
            "[smollm2]",
        ),
    ):
        module, grammar = _module("needle"), _module("schemes")
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
            )
    console.print(module.table(result))
    _save(output, "needle", result, module.markdown(result))


def bench(
    model: Model = None,
    *,
    schemes: Schemes = BENCH,
    contexts: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = (
        "1024,4096"
    ),
    repeats: Annotated[int, typer.Option(help="Turns of each scheme and context.")] = 3,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to write in each turn.")] = 32,
    numpy: Annotated[
        bool,
        typer.Option(
            "--numpy",
            help="On a CPU, let numpy multiply in linear layers, as quality does: sooner done, but "
            "not what mlx-lm does.",
        ),
    ] = False,
    dtype: Dtype = None,
    output: Output = None,
) -> None:
    """Measure speed and memory of schemes, in turn in one process."""
    with refusing(
        ValueError,
        RuntimeError,
        where=(
            "[bench]",
            "[quality]",
            "[scheme]",
            "[RotorConfig]",
            "[measure]",
            "[smollm2]",
        ),
    ):
        module, grammar = _module("bench"), _module("schemes")
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
            )
    console.print(module.table(result))
    _save(output, "bench", result, module.markdown(result), module.plot(result))


def calibrate(
    model: Model = None,
    *,
    transform: Annotated[
        str,
        typer.Option(
            help="scale: a factor a channel; rotors: learned rotors besides; klt: a matrix a KV "
            "head."
        ),
    ] = "scale",
    text: Annotated[
        Path | None, typer.Option(help="A text file; prose of CPython's documentation if none.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to read, from its end.")] = 512,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Measure each layer too, in float32: bits then go to the layers that need them.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file; where the model finds it by itself if none."),
    ] = None,
) -> None:
    """Read a short text and keep what compresses this model's cache best."""
    with refusing(
        ValueError,
        RuntimeError,
        where=(
            "[calibration]",
            "[smollm2]",
            "[hook]",
        ),
    ):
        words = None if text is None else _read(text)
        console, path, (loaded, tokenizer) = _load(model)
        with _progress(console) as progress:
            count = len(loaded.layers)
            total = tokens + count + layers * (2 * count + 1) * tokens
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
        if output is None:
            output = importlib.import_module("rotormlx.mlx.calibration").default_path(
                loaded, transform
            )
            output.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(output)
    console.print(
        f"{path.name}: {transform} {'and losses ' if layers else ''}of {len(calibration.layers)} "
        f"layers from {calibration.tokens} tokens, {calibration.numbers_a_head:,} numbers a KV "
        f"head, {output.stat().st_size / 1e6:.2f} MB",
        highlight=False,
    )
    typer.echo(f"wrote {output}", err=True)


def _load(model: str | None) -> tuple[Console, Path, tuple[Any, Any]]:
    """A console, the path of the model, and the model with its own caches and its tokenizer."""
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
    try:
        return importlib.import_module(f"rotormlx.measure.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rotormlx"):
            raise
        raise Refusal(
            f"[measure] This command needs the package {error.name}, but it is not installed; "
            "install rotormlx[bench]."
        ) from None


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise Refusal(
            f"[measure] --{option} must be whole numbers separated by commas, but {text!r} came."
        )
    return [int(part) for part in parts]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            f"[quality] A text file in UTF-8 is required, but {path} gave: {error}."
        ) from error


def _command() -> str:
    return f"rotormlx {shlex.join(sys.argv[1:])}"


def _save(output: Path | None, name: str, result: Any, markdown: str, svg: str = "") -> None:
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(result.as_dict(), indent=1) + "\n", ".md": markdown, ".svg": svg}
    for suffix, content in texts.items():
        if content:
            (output / (name + suffix)).write_text(content, encoding="utf-8")
            typer.echo(f"wrote {output / (name + suffix)}", err=True)


def _progress(console: Console) -> Progress:
    bar, left = BarColumn(), TimeRemainingColumn()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), bar, left)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
