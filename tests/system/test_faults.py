"""What fails in the middle: an append leaves all of what was before, or all of what is after.

Failures come from a backend that gives up, from a memory limit, and from an interrupt at every step
of the Python code. Kernels that do not compile name themselves, and the model stays usable.
"""

from __future__ import annotations

import copy
import gc
import itertools
import re
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step

import rotormlx.torch
from rotormlx.codec import counts as counts_module
from rotormlx.codec import limits
from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.mlx import attention, hosts, integration
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend, cuda_text, metal, metal_attend
from rotormlx.mlx.backends import cuda as mlx_cuda
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache import batch as batch_module
from rotormlx.mlx.cache import batch_store, store
from rotormlx.mlx.cache import single as cache_module
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.torch import build, cuda, native
from rotormlx.torch import layer as torch_layer
from rotormlx.torch import store as torch_store
from rotormlx.torch.layer import RotorLayer
from tests.support import models as tiny_models
from tests.support import torch_models

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, H, D, DV = 2, 2, 4, 32, 16
SMALL = {"sink": 2, "window": 8}
# What happens to a cache before the append that fails; the append packs in every case.
CASES = {
    "empty": (RotorConfig(**SMALL), None, []),
    "tail-full": (RotorConfig(3, 2, **SMALL), None, [BLOCK + 9]),
    "packed": (RotorConfig(**SMALL), None, [5 * BLOCK]),
    "prefill-scale": (RotorConfig(rotation="rotor3", **SMALL), None, [BLOCK]),
    "begun-block": (RotorConfig(4, 3, **SMALL), None, [4 * BLOCK, -90]),
    "ring": (RotorConfig(**SMALL), 2 * BLOCK + 2 + 8 + 63, [5 * BLOCK]),
}
APPENDED = 3 * BLOCK


def tokens(count, seed, rows=B):
    rng = np.random.default_rng(seed)
    parts = (rng.normal(size=(rows, K, count, dim)).astype(np.float32) for dim in (D, DV))
    return tuple(map(mx.array, parts))


def appended(cache, steps):
    """Tokens appended, or forgotten where a number is negative."""
    for seed, count in enumerate(steps):
        if count < 0:
            cache.trim(-count)
        else:
            cache.update_and_fetch(*tokens(count, seed))
    return cache


def single(case):
    config, max_size, steps = CASES[case]
    return appended(RotorKVCache(config, 1, max_size), steps)


def batch(case):
    """The same, in rows of two lengths: the second row has 7 tokens of left padding."""
    config, max_size, steps = CASES[case]
    return appended(BatchRotorKVCache([0, 7], config, 1, max_size), steps)


def snapshot(cache):
    """All that a cache says of itself, as numpy arrays and numbers, and what attention reads."""
    state = [np.array(entry) if isinstance(entry, mx.array) else entry for entry in cache.state]
    state += [np.array(cache.offset), cache.size(), cache.empty(), cache.is_trimmable()]
    state.append(repr(cache.rows if hasattr(cache, "rows") else cache.counts))
    if not cache.empty() and cache.size():
        queries = mx.array(np.random.default_rng(9).normal(size=(B, H, 1, D)).astype(np.float32))
        state.append(np.array(attend_view(queries, *cache.keys_and_values(), scale=0.2)))
    return state


def appended_to(cache, pair):
    cache.update_and_fetch(*pair)
    return cache


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)
    )


# ---- a backend that fails -----------------------------------------------------------------------


class Failing:
    """The backend, whose n-th call of encode or prefill_scale raises."""

    def __init__(self, number, error):
        self.left, self.error = number, error

    def __getattr__(self, name):
        function = getattr(backend(), name)
        if name not in ("encode", "prefill_scale"):
            return function

        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("device lost")], ids=repr)
