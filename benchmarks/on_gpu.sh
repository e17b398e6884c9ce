#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes and without a network: benchmarks/on_gpu.sh OUTDIR
#
# Builds in place with what is installed, runs the tests on the GPU and on the CPU, compute-sanitizer on small cases, the benchmarks,
# and leaves OUTDIR/<gpu>-<date>.json (keep it in benchmarks/results) and OUTDIR/<gpu>-<date>.log. Python is $PYTHON or python3.
# With --rehearse behind OUTDIR the same steps on the CPU, where there is no GPU: what can break without one, breaks.
set -uo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2:---rehearse}" != --rehearse ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
fi
device=cuda seconds=0.3 crop=512 batch=8 arguments=() patience=1
[ $# -eq 2 ] && device=cpu seconds=0 crop=192 batch=2 arguments=(--quick) patience=5
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg
log="$work/log"
deadline=$((520 * patience)) # seconds; the report takes a few more

if [ $device = cuda ] && ! "$python" -c "import torch; torch.zeros(1).cuda()" 2>"$work/why"; then
  echo "no GPU that PyTorch can use: $(tail -n 1 "$work/why")"
  exit 2
fi

# stage NAME SECONDS COMMAND...: runs it within its time, keeps its exit status and duration for the report.
stage() {
  local name=$1 limit=$(($2 * patience)) begun=$SECONDS status left=$((deadline - SECONDS))
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  echo "=== $name: $*" | tee -a "$log"
  if [ "$limit" -lt 10 ]; then
    echo "no time was left" >"$work/$name.out"
    status=124
  else
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$work/$name.out" 2>&1
    status=$?
  fi
  tail -n 40 "$work/$name.out" | cut -c1-300 | tee -a "$log"
  echo "=== $name: exit $status after $((SECONDS - begun)) s" | tee -a "$log"
  echo "$name $status $((SECONDS - begun))" >>"$work/stages"
}

nvidia-smi -L 2>&1 | tee -a "$log"
stage build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .

# The tests of what only a GPU has, then those of the operators with their tensors there.
export AFA_TEST_DEVICE=$device
pytest=("$python" -m pytest -p no:cacheprovider --continue-on-collection-errors --tb=short -o addopts= -q -m "not slow")
workers=() # side by side, as most of their time goes into compiling for one size after the other
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
stage cuda_tests 80 "${pytest[@]}" tests/test_cuda.py --junitxml="$work/cuda_tests.xml"
operators=(tests/test_{par,affinity}{,_interface}.py tests/test_{diffusion,random_walk,fuzz,fuzz_affinity}.py)
stage operators 150 "${pytest[@]}" "${workers[@]}" "${operators[@]}" --junitxml="$work/operators.xml"

# Small cases of every operator, forward and backward, under the memory and race checkers; and a planted fault, which the
# first must see. Every tensor has its own allocation, or the space between two of them would be as good as theirs.
if command -v compute-sanitizer >/dev/null; then
  checked=(compute-sanitizer --launch-timeout 60 --report-api-errors no --error-exitcode 9 --tool)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  fault='"$@" memcheck "$0" tests/every_operator.py --fault 2>&1 | tee /dev/stderr | grep "Invalid __global__ write" >/dev/null'
  stage planted_fault 60 bash -c "$fault" "$python" "${checked[@]}"
  stage memcheck 60 "${checked[@]}" memcheck "$python" tests/every_operator.py
  stage racecheck 60 "${checked[@]}" racecheck "$python" tests/every_operator.py
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

bench=("$python" benchmarks/run.py --device "$device" --seconds "$seconds" --out "$work/benchmarks" "${arguments[@]}")
stage par 60 "${bench[@]}" par
stage affinity 60 "${bench[@]}" affinity
stage random_walk 40 "${bench[@]}" random_walk
step=("$python" benchmarks/bench_train_step.py --device "$device" --backbone mit_b1 --crop "$crop" --batch "$batch")
stage train_step 60 "${step[@]}" --json "$work/benchmarks/train_step-$device.json"
stage train_step_graph 60 "${step[@]}" --cuda-graph --json "$work/benchmarks/train_step_graph-$device.json"

# The rest of the suite; then, if there is time, PAR beside what Inductor makes of the reference.
ran=("${operators[@]/#/--ignore=}" --ignore=tests/test_cuda.py)
stage suite 200 "${pytest[@]}" "${workers[@]/worksteal/loadfile}" "${ran[@]}" --junitxml="$work/suite.xml"
if [ $device = cuda ]; then # Inductor takes ten minutes on a CPU
  cp "$work/benchmarks/par-cuda.json" "$work/par.json"
  stage par_compiled 120 "${bench[@]}" par --compile
  # What a run that was stopped leaves has fewer cases than the first.
  grep -q "^par_compiled 0 " "$work/stages" || cp "$work/par.json" "$work/benchmarks/par-cuda.json"
fi

"$python" benchmarks/on_gpu_report.py "$work" "$log" "$out"
