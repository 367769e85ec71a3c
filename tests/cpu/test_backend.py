"""The CPU backend inside MLX: tracing, streams, dtypes, memory, and who chooses it.

That it computes the right thing is in test_mlx_backend.py, which runs on every backend.
"""

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec.format import BLOCK, KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.mlx import backends
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends.cpu import CPUBackend
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache.single import RotorKVCache

needs_library = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"no CPU library: {cpu_library.missing()}"
)


@pytest.fixture(autouse=True)
def cpu_backend(request, monkeypatch):
    if "machine" not in request.fixturenames:
        monkeypatch.setenv("ROTORMLX_BACKEND", "cpu")


@pytest.fixture
def calls(monkeypatch):
    """Names of the library's functions that are called."""
    seen = []
    for name in ("encode", "decode", "attend"):
        function = getattr(cpu_library, name)

        def recorded(*a, name=name, function=function, **k):
            seen.append(name)
            return function(*a, **k)

        monkeypatch.setattr(cpu_library, name, recorded)
    return seen


def filled(tokens=300, dtype=mx.float32):
    mx.random.seed(0)
    keys, values = (mx.random.normal((1, 2, tokens, 64)).astype(dtype) for _ in "kv")
    cache = RotorKVCache(RotorConfig())
    cache.update_and_fetch(keys, values)
    return cache


def query(dtype=mx.float32, length=1):
    return mx.random.normal((1, 6, length, 64), key=mx.random.key(1)).astype(dtype)


@needs_library
def test_every_operation_is_the_library_s(calls):
    cache = filled()
    views = cache.keys_and_values()
    mx.eval(attend_view(query(), *views, scale=0.1))
    CPUBackend().decode(views[0].packed, views[0].codec)
    assert set(calls) == {"encode", "attend", "decode"}


def traced_by_compile(function, q):
    return mx.compile(function)(q)


def traced_by_export(function, q):
    calls = []
    mx.export_function(lambda event: calls.append(event["type"]), function, q)
    assert "primitive" in calls
    return function(q)


@needs_library
@pytest.mark.parametrize("traced", [traced_by_compile, traced_by_export])
def test_traced_functions_take_the_inherited_operations(calls, traced):
    """There are no numbers yet while a function is traced, so the library could read none."""
    views = filled().keys_and_values()
    q = query()
    expected = np.array(MLXBackend().attend(AttendCall(q, *views, scale=0.1)))
    mx.eval([view.exact for view in views], [view.packed for view in views])
    calls.clear()
    found = np.array(traced(lambda q: attend_view(q, *views, scale=0.1), q))
    # Float32 sums in another order.
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    assert calls == (["attend"] if traced is traced_by_export else [])


@needs_library
def test_encode_and_decode_can_be_traced(calls):
    x = mx.random.normal((1, 2, 2 * BLOCK, 64))
    for role in (KEY, VALUE):
        chosen = codec(RotorConfig(), 64, layer=0, role=role)
        packed = CPUBackend().encode(x, chosen)
        decoded = CPUBackend().decode(packed, chosen)
        calls.clear()

        def both(x, chosen=chosen):
            made = CPUBackend().encode(x, chosen)
            return made.words, CPUBackend().decode(made, chosen)

        words, again = mx.compile(both)(x)
        assert calls == []
        assert np.array_equal(np.array(words), np.array(packed.words))
        # Sums of 64 products in float32.
        assert np.allclose(np.array(again), np.array(decoded), rtol=0, atol=2e-6 * 8)


@needs_library
def test_inputs_under_way_on_another_stream_are_waited_for():
    views = filled().keys_and_values()
    expected = np.array(attend_view(query() * 3, *views, scale=0.1))
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        busy = mx.ones((700, 700))
        for _ in range(5):
            busy = busy @ busy / 700
        q = query() * 3 + 0 * busy[0, 0]
        mx.async_eval(q)
    out = attend_view(q, *views, scale=0.1)
    mx.async_eval(out + 1)
    assert np.array_equal(np.array(out), expected)


@needs_library
def test_output_does_not_change_with_what_comes_later():
    """An output is memory of its own, and a view is what the cache held then."""
    cache = filled()
    views = cache.keys_and_values()
    first = attend_view(query(), *views, scale=0.1)
    kept = np.array(first)
    for _ in range(2 * BLOCK):
        cache.update_and_fetch(mx.ones((1, 2, 1, 64)), mx.ones((1, 2, 1, 64)))
    second = np.array(attend_view(query(), *cache.keys_and_values(), scale=0.1))
    assert not np.array_equal(second, kept)
    assert np.array_equal(np.array(first), kept)
    assert np.array_equal(np.array(attend_view(query(), *views, scale=0.1)), kept)


