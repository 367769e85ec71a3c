"""The interface to a package that runs models, and how such a package is extended.

About 105 model files of mlx-lm and 150 of mlx-vlm bind ``scaled_dot_product_attention`` by name
when they are imported, so replacing the attribute of a module would reach none of them. But the
function object is the same everywhere. Its ``__code__`` is exchanged for code that checks the type
of the keys, and runs the original code if they are arrays.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, ClassVar, NamedTuple

from mlx.nn.layers.base import Module

from rotormlx.mlx.cache import base
from rotormlx.mlx.cache.classes import CLASSES
from rotormlx.mlx.host_caches import GROWING

_VARARGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
# Held while a host is changed or restored, and while users of the change are counted.
_lock = threading.RLock()


class Exchange(NamedTuple):
    """A function of a host whose code is exchanged.

    module: Full name of the module that defines it.
    name: Its name in that module.
    replacement: The function whose code it gets. It must have the same signature, unless it takes
        ``*args`` and ``**options``; then the signature must only have the parameters ``needs``.
    needs: The parameters that such a signature must have.
    """

    module: str
    name: str
    replacement: Any
    needs: tuple[str, ...] = ()

    @property
    def function(self) -> Any:
        """The function object, the same in every module that imported it."""
        return vars(importlib.import_module(self.module))[self.name]


class _Run:
    """A user of a host's change that is not a model."""


class Host(ABC):
    """A package that makes caches for models and computes attention over them."""

    # The name for pip, and the name for import.
    name: ClassVar[str]
    package: ClassVar[str]
    # The oldest and the newest version with which the tests ran.
    tested: ClassVar[tuple[str, str]]

    def __init__(self) -> None:
        # Functions with the original code, by name; empty while the host is unchanged.
        self._original: dict[str, FunctionType] = {}
        # The users of the change, by id: models, and blocks of :meth:`in_place`.
        self._users: dict[int, weakref.ref[Any]] = {}

    # ---- the properties of a host ---------------------------------------------------------------

    @property
    @abstractmethod
    def exchanges(self) -> tuple[Exchange, ...]:
        """The functions whose code is exchanged."""

    @property
    def caches(self) -> ModuleType:
        """The module of its caches, in which it also looks up classes by name."""
        return importlib.import_module(f"{self.package}.models.cache")

    @property
    def version(self) -> str:
        """The installed version."""
        return str(importlib.import_module(self.package).__version__)

    @property
    def is_available(self) -> bool:
        """Whether it is installed."""
        return importlib.util.find_spec(self.package) is not None

    def load(self, path_or_repo: str, **options: Any) -> tuple[Any, ...]:
        """Load with the host's ``load``, without reading weights; the model comes first."""
        own = importlib.import_module(self.package).load
        loaded: tuple[Any, ...] = own(path_or_repo, lazy=True, **options)
        return loaded

    def target(self, model: Module) -> Module:
        """Return the part of a model that makes caches and takes tokens: the model itself."""
        return model

    def own_caches(self, model: Any) -> list[Any]:
        """Return the caches that the model's class makes, ignoring changes to the instance."""
        make = getattr(type(model), "make_cache", None)
        growing = getattr(self.caches, GROWING)
        return [growing() for _ in model.layers] if make is None else list(make(model))

    # ---- changing it ----------------------------------------------------------------------------

    def install(self) -> None:
        """Make the host's attention, caches and files support compressed caches.

        Calling it again changes nothing. The change lasts until :meth:`remove`, or until the last
        user is released. An untested version of the host is accepted if its functions suit.

        Raises:
            RuntimeError: If a function is missing or has another signature; nothing is changed
                then.
        """
        with _lock:
            if self._original:
                return
            exchanges = self.exchanges
            for exchange in exchanges:
                self._check(exchange)
            for exchange in exchanges:
                self._original[exchange.name] = _exchanged(exchange)
            vars(self.caches).update(CLASSES)
            base.readers.add(self.name)

    def remove(self) -> None:
        """Restore the host's own code objects, even if models still use the change.

        Calling it again changes nothing.
        """
        with _lock:
            self._users.clear()
            if not self._original:
                return
            for exchange in self.exchanges:
                function = exchange.function
                function.__code__ = self._original.pop(exchange.name).__code__
                vars(function).pop("__signature__", None)
            for name in CLASSES:
                vars(self.caches).pop(name, None)
            base.readers.discard(self.name)

    def installed(self) -> bool:
        """Whether the host's attention can read compressed keys now."""
        return bool(self._original)

    def use(self, user: Any) -> None:
        """Install for a user, such as a model, until :meth:`release` or until it is deleted.

        Raises:
            RuntimeError: As :meth:`install`.
        """
        with _lock:
            self.install()
            self._users[id(user)] = weakref.ref(user)

    def release(self, user: Any) -> None:
        """Unregister a user; the host's code objects are restored when no user is left."""
        with _lock:
            self._users.pop(id(user), None)
            if all(other() is None for other in self._users.values()):
                self.remove()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the change for the duration of a block.

        Raises:
            RuntimeError: As :meth:`install`.
        """
        run = _Run()
        self.use(run)
        try:
            yield
        finally:
            self.release(run)

    def own(self, name: str) -> Any:
        """Return a function of the host with its original code."""
        if (own := self._original.get(name)) is not None:
            return own
        # Another thread has just called remove(), so the function has its original code again.
        return next(exchange.function for exchange in self.exchanges if exchange.name == name)

    # ---- inside ---------------------------------------------------------------------------------

    def _check(self, exchange: Exchange) -> None:
        """Refuse a function that is missing or has another signature."""
        try:
            function = exchange.function
        except (ImportError, KeyError):
            raise self._incompatible(f"a function {exchange.name}") from None
        if not isinstance(function, FunctionType) or function.__code__.co_freevars:
            raise self._incompatible(f"a plain function {exchange.name}")
        ours = inspect.signature(exchange.replacement)
        if exchange.needs:
            missing = set(exchange.needs) - set(inspect.signature(function).parameters)
            if missing:
                raise self._incompatible(f"{exchange.name}(..., {', '.join(sorted(missing))})")
        elif function.__code__.co_flags & _VARARGS or _names(function) != _names(ours):
            raise self._incompatible(f"{exchange.name}({', '.join(ours.parameters)})")

    def _incompatible(self, wanted: str) -> RuntimeError:
        oldest, newest = self.tested
        return RuntimeError(
            f"[hook] rotormlx needs {self.name} with {wanted}, but {self.name} {self.version} has "
            f"none; versions {oldest} to {newest} work: pip install '{self.name}=={newest}'."
        )


def _exchanged(exchange: Exchange) -> FunctionType:
    """Exchange the code of a function; return a function with the original code."""
    function = exchange.function
    own = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    if exchange.needs:
        function.__signature__ = inspect.signature(function)
    function.__code__ = exchange.replacement.__code__
    return own


def _names(function: Any) -> list[tuple[str, Any, Any]]:
    """Return names, kinds and defaults of parameters, without types."""
    signature = function if isinstance(function, inspect.Signature) else inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]
