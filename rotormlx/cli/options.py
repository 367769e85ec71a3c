"""The options that all commands with a compressed cache share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from rotormlx.cli.refusal import Refusal, refusing
from rotormlx.codec.counts import LEAST_SLIDING_WINDOW
from rotormlx.config import BITS, CALIBRATED, CHANNEL_SCALES, QUALITIES, ROTATIONS, RotorConfig

MOST = 2**31 - 1  # the largest count that an option takes
PANEL = "Options of rotormlx"
DEFAULT = RotorConfig()


def _choices(choices: tuple[object, ...]) -> str:
    return ", ".join(map(str, choices))


# By field of RotorConfig: the name of the parameter, its type and its help.
_CONFIG: dict[str, tuple[str, Any, str]] = {
    "key_bits": ("key_bits", int | None, f"Bits per key: {_choices(BITS)}. Overrides --quality."),
    "value_bits": (
        "value_bits",
        int | None,
        f"Bits per value: {_choices(BITS)}. Overrides --quality.",
    ),
    "rotation": ("rotation", str, f"The rotation: {_choices((*ROTATIONS, CALIBRATED))}."),
    "channel_scale": (
        "channel_scale",
        str | None,
        f"The channel scale: {_choices(CHANNEL_SCALES)}. The default suits the rotation.",
    ),
    "sink": ("sink", int, "Number of first tokens that stay exact."),
    "window": ("window", int, "Minimum number of latest tokens that stay exact."),
    # mlx-lm's commands already have an option --seed.
    "seed": ("rotation_seed", int, "Seed of the rotations."),
}

# Fields that --quality sets if they are not given.
_BITS = ("key_bits", "value_bits")

CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        help="A file written by rotormlx calibrate. By default, the one stored for the model.",
        rich_help_panel=PANEL,
    ),
]

SlidingWindows = Annotated[
    bool,
    typer.Option(
        "--sliding-windows/--no-sliding-windows",
        help=f"Also compress sliding windows of at least {LEAST_SLIDING_WINDOW} tokens.",
        rich_help_panel=PANEL,
    ),
]


def count(text: str, least: int = 1) -> Any:
    """Return an option that takes an integer of at least ``least``; ``text`` is its help."""
    return typer.Option(help=text, min=least, max=MOST)


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's argument ``config`` by the options of a :class:`RotorConfig`."""

    @wraps(command)
    def with_config(**given: Any) -> None:
        fields = {field: given.pop(name) for field, (name, _, _) in _CONFIG.items()}
        asked = {field: value for field, value in fields.items() if value is not None}
        with refusing(ValueError):
            config = RotorConfig.of_quality(given.pop("quality"), **asked)
        if config.seed and config.rotation in ("identity", CALIBRATED):
            raise Refusal(
                f"[RotorConfig] --rotation-seed {config.seed} has no effect with --rotation "
                f"{config.rotation}, which is not drawn; leave it out."
            )
        if given.get("calibration") is not None and _replaced(config):
            raise Refusal(
                f"[calibration] --calibration {given['calibration']} brings its own channel scale "
                f"or rotation, but --rotation {config.rotation} and --channel-scale "
                f"{config.channel_scale} were given; leave them out."
            )
        command(**given, config=config)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "config":
            parameters += [_QUALITY, *(_parameter(field) for field in _CONFIG)]
        else:
            parameters.append(parameter)
    with_config.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters
    )
    with_config.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_config


def given_options(context: typer.Context) -> dict[str, str]:
    """Return the options that the user gave, by field, e.g. ``key_bits``: ``--key-bits``."""
    options = {
        field: option_of(field) for field in _CONFIG if _is_given(context, _CONFIG[field][0])
    }
    of_quality = _BITS if _is_given(context, "quality") else ()
    return {**dict.fromkeys(of_quality, "--quality"), **options}


def option_of(field: str) -> str:
    """Return the option that sets a field of a configuration, such as ``--key-bits``."""
    return f"--{_CONFIG[field][0].replace('_', '-')}"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _replaced(config: RotorConfig) -> bool:
    """Return whether a calibration would replace an option that the user gave."""
    return config.channel_scale in ("none", "prefill")


def _parameter(field: str) -> inspect.Parameter:
    name, kind, text = _CONFIG[field]
    return _option(name, kind, text, None if field in _BITS else getattr(DEFAULT, field))


def _option(name: str, kind: Any, text: str, default: Any) -> inspect.Parameter:
    option = typer.Option(help=text, rich_help_panel=PANEL)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_QUALITY = _option(
    "quality",
    str,
    "Bits by name: " + ", ".join(f"{name} ({key})" for name, (key, _) in QUALITIES.items()) + ".",
    next(iter(QUALITIES)),
)
