"""Small random models of mlx-vlm, with the towers that see and hear where these are small too."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm.models
from mlx.utils import tree_flatten, tree_unflatten

from tests.support.models import visible

_ZOO = json.loads(Path(__file__).with_name("vlm_zoo.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = _ZOO["configs"]
# Packages of mlx-vlm that hold no language model which runs on tokens, and why.
NOT_RUN: dict[str, str] = _ZOO["not run"]
# What an encoder gives a decoder, of these types: noise of this width.
ENCODED_WIDTHS = {"florence2": 128, "nemotron_parse": 128}
# Types whose language model takes positions from the model around it.
POSITIONED = ("minicpmo",)
# Parts of a configuration that have a class of their own, as mlx-vlm's loader knows them.
PARTS = ("text", "vision", "perceiver", "projector", "audio")


def config(model_type: str) -> Any:
    """The configuration of a model type, of the package's own class."""
    package = importlib.import_module(f"mlx_vlm.models.{model_type}")
    settings = {"model_type": model_type} | json.loads(json.dumps(CONFIGS[model_type]))
    for part in PARTS[:2]:
        settings.setdefault(f"{part}_config", {})
    made = package.ModelConfig.from_dict(settings)
    for part in PARTS:
        name = f"{part}_config"
        if settings.get(name) and hasattr(made, name):
            part_class = getattr(package, f"{part.title()}Config")
            setattr(made, name, part_class.from_dict(settings[name]))
    return made


def build(model_type: str) -> Any:
    """A model with random weights, the same each time; float32 in its language model.

    The weights of towers that see and hear are made when these are used: some are large.
    """
    package = importlib.import_module(f"mlx_vlm.models.{model_type}")
    mx.random.seed(0)
    model = package.Model(config(model_type))
    weights = tree_flatten(model.language_model.parameters())
    read = [(name, visible(p)) for name, p in weights if "vision" not in name]
    model.language_model.update(tree_unflatten(read))
    return model.eval()


def model_types() -> list[str]:
    """The packages of mlx-vlm that hold a file of a language model, and those in the zoo."""
    packages = Path(mlx_vlm.models.__path__[0])
    return sorted({path.parent.name for path in packages.glob("*/language.py")} | set(CONFIGS))


def forget(model: Any) -> None:
    """Make a model as it was loaded: without the positions of an earlier prompt."""
    for name in ("_position_ids", "_rope_deltas"):
        if hasattr(model.language_model, name):
            setattr(model.language_model, name, None)


def begin_sequence(model: Any, tokens: mx.array) -> None:
    """Give a model the positions of tokens ``[1, L]``, if it does not count them itself."""
    if model.config.model_type in POSITIONED:
        model.get_input_embeddings(tokens)


def logits(model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
    """The logits ``[1, L, V]`` of the language model for tokens ``[1, L]``."""
    if width := ENCODED_WIDTHS.get(model.config.model_type):
        seen = mx.random.normal((1, 9, width), key=mx.random.key(2))
        given = {"decoder_input_ids": tokens, "encoder_outputs": seen}
        return model.language_model(**given, cache=caches).logits
    return model.language_model(tokens, cache=caches).logits
