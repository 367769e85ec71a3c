"""Rules for saved states, one per class, that can be checked from a file's header.

Reading a file creates caches of the classes that it names. These rules are checked before that.
They need only the header and a few small tensors, so a file that breaks a rule is refused before
any cache is made. The rules also list the classes that a file may name; any other name is refused.

Source: docs/FORMAT.md, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rotormlx.codec.format import FORMAT_VERSION
from rotormlx.config import RotorConfig
from rotormlx.storage.cache_fields import (
    BATCH_SLIDING,
    CHUNKED,
    FLOATS,
    LAYOUTS,
    SLIDING,
    Field,
    SavedBatch,
    SavedCache,
    StateReader,
    kv_dims,
)
from rotormlx.storage.tensor_file import Array, Entry, TensorFile

# In a state, an array is represented by its entry in the header; other values are stored directly.
State = list[Any]


class Shape(NamedTuple):
    """The properties of a saved cache that must fit a model.

    name: Class of the cache; for a compressed cache, the class of its layout in :data:`LAYOUTS`.
    config, layer: Configuration and layer index of a compressed cache.
    limited: Whether the number of tokens of a compressed cache is limited.
    window: Tokens of a sliding window, or of a chunk.
    dims: KV heads, key dimension and value dimension; None if it holds no keys and values.
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
        state: The state.
        file: The file that holds the state.

    Yields:
        The shape of the cache; for a ``CacheList``, the shape of each part.

    Raises:
        ValueError: If the class is not listed, or the state breaks a rule of the class.
    """
    if name == "CacheList":
        for part in state:
            if type(part) is not list or len(part) != 2 or type(part[0]) is not list:
                raise file.error(
                    "hold a state and a class for each part of a CacheList", "it does not"
                )
            yield from check(part[1], part[0], file)
        return
    if type(name) is not str or name not in _RULES:
        raise file.error(
            f"hold caches of {', '.join(_RULES)} or CacheList", f"it has {ascii(name)[:80]}"
        )
    yield _RULES[name](_Rules(name, state, file))


class _Rules(StateReader):
    """A state that is checked against the header of its file."""

    def __init__(self, name: str, state: State, file: TensorFile) -> None:
        self.name = name
        self.state = state
        self.file = file

    def field(self, entry: Any) -> Any:
        """Return the dtype and shape of an array from the header; other values unchanged."""
        return Field(entry.dtype, entry.shape) if isinstance(entry, Entry) else entry

    def numbers(self, entry: Any) -> Array:
        """Read the content of one tensor, before the other tensors are checked."""
        return self.file.read(entry)

    def refuse(self, required: str, came: object) -> ValueError:
        """Return the error for a state that is not as required."""
        shown = tuple(came) if isinstance(came, Field) else came
        return self.file.error(f"hold {required} in a {self.name}", f"it holds {shown!a:.120}")

    def refuse_version(self, version: object) -> ValueError:
        """Return the error for another format version."""
        return self.file.error(
            f"be of format version {FORMAT_VERSION}, which this rotormlx reads",
            f"it has version {version!a:.40}",
        )

    def config(self, text: str) -> RotorConfig:
        """Parse a configuration; the file may hold any text in its place."""
        try:
            return RotorConfig.from_json(text)
        except (ValueError, TypeError, RecursionError) as error:
            reason = str(error).partition("] ")[2].partition(";")[0] or type(error).__name__
            raise self.file.error(
                f"hold a configuration in a {self.name}",
                f"{reason.encode('ascii', 'replace')!a:.200}",
            ) from error

    def keys_and_values(self) -> tuple[int, tuple[int, int, int] | None]:
        """Require two matching arrays, or two None, as the first entries.

        Returns:
            The number of tokens; and KV heads, key dimension and value dimension, or None.
        """
        keys, values = self.state[:2]
        if keys is None and values is None:
            return 0, None
        a, b = self.floating("keys", keys).shape, self.floating("values", values).shape
        self.require(a[:3] == b[:3], "keys and values that agree up to head_dim", (a, b))
        return a[2], (a[1], a[3], b[3])


# ---- mlx-lm's classes ---------------------------------------------------------------------------


def _growing(rules: _Rules) -> Shape:
    rules.entries(len(rules.state), 3)
    tokens, dims = rules.keys_and_values()
    offset = rules.state[2]
    rules.integers(offset)
    rules.require(offset <= tokens, f"at most {tokens} tokens", offset)
    return Shape(rules.name, dims=dims)


def _sliding(rules: _Rules) -> Shape:
    rules.entries(len(rules.state), 6)
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
    rules.entries(len(rules.state), 5)
    tokens, dims = rules.keys_and_values()
    offset, size, start = rules.state[2:]
    rules.integers(offset, size, start)
    is_right = size > 0 and 0 <= offset - start <= tokens
    rules.require(is_right, f"counts that add up, with {tokens} places", rules.state[2:])
    return Shape(rules.name, window=size, dims=dims)


def _arrays(rules: _Rules) -> Shape:
    rules.entries(len(rules.state), 3)
    held, *lengths = rules.state
    rules.require(type(held) is list and len(held) > 0, "a list of arrays", held)
    arrays = [a for a in held if a is not None]
    is_right = all(isinstance(a, Entry) and a.shape and a.dtype in FLOATS for a in arrays)
    rules.require(is_right, "floating arrays", arrays)
    batches = {a.shape[0] for a in arrays}
    for entry in lengths:
        is_right = isinstance(entry, Entry) and entry.dtype == "I32" and len(entry.shape) == 1
        rules.require(entry is None or is_right, "one int32 per row", entry)
        batches |= set() if entry is None else {entry.shape[0]}
    rules.require(len(batches) <= 1, "arrays that agree in batch", sorted(batches))
    return Shape(rules.name)


# ---- the classes of rotormlx --------------------------------------------------------------------


def _compressed(rules: _Rules) -> Shape:
    saved = SavedCache.read(rules.state, rules)
    limited = saved.max_size is not None
    dims = kv_dims(saved.stores)
    return Shape(LAYOUTS[rules.name], saved.config, saved.layer, limited, _window(rules), dims)


def _compressed_batch(rules: _Rules) -> Shape:
    saved = SavedBatch.read(rules.state, rules)
    limited = saved.max_size is not None
    dims = kv_dims(saved.stores)
    return Shape(LAYOUTS[rules.name], saved.config, saved.layer, limited, _window(rules), dims)


def _window(rules: _Rules) -> int | None:
    """Return the window or chunk size; None for a class that has none."""
    places = {SLIDING: -1, BATCH_SLIDING: -1, CHUNKED: -2}
    place = places.get(rules.name)
    return None if place is None else rules.state[place]


_RULES: dict[str, Callable[[_Rules], Shape]] = {
    "KVCache": _growing,
    "RotatingKVCache": _sliding,
    "ChunkedKVCache": _chunked,
    "ArraysCache": _arrays,
    **{
        name: _compressed_batch if layout.startswith("Batch") else _compressed
        for name, layout in LAYOUTS.items()
    },
}
