"""The operator ``torch.ops.rotormlx.step``: a decode step whose lengths are on the device.

It stores the new tokens, packs a block if one is full, and attends, all in buffers of a fixed place
and size. So ``torch.compile(fullgraph=True)`` can trace it, and a CUDA graph can replay it. A block
is packed at the start of the step after the one that filled the tail; attention reads the same
bytes as if it had been packed at the end of that step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotormlx.codec.format import Packed
from rotormlx.torch import checks, cuda, native, ops
from rotormlx.torch.store_step import Step, store
from rotormlx.torch.torch_ops import AttendCall

torch.library.define(
    "rotormlx::step",
    "(Tensor query, Tensor keys, Tensor values, Tensor(a!) lengths, Tensor(k!) counter, "
    "Tensor(b!) key_exact, "
    "Tensor(c!) key_words, Tensor(d!) key_scales, Tensor(e!) key_centres, "
    "Tensor(f!)? key_channel_scale, Tensor(g!) value_exact, Tensor(h!) value_words, "
    "Tensor(i!) value_scales, Tensor(j!)? value_channel_scale, Tensor? mask, Tensor? sink_logits, "
    "*, int key_bits, int value_bits, str rotation, str value_rotation, int seed, int layer, "
    "int sink, int window, bool own_scale, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


_STORE: dict[str, Callable[[Step], None]] = {
    "cpu": partial(store, encode=native.encode),
    "cuda": cuda.store,
}


def step_fitting(stored: Step, call: AttendCall) -> Tensor:
    """Run the operator on parts that are known to fit (a cache's own buffers).

    Nothing is checked, and the call cannot be traced.
    """
    _STORE.get(call.query.device.type, store)(stored)
    return ops.attend_fitting(call)


def _fake(stored: Step, call: AttendCall) -> Tensor:
    """Return an output of the right shape and dtype, for tracing."""
    return ops.fake_attend(call)


def _step_with(implementation: Callable[[Step, AttendCall], Tensor]) -> Callable[..., Tensor]:
    def step(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        counter: Tensor,
        key_exact: Tensor,
        key_words: Tensor,
        key_scales: Tensor,
        key_centres: Tensor,
        key_channel_scale: Tensor | None,
        value_exact: Tensor,
        value_words: Tensor,
        value_scales: Tensor,
        value_channel_scale: Tensor | None,
        mask: Tensor | None,
        sink_logits: Tensor | None,
        *,
        key_bits: int,
        value_bits: int,
        rotation: str,
        value_rotation: str,
        sink: int,
        window: int,
        own_scale: bool,
        scale: float,
        **coding: Any,
    ) -> Tensor:
        tensors = (query, keys, values, key_exact, value_exact, mask, sink_logits)
        names = ("query", "keys", "values", "exact_keys", "exact_values", "mask", "sink_logits")
        checks.require_no_gradient("step", **dict(zip(names, tensors, strict=True)))
        checks.require_vectors("step", query=query, keys=keys, values=values)
        key_view, value_view = ops.views_of(
            (key_exact, Packed(key_words, key_scales, key_centres), key_channel_scale),
            (value_exact, Packed(value_words, value_scales, None), value_channel_scale),
            bits=(key_bits, value_bits),
            rotations=(rotation, value_rotation),
            **coding,
        )
        stored = Step(
            (keys, values), lengths, counter, key_view, value_view, sink, window, own_scale
        )
        causal = mask is None
        call = AttendCall(
            query, lengths, key_view, value_view, sink, scale, causal, mask, sink_logits
        )
        checks.check_step(stored.new, counter, call, window)
        checks.check_call(call)
        return implementation(stored, call)

    return step


torch.library.impl("rotormlx::step", ("cpu", "cuda"), _step_with(step_fitting))
torch.library.register_fake("rotormlx::step", _step_with(_fake))
