#!/usr/bin/env bash
# What needs a GPU, in two halves of under 5 minutes each, without a network:
#
#   benchmarks/on_gpu.sh OUTDIR --first     builds; tests of what only a GPU has; memory checker; PAR and its plans timed; operators' tests
#   benchmarks/on_gpu.sh OUTDIR --second    builds if need be; race checker; the other operators, the host's part of their calls and
#                                           a training step timed;
#                                           the model's tests on the GPU; PAR beside torch.compile if there is time
#
# Each leaves <gpu>-<date>-<half>.json (keep it in benchmarks/results), .log and .md, a table to paste, in OUTDIR, which both may
# share. Python is $PYTHON or python3, with the packages it has. --rehearse behind a half: the same steps on the CPU, where there
# is no GPU: what can break without one, breaks.
#
#   .carry/golden, .carry/voc32    recorded numbers and photographs that are not in the repository; git ignores .carry, so copy
#                                  them there, and .carry to the machine. Where they exist, AFA_GOLDEN and AFA_VOC name them
#   AFA_ON_GPU_SKIP="build par"    stages to leave out
#   AFA_ON_GPU_SECONDS=285         for the half; a stage that none are left for fails
set -uo pipefail
usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 2
}
[ $# -ge 2 ] && [[ $1 != --* ]] || usage
half='' device=cuda seconds=0.3 trained=(--backbone mit_b1 --crop 512 --batch 8 --rounds 3) quick=() patience=1
for option in "${@:2}"; do
  case $option in
    --first | --second) [ -z "$half" ] || usage; half=${option#--} ;;
    --rehearse) device=cpu seconds=0 trained=(--backbone mit_b0 --crop 192 --rounds 1) quick=(--quick) patience=5 ;;
    *) usage ;;
  esac
done
[ -n "$half" ] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg AFA_TEST_DEVICE=$device
[ -d .carry/golden ] && export AFA_GOLDEN=$PWD/.carry/golden
[ -d .carry/voc32 ] && export AFA_VOC=$PWD/.carry/voc32
log=$work/log deadline=${AFA_ON_GPU_SECONDS:-$((285 * patience))}

# Now, for after a kernel that hangs nobody can be asked.
if ! "$python" benchmarks/on_gpu_report.py --machine $device >"$work/machine.json" 2>"$work/why" && [ $device = cuda ]; then
  echo "no GPU that PyTorch can use: $(tail -n 1 "$work/why")"
  exit 2
fi

say() { echo "=== $*" | tee -a "$log"; }

# The report finds in $work: machine.json; stages, a line "NAME STATUS SECONDS" or "NAME - 0 WHY" each; NAME.out; NAME.xml of tests;
# the folder benchmarks.
leave_out() {
  say "$1: left out, $2"
  echo "$1 - 0 $2" >>"$work/stages"
}

# time_of SECONDS: what a stage gets, of the half's time. What does not end when interrupted is killed 5 s later.
time_of() {
  local limit=$(($1 * patience)) left=$((deadline - SECONDS - 5))
  echo $((left < limit ? left : limit))
}

# stage NAME SECONDS COMMAND...: runs it within its time.
stage() {
  local name=$1 limit begun=$SECONDS status
  limit=$(time_of "$2")
  shift 2
  if [[ " ${AFA_ON_GPU_SKIP:-} " == *[\ ,]"$name"[\ ,]* ]]; then
    leave_out "$name" "AFA_ON_GPU_SKIP"
    return
  fi
  say "$name: $*"
  if [ "$limit" -lt 5 ]; then
    echo "no time was left" >"$work/$name.out"
    status=124
  else
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$work/$name.out" 2>&1
    status=$?
  fi
  tail -n 40 "$work/$name.out" | cut -c1-300 | tee -a "$log"
  [ $status = 124 ] || [ $status = 137 ] && say "$name: stopped, ${limit} s"
  say "$name: exit $status after $((SECONDS - begun)) s"
  echo "$name $status $((SECONDS - begun))" >>"$work/stages"
}

pytest=("$python" -m pytest -v -p no:cacheprovider --continue-on-collection-errors --tb=short -o addopts=)
longest=$((40 * patience)) ends=no
if "$python" -c "import pytest_timeout" 2>/dev/null; then
  pytest+=("--timeout=$longest" --timeout-method=thread) # a signal does not reach a thread that waits for a kernel
  "$python" -c "from pytest_timeout import SESSION_EXPIRE_KEY" 2>/dev/null && ends=yes
else
  say "no pytest-timeout: a test that hangs shows where after $longest s, and ends with its stage"
  pytest+=(-o "faulthandler_timeout=$longest")
fi
# Side by side, as most of the operators' time goes into compiling for one size after the other; and what a test does to its
# process, a hung kernel for one, the others are spared.
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)

