"""The torch companion in an environment that has neither mlx nor mlx-lm."""

import importlib.metadata
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

import rotormlx

pytestmark = pytest.mark.slow

PACKAGE = Path(rotormlx.__file__).parent
# What a wheel has inside the package.
KERNEL_FOLDERS = ("cuda_kernels", "metal_kernels", "shared_kernels")
LEFT_OUT = ("mlx", "rotormlx", "_rotormlx", "__pycache__")

USE = """
import sys
from importlib.util import find_spec

assert find_spec("mlx") is find_spec("mlx_lm") is None
import rotormlx.torch

assert "transformers" not in sys.modules, "loaded before it is used"
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rotormlx.torch.prompt_cache
from rotormlx.kernels import cuda_plan
from rotormlx.torch.build import Configuration, source_files

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 97, "head_dim": 32}
config = LlamaConfig(
    **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, eos_token_id=None
)
model = LlamaForCausalLM(config).eval()
chosen = rotormlx.RotorConfig(key_bits=4, value_bits=3, window=0)
assert "1 of 1 caches compressed" in str(rotormlx.torch.apply(model, chosen))
cache = rotormlx.torch.RotorCache(model.config, chosen)
prompt = torch.arange(80)[None]
text = model.generate(prompt, max_new_tokens=4, do_sample=False, past_key_values=cache)
assert text.shape == (1, 84) and cache.packed_tokens == 64, (text.shape, cache.packed_tokens)

build = Configuration("cascade", 64, 80, 4, 3, "sm_90a")
assert sorted(build.headers()) == ["key_rotation.h", "value_rotation.h"]
names = {path.name for path in source_files()}
assert {"launch_attend.cu", "launch_codec.cu", "launch_store.cu"} <= names
assert {"binding.cpp", "rotation.h"} <= names
assert build.name.startswith("rotormlx_cuda_")
shape = cuda_plan.Shape(1, 8, 2, 1, 64, 80, 4, 3, 70, 4096, is_float32=False)
assert cuda_plan.attend_plan(shape).parts > 1
assert not {name for name in sys.modules if name.partition(".")[0] in ("mlx", "mlx_lm")}
"""


def link(folder, names, target):
    for name in names:
        (target / name).symlink_to(folder / name)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter whose packages are those of this one but MLX's, and rotormlx as in a wheel."""
    root = tmp_path_factory.mktemp("without_mlx")
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    packages = Path(torch.__file__).parents[1]
    link(
        packages,
        [
            entry.name
            for entry in packages.iterdir()
            if not entry.name.startswith(LEFT_OUT) and entry.suffix != ".pth"
        ],
        site,
    )
    # pyproject.toml is not read: the version stands in the metadata of the installation.
    metadata = Path(str(importlib.metadata.distribution("rotormlx").locate_file("")))
    (dist_info,) = metadata.glob("rotormlx-*.dist-info")
    link(metadata, [dist_info.name], site)
    (site / "rotormlx").mkdir()
    link(PACKAGE, [p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"], site / "rotormlx")
    beside = [name for name in KERNEL_FOLDERS if not (PACKAGE / name).exists()]
    link(PACKAGE.parent, beside, site / "rotormlx")
    return root / "bin" / "python"


def run(python, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_model_is_compressed_and_kernels_can_be_compiled(python):
    done = run(python, "-c", USE)
    assert done.returncode == 0, done.stderr


def test_the_build_command_starts(python):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = run(python, "-m", "rotormlx.torch", "build")
    assert done.returncode == 1
    assert "is built without CUDA; install a CUDA build of torch" in done.stderr


def test_mlx_is_missed_where_it_is_needed(python):
    """The environment is what it says: what runs on MLX does not start."""
    done = run(python, "-c", "import rotormlx.mlx.backends")
    assert "No module named 'mlx'" in done.stderr
