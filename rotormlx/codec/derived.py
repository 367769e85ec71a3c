"""Caches results derived from an object, such as a rotation, for as long as the object exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

Thing_contra = TypeVar("Thing_contra", contravariant=True)
Rest = ParamSpec("Rest")
Result_co = TypeVar("Result_co", covariant=True)


class Derived(Protocol[Thing_contra, Rest, Result_co]):
    """A function of an object whose results are cached."""

    def __call__(
        self, thing: Thing_contra, /, *args: Rest.args, **kwargs: Rest.kwargs
    ) -> Result_co:
        """Return the result for an object and these arguments."""

    def cache_clear(self) -> None:
        """Forget all results."""


def derived(
    function: Callable[Concatenate[Thing_contra, Rest], Result_co],
) -> Derived[Thing_contra, Rest, Result_co]:
    """Cache results like ``functools.cache``, but drop them when the first argument is deleted.

    A model's calibrated rotations are large. ``functools.cache`` would keep them, and the data that
    backends derive from them, after the model is deleted. A result must not refer to the first
    argument.
    """
    kept: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

    @wraps(function)
    def found_or_made(thing: Any, /, *args: Any, **kwargs: Any) -> Any:
        results = kept.get(thing)
        if results is None:
            results = kept.setdefault(thing, {})
        key = args, *kwargs.items()
        if key not in results:
            results[key] = function(thing, *args, **kwargs)
        return results[key]

    found_or_made.cache_clear = kept.clear  # type: ignore[attr-defined]
    return cast(Derived[Thing_contra, Rest, Result_co], found_or_made)