# tests NAME SECONDS KIND MARKS: those files that use the device, as benchmarks/device_tests.py finds them.
tests() {
  local files session=() left
  # Ends by itself before it is stopped, or nobody would read why tests failed.
  left=$(time_of "$2")
  [ $ends = yes ] && session=("--session-timeout=$((left > 50 ? left - 25 : left / 2))")
  mapfile -t files < <("$python" benchmarks/device_tests.py "$3" 2>>"$log")
  say "$1: ${#files[@]} files, ${files[*]}"
  [ -n "${files[*]}" ] || files=(no-test-files) # without any, pytest would run all there are
  # Tests of what only a GPU has try the self check too; the others would pay for it in every worker.
  stage "$1" "$2" env "AFA_SELF_CHECK=$([ "$3" = cuda ] && echo 1 || echo 0)" "${pytest[@]}" "${session[@]}" "${workers[@]}" -m "$4" --junitxml="$work/$1.xml" "${files[@]}"
}

# Every operator on small inputs, forward and backward, under a checker of compute-sanitizer. Only our kernels are instrumented:
# --kernel-name takes a substring (kns) of the mangled name, which of ours begins with namespace afa, and may be repeated; the
# planted fault is a kernel write_past. Every tensor has its own allocation, or the space between two of them would be as good as
# theirs. AFA_BACKEND, for with the Triton kernels in their place there would be nothing to find.
checker=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
checked=("$checker" --launch-timeout 60 --target-processes application-only --report-api-errors no --error-exitcode 9)
checked+=(--kernel-name kns=_ZN3afa --kernel-name kns=write_past --tool)
check() {
  if [ $device = cpu ] && [ ! -x "$checker" ]; then
    leave_out "$1" "no compute-sanitizer here"
  else
    stage "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 AFA_BACKEND=native AFA_SELF_CHECK=0 "${@:3}"
  fi
}
fault='"$@" memcheck "$0" tests/support/every_operator.py --fault 2>&1 | tee /dev/stderr | grep "Invalid __global__ write" >/dev/null'

# As afa doctor --check, of the compiled module alone: Triton would compile for minutes.
proof="import afa_kernels, sys; rows = afa_kernels.self_check('$device', backends=['native']); print(rows)
sys.exit(any(not row.ok for row in rows) or not rows)"

# Without Triton, whose kernels take longer to compile than the half has.
bench=("$python" benchmarks/run.py --device "$device" --backends native --seconds "$seconds" --out "$work/benchmarks" "${quick[@]}")
step=("$python" benchmarks/bench_train_step.py --device "$device" "${trained[@]}")
build=("$python" -m pip install --no-build-isolation --no-deps --no-index -e .)
[ $device = cuda ] && build=(env AFA_CUDA=1 "${build[@]}") # a CUDA compiler that fails is the end of it, not a reason for less
mkdir "$work/benchmarks"

say "the $half half on $(timeout 20 nvidia-smi -L 2>/dev/null || echo "a machine without nvidia-smi")"
if [ "$half" = first ]; then
  stage build 130 "${build[@]}"
  stage doctor 20 "$python" -m afa_model.cli doctor
  stage self_check 30 "$python" -c "$proof"
  tests cuda_tests 60 cuda "cuda and not slow"
  check planted_fault 30 bash -c "$fault" "$python" "${checked[@]}"
  check memcheck 40 "${checked[@]}" memcheck "$python" tests/support/every_operator.py
  stage par 45 "${bench[@]}" par
  stage plans 20 "$python" benchmarks/bench_plans.py --device "$device"
  tests operators 150 operators "not slow" # last, for they take whatever time there is
else
  modules=(afa_kernels/_native*.so)
  if [ -e "${modules[0]}" ] && [ -z "$(find csrc CMakeLists.txt setup.py -newer "${modules[0]}")" ] &&
    "$python" -c "from afa_kernels.core import native_module as m; exit(m.native is None or '$device' == 'cuda' and not m.native.cuda)"; then
    leave_out build "built already"
  else
    stage build 130 "${build[@]}"
  fi
  check racecheck 45 "${checked[@]}" racecheck "$python" tests/support/every_operator.py
  stage affinity 45 "${bench[@]}" affinity
  stage batches 15 "$python" benchmarks/bench_affinity_batches.py --device "$device"
  stage random_walk 25 "${bench[@]}" random_walk
  if [ $device = cpu ]; then
    leave_out host "without a GPU benchmarks/bench_host.py counts and needs no rehearsal"
  else
    stage host 20 "$python" benchmarks/bench_host.py --device "$device" --json "$work/benchmarks/host-$device.json"
  fi
  stage others 60 "${bench[@]}" path_affinity feature_affinity pcm sinkhorn
  stage bilateral 40 "${bench[@]}" bilateral
  stage train_step 60 "${step[@]}" --json "$work/benchmarks/train_step-$device.json"
  stage train_step_graph 60 "${step[@]}" --cuda-graph --json "$work/benchmarks/train_step_graph-$device.json"
  tests suite 60 model "not slow"
  if [ $device = cpu ]; then
    leave_out par_compiled "Inductor takes ten minutes on a CPU"
  elif [ $((deadline - SECONDS)) -lt 40 ]; then
    leave_out par_compiled "no time was left"
  else
    stage par_compiled 120 "${bench[@]}" par --compile
  fi
fi

"$python" benchmarks/on_gpu_report.py "$work" "$log" "$out" "$half"
status=$?
if [ ! -e "$work/reported" ]; then # not even the report worked
  cat "$log" "$work"/*.out >"$out/$half.log" 2>/dev/null
  status=1
fi
exit $status
