#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes and without a network: benchmarks/on_gpu.sh OUTDIR
#
# Builds in place with what is installed, runs the tests on the GPU and on the CPU, compute-sanitizer on small cases, the benchmarks,
# and leaves OUTDIR/<gpu>-<date>.json (keep it in benchmarks/results) and OUTDIR/<gpu>-<date>.log. Python is $PYTHON or python3.
set -uo pipefail
if [ $# -ne 1 ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg
log="$work/log"

# stage NAME SECONDS COMMAND...: runs it within its time, keeps its exit status and duration for the report.
stage() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  echo "=== $name: $*" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$work/$name.out" 2>&1
  status=$?
  tail -n 40 "$work/$name.out" | cut -c1-300 | tee -a "$log"
  echo "=== $name: exit $status after $((SECONDS - begun)) s" | tee -a "$log"
  echo "$name $status $((SECONDS - begun))" >>"$work/stages"
}

nvidia-smi -L 2>&1 | tee -a "$log"
stage build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .

# Small cases of every operator, forward and backward, under the memory and race checkers.
if command -v compute-sanitizer >/dev/null; then
  cases='import sys; sys.path.insert(0, "tests"); import test_threads; print(len(test_threads.everything(0)), "results")'
  for tool in memcheck racecheck; do
    AFA_TEST_DEVICE=cuda stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -c "$cases"
  done
fi

pytest=("$python" -m pytest -p no:cacheprovider --continue-on-collection-errors --tb=short -o addopts= -q -m "not slow")
AFA_TEST_DEVICE=cuda stage cuda_tests 60 "${pytest[@]}" tests/test_cuda.py --junitxml="$work/cuda_tests.xml"
operators=(tests/test_par.py tests/test_diffusion.py tests/test_affinity.py tests/test_random_walk.py tests/test_fuzz*.py)
AFA_TEST_DEVICE=cuda stage operators_on_cuda 100 "${pytest[@]}" "${operators[@]}" --junitxml="$work/operators_on_cuda.xml"
stage par 100 "$python" benchmarks/run.py par --device cuda --compile --seconds 0.3 --out "$work/benchmarks"
stage others 60 "$python" benchmarks/run.py affinity random_walk --device cuda --seconds 0.2 --out "$work/benchmarks"
stage train_step 60 "$python" benchmarks/bench_train_step.py --device cuda --backbone mit_b1 --crop 512 --batch 8 \
  --json "$work/benchmarks/train_step-cuda.json"

# Whatever is left of the nine minutes goes to the whole suite, emulator and all.
left=$((530 - SECONDS))
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
[ "$left" -gt 30 ] && stage suite "$left" "${pytest[@]}" "${workers[@]}" --junitxml="$work/suite.xml"

"$python" benchmarks/on_gpu_report.py "$work" "$log" "$out"
