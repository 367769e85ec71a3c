"""What the saved state of a cache must be like, class by class, as far as a header tells.

Reading a file means to give its content to the classes that it names. These rules come first: they
need no array, so a file that breaks one is refused before anything is read or made. They are also
the list of classes that a file may name; any other name is refused, whatever it stands for.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, PLANES, ROLES
from rotormlx.config import RotorConfig
from rotormlx.storage.tensor_file import Entry, TensorFile

FLOATS = ("F16", "BF16", "F32")
_HEADER, _STORE, _LIMIT = 5, 5, 2  # entries of a compressed cache: numbers, a role's arrays, limit

# A state's arrays are entries of a header; numbers, texts and None are what they are.
State = list[Any]


class Shape(NamedTuple):
    """What a file says of one cache, as far as it must fit a model.

    name: Its class.
    config, layer, limited: Of a compressed one; limited if it holds no more than so many tokens.
    window: The most tokens of a sliding window.
    dims: KV heads, key dimension and value dimension, where it holds keys and values.
    """

    name: str
    config: RotorConfig | None = None
    layer: int | None = None
    limited: bool = False
    window: int | None = None
    dims: tuple[int, int, int] | None = None


def check(name: Any, state: State, file: TensorFile) -> Iterator[Shape]:
    """Compare a state with the rules of its class.

    Args:
        name: The class.
        state: Its state.
        file: Where it stands.

    Yields:
        Its shape; of a ``CacheList`` that of each part.

    Raises:
        ValueError: If the class is not listed, or its state is not one of its kind.
    """
    if name == "CacheList":
        for part in state:
            if type(part) is not list or len(part) != 2 or type(part[0]) is not list:
                raise file.error("hold a state and a class for each part of a CacheList", "others")
            yield from check(part[1], part[0], file)
        return
    if type(name) is not str or name not in _RULES:
        raise file.error(
            f"hold caches of {', '.join(_RULES)} or CacheList", f"it has {ascii(name)[:80]}"
        )
    yield _RULES[name](_Rules(name, state, file))


class _Rules:
    """A state under examination."""

    def __init__(self, name: str, state: State, file: TensorFile) -> None:
        self.name = name
        self.state = state
        self.file = file

    def require(self, holds: bool, what: str, came: object) -> None:
        """Refuse the file unless something holds."""
        if not holds:
            shown = (came.dtype, came.shape) if isinstance(came, Entry) else came
            raise self.file.error(f"hold {what} in a {self.name}", f"it holds {shown!a:.120}")

    def entries(self, *counts: int) -> None:
        """Require one of these numbers of entries."""
        have = len(self.state)
        self.require(have in counts, f"{' or '.join(map(str, counts))} entries", have)

    def integers(self, *values: Any) -> None:
        """Require integers from 0."""
        is_right = all(type(n) is int and 0 <= n < 2**31 for n in values)
        self.require(is_right, "integers from 0", values)

    def floating(self, what: str, entry: Any) -> tuple[int, ...]:
        """Require a floating array of 4 dimensions; returns its shape."""
        is_right = isinstance(entry, Entry) and len(entry.shape) == 4 and entry.dtype in FLOATS
        self.require(is_right, f"{what} as a floating array of 4 dimensions", entry)
        shape: tuple[int, ...] = entry.shape
        return shape

    def array(self, what: str, entry: Any, dtype: str, shape: tuple[int, ...] | None) -> None:
        """Require an array of this dtype and shape, or None."""
        have = (entry.dtype, entry.shape) if isinstance(entry, Entry) else entry
        want = None if shape is None else (dtype, shape)
        self.require(have == want, f"{what} of dtype and shape {want}", have)

    def keys_and_values(self) -> tuple[int, tuple[int, int, int] | None]:
        """Require two arrays alike as the first entries, or two None: their tokens, and dims."""
        keys, values = self.state[:2]
        if keys is None and values is None:
            return 0, None
        a, b = self.floating("keys", keys), self.floating("values", values)
        self.require(a[:3] == b[:3], "keys and values that agree up to head_dim", (a, b))
        return a[2], (a[1], a[3], b[3])


# ---- mlx-lm's classes ---------------------------------------------------------------------------


def _growing(rules: _Rules) -> Shape:
    rules.entries(3)
    tokens, dims = rules.keys_and_values()
    offset = rules.state[2]
    rules.integers(offset)
    rules.require(offset <= tokens, f"at most {tokens} tokens", offset)
    return Shape(rules.name, dims=dims)


def _sliding(rules: _Rules) -> Shape:
    rules.entries(6)
    tokens, dims = rules.keys_and_values()
    offset, keep, window, place = rules.state[2:]
    rules.integers(offset, keep, window, place)
    is_right = (
        keep <= window
        and window > 0
        and place <= tokens
        and (offset <= tokens or tokens >= window)
        and (dims is None) <= (offset == place == 0)
    )
    rules.require(is_right, f"counts that add up, with {tokens} places", rules.state[2:])
    return Shape(rules.name, window=window, dims=dims)


def _chunked(rules: _Rules) -> Shape:
    rules.entries(5)
    tokens, dims = rules.keys_and_values()
    offset, size, start = rules.state[2:]
    rules.integers(offset, size, start)
    is_right = size > 0 and 0 <= offset - start <= tokens
    rules.require(is_right, f"counts that add up, with {tokens} places", rules.state[2:])
    return Shape(rules.name, dims=dims)


def _arrays(rules: _Rules) -> Shape:
    rules.entries(3)
    held, *lengths = rules.state
    rules.require(type(held) is list and len(held) > 0, "a list of arrays", held)
    found = [a for a in held if a is not None]
    is_right = all(isinstance(a, Entry) and a.shape and a.dtype in FLOATS for a in found)
    rules.require(is_right, "floating arrays", found)
    batches = {a.shape[0] for a in found}
    for entry in lengths:
        is_right = isinstance(entry, Entry) and entry.dtype == "I32" and len(entry.shape) == 1
        rules.require(entry is None or is_right, "one int32 a row", entry)
        batches |= set() if entry is None else {entry.shape[0]}
    rules.require(len(batches) <= 1, "arrays that agree in batch", sorted(batches))
    return Shape(rules.name)


# ---- ours ---------------------------------------------------------------------------------------


def _compressed(rules: _Rules) -> Shape:
    rules.entries(*(n + m for n in (_HEADER, _HEADER + 2 * _STORE) for m in (0, _LIMIT)))
    state = rules.state
    config = _config(rules)
    limited = len(state) % _HEADER == _LIMIT
    limit, evicted = state[-_LIMIT:] if limited else (None, 0)
    layer, tokens, packed = state[2:_HEADER]
    rules.integers(layer, tokens, packed, evicted, *([limit] if limited else []))
    arrays = state[_HEADER : len(state) - (_LIMIT if limited else 0)]
    counts = np.array([[tokens, packed, evicted]], np.int64)
    _counts(rules, config, limit, counts)
    rules.require(bool(arrays) or tokens == 0, "counts that add up", (tokens, packed))
    dims = _stores(rules, config, arrays, tokens - packed, packed) if arrays else None
    return Shape(rules.name, config, layer, limited, dims=dims)


def _compressed_batch(rules: _Rules) -> Shape:
    rules.entries(_HEADER, _HEADER + 2 * _STORE)
    config = _config(rules)
    layer, limit, table = rules.state[2:_HEADER]
    rules.integers(layer, *([] if limit is None else [limit]))
    is_right = isinstance(table, Entry) and table.dtype == "I32" and table.shape[1:] == (3,)
    rules.require(is_right and len(table.shape) == 2, "three counts a row", table)
    counts = rules.file.read(table).astype(np.int64)
    _counts(rules, config, limit, counts)
    arrays = rules.state[_HEADER:]
    if not arrays:
        rules.require(not counts[:, 0].any(), "counts that add up", "tokens without arrays")
        return Shape(rules.name, config, layer)
    exact = int((counts[:, 0] - counts[:, 1]).max(initial=0))
    packed = int(counts[:, 1].max(initial=0))
    dims = _stores(rules, config, arrays, exact, packed, rows=len(counts))
    return Shape(rules.name, config, layer, dims=dims)


def _config(rules: _Rules) -> RotorConfig:
    version, text = rules.state[:2]
    if version != FORMAT_VERSION or type(version) is not int:
        raise rules.file.error(
            f"be of format version {FORMAT_VERSION}, which this rotormlx reads",
            f"it has version {version!a:.40}",
        )
    rules.require(type(text) is str, "a configuration in JSON", text)
    try:
        return RotorConfig.from_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition("] ")[2].partition(";")[0] or type(error).__name__
        raise rules.file.error(
            f"hold a configuration in a {rules.name}", f"{reason.encode('ascii', 'replace')!a:.200}"
        ) from error


def _counts(rules: _Rules, config: RotorConfig, limit: int | None, counts: Any) -> None:
    """Require counts that add up: int64 ``[B, 3]``, tokens, packed and evicted ones of each row."""
    tokens, packed, evicted = counts.T
    right = (counts >= 0).all(1) & (packed + np.where(packed > 0, config.sink, 0) <= tokens)
    if limit is None:
        right &= evicted == 0
    else:
        blocks = (limit - config.sink - config.window - BLOCK + 1) // BLOCK
        rules.require(blocks > 0, "a limit with room for a block", limit)
        full = (packed == blocks * BLOCK) & (evicted % BLOCK == 0)
        right &= (packed <= blocks * BLOCK) & ((evicted == 0) | full)
    rules.require(bool(right.all()), "counts that add up", counts[~right][:3].tolist())


def _stores(
    rules: _Rules,
    config: RotorConfig,
    arrays: State,
    exact_tokens: int,
    packed: int,
    rows: int | None = None,
) -> tuple[int, int, int]:
    """Require the arrays of keys and values; ``rows`` is the batch where rows have own lengths."""
    dims = []
    fronts = set()
    for role, part in zip(ROLES, (arrays[:_STORE], arrays[_STORE:]), strict=True):
        exact, words, scales, centres, channel_scale = part
        batch, heads, _, d = rules.floating(f"exact {role}s", exact)
        wanted = (batch if rows is None else rows, heads, exact_tokens, d)
        rules.array(f"exact {role}s", exact, exact.dtype, wanted)
        blocks = -(-packed // BLOCK)
        front = (batch, heads, blocks)
        bits = config.key_bits if role == KEY else config.value_bits
        axis, lanes = (d, BLOCK) if role == KEY else (BLOCK, d)
        word_rows = sum(math.ceil(axis / plane.a_word) for plane in PLANES[bits])
        some = blocks > 0
        words_shape = (*front, word_rows, lanes)
        rules.array(f"{role} words", words, "U32", words_shape if some else None)
        rules.array(f"{role} scales", scales, "F16", (*front, BLOCK) if some else None)
        is_key = role == KEY and some
        rules.array(f"{role} centres", centres, "F16", (*front, d) if is_key else None)
        scale_shape: tuple[int, ...] | None = None
        if config.is_calibrated:
            scale_shape = config.calibrated_shape(heads, d)
        elif config.scales_channels and some:
            scale_shape = (heads, d) if rows is None else (rows, heads, d)
        rules.array(f"{role} channel scale", channel_scale, "F32", scale_shape)
        dims.append(d)
        fronts.add((batch, heads))
    rules.require(len(fronts) == 1, "keys and values that agree in batch and KV heads", fronts)
    return fronts.pop()[1], dims[0], dims[1]


_RULES: dict[str, Callable[[_Rules], Shape]] = {
    "KVCache": _growing,
    "RotatingKVCache": _sliding,
    "ChunkedKVCache": _chunked,
    "ArraysCache": _arrays,
    "RotorKVCache": _compressed,
    "BatchRotorKVCache": _compressed_batch,
}
