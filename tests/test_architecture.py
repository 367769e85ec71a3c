"""The order of the modules, and what importing the package loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rotormlx

PACKAGE = Path(rotormlx.__file__).parent

# From the ground up: a module imports only from lines above its own.
LAYERS = [
    {"config", "limits", "files", "fingerprint", "paths", "terminal"},
    {"algebra", "generator", "codebook", "cpu_linear"},
    {"rotation"},
    {"format", "learned"},
    {"cpu_library", "reference", "saved_rules", "view"},
    {"backends.mlx_ops", "backends.kernel_source", "backends.first_call", "saved_state"},
    {"backends.metal_attend"},
    {"backends.cpu", "backends.metal", "backends.mlx_cuda"},
    {"backends"},
    {"store"},
    {"attention", "cache"},
    {"batch_cache"},
    {"hook", "report"},
    {"probe", "quality", "smollm2"},
    {"layer_bits"},
    {"calibration"},
    {"integration"},
    {"rivals"},
    {"retention"},
    {"quality_run"},
    {"needle", "quality_report"},
    {"bench"},
    {"demo", "prompt_cache", "usage"},
    {"torch.build", "torch.torch_ops"},
    {"torch.cuda", "torch.native"},
    {"torch.ops"},
    {"torch.store"},
    {"torch.layer"},
    {"torch.attention"},
    {"torch.cache"},
    {"torch.integration", "torch.prompt_cache"},
    {"torch"},
    {"torch.__main__"},
    {"perplexity", "serving"},
    {"session"},
    {"batching", "measure_cli"},
    {"cli"},
    {"__main__", "__init__"},
]
# The hook runs inside mlx-lm; single caches merge into a batch, which gives them back.
ALLOWED = {("hook", "hook"), ("cache", "batch_cache")}


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree):
    """Modules of this package that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rotormlx."):
            package = node.module.removeprefix("rotormlx.")
            names = [f"{package}.{alias.name}" for alias in node.names]
            yield from (name if level(name) is not None else package for name in names)
        elif isinstance(node, ast.ImportFrom) and node.module == "rotormlx":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("rotormlx."):
                    yield alias.name.removeprefix("rotormlx.")


def level(module):
    return next((i for i, names in enumerate(LAYERS) if module in names), None)


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set().union(*LAYERS)


def test_imports_flow_downward():
    upward = [
        f"{module} imports {imported}"
        for module, tree in modules()
        for imported in imports(tree)
        if level(imported) is not None
        and level(imported) >= level(module)
        and (module, imported) not in ALLOWED
    ]
    assert upward == []


def test_only_one_place_knows_the_backends():
    """Nobody else imports a backend's class or compares a backend's name."""
    for module, tree in modules():
        if module.startswith("backends"):
            continue
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert not names & {"CPUBackend", "MLXBackend", "MetalBackend"}, module


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
