"""Handles that a compressed layer returns instead of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rotormlx.codec.format import ROLES

Function = TypeVar("Function", bound=Callable[..., Any])
ADVICE = (
    "its attention must be rotormlx's: call "
    'model.set_attn_implementation("rotormlx") or rotormlx.torch.apply(model) first'
)
# Operations for which Python would use a default, or raise an error of its own.
_OPERATIONS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_REFUSED = (
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in _OPERATIONS),
    *("__neg__", "__pos__", "__abs__", "__invert__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__round__"),
    *("__setitem__", "__delitem__", "__contains__", "__reversed__"),
)


def untraced(function: Function) -> Function:
    """Make ``torch.compile`` call a function between its graphs, without tracing it.

    Packing depends on the number of tokens, so a graph of one step does not fit the next.
    """
    reason = (
        "[RotorCache] Compressed attention runs between graphs, but one graph was requested; "
        "compile without fullgraph=True."
    )
    kept = torch.compiler.disable(function, reason=reason)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The wrapper that keeps the compiler out costs more time than the step itself.
        chosen = kept if torch.compiler.is_dynamo_compiling() else function
        return chosen(*args, **kwargs)

    return cast(Function, call)


class KVHandle:
    """A stand-in for a layer's keys or values between ``update`` and the attention function.

    It has a shape, dtype and device like a tensor, and raises an error for any other use.

    Args:
        step: The step that the handle belongs to; attention reads it.
        role: ``"key"`` or ``"value"``.
        layer: Index of the layer.
        like: The new tokens, ``[B, K, L, D]``.
        tokens: Number of all tokens, S.
    """

    ndim = 4

    def __init__(self, step: Any, role: str, layer: int, like: Tensor, tokens: int) -> None:
        self.step = step
        self.role = role
        self.layer = layer
        self._like, self._tokens = like, tokens

    def goes_with(self, values: object) -> bool:
        """Return whether these are the keys, and ``values`` the values, of one step."""
        return (
            isinstance(values, KVHandle)
            and (self.role, values.role) == ROLES
            and self.step is values.step
        )

    @property
    def shape(self) -> torch.Size:
        """Shape ``[B, K, S, D]``, with all tokens."""
        batch, heads, _, head_dim = self._like.shape
        return torch.Size((batch, heads, self._tokens, head_dim))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the new tokens."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the new tokens."""
        return self._like.device

    @property
    def requires_grad(self) -> bool:
        """Whether the new tokens require a gradient."""
        return self._like.requires_grad

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Return the number of elements, with all tokens."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"KVHandle({self.role}s of layer {self.layer}, {tuple(self.shape)}, {self.dtype})"

    def refuse(self, what: str) -> NoReturn:
        """Raise the error of every other use."""
        raise ValueError(
            f"[RotorCache] The compressed {self.role}s of layer {self.layer} must be passed to "
            f"attention unchanged, but the model uses {what} on them; {ADVICE}."
        )

    def __getitem__(self, index: object) -> NoReturn:
        self.refuse("indexing")

    def __iter__(self) -> Iterator[NoReturn]:
        self.refuse("iteration")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse(f".{name}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        # Handles may be in lists, as in torch.cat.
        leaves = tree_leaves((args, kwargs))
        handle = next(leaf for leaf in leaves if isinstance(leaf, cls))
        handle.refuse(f"torch.{getattr(function, '__name__', function)}")


def _refusing(name: str) -> Any:
    def refused(self: KVHandle, *_: object) -> NoReturn:
        self.refuse(name.strip("_"))

    return refused


for _name in _REFUSED:
    setattr(KVHandle, _name, _refusing(_name))
KVHandle.__hash__ = object.__hash__  # type: ignore[method-assign]
