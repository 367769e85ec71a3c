"""Kernel launches of one layer in a decode step; they are counted on any machine."""

import mlx.core as mx
import pytest

from scripts.launches import HEAD_DIM, KV_HEADS, REPEATS, Counted, Step, count, counted, using

# Nothing packed; both kinds of tokens within a step each; several parts.
FEW, SOME, MANY = 100, 300, 4000


@pytest.mark.parametrize(
    ("name", "tokens", "attention"),
    [
        *(("metal", FEW, Counted(1, 1)), ("metal", SOME, Counted(1, 1))),
        ("metal", MANY, Counted(2, 2)),
        *(("mlx_cuda", FEW, Counted(3, 2)), ("mlx_cuda", MANY, Counted(4, 3))),
        *(("mlx", FEW, Counted(49, 26)), ("mlx", SOME, Counted(213, 106))),
    ],
)
def test_launches_of_a_step(name, tokens, attention):
    """MLX-CUDA has a node beside its three kernels that copies queries only if they have gaps."""
    assert counted(name, Step(tokens)) == (Counted(2, 2), attention)


@pytest.mark.parametrize(
    "step",
    [
        Step(MANY, rotation="dense"),
        Step(MANY, batch=3, dtype=mx.bfloat16),
        Step(MANY, dtype=mx.float32, mask="causal"),
        Step(MANY, sink_logits=mx.zeros(KV_HEADS * REPEATS, mx.bfloat16)),
        Step(MANY, mask=mx.ones((1, 1, 1, MANY + 1), mx.bool_)),
    ],
    ids=["dense", "batch", "causal", "sink logits", "mask"],
)
def test_nothing_makes_metal_launch_more(step):
    _, attention = counted("metal", step)
    assert attention.launches == 2


@pytest.mark.parametrize("name", ["metal", "mlx_cuda"])
def test_mlx_operations_launch_many_more(name):
    """The count sees operations: those of the backend in MLX operations."""
    _, fused = counted(name, Step(MANY))
    _, plain = counted("mlx", Step(MANY))
    assert plain.launches > 20 * fused.launches


def test_views_launch_nothing_and_joining_launches_by_array():
    def function(x):
        joined = mx.concatenate([x, x, mx.swapaxes(x, 0, 1)])
        return [mx.pad(joined.astype(mx.float16), 1), x[None, :2].reshape(-1)]

    with using("mlx"):
        found = count(function, mx.zeros((HEAD_DIM, HEAD_DIM)))
    assert found.launches == 3 + 1 + 2
    assert found.nodes >= 6
