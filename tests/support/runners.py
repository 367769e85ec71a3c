"""The platforms whose kernels the tests run: on the device where it is there, else emulated.

All have the same calls. Arrays that go to kernels lie among others that must not be read. Nowhere
else in tests/gpu is a backend's ``attend`` or a launcher called.
"""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec.format import Packed
from rotormlx.kernels import cuda_plan
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import cuda, cuda_text, metal, metal_attend
from tests import emulator
from tests.emulator.cuda import MLXKernel
from tests.support import cuda_calls
from tests.support.attend_cases import Launch
from tests.support.codec_cases import as_numpy


def with_gaps(a):
    """The same array as a part of a larger one whose other numbers must not be read."""
    if a is None:
        return None
    wide = np.full([n + 1 for n in a.shape], np.nan if a.dtype.kind == "f" else 2**32 - 1, a.dtype)
    wide[tuple(slice(n) for n in a.shape)] = a
    return mx.array(wide)[tuple(slice(n) for n in a.shape)]


class BackendRunner:
    """A backend of the MLX side.

    Args:
        name: In the ids of tests.
        backend: Whose kernels run.
        on_device: Whether the device is here.
        maker: Name of the function in ``mx.fast`` that makes kernels, if any does.
        emulated: What stands in for that function without the device.
        caches: Functions of the backend that keep the kernels they have made.
    """

    def __init__(self, name, backend, *, on_device=True, maker=None, emulated=None, caches=()):
        self.name, self.backend, self.on_device = name, backend, on_device
        self._maker, self._caches = maker, caches
        self._make = emulated if maker and not on_device else None

    @contextlib.contextmanager
    def kernels(self, make=None):
        """The backend's kernels are made anew, by ``make`` or as this machine can run them."""
        make = make or self._make
        with pytest.MonkeyPatch.context() as patch:
            if make:
                patch.setattr(mx.fast, self._maker, make)
            for cached in self._caches:
                cached.cache_clear()
            yield
        for cached in self._caches:
            cached.cache_clear()

    def missing(self):
        """Why nothing can run here, or None."""
        return None if self.on_device else emulator.missing()

    def encode(self, x, chosen, *, scale=None, centres=None, start=0, state=None):
        """Packed rows as numpy arrays, of an MLX array and numpy arrays."""
        given = {"channel_scale": with_gaps(scale), "centres": with_gaps(centres), "start": start}
        if state is not None:
            given["state"] = with_gaps(np.repeat(state, 2, -1))[..., ::2]
        return as_numpy(self.backend.encode(x, chosen, **given))

    def decode(self, packed, chosen, *, scale=None, dtype=mx.float32):
        """An MLX array, of numpy arrays."""
        given = Packed(*map(with_gaps, packed))
        return self.backend.decode(given, chosen, channel_scale=with_gaps(scale), dtype=dtype)

    def attend(self, queries, keys, values, *, launch=None, **options):
        """Attention over two views; ``options`` are scale, mask and sink_logits; see AttendCall."""
        with self._launched_as(launch or Launch()):
            return self.backend.attend(AttendCall(queries, keys, values, **options))

    def _launched_as(self, launch):
        """Calls of attend are cut in this way, where there is one."""
        return contextlib.nullcontext()


class MetalRunner(BackendRunner):
    """The Metal backend."""

    def __init__(self):
        super().__init__(
            "metal",
            metal.MetalBackend(),
            on_device=mx.metal.is_available(),
            maker="metal_kernel",
            emulated=emulator.metal_kernel,
            caches=(
                *(metal._codec_kernel, metal._rotor3_kernel, metal._metal_kernel),
                *(metal_attend._attend_kernel, metal_attend._merge_kernel),
                *(metal_attend._prefill_kernel, metal_attend._kernel),
            ),
        )

    def rotor3(self, x, chosen, *, seed, layer):
        """The published method there and back, on rows ``[n, D]`` with gaps behind them."""
        wide = mx.pad(x, ((0, 1), (0, 1)), constant_values=np.nan)
        x = wide[: x.shape[0], : x.shape[1]]
        return metal.rotor3_quantize_dequantize(x, chosen.bits, seed=seed, layer=layer)

    @contextlib.contextmanager
    def _launched_as(self, launch):
        """Calls of attend are cut in this way."""
        with pytest.MonkeyPatch.context() as patch:
            for name, number in zip(("SIMDGROUPS", "MAX_PARTS"), launch.steps or (), strict=False):
                patch.setattr(metal_attend, name, number)
            if launch.levels or not self.on_device:
                # The emulator is slow at shuffles.
                patch.setenv("ROTORMLX_METAL_LEVELS", launch.levels or "table")
            if launch.kernels > 1:
                patch.setattr(metal_attend, "ALONE_STEPS", 0)
            yield

    @contextlib.contextmanager
    def mutated(self, changes, kernel=None, *, once=True):
        """The text of the kernel of this name is changed, or that of all; each change must apply.

        Args:
            changes: Pairs of an old and a new text.
            kernel: How the name of a kernel of the backend begins.
            once: Whether an old text must stand once in a kernel.
        """
        applied = set()

        def changed(text, old, new):
            assert not once or text.count(old) <= 1, f"{old!r} must stand once"
            applied.update([old] if old in text else [])
            return text.replace(old, new)

        def make(*, source, header, name, **more):
            for old, new in changes if name.startswith(kernel or "") else ():
                source, header = (changed(text, old, new) for text in (source, header))
            return emulator.metal_kernel(source=source, header=header, name=name, **more)

        with self.kernels(make):
            yield
        assert applied == {old for old, _ in changes}, f"no kernel of this case holds {changes}"

    @contextlib.contextmanager
    def recorded(self, on_kernel):
        """``on_kernel(kernel, launch)`` is called with each kernel before it runs."""

        def make(*arguments, **more):
            kernel = emulator.metal_kernel(*arguments, **more)

            def call(**launch):
                on_kernel(kernel, launch)
                return kernel(**launch)

            return call

        with self.kernels(make):
            yield


