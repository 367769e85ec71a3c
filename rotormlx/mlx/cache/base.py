"""The base class of caches of one sequence and of batches: two stores, keys and values."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NoReturn, Self, TypeVar

import mlx.core as mx

from rotormlx.codec.counts import max_blocks
from rotormlx.codec.parts import Part
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.store import Calibrated, Store
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import cache_fields
from rotormlx.storage.cache_fields import SavedBatch, SavedCache

S = TypeVar("S", bound=Store)

# The hosts whose attention handles compressed keys now, by name.
readers: set[str] = set()


class StoredCache(ABC, Generic[S]):
    """A cache of one layer that holds its keys in one store and its values in another.

    Args:
        config: The compression settings.
        layer: Index of the layer in the model; selects its rotations.
        max_size: The most tokens to hold for a sequence; None for no limit.
        calibrated: The calibrated arrays for keys and for values; None without a calibration.

    Raises:
        ValueError: If ``max_size`` has no room for sink, window and a block.
    """

    # The name of its class in files, from which readers know its parts and entries.
    kind: ClassVar[str]
    # Attributes that are saved after the entries that all classes share.
    own_entries: ClassVar[tuple[str, ...]] = ()
    # The class of the stores.
    _store: ClassVar[type[Store]]
    # The views of the latest step if it dropped tokens that its first queries see. Layers that read
    # the keys and values of another layer need these views in the same step.
    _latest: tuple[KVView, KVView] | None = None

    def __init__(
        self,
        config: RotorConfig | None,
        layer: int,
        max_size: int | None,
        calibrated: Calibrated | None,
    ) -> None:
        self.config = config or RotorConfig()
        self.layer = layer
        self.max_size = max_size
        self.calibrated = calibrated
        self._max_blocks = max_blocks(max_size, self.config)
        self._keys: S | None = None
        self._values: S | None = None

    @property
    def _settings(self) -> tuple[Any, ...]:
        """The arguments that make an empty cache or batch like this one."""
        return self.config, self.layer, self.max_size, self.calibrated

    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self._keys is None

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything that is saved: numbers, texts, arrays and None.

        Source: docs/FORMAT.md, section 8; :class:`SavedCache` and :class:`SavedBatch` name the
        entries, which :attr:`own_entries` follow.
        """
        self._latest = None  # hosts read the state to compute it
        return (*self._saved(), *(getattr(self, name) for name in self.own_entries))

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: If it is not the state of such a cache, or has another format version.
        """
        self._restore(state)
        own = state[len(state) - len(self.own_entries) :]
        vars(self).update(zip(self.own_entries, own, strict=True), _latest=None)

    @abstractmethod
    def _saved(self) -> tuple[Any, ...]:
        """Return the entries that all classes share."""

    @abstractmethod
    def _restore(self, state: Sequence[Any]) -> None:
        """Check a state, and restore the entries that all classes share."""

    def _take(self, saved: SavedCache | SavedBatch, **counts: Any) -> None:
        """Restore checked entries and the counts of this class."""
        blocks = max_blocks(saved.max_size, saved.config)
        stores = [
            self._store.from_saved(part.config, saved.layer, part.role, store, blocks)
            for part, store in zip(
                cache_fields.parts(self.kind, saved.config), saved.stores, strict=False
            )
        ]
        key_store, value_store = stores or (None, None)
        vars(self).update(
            config=saved.config,
            layer=saved.layer,
            max_size=saved.max_size,
            calibrated=saved.calibrated,
            _max_blocks=blocks,
            _keys=key_store,
            _values=value_store,
            **counts,
        )

    @property
    def meta_state(self) -> str:
        """An empty text, which mlx-lm before 0.32 and mlx-vlm read; ``state`` holds everything."""
        return ""

    @meta_state.setter
    def meta_state(self, nothing: Any) -> None:
        pass

    @classmethod
    def from_state(cls, state: Sequence[Any], meta_state: Any = "") -> Self:
        """Make a cache from a state; ``meta_state`` comes from older hosts and is empty.

        Raises:
            ValueError: If it is not the state of such a cache, or has another format version.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def prefix_cache_snapshot(self) -> dict[str, Any]:
        """Return what a prefix cache of mlx-vlm stores, without a copy."""
        return {"state": self.state, "meta_state": self.meta_state}

    def prefix_cache_restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`prefix_cache_snapshot`."""
        self.state = snapshot["state"]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, including room for growth."""
        return sum(store.nbytes for store in self._stores)

    @property
    def keys(self) -> mx.array | None:
        """An empty array in place of the keys.

        Pipeline-parallel models assign ``cache.keys = mx.depends(cache.keys, sent)``, so that MLX
        computes the arrays they sent together with the cache.
        """
        return None if self._keys is None else self._keys.exact[:, :, :0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        store, _ = self._filled()
        store.exact = mx.depends(store.exact, keys)

    @property
    def values(self) -> NoReturn:
        """An absent attribute: code that copies ``keys`` and ``values`` fails, and loses no tokens.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(
            f"[{type(self).__name__}] A compressed cache has no array of values; copy it with "
            "copy.deepcopy, or through its state."
        )

    @values.setter
    def values(self, values: mx.array) -> None:
        _, store = self._filled()
        store.exact = mx.depends(store.exact, values)

    def _served(
        self, views: tuple[KVView, KVView], new: Sequence[mx.array] = ()
    ) -> tuple[Any, Any]:
        """Return keys and values for the model: handles for the fused attention.

        Args:
            views: The views of keys and of values.
            new: The keys and values just appended, if any.
        """
        return views

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Self:
        """Warn, and return the cache unchanged; mlx-lm calls this when ``kv_bits`` is given."""
        config = self.config
        warnings.warn(
            f"kv_bits={bits} asks for mlx-lm's own cache quantization, but this cache is already "
            f"compressed by rotormlx, to {config.key_bits} bits for keys and {config.value_bits} "
            "for values; leave kv_bits out, or call rotormlx.remove(model) first.",
            stacklevel=2,
        )
        return self

    @property
    def bits(self) -> int:
        """An absent attribute that mlx-lm's own attention looks up before it reads keys and values.

        Raises:
            ValueError: While mlx-lm's attention cannot read compressed caches.
            AttributeError: Otherwise.
        """
        self._check_readable()
        raise AttributeError(f"{type(self).__name__} has no bits")

    def _check_readable(self) -> None:
        """Refuse to serve a model while no host's attention can read compressed caches."""
        if not readers:
            raise ValueError(
                f"[{type(self).__name__}] A model must be compressed before its attention can read "
                "compressed caches, but none is now; call rotormlx.apply(model) first."
            )

    @property
    def _stores(self) -> list[S]:
        return [store for store in (self._keys, self._values) if store is not None]

    def _filled(self) -> tuple[S, S]:
        if self._keys is None or self._values is None:
            raise ValueError(
                f"[{type(self).__name__}] The cache is empty; append keys and values first."
            )
        return self._keys, self._values

    @property
    def parts(self) -> tuple[Part, Part]:
        """The contents of the first store and of the second store."""
        return cache_fields.parts(self.kind, self.config)

    def _new_stores(self, *like: mx.array) -> tuple[S, S]:
        made = [
            self._store(
                part.config, self.layer, part.role, x[:, :, :0], calibrated, self._max_blocks
            )
            for part, x, calibrated in zip(
                self.parts, like, self.calibrated or (None, None), strict=True
            )
        ]
        return made[0], made[1]  # type: ignore[return-value]  # _store is S's class