@pytest.mark.parametrize("make", [single, batch])
@pytest.mark.parametrize("case", CASES)
def test_a_failed_append_changes_nothing(monkeypatch, case, make, error):
    """Whichever encode of an append fails; the same append then gives what it gives at once."""
    more = tokens(APPENDED, 20)
    expected = snapshot(appended_to(make(case), more))
    for number in itertools.count(1):
        cache = make(case)
        before = snapshot(cache)
        failing = Failing(number, error)
        with monkeypatch.context() as patch:
            for module in (store, batch_store):
                patch.setattr(module, "backend", lambda failing=failing: failing)
            try:
                cache.update_and_fetch(*more)
            except type(error):
                assert same(snapshot(cache), before), f"call {number}"
            else:
                break
        assert same(snapshot(appended_to(cache, more)), expected)
    assert number > 2  # keys and values at least have failed


@pytest.mark.parametrize("make", [single, batch])
def test_tokens_that_do_not_fit_change_nothing(make):
    cache = make("packed")
    before = snapshot(cache)
    keys, values = tokens(APPENDED, 20)
    wrong = {
        "fewer values": (keys, values[:, :, 1:]),
        "one head": (keys[:, :1], values[:, :1]),
        "one row": (keys[:1], values[:1]),
        "head_dim": (keys[..., :24], values),
        "integers": (keys.astype(mx.int32), values),
        "three dimensions": (keys[0], values[0]),
    }
    for name, pair in wrong.items():
        with pytest.raises(ValueError, match=r"^\[\w*RotorKVCache\] "):
            cache.update_and_fetch(*pair)
        assert same(snapshot(cache), before), name


# ---- interrupts ---------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the n-th step of the Python code of some files.

    A step is a line, and every single operation of the functions that are named.
    """

    def __init__(self, number, modules, every_operation_of):
        self.left = number
        self.files = {module.__file__ for module in modules}
        self.names = every_operation_of

    def __enter__(self):
        sys.settrace(self._enter_frame)

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter_frame(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = frame.f_code.co_name in self.names
        return self._step

    def _step(self, frame, event, argument):
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._step


@pytest.mark.slow
@pytest.mark.parametrize("make", [single, batch])
@pytest.mark.parametrize("case", ["prefill-scale", "begun-block", "ring"])
def test_an_interrupted_append_is_whole_or_nothing(make, case):
    """Wherever it comes, keys are never longer than values, and counts are those of the bytes."""
    more = tokens(APPENDED, 20)
    ready = make(case)
    before = snapshot(ready)
    after = snapshot(appended_to(copy.deepcopy(ready), more))
    modules = (cache_module, batch_module, store, batch_store, counts_module)
    found = []
    for number in itertools.count(1):
        cache = copy.deepcopy(ready)
        try:
            with Interrupt(number, modules, {"update_and_fetch"}):
                cache.update_and_fetch(*more)
        except KeyboardInterrupt:
            now = snapshot(cache)
            found.append(same(now, after))
            assert found[-1] or same(now, before), f"step {number}"
        else:
            break
    # Nothing first, then everything, and never back.
    assert found == sorted(found)
    assert found.count(False) > 100
    assert found.count(True) >= 1


def rotor_layer(case):
    config, _, steps = CASES[case]
    layer = RotorLayer(config, 1)
    for seed, count in enumerate(steps):
        if count < 0:
            layer.crop(count)
        else:
            read(layer, count, seed)
    return layer


def read(layer, count, seed):
    """One step of a layer: update, then attention asks for the keys."""
    pair = (torch.from_numpy(np.array(x)) for x in tokens(count, seed))
    handle, _ = layer.update(*pair)
    return handle.step.read([0, 7] if layer.length == count else None)


def torch_snapshot(layer):
    """What counts of a layer, row by row."""
    found = [layer.length, layer.padding, layer.packed]
    for part in layer.stores or ():
        for row, (packed, held) in enumerate(zip(layer.packed, layer.tokens, strict=True)):
            blocks = -(-packed // BLOCK)
            exact, *rest, scale = part.saved(Counts(held, packed), single=False)
            counts = scale is not None and packed  # a row takes its scale with its first block
            found += [exact[row, :, : held - packed].numpy(), counts and scale[row].numpy().copy()]
            for array in rest:
                numbers = None if array is None else array[row, :, :blocks].numpy().copy()
                if numbers is not None and packed % BLOCK and array is rest[0]:
                    numbers[:, -1] &= part.codec.kept_bits(packed % BLOCK).view(np.int32)
                if numbers is not None and packed % BLOCK and array is rest[1]:
                    numbers[:, -1, packed % BLOCK :] = 0
                found.append(numbers)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prefill-scale", "begun-block", "tail-full"])
def test_an_interrupted_step_of_a_torch_layer_is_whole_or_nothing(case):
    """Or, before its tokens reach the layer, the next step is refused."""
    after = rotor_layer(case)
    read(after, APPENDED, 20)
    after = torch_snapshot(after)
    found = []
    for number in itertools.count(1):
        layer = rotor_layer(case)
        before = torch_snapshot(layer)
        pair = [torch.from_numpy(np.array(x)) for x in tokens(APPENDED, 20)]
        handle, _ = layer.update(*pair)
        try:
            with Interrupt(number, (torch_layer, torch_store), {"store", "_store"}):
                handle.step.read(None)
        except KeyboardInterrupt:
            pass
        else:
            break
        now = torch_snapshot(layer)
        if same(now, after):
            found.append("after")
        elif same(now, before):
            found.append("before")
            with pytest.raises(RuntimeError, match="were discarded; run the model again"):
                handle.step.read(None)
            read(layer, APPENDED, 20)
            assert same(torch_snapshot(layer), after)
        else:
            found.append("at the door")
            with pytest.raises(RuntimeError, match=r"never reached attention.* use a new cache"):
                layer.update(*pair)
    assert found == sorted(found, key=["at the door", "before", "after"].index)
    assert found.count("at the door") < 20
    assert found.count("before") > 100
    assert found.count("after") >= 1


# ---- limits that are known before ----------------------------------------------------------------


@pytest.fixture
def memory_limit():
    """Sets MLX's memory limit for the test."""
    usual = mx.get_memory_limit()
    yield mx.set_memory_limit
    mx.set_memory_limit(usual)


