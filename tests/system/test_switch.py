"""ROTORMLX in the environment: programs that know nothing of rotormlx get compressed caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rotormlx.config import RotorConfig
from rotormlx.mlx import environment, switch
from tests.support import models

CLONE = Path(__file__).resolve().parents[2]
SWITCH = ("rotormlx_switch.pth", "rotormlx_switch.py")
LOAD = """
import sys
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

model, tokenizer = mlx_lm.load(sys.argv[1])
cache = make_prompt_cache(model)
print([type(c).__name__ for c in cache], getattr(cache[0], "config", None))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages that has the switch, as one that a wheel was installed to."""
    folder = tmp_path_factory.mktemp("site")
    for name in SWITCH:
        shutil.copy(CLONE / name, folder)
    return folder


def python(site, code, *arguments, setting=None, packages=True):
    """What an interpreter says that reads the .pth files of a folder when it starts."""
    environment = {name: value for name, value in os.environ.items() if name != "ROTORMLX"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p) if packages else ""
    if setting is not None:
        environment["ROTORMLX"] = setting
    start = f"import site; site.addsitedir({str(site)!r})\n"
    return subprocess.run(
        [sys.executable, *([] if packages else ["-S"]), "-c", start + code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("models") / "llama")


def test_a_model_that_any_program_loads_is_compressed_and_reported(site, llama):
    done = python(site, LOAD, llama, setting="k8v4,window=0")
    assert done.returncode == 0, done.stderr
    assert "['RotorKVCache', 'RotorKVCache']" in done.stdout
    assert "key_bits=8, value_bits=4" in done.stdout
    assert "window=0" in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("rotormlx:")]
    assert len(said) == 1, done.stderr
    assert "ROTORMLX=k8v4,window=0: llama: 2 of 2 caches compressed, K8 V4" in said[0]


def test_without_it_caches_are_those_of_mlx_lm(site, llama):
    done = python(site, LOAD, llama)
    assert "['KVCache', 'KVCache']" in done.stdout
    assert "rotormlx" not in done.stderr


def test_a_refused_model_keeps_its_own_caches_and_says_why(site, tmp_path):
    done = python(site, LOAD, models.save(tmp_path / "mamba2", "mamba2", expand=1), setting="4")
    assert "['ArraysCache', 'ArraysCache']" in done.stdout
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("rotormlx:"))
    assert "ROTORMLX=4: a model keeps its own caches: [apply] mamba2 cannot be" in said


@pytest.mark.parametrize("setting", ["", " ", "0", "off", "OFF", None])
def test_nothing_is_requested(monkeypatch, setting):
    monkeypatch.delenv("ROTORMLX", raising=False)
    if setting is not None:
        monkeypatch.setenv("ROTORMLX", setting)
    assert environment.requested() is None


def test_what_is_requested_is_the_configuration_in_the_environment(monkeypatch):
    monkeypatch.setenv("ROTORMLX", " K8v4 , window=0")
    assert environment.requested() == RotorConfig(key_bits=8, value_bits=4, window=0)
    with environment.off():
        assert environment.requested() is None
    assert environment.requested() is not None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("5bits", r"Bits \(4 or k8v4\), a quality .*, but '5bits' was given"),
        ("5", "key_bits must be one of 2, 3, 4, 8, but 5 was given"),
    ],
)
def test_a_setting_that_means_nothing_stops_a_load_before_it_reads(monkeypatch, setting, says):
    monkeypatch.setenv("ROTORMLX", setting)
    with pytest.raises(ValueError, match=rf"^\[ROTORMLX\] {says}"):
        switch.load_model(lambda: pytest.fail("was loaded"))


def test_a_fault_while_compressing_does_not_end_the_program(monkeypatch, capfd):
    """Whatever is raised is reported, and the model is given back as it is."""
    monkeypatch.setenv("ROTORMLX", "4")
    monkeypatch.setattr("rotormlx.mlx.integration.apply", lambda *_: {}["layers"])
    monkeypatch.setattr(switch.logging.getLogger("rotormlx"), "handlers", [])
    assert switch.load_model(lambda path: (path, {}), "model") == ("model", {})
    said = "rotormlx: ROTORMLX=4: a model keeps its own caches: KeyError: 'layers'\n"
    assert capfd.readouterr().err == said


def test_what_a_caller_of_rotormlx_asks_for_is_not_overridden(site, llama):
    code = LOAD.replace("mlx_lm.load(sys.argv[1])", "rotormlx.load(sys.argv[1])")
    done = python(site, "import rotormlx" + code, llama, setting="k8v8")
    assert "key_bits=4, value_bits=4" in done.stdout
    assert "ROTORMLX" not in done.stderr


def test_the_handlers_of_a_program_get_the_report(monkeypatch, caplog, capfd):
    """And standard error does not get it again."""
    monkeypatch.setenv("ROTORMLX", "4")
    log = switch.logging.getLogger("rotormlx")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    with caplog.at_level("INFO", "rotormlx"):
        model, _ = switch.load_model(lambda: (models.build("llama"), {}))
    assert [type(cache).__name__ for cache in model.make_cache()] == ["RotorKVCache"] * 2
    said = "rotormlx: ROTORMLX=4: llama: 2 of 2 caches compressed, K4 V4 cascade"
    assert caplog.messages[0].startswith(said)
    assert "rotormlx" not in capfd.readouterr().err


def test_an_interpreter_without_it_loads_nothing(site):
    code = "import sys; print([m for m in sys.modules if m.startswith('rotormlx')], sys.meta_path)"
    done = python(site, code)
    assert done.stdout.startswith("[] ")
    assert "rotormlx" not in done.stdout
    done = python(site, code, setting="4")
    assert done.stdout.startswith("['rotormlx_switch'] ")


@pytest.mark.parametrize("left", [SWITCH[:1], SWITCH[1:], SWITCH])
@pytest.mark.parametrize("setting", [None, "4"])
def test_what_an_uninstallation_leaves_harms_no_interpreter(site, tmp_path, left, setting):
    """rotormlx and MLX are not there, and of the switch perhaps only one file."""
    for name in left:
        shutil.copy(site / name, tmp_path)
    done = python(tmp_path, "print('runs')", setting=setting, packages=False)
    assert (done.returncode, done.stdout) == (0, "runs\n")
    if setting is None:
        assert done.stderr == ""


def test_a_host_that_has_no_such_loader_is_named(site, tmp_path):
    package = tmp_path / "mlx_vlm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "utils.py").write_text("def load(path): ...\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlx_vlm.utils"
    done = python(site, code, setting="4")
    assert done.returncode == 0
    assert "rotormlx: ROTORMLX needs mlx_vlm.utils.load_model, but" in done.stderr


def test_a_model_that_comes_without_a_tuple_is_compressed(site, llama, tmp_path):
    """As mlx-vlm's loader gives it."""
    package = tmp_path / "mlx_vlm"
    package.mkdir()
    (package / "__init__.py").touch()
    source = "import mlx_lm.utils\n\ndef load_model(path, lazy=False):\n    '''Own.'''\n"
    source += "    return mlx_lm.utils.load_model.__wrapped__(path)[0]\n"
    (package / "utils.py").write_text(source)
    code = f"""
import inspect, sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
from mlx_vlm.utils import load_model
print(inspect.signature(load_model), load_model.__doc__)
model = load_model(Path(sys.argv[1]))
print(type(model.make_cache()[0]).__name__)
"""
    done = python(site, code, llama, setting="4")
    assert done.stdout == "(path, lazy=False) Own.\nRotorKVCache\n", done.stderr
