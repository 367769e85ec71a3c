"""A cache and an attention function that look on while a model runs on a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.masking_utils import sdpa_mask

from rotormlx.codec.rotation import check_head_dim
from rotormlx.config import RotorConfig
from rotormlx.torch.exact import check_options
from rotormlx.torch.handle import KVHandle
from rotormlx.torch.layer import RotorLayer

# The attention function that pretends.
NAME = "rotormlx_probe"
# Tensors that attention may get and that change no score: masks say the same.
_HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
# What speaks against the model as a whole, while one is tried.
_REFUSED: ContextVar[list[str]] = ContextVar("refused")


class ProbeCache(DynamicCache):
    """A cache of such layers, of the kind that RotorCache is."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)


class ProbeLayer(RotorLayer):
    """Answers as a compressed layer; a step is the first one of a layer that is made for it."""

    def __init__(self, index: int) -> None:
        self.past: tuple[Tensor, Tensor] | None = None
        self.waiting = self.seen = False
        self.reason = ""
        super().__init__(RotorConfig(), index)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take tokens, ask a compressed layer whether it would, and hand out handles."""
        self.seen = self.waiting = True
        new = key_states, value_states
        past = self.past or tuple(x[:, :, :0] for x in new)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        self.past = keys, values
        self.length, self.is_initialized = keys.shape[2], True
        try:
            handles = RotorLayer(self.config, self.layer).update(keys, values)
        except ValueError as error:
            self.note(_required(error))
            return keys, values
        return _ProbeHandle(handles[0], keys, self), _ProbeHandle(handles[1], values, self)

    def note(self, reason: str) -> None:
        """Remember the first thing that speaks against compressing this layer."""
        self.reason = self.reason or reason

    def end_step(self) -> None:
        """What was handed out must have arrived by now."""
        if not self.seen:
            self.note("no token of text went through it")
        if self.waiting:
            self.note("the attention function must get its keys and values, but does not")
        self.waiting = False

    def _read(self, which: int) -> Tensor | None:
        if self.past is None:
            return None
        self.note("the cache must keep its tensors to itself, but the model reads them")
        return self.past[which]

    # Where transformers' own layers keep their tensors.
    keys = property(lambda self: self._read(0), lambda self, value: None)
    values = property(lambda self: self._read(1), lambda self, value: None)


class _ProbeHandle(KVHandle):
    """Notes what a handle refuses, and lets the tensor answer."""

    tensor: Tensor
    probe: ProbeLayer

    def __init__(self, handle: KVHandle, tensor: Tensor, probe: ProbeLayer) -> None:
        vars(self).update(vars(handle), tensor=tensor, probe=probe)

    def open(self, what: str) -> Tensor:
        """The tensor, with a note of what it is for."""
        self.probe.note(
            f"the attention function must get its keys and values untouched, but {what} gets them"
        )
        return self.tensor

    def __getitem__(self, index: object) -> Any:
        return self.open("indexing")[index]  # type: ignore[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.open(f".{name}"), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        opened = _opened(f"torch.{getattr(function, '__name__', function)}")
        return function(*tree_map(opened, args), **tree_map(opened, kwargs or {}))


def _opened(what: str) -> Callable[[Any], Any]:
    return lambda x: x.open(what) if isinstance(x, _ProbeHandle) else x


def _operator(name: str) -> Callable[..., Any]:
    def apply(handle: _ProbeHandle, *others: Any) -> Any:
        return getattr(handle.open(name), f"__{name}__")(*map(_opened(name), others))

    return apply


for _symbol in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    setattr(_ProbeHandle, f"__{_symbol}__", _operator(_symbol))
    setattr(_ProbeHandle, f"__r{_symbol}__", _operator(f"r{_symbol}"))


# ---- attention that pretends --------------------------------------------------------------------


@contextmanager
def trial() -> Iterator[list[str]]:
    """Collect what speaks against the model as a whole."""
    refused: list[str] = []
    token = _REFUSED.set(refused)
    try:
        yield refused
    finally:
        _REFUSED.reset(token)


def _pretend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Zeros in the shape of attention's output, and a look at what it is asked."""
    for x in (key, value):
        if isinstance(x, _ProbeHandle):
            x.probe.waiting = False
            x.probe.note(_objection(module, query, key, value, dropout, kwargs))
            if attention_mask is None and not _is_causal(module, is_causal, query):
                x.probe.note("attention without a mask must be causal, but is not")
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        objection = _exact_objection(module, value, kwargs)
        _REFUSED.get().extend([objection] if objection else [])
    batch, heads, tokens = query.shape[:3]
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _objection(
    module: torch.nn.Module, query: Tensor, key: Any, value: Any, dropout: float, kwargs: Any
) -> str:
    """Why compressed attention cannot do this; nothing if it can."""
    if not (isinstance(key, KVHandle) and key.goes_with(value)):
        return "attention must take keys with the values of their own layer, but mixes them"
    if query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        return (
            f"queries must have its key's head_dim {key.shape[-1]} and a multiple of its "
            f"{key.shape[1]} heads, but have shape {tuple(query.shape)}"
        )
    return _asks_for_more(module, dropout, kwargs)


def _exact_objection(module: torch.nn.Module, value: Tensor, kwargs: dict[str, Any]) -> str:
    """Why attention over an exact layer would differ from the model's own; nothing if not."""
    # torch's own attention has biases, and dropout.
    rest = {name: x for name, x in kwargs.items() if name != "position_bias"}
    if rest.get("s_aux") is not None:
        try:
            check_head_dim(value.shape[-1])
        except ValueError as error:
            return _required(error)
    return _asks_for_more(module, 0.0, rest)


def _is_causal(module: torch.nn.Module, asked: bool | None, query: Tensor) -> bool:
    """Whether queries see no later token, where no mask says it."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked) or (
        query.shape[2] == 1
    )


def _asks_for_more(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> str:
    try:
        check_options(module, dropout, kwargs)
    except ValueError as error:
        return _required(error)
    known = ("s_aux", *_HARMLESS)
    more = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in known]
    if more:
        return f"attention must need nothing else, but {type(module).__name__} gives {more[0]}"
    return ""


def _required(error: Exception) -> str:
    """What is required and what came; what to do is said by the one who asks."""
    return str(error).partition("] ")[2].partition(";")[0].rstrip(".")


AttentionInterface.register(NAME, _pretend)
AttentionMaskInterface.register(NAME, sdpa_mask)
