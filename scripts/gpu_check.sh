#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, from the repository's root: scripts/gpu_check.sh [--list] [STAGE...]
#
# Installs what is missing (into .venv-gpu), runs every test that needs the GPU, runs some of them under compute-sanitizer,
# and measures. Each stage has a limit of its own, and what it prints and measures lands in the folder $OUT, by default
# gpu-check. A stage that has passed with these sources is skipped, unless it is named; one that was cut goes on where it
# can.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-check}
[[ $out == /* ]] || out=$PWD/$out

# Name, seconds that it may take, and what it does.
stages='build 470 installs Python packages that are missing, and compiles the kernels
tests-kernels 450 tests of the CUDA kernels on the GPU, through torch
tests-mlx 300 tests of the kernels on the GPU, through MLX
sanitizer 400 some tests under compute-sanitizer, memcheck and racecheck
bench-encode 300 speed of encoding
bench-decode 470 speed of decode attention
bench-prefill 400 speed of attention of prompts
bench-model 470 a whole model with random weights, each cache'

python=python3
[ -x .venv-gpu/bin/python ] && python=.venv-gpu/bin/python
# What the torch companion, its tests and the benchmarks import, in a Python whose torch sees the GPU.
complete='import sys, mlx.core, rotormlx, torch, transformers, ninja, platformdirs, typer, matplotlib, safetensors, pytest, xdist
sys.exit(not torch.cuda.is_available())'

stage_build() {
  if ! $python -c "$complete" 2>/dev/null; then
    python3 -m venv --system-site-packages .venv-gpu || exit 1
    python=.venv-gpu/bin/python
    echo "pip installs what is missing, with torch some gigabytes."
    $python -m pip install -q -e '.[torch,bench]' safetensors pytest pytest-xdist || exit 1
    $python -c "$complete" || { echo "torch must see the GPU: install a CUDA build of it that fits the driver, and run again."; exit 1; }
  fi
  $python -c 'import torch, mlx.core as mx; print("torch", torch.__version__, "CUDA", torch.version.cuda, "MLX", mx.__version__, "with CUDA:", mx.cuda.is_available())'
  local bits
  for bits in 4 3 2 8; do
    $python -m rotormlx.torch build --head-dim 128 --key-bits $bits --value-bits $bits || exit 1
  done
}

stage_tests-kernels() { # a process for each configuration, which is compiled first
  $pytest -n 3 --dist loadgroup tests/gpu/test_cuda_device.py
}

stage_tests-mlx() {
  if $python -c 'import sys, mlx.core as mx; sys.exit(not mx.cuda.is_available())'; then
    $pytest -n 4 -k mlx_cuda -p tests.support.runners \
      tests/gpu/test_mlx_cuda.py tests/gpu/test_encode_decode.py tests/gpu/test_attend.py
  else
    echo "This MLX is built without CUDA: skipped. pip install 'mlx[cuda13]' brings one."
  fi
}

stage_sanitizer() {
  local sanitizer tool code failed=0
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  [ -n "$sanitizer" ] || { echo "compute-sanitizer is not installed: skipped."; return; }
  for tool in memcheck racecheck; do
    timeout 180 "$sanitizer" --tool $tool --error-exitcode 1 --log-file "$out/$tool.txt" \
      $pytest tests/gpu/test_cuda_device.py -k "d128 and bf16 and (attend_is_the_reference or encode)"
    code=$?
    echo "$tool: $([ $code = 0 ] && echo no complaint || echo "exit status $code, see $out/$tool.txt")"
    [ $code = 0 ] || [ $code = 124 ] || failed=1
  done
  return $failed
}

stage_bench-encode() { $python scripts/bench_cuda.py --tables encode --output "$out"; }
stage_bench-decode() { $python scripts/bench_cuda.py --tables decode --output "$out"; }
stage_bench-prefill() { $python scripts/bench_cuda.py --tables prefill --output "$out"; }
stage_bench-model() { $python -m rotormlx.torch bench llama-8b --bits 4,3 --output "$out/bench-model.json"; }

need() { command -v "$1" >/dev/null || { echo "$1 is not on PATH; install $2."; exit 1; }; }

if [ "${1-}" = --list ]; then
  echo "$stages"
  exit
fi
[ -x /usr/local/cuda/bin/nvcc ] && PATH=/usr/local/cuda/bin:$PATH
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} ROTORMLX_CACHE=${ROTORMLX_CACHE:-$out/cache}
# The references are numpy's, many small products at the same time.
export MAX_JOBS=${MAX_JOBS:-8} OMP_NUM_THREADS=1
pytest="$python -m pytest -o addopts= -p no:cacheprovider --noconftest -W default -q"
if [ "${1-}" = --run ]; then # one stage, under its limit
  "stage_$2"
  exit
fi

for name in "$@"; do
  grep -q "^$name " <<<"$stages" || { echo "There is no stage $name; scripts/gpu_check.sh --list names all."; exit 2; }
done
need nvidia-smi "the NVIDIA driver"
need python3 "Python 3.11 or newer"
need nvcc "the CUDA toolkit"
need g++ "g++"
mkdir -p "$out/done"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
nvcc --version | tail -2 | head -1 | tee -a "$out/gpu.txt"

sources=$(find cuda_kernels shared_kernels rotormlx scripts tests -type f ! -name '*.so' ! -name '*.pyc' -print0 |
  sort -z | xargs -0 cat | sha256sum)
failed=0
while read -r name limit what; do
  if [ $# -gt 0 ]; then
    [[ " $* " == *" $name "* ]] || continue
  elif [ "$(cat "$out/done/$name" 2>/dev/null)" = "$sources" ]; then
    echo "$name: has passed with these sources; name it to run it again"
    continue
  fi
  printf '\n== %s: %s\n' "$name" "$what"
  rm -f "$out/done/$name"
  timeout "$limit" bash scripts/gpu_check.sh --run "$name" </dev/null 2>&1 | tee "$out/$name.txt"
  code=${PIPESTATUS[0]}
  if [ "$code" = 0 ]; then
    echo "$sources" >"$out/done/$name"
  else
    failed=1
    echo "$name: $([ "$code" = 124 ] && echo "cut after $limit s; the same command goes on" || echo "exit status $code")"
  fi
done <<<"$stages"
printf '\n== %s; see %s\n' "$([ $failed = 0 ] && echo "All passed" || echo "Something failed")" "$out"
exit $failed