@needs_library
@pytest.mark.parametrize(("tokens", "threads"), [(300, 1), (4000, 3)])
def test_little_work_takes_one_thread(monkeypatch, tokens, threads):
    """Another one would wake too late."""
    seen, attend = [], cpu_library.attend
    monkeypatch.setattr(cpu_library, "thread_count", lambda: 3)
    monkeypatch.setattr(
        cpu_library, "attend", lambda *a, **k: seen.append(k["threads"]) or attend(*a, **k)
    )
    attend_view(query(), *filled(tokens).keys_and_values(), scale=0.1)
    assert seen == [threads]


@needs_library
@pytest.mark.parametrize("of_cache", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("of_query", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_dtypes_may_differ(of_query, of_cache):
    views = filled(dtype=of_cache).keys_and_values()
    q = query(of_query, length=3)
    mask = mx.random.normal((3, views[0].tokens)).astype(of_cache)
    sink_logits = mx.arange(6).astype(of_query)
    options = {"scale": 0.1, "mask": mask, "sink_logits": sink_logits}
    found = attend_view(q, *views, **options)
    expected = MLXBackend().attend(AttendCall(q, *views, **options))
    expected = np.array(expected.astype(mx.float32))
    assert found.dtype == of_query
    # One unit in the last place of the dtype, between two roundings of nearly the same number.
    unit = {mx.float32: 2e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}[of_query]
    error = np.abs(np.array(found.astype(mx.float32)) - expected).max()
    assert error <= unit * np.abs(expected).max()


@needs_library
def test_masks_and_sinks_of_other_dtypes_are_numbers():
    views = filled().keys_and_values()
    tokens = views[0].tokens
    integers = mx.where(mx.arange(tokens) % 3 == 0, 0, -4)
    options = {"scale": 0.1, "sink_logits": mx.arange(6)}
    found = attend_view(query(), *views, mask=integers, **options)
    options["sink_logits"] = options["sink_logits"].astype(mx.float32)
    same = attend_view(query(), *views, mask=integers.astype(mx.float32), **options)
    assert np.array_equal(np.array(found), np.array(same))


@needs_library
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_decode_writes_every_dtype(dtype):
    chosen = codec(RotorConfig(), 64, layer=0, role=KEY)
    packed = CPUBackend().encode(mx.random.normal((1, 2, BLOCK, 64)), chosen)
    found = CPUBackend().decode(packed, chosen, dtype=dtype)
    expected = np.array(MLXBackend().decode(packed, chosen))
    assert found.dtype == dtype
    unit = {mx.float32: 2e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
    assert np.abs(np.array(found.astype(mx.float32)) - expected).max() <= unit * 8


@needs_library
def test_buffers_are_not_copied():
    """A step over a long cache takes no memory of MLX that grows with it."""
    taken = []
    for tokens in (1000, 8000):
        views = filled(tokens).keys_and_values()
        q = query()
        mx.eval(q, *((view.packed, view.exact, view.channel_scale) for view in views))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(attend_view(q, *views, scale=0.1))
        taken.append(mx.get_peak_memory() - before)
    assert taken[0] == taken[1]


# ---- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine seems to have."""

    def pretend(*, metal_gpu, device, lack):
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal_gpu)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
        monkeypatch.setattr(cpu_library, "missing", lambda: lack)

    monkeypatch.delenv("ROTORMLX_BACKEND", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("metal_gpu", "device", "lack", "name"),
    [
        (True, mx.gpu, None, "metal"),
        (True, mx.cpu, None, "cpu"),
        (False, mx.cpu, None, "cpu"),
        (False, mx.gpu, None, "mlx"),  # a CUDA build of MLX
        (False, mx.cpu, "it is not built", "mlx"),
    ],
)
def test_cpu_is_chosen_where_mlx_computes_on_the_cpu(machine, metal_gpu, device, lack, name):
    machine(metal_gpu=metal_gpu, device=device, lack=lack)
    assert backends.backend().name == name


def test_the_choice_follows_the_default_device(machine):
    """Although it is made once for each."""
    for device, name in ((mx.cpu, "cpu"), (mx.gpu, "metal"), (mx.cpu, "cpu")):
        machine(metal_gpu=True, device=device, lack=None)
        assert backends.backend().name == name


@pytest.mark.parametrize(
    ("device", "lack", "message"),
    [(mx.cpu, "it is not built", "it is not built"), (mx.gpu, None, "default device is the GPU")],
)
def test_cpu_by_name_is_refused_where_it_cannot_run(machine, monkeypatch, device, lack, message):
    machine(metal_gpu=False, device=device, lack=lack)
    monkeypatch.setenv("ROTORMLX_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=message):
        backends.backend()
    monkeypatch.delenv("ROTORMLX_BACKEND")
    assert message in backends.describe()


def test_mlx_by_name_is_taken_where_the_library_is(machine, monkeypatch):
    machine(metal_gpu=False, device=mx.cpu, lack=None)
    monkeypatch.setenv("ROTORMLX_BACKEND", "mlx")
    assert backends.backend().name == "mlx"