@contextlib.contextmanager
def planned_as(launch):
    """CUDA calls of attend are planned in this way."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            if launch.shares_rows:
                patch.setattr(cuda_plan, "MANY_ROWS", 1)
                cuda_plan.attend_plan.cache_clear()
            yield
    finally:
        cuda_plan.attend_plan.cache_clear()


class MLXCUDARunner(BackendRunner):
    """The CUDA backend of MLX's own CUDA build."""

    def __init__(self):
        kinds = ("codec", "query", "parts", "merge")
        super().__init__(
            "mlx_cuda",
            cuda.MLXCUDABackend(),
            on_device=mx.cuda.is_available(),
            maker="cuda_kernel",
            emulated=MLXKernel,
            caches=[getattr(cuda_text, f"{kind}_kernel") for kind in kinds],
        )

    def _launched_as(self, launch):
        """Calls of attend are cut in this way."""
        return planned_as(launch)


class CUDARunner:
    """The launchers of cuda_kernels/launch.h, in the emulator."""

    name = "cuda"
    on_device = False
    backend = cuda_calls  # its functions are those of a backend

    def __init__(self):
        self._changes = ()

    @contextlib.contextmanager
    def kernels(self):
        """Nothing to put in place."""
        yield

    def missing(self):
        """Why nothing can run here, or None."""
        return emulator.missing()

    @contextlib.contextmanager
    def mutated(self, changes):
        """The text is changed; each old text must stand in it once."""
        self._changes = tuple(changes)
        try:
            yield
        finally:
            self._changes = ()

    def encode(self, x, chosen, *, scale=None, centres=None, start=0, state=None):
        """As of the other runners."""
        made = self._codec_module(chosen)
        path = {"start": start, "state": state}
        return cuda_calls.encode(x, chosen, channel_scale=scale, centres=centres, **path, made=made)

    def decode(self, packed, chosen, *, scale=None, dtype=mx.float32):
        """As of the other runners."""
        made = self._codec_module(chosen)
        return cuda_calls.decode(packed, chosen, channel_scale=scale, dtype=dtype, made=made)

    def store(self, state, new, case):
        """Store a step of a ``StoreCase``; see :func:`cuda_calls.store`."""
        made = cuda_calls.module("store", *case.codecs, self._changes)
        own_scale = case.scale in ("own", "none")  # where there is none, none can be taken
        options = {"sink": case.sink, "window": case.window, "own_scale": own_scale}
        cuda_calls.store(state, new, case.codecs, **options, made=made)

    def rotor3(self, x, chosen, *, seed, layer):
        """As of the other runners."""
        return cuda_calls.rotor3(x, chosen, made=self._codec_module(chosen))

    def attend(self, queries, keys, values, *, launch=None, lengths=None, **options):
        """As of the other runners; ``lengths`` is what the device reads instead of the views'."""
        launch = launch or Launch()
        made = self.attend_module(keys.codec, values.codec, launch)
        call = AttendCall(queries, keys, values, **options)
        counters = np.zeros(cuda_plan.MANY_ROWS, np.int32) if launch.kernels == 1 else None
        with planned_as(launch):
            output = cuda_calls.attend(call, made=made, lengths=lengths, counters=counters)
        assert counters is None or not counters.any()
        return output

    def attend_module(self, key_codec, value_codec, launch):
        """The module that a call of ``attend`` runs."""
        return cuda_calls.module(
            "attend", key_codec, value_codec, self._changes, launch.multiprocessors
        )

    def _codec_module(self, chosen):
        return cuda_calls.module("codec", *cuda_calls.both_roles(chosen), self._changes)


METAL, CUDA, MLX_CUDA = MetalRunner(), CUDARunner(), MLXCUDARunner()
RUNNERS = {runner.name: runner for runner in (METAL, CUDA, MLX_CUDA)}


def launches_of(request):
    """The parameters of the tests that a module will run with emulated Metal kernels."""
    if METAL.on_device or METAL.missing():
        return []
    of_module = (i for i in request.session.items if i.getparent(pytest.Module) is request.node)
    parameters = (item.callspec.params for item in of_module if hasattr(item, "callspec"))
    return [p for p in parameters if p.get("runner", "metal") == "metal"]


@pytest.fixture
def runner(request):
    """The platform of this name, ready to run: ``parametrize`` it with ``indirect=["runner"]``."""
    chosen = RUNNERS[request.param]
    if missing := chosen.missing():
        pytest.skip(missing)
    with chosen.kernels():
        yield chosen
