"""Measures speed and memory of a whole model of transformers with each cache.

Weights may be random, because they do not affect the time; then nothing is downloaded. Contenders
run in turn in one process, so that a slowdown of the machine affects all of them. The result is the
median over turns. In a turn, ``generate`` decodes greedily, and a streamer takes the time of each
token.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from rotormlx.config import RotorConfig
from rotormlx.report import megabytes
from rotormlx.torch.integration import apply, remove

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Configuration class and its arguments; head_dim is given where it differs from
# hidden_size / num_attention_heads. The sizes are those in config.json of meta-llama/Llama-3.2-1B,
# meta-llama/Llama-3.2-3B, meta-llama/Llama-3.1-8B and Qwen/Qwen3-4B.
_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": (
        "LlamaConfig",
        _LLAMA3
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3b": (
        "LlamaConfig",
        _LLAMA3
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": (
        "LlamaConfig",
        _LLAMA3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "qwen3-4b": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 257,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
        },
    ),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        prompt: Tokens of the prompt for the time to the first token.
        history: Tokens in the cache before decoding.
        tokens: Tokens to write after the first one.
        batch: Sequences at once.
        runs: Measured turns of each contender; one more turn before them warms up and compiles.
    """

    prompt: int = 2048
    history: int = 16384
    tokens: int = 64
    batch: int = 1
    runs: int = 3


@dataclass(frozen=True)
class Contender:
    """A cache, and the arguments of ``generate`` that select it.

    Args:
        name: Name in the table.
        options: Arguments of ``generate``.
        bits: Bits of keys and values if the model is compressed, else None.
        missing: Why it cannot be measured here; empty if it can.
    """

    name: str
    options: dict[str, Any]
    bits: int | None = None
    missing: str = ""


@dataclass(frozen=True)
class Measured:
    """Figures of one turn, or the medians of several.

    Args:
        first_token_ms: Time from the start until the first token after the prompt is known.
        decode_tokens_per_second: Tokens of all sequences together, after the history.
        peak_bytes: Most memory that torch held on CUDA, including weights; on a CPU, where torch
            does not count it, the bytes of the cache.
        cache_bytes: Bytes allocated for the cache at the end, including room for growth.
    """

    first_token_ms: float
    decode_tokens_per_second: float
    peak_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class Row:
    """A contender with its figures, or with the reason why it has none."""

    contender: str
    measured: Measured | None
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """All rows, with settings, machine and date."""

    model: str
    weights: str
    command: str
    date: str
    device: str
    dtype: str
    versions: dict[str, str]
    settings: Settings
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return asdict(self)


def model_of(
    name: str, *, device: str, dtype: str, weights: bool = False
) -> tuple[PreTrainedModel, str]:
    """Make a model, with random weights unless ``weights`` is set.

    Args:
        name: One of ``SHAPES``, or a folder with ``config.json``.
        device: Device of the model.
        dtype: One of ``DTYPES``.
        weights: Whether to load the weights of the folder.

    Returns:
        The model, and a word for its weights.

    Raises:
        ValueError: If there is no such model, device or dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"[bench] --dtype must be one of {', '.join(DTYPES)}, but {dtype} came.")
    _check_device(device)
    folder = Path(name)
    model: Any
    if name not in SHAPES and not (folder / "config.json").is_file():
        raise ValueError(
            f"[bench] MODEL must be one of {', '.join(SHAPES)}, or a folder with config.json, but "
            f"{name!r} came."
        )
    if weights and name in SHAPES:
        raise ValueError(
            f"[bench] --weights needs a folder with weights, but {name} is a shape; leave it out."
        )
    if weights:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        model.to(torch.device(device))
    else:
        config = _config(name)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    # Without an end token, no text ends early.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval(), "its own" if weights else "random"


def contenders(bits: Sequence[int]) -> list[Contender]:
    """Return every cache to compare; rotormlx once per number of bits."""
    made = [Contender("DynamicCache", {})]
    for backend, package, there in (
        ("quanto", "optimum-quanto", is_optimum_quanto_available()),
        ("hqq", "hqq", is_hqq_available()),
    ):
        options = {
            "cache_implementation": "quantized",
            "cache_config": {"backend": backend, "nbits": 4},
        }
        missing = "" if there else f"not measured: {package} is not installed"
        made.append(Contender(f"QuantizedCache 4 bit, {backend}", options, missing=missing))
    static = {"cache_implementation": "static"}
    made += [Contender(f"RotorCache {width} bit", {}, width) for width in bits]
    made.append(Contender("StaticCache", static))
    made += [Contender(f"RotorCache {width} bit, static", static, width) for width in bits]
    return made


def run(
    model: PreTrainedModel,
    chosen: Sequence[Contender],
    settings: Settings,
    *,
    name: str,
    weights: str,
    command: str,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measure contenders in turn.

    Args:
        model: Model from :func:`model_of`.
        chosen: Contenders to compare.
        settings: Settings of the measurement.
        name: Name of the model in the table.
        weights: Word for its weights.
        command: Command to record in the result.
        keep: Function that gets the result so far after each round.

    Raises:
        ValueError: If the model has fewer positions than the texts have tokens.
    """
    _check_length(model, settings)
    turns: dict[str, list[Measured]] = {one.name: [] for one in chosen}
    reasons = {one.name: one.missing for one in chosen if one.missing}

    def result() -> Result:
        rows = tuple(
            Row(one.name, _median(turns[one.name]), reasons.get(one.name, "")) for one in chosen
        )
        return Result(
            name,
            weights,
            command,
            datetime.now(UTC).date().isoformat(),
            _device_name(model.device),
            str(model.dtype).removeprefix("torch."),
            _versions(),
            settings,
            rows,
        )

    for counted in range(-1, settings.runs):
        for one in chosen:
            if one.name in reasons:
                continue
            try:
                measured = _turn(model, one, settings)
            except (ValueError, ImportError) as error:
                reasons[one.name] = f"refused: {' '.join(str(error).split())}"
            except torch.OutOfMemoryError:
                reasons[one.name] = "out of memory"
            except RuntimeError as error:  # from a compiler or a kernel; the other contenders go on
                reasons[one.name] = f"failed: {str(error).strip().partition(chr(10))[0]}"
            else:
                if counted >= 0:
                    turns[one.name].append(measured)
            finally:
                remove(model)
        if counted >= 0:
            keep(result())
    return result()


