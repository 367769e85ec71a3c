"""What the package depends on, and the checks of what was built. Building itself is the gate's."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
import tarfile
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

from scripts import check_wheel

CLONE = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Distributions whose module has another name.
MODULES = {"mlx-lm": "mlx_lm"}
# pip, ninja: run as programs. mlx: hatch_build.py chooses which.
PROGRAMS = {"pip", "ninja"}


def hatch_dependencies():
    """The list in hatch_build.py, read without importing hatchling."""
    tree = ast.parse((CLONE / "hatch_build.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return ["mlx" + values["MLX_BOUND"], *values["DEPENDENCIES"]]


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def imported(folder, outside=()):
    """Top-level modules of others that the files of a folder import, ``outside`` left out."""
    found = set()
    for path in folder.rglob("*.py"):
        if any(path.is_relative_to(folder / name) for name in outside):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"rotormlx"}


def test_dependencies_are_those_that_are_imported():
    """None is missing, because others happen to bring it, and none is there that nobody needs."""
    package = CLONE / "rotormlx"
    base, bench, torch = hatch_dependencies(), EXTRAS["bench"], EXTRAS["torch"]
    modules = {MODULES.get(name, name) for name in names([*base, *bench]) - PROGRAMS}
    assert imported(package, ["torch"]) == modules
    modules = {MODULES.get(name, name) for name in names(torch) - PROGRAMS}
    shared = {MODULES.get(name, name) for name in names(base)}
    assert imported(package / "torch") - shared == modules


def test_every_dependency_says_why():
    for path in (CLONE / "pyproject.toml", CLONE / "hatch_build.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.match(r'\s+"[\w\[\]-]+[=>]=', line) or "rotormlx[" in line:
                assert re.search(r'",\s+# \w[^#]{7,}$', line), f"{path.name}: {line.strip()}"


def test_bounds_are_lower_ones():
    """An upper bound, or a pin, keeps users from fixes; torch is pinned for the tests alone."""
    given = [*hatch_dependencies(), *(r for extra in EXTRAS.values() for r in extra)]
    others = [r for r in given if not re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+(; .*)?", r)]
    assert [r for r in others if not r.startswith("rotormlx[")] == ["torch==2.13.0"]
    assert {r for r in given if r.startswith("mlx[")} == {
        f"mlx[{kind}]{hatch_dependencies()[0].removeprefix('mlx')}"
        for kind in ("cpu", "cuda12", "cuda13")
    }


def test_the_command_is_a_function():
    """What pip writes into bin/rotormlx calls it."""
    module, _, name = PROJECT["scripts"]["rotormlx"].partition(":")
    entry = getattr(importlib.import_module(module), name)
    assert callable(entry), f"{module}:{name} is a {type(entry).__name__}, no function"


# ---- the wheel's tag -----------------------------------------------------------------------------


@pytest.fixture
def platform_tag(monkeypatch):
    """The function of hatch_build.py on a machine with these tags; hatchling need not be there."""
    interfaces = {
        "hatchling.builders.hooks.plugin.interface": "BuildHookInterface",
        "hatchling.metadata.plugin.interface": "MetadataHookInterface",
    }
    for module, name in interfaces.items():
        stand_in = types.SimpleNamespace(**{name: list})  # any class that takes a parameter
        monkeypatch.setitem(sys.modules, module, stand_in)

    def of(*tags, target=None):
        monkeypatch.delenv("MACOSX_DEPLOYMENT_TARGET", raising=False)
        if target is not None:
            monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", target)
        machine = [types.SimpleNamespace(platform=tag) for tag in tags]
        monkeypatch.setattr("packaging.tags.sys_tags", lambda: iter(machine))
        return runpy.run_path(str(CLONE / "hatch_build.py"))["platform_tag"]()

    return of


def test_the_tag_is_of_this_machine_or_an_older_macos(platform_tag):
    linux = ("manylinux_2_36_x86_64", "musllinux_1_2_x86_64", "linux_x86_64")
    assert platform_tag(*linux) == "linux_x86_64"
    assert platform_tag(*linux, target="14.0") == "linux_x86_64"
    mac = ("macosx_15_0_arm64", "macosx_14_0_arm64")
    assert platform_tag(*mac) == "macosx_15_0_arm64"
    assert platform_tag(*mac, target="14.0") == "macosx_14_0_arm64"
    assert platform_tag(*mac, target="14") == "macosx_14_0_arm64"
    assert platform_tag("macosx_15_0_x86_64", target="10.15.4") == "macosx_10_15_x86_64"


# ---- the checks of what was built ----------------------------------------------------------------


def archive(path, files, date=(2020, 2, 2, 0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as made:
        for name, text in files.items():
            made.writestr(zipfile.ZipInfo(name, date), text)
    return path


@pytest.mark.skipif(not (CLONE / ".git").exists(), reason="this is no clone: there is no .git")
def test_a_wheel_is_compared_with_the_clone(tmp_path, capsys):
    """File by file: with the library, and without it where the wheel is for any machine."""
    for tag in ("py3-none-linux_x86_64", "py3-none-any"):
        path = tmp_path / f"rotormlx-0.1.0-{tag}.whl"
        wanted = check_wheel.wanted_in_wheel(path)
        assert ("rotormlx/librotormlx_cpu.so" in wanted) == (tag != "py3-none-any")
        assert {
            "rotormlx/py.typed",
            "rotormlx/mlx/cache/store.py",
            "rotormlx/pages/quality.html",
        } < wanted
        assert {"rotormlx/metal_kernels/attend.metal", "rotormlx/shared_kernels/levels.h"} < wanted
        files = dict.fromkeys(wanted, "")
        check_wheel.check("wheel", check_wheel.in_wheel(archive(path, files)), wanted)
        for change, says in (
            (files | {"rotormlx/notes.txt": ""}, r"\+ rotormlx/notes.txt"),
            (files | {"tests/conftest.py": ""}, r"\+ tests/conftest.py"),
            ({k: v for k, v in files.items() if k != "rotormlx/py.typed"}, "- rotormlx/py.typed"),
        ):
            found = check_wheel.in_wheel(archive(path, change))
            with pytest.raises(SystemExit, match=says):
                check_wheel.check("wheel", found, wanted)
    with pytest.raises(SystemExit, match="twice: a"):
        check_wheel.check("wheel", ["a", "a"], {"a"})
    assert capsys.readouterr().out.count("as listed") == 2


def sdist(folder, names):
    path = folder / "rotormlx-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name in names:
            made.addfile(tarfile.TarInfo(f"rotormlx-0.1.0/{name}"))
    return path


RELEASE = tuple(
    f"rotormlx-0.1.0-py3-none-{tag}.whl"
    for tag in (
        "macosx_14_0_arm64",
        "manylinux_2_27_x86_64.manylinux_2_28_x86_64",
        "manylinux_2_28_aarch64",
    )
)


@pytest.mark.skipif(not (CLONE / ".git").exists(), reason="this is no clone: there is no .git")
def test_a_release_holds_a_wheel_for_each_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_wheel.py", "release", str(tmp_path)])
    for name in RELEASE:
        files = dict.fromkeys(check_wheel.wanted_in_wheel(tmp_path / name), "")
        archive(tmp_path / name, files | {"rotormlx/": ""})  # auditwheel lists folders too
    sdist(tmp_path, check_wheel.wanted_in_sdist())
    check_wheel.main()
    assert capsys.readouterr().out.count("as listed") == 4
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"and nothing else, but holds .*notes.txt"):
        check_wheel.main()
    (tmp_path / "notes.txt").unlink()

    without_library = {k: v for k, v in files.items() if k != check_wheel.LIBRARY}
    archive(tmp_path / RELEASE[-1], without_library)
    with pytest.raises(SystemExit, match=rf"(?s){RELEASE[-1]}.*- rotormlx/librotormlx_cpu.so"):
        check_wheel.main()
    (tmp_path / RELEASE[-1]).rename(tmp_path / "rotormlx-0.1.0-py3-none-linux_aarch64.whl")
    with pytest.raises(SystemExit, match=r"must hold one each of .*manylinux_.*_aarch64"):
        check_wheel.main()


def test_a_wheel_for_a_machine_needs_its_library(monkeypatch):
    tag = {"WHEEL": "Tag: py3-none-linux_x86_64"}
    monkeypatch.setattr(
        check_wheel.metadata, "distribution", lambda _: types.SimpleNamespace(read_text=tag.get)
    )
    reason = None
    monkeypatch.setattr("rotormlx.kernels.cpu_library.missing", lambda: reason)
    check_wheel.require_library()
    reason = "it is not there"
    with pytest.raises(SystemExit, match="must load, but: it is not there"):
        check_wheel.require_library()
    tag["WHEEL"] = "Tag: py3-none-any"
    check_wheel.require_library()


def test_builds_are_compared_byte_by_byte(tmp_path, capsys):
    first, second = (tmp_path / name / "a.whl" for name in ("first", "second"))
    archive(first, {"x.py": "1", "y.so": "2"})
    archive(second, {"x.py": "1", "y.so": "2"})
    check_wheel.compare(first.parent, second.parent)
    assert capsys.readouterr().out.endswith("a.whl, twice\n")
    archive(second, {"x.py": "1", "y.so": "built today"})
    with pytest.raises(SystemExit, match=r"differ in \['y.so'\]"):
        check_wheel.compare(first.parent, second.parent)
    archive(second, {"x.py": "1", "y.so": "2"}, date=(2026, 1, 1, 0, 0, 0))
    with pytest.raises(SystemExit, match="differ in times or order"):
        check_wheel.compare(first.parent, second.parent)
    (second.parent / "b.whl").touch()
    with pytest.raises(SystemExit, match="files with the same names"):
        check_wheel.compare(first.parent, second.parent)