@pytest.mark.parametrize("make", [single, batch])
def test_what_memory_has_no_room_for_is_refused_before_anything_is_done(memory_limit, make):
    """To the byte: what the exact buffer and the packed ones will take."""
    cache, count = make("packed"), 40 * BLOCK
    before, pair = snapshot(cache), tokens(count, 20)
    mx.eval(pair)
    after = appended_to(copy.deepcopy(cache), pair)
    stores = after._keys, after._values
    packed = sum(a.nbytes for s in stores for a in s.packed if a is not None)
    rows = getattr(cache, "rows", [cache])
    exact = max(row.counts.exact for row in rows) + count
    needed = packed + B * K * exact * (D + DV) * 4
    mx.eval([store.arrays for store in stores])
    del after, stores
    mx.synchronize()

    memory_limit(mx.get_active_memory() + needed - 1)
    with pytest.raises(MemoryError, match=rf"Appending 2,560 tokens needs {needed:,} bytes, but"):
        cache.update_and_fetch(*pair)
    assert same(snapshot(cache), before)
    cache.update_and_fetch(*tokens(1, 21))  # needs no new buffer
    cache.trim(1)
    mx.eval(cache.state)
    memory_limit(mx.get_active_memory() + needed)
    cache.update_and_fetch(*pair)
    assert cache.size() == 5 * BLOCK + count


def test_a_full_ring_needs_no_more_memory(memory_limit):
    cache = single("ring")
    memory_limit(1)
    for seed in range(2 * BLOCK):
        cache.update_and_fetch(*tokens(1, seed))
    with pytest.raises(MemoryError):
        cache.update_and_fetch(*tokens(3 * BLOCK, 0))


@pytest.mark.parametrize("make", [single, batch])
def test_positions_beyond_32_bits_are_refused(make):
    """A cache with a limit goes on for ever, but its positions do not."""
    cache = make("ring")
    for row in getattr(cache, "rows", [cache]):
        row.counts.evicted = limits.MOST_TOKENS // BLOCK * BLOCK - 3 * BLOCK - row.counts.tokens
    cache.update_and_fetch(*tokens(2 * BLOCK, 1))
    before = snapshot(cache)
    assert np.all(np.array(cache.offset) < 2**31)
    with pytest.raises(ValueError, match=r"must have at most 2,143,289,344 tokens, but it would"):
        cache.update_and_fetch(*tokens(2 * BLOCK, 2))
    assert same(snapshot(cache), before)


