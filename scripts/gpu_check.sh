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
# What the torch companion, its tests and the benchmark import. A python3 that has all of it, and whose torch sees the GPU, is taken
# as it is.
complete='import sys, mlx.core, rotormlx, torch, transformers, ninja, platformdirs, typer, matplotlib, safetensors, pytest, xdist
sys.exit(not torch.cuda.is_available())'
python=python3
if ! python3 -c "$complete" 2>/dev/null; then
  python3 -m venv --system-site-packages .venv-gpu || exit 1
  python=.venv-gpu/bin/python
  echo "pip installs what is missing, with torch some gigabytes."
  $python -m pip install -q -e '.[torch,bench]' safetensors pytest pytest-xdist || exit 1
  $python -c "$complete" || { echo "torch must see the GPU: install a CUDA build of it that fits the driver, and run again."; exit 1; }
fi
$python -c 'import torch, mlx.core as mx; print("torch", torch.__version__, "CUDA", torch.version.cuda, "MLX", mx.__version__, "with CUDA:", mx.cuda.is_available())' |
  tee -a "$out/gpu.txt"
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} ROTORMLX_CACHE=$PWD/$out/cache
# The references are numpy's, many small products at the same time.
export MAX_JOBS=${MAX_JOBS:-8} OMP_NUM_THREADS=1
pytest="$python -m pytest -o addopts= -p no:cacheprovider --noconftest -W default -q"

step "Tests on the GPU, torch"
# A process for each configuration, which is compiled first.
timeout 300 $pytest -n 3 --dist loadgroup tests/gpu/test_cuda_device.py 2>&1 | tee "$out/tests.txt" || failed=1

step "Tests on the GPU, MLX"
if $python -c 'import sys, mlx.core as mx; sys.exit(not mx.cuda.is_available())'; then
  timeout 180 $pytest -n 4 -k mlx_cuda -p tests.support.runners \
    tests/gpu/test_mlx_cuda.py tests/gpu/test_encode_decode.py tests/gpu/test_attend.py 2>&1 | tee "$out/mlx-tests.txt" || failed=1
else
  echo "This MLX is built without CUDA: skipped. pip install 'mlx[cuda13]' brings one."
fi

step "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    timeout 120 "$sanitizer" --tool $tool --error-exitcode 1 --log-file "$out/$tool.txt" \
      $pytest tests/gpu/test_cuda_device.py -k "d128 and bf16 and (attend_is_the_reference or encode)" >"$out/$tool-tests.txt" 2>&1
    code=$?
    echo "$tool: $([ $code = 0 ] && echo no complaint || echo "exit status $code, see $out/$tool.txt")"
    [ $code = 0 ] || [ $code = 124 ] || failed=1
  done
else
  echo "compute-sanitizer is not installed: skipped."
fi

step "Benchmark"
timeout 300 $python scripts/bench_cuda.py --output "$out" 2>&1 | tee "$out/bench.txt" || failed=1

step "$([ $failed = 0 ] && echo "All passed" || echo "Something failed"); see $out"
exit $failed
