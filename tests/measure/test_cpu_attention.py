"""The attention of measurements on a CPU is MLX's."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import QuantizedKVCache

from rotormlx.measure.cpu_attention import FEWEST, attended, numpy_attention

B, H, K, L, S, D = 2, 6, 2, 11, 45, 32
pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="needs MLX on the CPU"
)


def arrays(dtype: mx.Dtype, length: int = L) -> list[mx.array]:
    shapes = [(B, H, length, D), (B, K, S, D), (B, K, S, D)]
    return [mx.random.normal(s, key=mx.random.key(i)).astype(dtype) for i, s in enumerate(shapes)]


def masks() -> dict[str, Any]:
    shown = mx.random.uniform(shape=(B, 1, L, S), key=mx.random.key(7)) > 0.4
    return {
        "none": None,
        "causal": "causal",
        "booleans": shown,
        "numbers": mx.where(shown, 0.5, -mx.inf),
    }


def float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_attention_is_mlx_attention(mask: str, sinks: bool, dtype: mx.Dtype) -> None:
    q, k, v = arrays(dtype)
    chosen = masks()[mask]
    if mask == "numbers":
        chosen = chosen.astype(dtype)
    options: dict[str, Any] = {"scale": 0.3, "mask": chosen}
    if sinks:
        options["sinks"] = mx.linspace(-2, 3, H).astype(dtype)
    # Judged in float32, from the same rounded inputs.
    wide = {
        name: x.astype(mx.float32) if isinstance(x, mx.array) and x.dtype == dtype else x
        for name, x in options.items()
    }
    wanted = mx.fast.scaled_dot_product_attention(
        *(x.astype(mx.float32) for x in (q, k, v)), **wide
    )
    mx.eval(wanted)
    with numpy_attention():
        found = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    assert (found.dtype, found.shape) == (dtype, (B, H, L, D))
    # float32 sums of 45 terms in another order; bfloat16 rounds results up to 2 to 2^-8.
    tolerance = 1e-5 if dtype == mx.float32 else 0.008
    assert np.abs(float32(found) - float32(wanted)).max() < tolerance


def test_sinks_take_their_share() -> None:
    q, k, v = (float32(x) for x in arrays(mx.float32))
    plain = attended(q, k, v, 0.3)
    # A sink as heavy as all tokens together halves what a query gets.
    scores = np.einsum("bhld,bhsd->bhls", 0.3 * q, np.repeat(k, H // K, axis=1))
    heavy = np.log(np.exp(scores[0, 4, 7]).sum())
    halved = attended(q, k, v, 0.3, sinks=np.full(H, heavy, np.float32))
    np.testing.assert_allclose(halved[0, 4, 7], plain[0, 4, 7] / 2, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_the_quantized_cache_attends_as_mlx_lm_lets_it(mask: str | None) -> None:
    _, k, v = arrays(mx.float32)
    cache = QuantizedKVCache(group_size=32, bits=4)
    codes = cache.update_and_fetch(k, v)

    def out() -> np.ndarray:
        q = arrays(mx.float32)[0]  # mlx-lm scales them in place
        return float32(
            base.scaled_dot_product_attention(q, *codes, cache=cache, scale=0.3, mask=mask)
        )

    wanted = out()
    with numpy_attention():
        found = out()
    # float32 sums of 45 terms in another order.
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_few_queries_and_what_comes_after_stay_with_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = mx.fast.scaled_dot_product_attention
    seen: list[int] = []

    def watched(q: mx.array, *rest: Any, **options: Any) -> mx.array:
        seen.append(q.shape[2])
        return fast(q, *rest, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    with ExitStack() as stack:
        stack.enter_context(numpy_attention())
        for length in (1, FEWEST - 1, FEWEST):
            mx.fast.scaled_dot_product_attention(*arrays(mx.float32, length), scale=1.0)
    assert seen == [1, FEWEST - 1]
    assert mx.fast.scaled_dot_product_attention is watched