def table(result: Result) -> Table:
    """Return the results as a table for a terminal."""
    title = f"{result.model}, {result.weights} weights, {result.dtype}, {result.device}"
    out = Table(title=title)
    out.add_column("cache")
    settings = result.settings
    for name in (
        f"first token of {settings.prompt:,}, ms",
        f"decode over {settings.history:,}, tokens/s",
        "peak memory",
        "cache",
    ):
        out.add_column(name, justify="right")
    for row in result.rows:
        out.add_row(row.contender, *(_cells(row.measured) if row.measured else ["-"] * 4))
    return out


def remarks(result: Result) -> list[str]:
    """Return one line per row without figures, with the reason."""
    return [f"{row.contender}: {row.reason}" for row in result.rows if row.reason]


def cache_bytes(cache: Any) -> int:
    """Return the bytes allocated for the tensors of any cache, each tensor counted once."""
    own = getattr(cache, "nbytes", None)
    if isinstance(own, int):
        return own
    held = [tensor for layer in cache.layers for tensor in _tensors(vars(layer))]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())


# ---- a turn -------------------------------------------------------------------------------------


class _Stamps(BaseStreamer):
    """Records the time at which each token reaches the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token per call."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def _turn(model: PreTrainedModel, one: Contender, settings: Settings) -> Measured:
    if one.bits is not None:
        apply(model, RotorConfig(one.bits, one.bits))
    first, _, _ = _generate(model, one, settings.batch, settings.prompt, 1)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    _, decode, cache = _generate(model, one, settings.batch, settings.history, settings.tokens + 1)
    held = cache_bytes(cache)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else held
    return Measured(1e3 * first, settings.batch * settings.tokens / decode, peak, held)


def _generate(
    model: PreTrainedModel, one: Contender, batch: int, length: int, new_tokens: int
) -> tuple[float, float, Any]:
    """Generate; return seconds to the first token, seconds from first to last, and the cache."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator).to(model.device)
    stamps = _Stamps()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    generate: Any = model.generate
    made = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        streamer=stamps,
        return_dict_in_generate=True,
        **one.options,
    )
    first, last = stamps.times[1], stamps.times[-1]
    # Before transformers 5.24, the name is past_key_values.
    cache = getattr(made, "cache", None) or made.past_key_values
    return first - start, last - first, cache


def _tensors(value: Any) -> list[Tensor]:
    found = []
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        # A quantized tensor is made of others.
        flatten: Any = getattr(leaf, "__tensor_flatten__", None)
        parts = flatten()[0] if flatten else ()
        found += [getattr(leaf, part) for part in parts] or [leaf]
    return found


# ---- output and checks --------------------------------------------------------------------------


def _median(turns: Sequence[Measured]) -> Measured | None:
    if not turns:
        return None
    return replace(
        turns[-1],
        first_token_ms=statistics.median(turn.first_token_ms for turn in turns),
        decode_tokens_per_second=statistics.median(turn.decode_tokens_per_second for turn in turns),
        peak_bytes=max(turn.peak_bytes for turn in turns),
    )


def _cells(measured: Measured) -> list[str]:
    return [
        f"{measured.first_token_ms:.1f}",
        f"{measured.decode_tokens_per_second:.1f}",
        megabytes(measured.peak_bytes),
        megabytes(measured.cache_bytes),
    ]


def _config(name: str) -> Any:
    if name not in SHAPES:
        return AutoConfig.from_pretrained(name)
    kind, sizes = SHAPES[name]
    return getattr(transformers, kind)(**sizes)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"[bench] --device must be cpu, cuda or cuda:N, but {device!r} came.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"[bench] --device {device} needs a CUDA GPU, but torch sees none; use --device cpu."
        )


def _check_length(model: PreTrainedModel, settings: Settings) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    asked = max(settings.prompt, settings.history + settings.tokens) + 1
    if isinstance(most, int) and asked > most:
        raise ValueError(
            f"[bench] The model has {most:,} positions, but {asked:,} tokens were asked for; give "
            "a smaller --prompt, --history or --tokens."
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("rotormlx", "torch", "transformers")}
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {"python": platform.python_version()} | found | cuda
