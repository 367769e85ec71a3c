"""Reads one text through the exact cache, and then through the caches of each scheme.

The distributions of a long text take gigabytes. So those of the exact cache are stored in files,
and those of a scheme are compared chunk by chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from rotormlx.measure import attention_error, cache_contents, free_running, scoring, unfinished
from rotormlx.measure.attention_error import Attended, LayerError
from rotormlx.measure.free_running import Settings
from rotormlx.measure.schemes import EXACT, Scheme, scheme
from rotormlx.measure.scoring import CHUNK, Differences

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Text:
    """A text to read through a cache.

    Args:
        name: Name of the text.
        ids: Tokens of the text.
        start: The first prediction to compare.
        written: Settings of the continuations.
        folder: A folder for the results of the exact cache and of each scheme.
    """

    name: str
    ids: tuple[int, ...]
    start: int
    written: Settings
    folder: Path

    @property
    def targets(self) -> NDArray[np.int64]:
        """The actual next tokens, ``[S - 1]``."""
        return np.asarray(self.ids[1:], np.int64)

    @property
    def steps(self) -> int:
        """Number of tokens that are read and generated for one scheme."""
        return len(self.ids) - 1 + self.written.tokens


@dataclass(frozen=True)
class Exact:
    """The results of the exact cache.

    Args:
        log_likelihoods: Log-probabilities of the actual next tokens, from the first compared
            prediction on.
        continuations: The tokens of the continuations, the greedy one first.
        dtype: The dtype of the model's computation.
        cache_bytes: Bytes of the cache.
    """

    log_likelihoods: NDArray[np.float64]
    continuations: list[list[int]]
    dtype: str
    cache_bytes: int


@dataclass(frozen=True)
class Coded:
    """The results of one scheme for one text.

    Args:
        differences: Differences from the exact cache's predictions, one by one.
        common: Number of tokens of each continuation before the first that differs.
        layers: Errors of each layer.
        bits_per_value: Bits per compressed value, scales and centres included.
        exact_tokens: Numbers of first and of latest tokens that are never packed.
        cache_bytes: Bytes of the cache.
        packed_tokens: Tokens packed in the cache, in the layer with the fewest.
        seconds: Time that reading the text took.
    """

    differences: Differences
    common: list[int]
    layers: tuple[LayerError, ...]
    bits_per_value: float
    exact_tokens: tuple[int, int]
    cache_bytes: int
    packed_tokens: int
    seconds: float


# ---- the exact cache ----------------------------------------------------------------------------


def exact(model: Any, text: Text, advance: Advance, *, distributions: bool) -> Exact:
    """Read a text through the exact cache, or load the results of an earlier run.

    Args:
        model: The model; the hook must be installed.
        text: The text.
        advance: Called with the number of tokens read or generated.
        distributions: Whether distributions are needed, because a scheme is still to be compared.
    """
    files = [_distributions(text), _layers(text)] if distributions else []
    found = _found_exact(text)
    if found is not None and all(path.is_file() for path in files):
        if distributions:
            advance(text.steps)
        return found
    _exact(text).unlink(missing_ok=True)  # this file marks the others as complete
    caches = scheme(EXACT).caches(model)
    with attention_error.record_queries() as latest:
        # Before the continuations: the latest queries must be those at the end of the text.
        likelihoods = _keep_distributions(model, text, caches, advance)
        layers = list(attention_error.attended(caches, latest))
    _keep_layers(text, layers)
    keys, _ = cache_contents.decoded(next(cache for _, cache in cache_contents.compressed(caches)))
    size = cache_contents.used_bytes(caches)
    # The continuations begin with the last token, which has not been read.
    written = free_running.continuations(model, text.ids[-1], caches, text.written, advance)
    made = Exact(likelihoods, written, str(keys.dtype).rpartition(".")[2], size)
    facts = {"continuations": written, "dtype": made.dtype, "cache_bytes": size}
    unfinished.write(_exact(text), {"log_likelihoods": likelihoods}, facts)
    return made


def drop_distributions(text: Text) -> None:
    """Delete the files that are needed only to compare a scheme with the exact cache."""
    _distributions(text).unlink(missing_ok=True)
    _layers(text).unlink(missing_ok=True)


def _keep_distributions(
    model: Any, text: Text, caches: Sequence[Any], advance: Advance
) -> NDArray[np.float64]:
    """Write all log-probabilities ``[S - 1, V]`` to a file; return those of the next tokens."""
    text.folder.mkdir(exist_ok=True)
    likelihoods = np.empty(len(text.targets))
    # Not a memory map, with which a full disk would end the process without a message.
    with _distributions(text).open("wb") as file:
        for start, rows, _ in scoring.chunks(model, text.ids, caches):
            if start == 0:
                shape = (len(text.targets), rows.shape[1])
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                write_array_header_1_0(file, header)
            file.write(rows.astype("<f4").tobytes())
            part = slice(start, start + len(rows))
            likelihoods[part] = rows[np.arange(len(rows)), text.targets[part]]
            advance(len(rows))
    return likelihoods[text.start :]


def _keep_layers(text: Text, layers: Sequence[Attended]) -> None:
    arrays = {
        f"{number}.{name}": getattr(layer, name)
        for number, layer in enumerate(layers)
        for name in ("queries", "keys", "values")
    }
    facts = {"layers": [(layer.layer, layer.scale) for layer in layers]}
    unfinished.write(_layers(text), arrays, facts)


def _attended(text: Text) -> Iterator[Attended]:
    """Yield the stored layers one by one, because all may not fit into memory."""
    with np.load(_layers(text), allow_pickle=False) as file:
        facts = unfinished.facts_of(file)
        for number, (layer, scale) in enumerate(facts["layers"]):
            vectors = {name: file[f"{number}.{name}"] for name in ("queries", "keys", "values")}
            yield Attended(layer, **vectors, scale=scale)


def _found_exact(text: Text) -> Exact | None:
    found = unfinished.read(_exact(text))
    return None if found is None else Exact(found[0]["log_likelihoods"], **found[1])


# ---- a scheme -----------------------------------------------------------------------------------


def coded(model: Any, text: Text, chosen: Scheme, reference: Exact, advance: Advance) -> Coded:
    """Read a text through the caches of a scheme, and compare with the exact cache.

    Args:
        model: The model; the hook must be installed.
        text: The text, already read through the exact cache.
        chosen: The scheme.
        reference: The result of :func:`exact`.
        advance: Called with the number of tokens read or generated.

    Raises:
        RuntimeError: If a compared prediction read too few packed tokens.
    """
    caches = chosen.caches(model)
    began = time.perf_counter()
    differences = _compared(model, text, chosen, caches, advance)
    seconds = time.perf_counter() - began
    size, packed = cache_contents.used_bytes(caches), scoring.packed_of(caches)
    bits = cache_contents.bits_per_value([c for _, c in cache_contents.compressed(caches)])
    written = free_running.continuations(model, text.ids[-1], caches, text.written, advance)
    pairs = zip(reference.continuations, written, strict=True)
    made = Coded(
        differences,
        [free_running.common_start(a, b) for a, b in pairs],
        tuple(attention_error.layer_error(x, chosen.make(x.layer)) for x in _attended(text)),
        bits,
        cache_contents.exact_tokens(chosen.make(0)),
        size,
        packed,
        seconds,
    )
    facts = asdict(made)
    arrays = facts.pop("differences")
    unfinished.write(_coded(text, unfinished.of_scheme(chosen, model)), arrays, facts)
    return made


def found_coded(model: Any, text: Text, chosen: Scheme) -> Coded | None:
    """Return the stored result of :func:`coded`, or None if there is none."""
    found = unfinished.read(_coded(text, unfinished.of_scheme(chosen, model)))
    if found is None:
        return None
    arrays, facts = found
    facts["exact_tokens"] = tuple(facts["exact_tokens"])
    facts["layers"] = tuple(LayerError(**layer) for layer in facts["layers"])
    return Coded(Differences(**arrays), **facts)


def _compared(
    model: Any, text: Text, chosen: Scheme, caches: Sequence[Any], advance: Advance
) -> Differences:
    exact_rows = np.load(_distributions(text), mmap_mode="r")
    parts: list[Differences] = []
    for first, rows, packed in scoring.chunks(model, text.ids, caches):
        if first >= text.start:
            if packed < CHUNK:
                raise RuntimeError(
                    f"[quality] Every compared prediction must read at least {CHUNK} packed "
                    f"tokens, but one through {chosen.name} read {packed}; start later."
                )
            part = slice(first, first + len(rows))
            parts.append(scoring.differences_of_rows(exact_rows[part], rows, text.targets[part]))
        advance(len(rows))
    return Differences.joined(parts)


# ---- files --------------------------------------------------------------------------------------


def _exact(text: Text) -> Path:
    return text.folder / "exact.npz"


def _distributions(text: Text) -> Path:
    return text.folder / "distributions.npy"


def _layers(text: Text) -> Path:
    return text.folder / "layers.npz"


def _coded(text: Text, digest: str) -> Path:
    return text.folder / f"{digest}.npz"