def test_positions_of_a_torch_layer_are_refused_too(monkeypatch):
    monkeypatch.setattr(limits, "MOST_TOKENS", 5 * BLOCK)
    layer = rotor_layer("packed")
    before = torch_snapshot(layer)
    with pytest.raises(ValueError, match="must have at most 320 tokens, but it would have 321"):
        read(layer, 1, 0)
    assert same(torch_snapshot(layer), before)


@pytest.mark.parametrize("make", [single, batch])
def test_a_long_prompt_is_encoded_in_several_calls(monkeypatch, make):
    """A grid counts threads in 32 bits; the bytes do not tell where a prompt was cut."""
    expected = snapshot(appended_to(make("packed"), tokens(9 * BLOCK, 1)))
    monkeypatch.setattr(limits, "MOST_ENCODED", 2 * BLOCK)
    longest = []

    class Watched:
        def __getattr__(self, name):
            return getattr(backend(), name)

        def encode(self, x, *args, **kwargs):
            longest.append(x.shape[2])
            return backend().encode(x, *args, **kwargs)

    for module in (store, batch_store):
        monkeypatch.setattr(module, "backend", Watched)
    assert same(snapshot(appended_to(make("packed"), tokens(9 * BLOCK, 1))), expected)
    assert max(longest) == 2 * BLOCK


# ---- attention that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [[261, 260], [261, 261]], ids=["layer0", "layer1"])
def test_layers_of_a_model_meet_again_after_a_failed_step(monkeypatch, offsets):
    """Layers that a step has reached hold a token more; trim forgets it, bit for bit."""
    config = RotorConfig(8, 8, sink=2, window=64)
    model, ids = tiny_models.build("llama"), tiny_models.tokens(300)
    caches = integration.make_prompt_cache(model, config)
    tiny_models.logits(model, ids[:, :260], caches)

    class Broken(MLXBackend):
        def attend(self, call):
            if [cache.offset for cache in caches] == offsets:
                raise RuntimeError("device lost")
            return backend().attend(call)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "backend", Broken)
        with pytest.raises(RuntimeError, match="device lost"):
            model(ids[:, 260:261], cache=caches)
    assert [cache.offset for cache in caches] == offsets
    for cache in caches:
        cache.trim(cache.offset - 260)
    found = tiny_models.logits(model, ids[:, 260:], caches)
    fresh = integration.make_prompt_cache(model, config)
    tiny_models.logits(model, ids[:, :260], fresh)
    assert mx.array_equal(found, tiny_models.logits(model, ids[:, 260:], fresh))


# ---- kernels that do not compile -----------------------------------------------------------------


