"""Which part of the package may import which, and what importing the package loads."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rotormlx

PACKAGE = Path(rotormlx.__file__).parent
HOSTS = {"mlx", "mlx_lm", "torch", "transformers"}

# For each part: the parts of this package that it may import, and the libraries that run models.
# The modules `config` and `report` at the top of the package are for everyone.
RULES = {
    "codec": (set(), set()),
    "storage": ({"codec"}, set()),
    "kernels": ({"codec", "storage"}, set()),
    "mlx": ({"codec", "storage", "kernels"}, {"mlx", "mlx_lm"}),
    "torch": ({"codec", "storage", "kernels"}, {"torch", "transformers"}),
    "measure": ({"codec", "storage", "kernels", "mlx"}, {"mlx", "mlx_lm"}),
    "cli": ({"codec", "storage", "kernels", "mlx", "measure"}, {"mlx", "mlx_lm"}),
}
FOR_EVERYONE = {"config", "report"}
NUMPY_AND_STANDARD = {"numpy", *sys.stdlib_module_names}


def imports(path):
    """Full names of what a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def module_of(name):
    """The module of this package that ``rotormlx.a.b`` is or lies in, by its path; else None."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file():
            return ".".join(parts[:end])
        if (path / "__init__.py").is_file():
            return ".".join((*parts[:end], "__init__"))
    return None


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(("rotormlx", *path.relative_to(PACKAGE).with_suffix("").parts)), path


def test_every_part_has_its_rule():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(RULES)


@pytest.mark.parametrize("part", RULES)
def test_a_part_imports_only_what_it_may(part):
    parts, libraries = RULES[part]
    allowed = {part} | parts | FOR_EVERYONE
    wrong = []
    for path in sorted((PACKAGE / part).rglob("*.py")):
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top == "rotormlx":
                here = rest.partition(".")[0]
                is_module = here in RULES or (PACKAGE / f"{here}.py").exists()
                fits = here in allowed or not is_module
            else:
                fits = top not in HOSTS or top in libraries
            if not fits:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_the_codec_needs_numpy_only():
    wrong = {
        f"{path.name} imports {name}"
        for path in (PACKAGE / "codec").glob("*.py")
        for name in imports(path)
        if name.partition(".")[0] not in NUMPY_AND_STANDARD | {"rotormlx"}
    }
    assert wrong == set()


def test_no_import_goes_round_in_a_circle():
    graph = {
        name: {module_of(i) for i in imports(path) if i.startswith("rotormlx.")} - {None, name}
        for name, path in modules()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_one_place_knows_the_backends():
    """Nobody else imports a backend's class."""
    classes = {"CPUBackend", "MLXBackend", "MetalBackend", "MLXCUDABackend"}
    wrong = [
        f"{name} imports {found}"
        for name, path in modules()
        if not name.startswith("rotormlx.mlx.backends")
        for found in imports(path)
        if found.rpartition(".")[2] in classes
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["torch", "mlx_lm", "transformers", "mlx.core"])
def test_import_is_light(module, tmp_path):
    """``import rotormlx`` loads no model library: one that cannot be imported is not missed."""
    package = tmp_path / Path(*module.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    code = f"import sys, rotormlx; assert {module!r} not in sys.modules, 'loaded'"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
