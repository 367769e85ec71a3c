#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, from the repository's root: scripts/gpu_check.sh
#
# Installs what is missing (into .venv-gpu), runs every test that needs the GPU, runs some of them under compute-sanitizer,
# and measures (scripts/bench_cuda.py). Everything it prints and measures lands in the folder $OUT, by default gpu-check.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-check}
mkdir -p "$out"
failed=0

step() { printf '\n== %s\n' "$1"; }
need() { command -v "$1" >/dev/null || { echo "$1 is not on PATH; install $2."; exit 1; }; }
need nvidia-smi "the NVIDIA driver"
need python3 "Python 3.11 or newer"
[ -x /usr/local/cuda/bin/nvcc ] && PATH=/usr/local/cuda/bin:$PATH
need nvcc "the CUDA toolkit"
need g++ "g++"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
nvcc --version | tail -2 | head -1 | tee -a "$out/gpu.txt"

step "Python packages"
# What the torch companion, its tests and the benchmark import. The text of the kernels is made in a package that
# imports MLX; any build of it will do. A python3 that has all of it, and whose torch sees the GPU, is taken as it is.
modules="torch, numpy, transformers, safetensors, ninja, platformdirs, rich, typer, matplotlib, pytest, xdist"
sees_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
python=python3
if ! python3 -c "import mlx.core, $modules; $sees_gpu" 2>/dev/null; then
  python3 -m venv --system-site-packages .venv-gpu || exit 1
  python=.venv-gpu/bin/python
  if ! $python -c "$sees_gpu" 2>/dev/null; then
    echo "torch with CUDA is missing: pip installs it, some gigabytes."
    $python -m pip install -q torch || { echo "torch could not be installed; install a CUDA build of it and run again."; exit 1; }
  fi
  $python -c 'import mlx.core' 2>/dev/null || $python -m pip install -q 'mlx[cpu]' || exit 1
  $python -m pip install -q numpy 'transformers>=5.7' safetensors ninja platformdirs rich typer matplotlib pytest pytest-xdist || exit 1
fi
$python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "sees the GPU:", torch.cuda.is_available())' | tee -a "$out/gpu.txt"
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} ROTORMLX_CACHE=$PWD/$out/cache MAX_JOBS=${MAX_JOBS:-8}
pytest="$python -m pytest -o addopts= -p no:cacheprovider --noconftest -W default -q tests/test_cuda_device.py"

step "Tests on the GPU"
# One process for each configuration, since each is compiled first.
timeout 180 $pytest -n 3 2>&1 | tee "$out/tests.txt" || failed=1

step "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    timeout 60 "$sanitizer" --tool $tool --error-exitcode 1 --log-file "$out/$tool.txt" \
      $pytest -k "d128 and bf16 and (attend_is_the_reference or encode)" >"$out/$tool-tests.txt" 2>&1
    code=$?
    echo "$tool: $([ $code = 0 ] && echo no complaint || echo "exit status $code, see $out/$tool.txt")"
    [ $code = 0 ] || [ $code = 124 ] || failed=1
  done
else
  echo "compute-sanitizer is not installed: skipped."
fi

step "Benchmark"
timeout 150 $python scripts/bench_cuda.py --output "$out" 2>&1 | tee "$out/bench.txt" || failed=1

step "$([ $failed = 0 ] && echo "All passed" || echo "Something failed"); see $out"
exit $failed