def failing_kernels(wanted, when):
    """What makes kernels: one fails where a real one does, the others give zeros."""

    class Kernel:
        def __init__(self, name, **_):
            self.fails = name.startswith(f"rotormlx_{wanted}")
            if self.fails and when == "made":
                raise RuntimeError("no such function")

        def __call__(self, *, output_shapes, output_dtypes, **_):
            if self.fails and when == "called":
                raise RuntimeError("no such function")
            # MLX evaluates this only when asked, and then finds that it cannot be done.
            number = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu)[0, 0]
            number = number if self.fails else mx.zeros(())
            return [
                mx.broadcast_to(number, shape).astype(dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]

    return Kernel


BACKENDS = {"metal": (metal, metal_attend), "mlx_cuda": (mlx_cuda, cuda_text)}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["made", "called", "evaluated"])
@pytest.mark.parametrize("kernel", ["encode", "attend", "attend_merge"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_kernel_that_fails_names_itself_and_the_model_stays_usable(
    monkeypatch, name, kernel, when
):
    model, prompt = tiny_models.build("llama"), tiny_models.tokens(200)[0]

    def text():
        return [token for token, _ in generate_step(prompt, model, max_tokens=5)]

    expected = text()
    kind = {"metal": metal.MetalBackend, "mlx_cuda": mlx_cuda.MLXCUDABackend}[name]
    for module in (attention, store):
        monkeypatch.setattr(module, "backend", kind)
    maker = {"metal": "metal_kernel", "mlx_cuda": "cuda_kernel"}[name]
    monkeypatch.setattr(mx.fast, maker, failing_kernels(kernel, when))
    # So short a text would need no second kernel.
    monkeypatch.setattr(metal_attend, "ALONE_STEPS", 0)
    clear_kernels(name)
    rotormlx.apply(model)
    try:
        device = re.escape(mx.device_info()["device_name"])
        says = rf"^\[kernel\] The kernel rotormlx_{kernel}\w* must compile and run on {device}, but"
        with pytest.raises(RuntimeError, match=says):
            text()
        with pytest.raises(RuntimeError, match=says):  # the second time too
            text()
    finally:
        gc.collect()  # models of other tests, which would count as users
        rotormlx.remove(model)
        clear_kernels(name)
    assert not hosts.MLX_LM.installed()
    assert text() == expected


def clear_kernels(name):
    for module in BACKENDS[name]:
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def test_a_kernel_is_waited_for_only_once(monkeypatch):
    """And not at all while a function is traced."""
    evaluated = []
    monkeypatch.setattr(mx.fast, "metal_kernel", failing_kernels("none", "never"))
    clear_kernels("metal")
    cache = single("packed")
    queries = mx.ones((B, H, 1, D))
    views = cache.keys_and_values()

    def attend(q):
        return metal_attend.attend(AttendCall(q, *views, scale=1.0))

    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: (evaluated.append(a), evaluate(*a)))
    mx.compile(attend)(queries)
    attend(queries)
    count = len(evaluated)
    attend(queries)
    clear_kernels("metal")
    assert count > 0
    assert len(evaluated) == count


def test_cuda_kernels_that_torch_cannot_compile_are_named(monkeypatch, tmp_path):
    model, ids = torch_models.build("llama"), torch_models.tokens(150)

    def text():
        return model.generate(ids, max_new_tokens=5)

    def load(**_):
        raise RuntimeError("Error building extension: launch_attend.cu(5): error")

    expected = text()
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "missing", lambda: None)
    monkeypatch.setattr(build.cpp_extension, "load", load)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # The operators of the CPU go where those of CUDA go.
    monkeypatch.setattr(native.cpu_library, "missing", lambda: "it is not for this test")
    monkeypatch.setattr(
        native, "torch_ops", SimpleNamespace(encode=cuda.encode, attend=cuda.attend)
    )
    cuda._can_compile.cache_clear()
    rotormlx.torch.apply(model)
    with pytest.raises(RuntimeError, match=r"launch_attend.cu.* for sm_90a \(Test GPU\), but"):
        text()
    rotormlx.torch.remove(model)
    cuda._can_compile.cache_clear()
    assert torch.equal(text(), expected)


# ---- what a CUDA grid holds ----------------------------------------------------------------------


def test_more_heads_than_a_cuda_grid_holds_are_refused(monkeypatch):
    """Before any kernel is made; the shapes alone say it."""
    monkeypatch.setattr(cuda_text, "codec_kernel", None)
    monkeypatch.setattr(cuda_text, "parts_kernel", None)
    chosen = single("packed")._keys.codec
    says = r"at most 65,535 on CUDA, but 32,768 rows of 2 KV heads were given; split the batch"
    rows = mx.broadcast_to(mx.zeros((1, 1, 1, 1)), (2**15, 2, BLOCK, D))
    with pytest.raises(ValueError, match=says):
        mlx_cuda.MLXCUDABackend().encode(rows, chosen)
    rows = torch.zeros(1).expand(2**15, 2, BLOCK, D)
    monkeypatch.setattr(cuda, "_operators_for", lambda *_: "some")
    with pytest.raises(ValueError, match=says):
        cuda.encode(rows, chosen)
