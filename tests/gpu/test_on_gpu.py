"""benchmarks/on_gpu.sh, which has minutes on a borrowed GPU: whatever happens there, what was seen comes back."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.common import ROOT
from support.on_gpu_stand_in import Machine

import afa_kernels

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
FIRST = ["build", "doctor", "self_check", "cuda_tests", "planted_fault", "memcheck", "par", "plans", "operators"]
SECOND = ["build", "racecheck", "affinity", "batches", "random_walk", "host", "others", "bilateral"]
SECOND += ["train_step", "train_step_graph", "suite", "par_compiled"]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def results(machine: Machine, half: str = "first") -> dict:
    return json.loads(machine.left(f"{half}.json"))


# --- how it is called ---


@pytest.mark.parametrize("options", [[], ["OUT"], ["--first"], ["OUT", "--first", "--second"], ["OUT", "--third"]])
def test_without_a_folder_and_one_half_it_says_how_it_is_called(options, tmp_path):
    run = subprocess.run(["bash", SCRIPT, *options], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and list(tmp_path.iterdir()) == []
    for word in ("OUTDIR --first", "OUTDIR --second", "--rehearse", ".carry/golden", "AFA_ON_GPU_SKIP", "$PYTHON"):
        assert word in run.stdout


@pytest.mark.parametrize("half", ["--first", "--second"])
def test_without_a_gpu_it_says_so_and_leaves_nothing(half, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = subprocess.run(
        ["bash", SCRIPT, tmp_path, half], capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/bin"}
    )
    assert run.returncode == 2 and "no GPU that PyTorch can use: " in run.stdout
    assert list(tmp_path.iterdir()) == []


# --- what a half runs ---


def test_both_halves_leave_a_table_a_log_and_a_json_in_one_folder(machine):
    machine.does("train_step", """echo '{"operator": "step"}' >"${!#}" """)
    for half, stages in (("first", FIRST), ("second", SECOND)):
        run = machine.run(f"--{half}")
        assert run.returncode == 0, run.stdout + run.stderr
        ran = results(machine, half)["stages"]
        assert list(ran) == stages and not any(stage["exit"] for stage in ran.values())
        assert machine.left(f"{half}.md") in run.stdout
    assert results(machine, "second")["reports"] == [{"operator": "step"}]
    names = machine.files()
    assert len(names) == 6 and len(set(names)) == 6
    assert all(re.fullmatch(r"gpu-of-80-gb-\d{8}-(first|second)\.(json|log|md)", name) for name in names)


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_rehearsal_runs_the_same_on_the_cpu(machine, half):
    """What a script gets wrong should not be found out on borrowed time."""
    assert machine.run("--rehearse", f"--{half}").returncode == 0
    ran = results(machine, half)["stages"]
    assert list(ran) == {"first": FIRST, "second": SECOND}[half]
    assert [name for name, stage in ran.items() if "left_out" in stage] == ["host", "par_compiled"] * (half == "second")
    assert "--device cpu" in " ".join(machine.calls("par") + machine.calls("affinity"))


def test_a_stage_that_fails_is_named_and_the_others_run(machine):
    machine.does("build", "echo a compiler that fails, AFA_CUDA=$AFA_CUDA; exit 7")
    run = machine.run("--first")
    assert run.returncode == 1 and re.search(r"\| build \| 7 \|", run.stdout)
    ran = results(machine)["stages"]
    assert [name for name, stage in ran.items() if stage["exit"]] == ["build"] and list(ran) == FIRST
    assert "a compiler that fails, AFA_CUDA=1" in machine.left(".log"), "without CUDA it would build all the same"


def test_the_halfs_time_ends_its_stages(machine):
    """A machine is taken away when its time is up, and with it everything that was not brought back by then."""
    machine.does("doctor", "trap '' INT; sleep 600")  # not even interrupted
    begun = time.monotonic()
    run = machine.run("--first", AFA_ON_GPU_SECONDS="12")
    assert run.returncode == 1 and time.monotonic() - begun < 200
    ran = results(machine)["stages"]
    assert list(ran) == FIRST and ran["build"]["exit"] == 0 and ran["doctor"]["exit"] in (124, 137)
    assert {ran[name]["exit"] for name in FIRST[2:]} == {124} and len(machine.calls("cuda_tests")) == 0
    assert "no time was left" in machine.left(".log") and "| doctor |" in run.stdout


def test_each_half_ends_within_five_minutes():
    text = SCRIPT.read_text()
    (seconds,) = re.findall(r"AFA_ON_GPU_SECONDS:-\$\(\((\d+) \* patience", text)
    assert 240 <= int(seconds) <= 290


def test_stages_that_are_not_wanted_are_left_out(machine):
    run = machine.run("--first", AFA_ON_GPU_SKIP="build,cuda_tests operators")
    assert run.returncode == 0 and machine.calls("build") == machine.calls("operators") == []
    ran = results(machine)["stages"]
    left_out = {name for name, stage in ran.items() if stage == {"left_out": "AFA_ON_GPU_SKIP"}}
    assert left_out == {"build", "cuda_tests", "operators"} and len(machine.calls("par")) == 1


@pytest.mark.parametrize("state", ["missing", "older", "newer", "without CUDA"])
def test_the_second_half_builds_what_the_first_has_not(machine, state):
    module = machine.root / "afa_kernels" / "_native.cpython.so"
    if state != "missing":
        module.touch()
    if state == "older":
        time.sleep(0.05)
        (machine.root / "csrc" / "par.cu").touch()
    if state == "without CUDA":
        machine.does("built", "exit 1")
    machine.run("--second", AFA_ON_GPU_SKIP=" ".join(SECOND[1:]))
    assert len(machine.calls("build")) == (state != "newer")


def test_numbers_and_photographs_that_were_carried_are_used(machine):
    for name in ("golden", "voc32"):
        (machine.root / ".carry" / name).mkdir(parents=True)
    machine.does("suite", "echo recorded: $AFA_GOLDEN photographs: $AFA_VOC device: $AFA_TEST_DEVICE")
    machine.run("--second", AFA_ON_GPU_SKIP=" ".join(SECOND[1:9]))
    carry = machine.root / ".carry"
    assert f"recorded: {carry}/golden photographs: {carry}/voc32 device: cuda" in machine.left(".log")


def test_backends_prove_themselves_once_and_not_in_every_worker(machine):
    """A backend that fails is a stage that fails; the tests are of the kernels then, not of what replaces them."""
    machine.does("self_check", "exit 1")
    for stage in ("cuda_tests", "operators"):
        machine.does(stage, f"echo {stage}: AFA_SELF_CHECK=$AFA_SELF_CHECK")
    run = machine.run("--first")
    assert run.returncode == 1 and re.search(r"\| self_check \| 1 \|", run.stdout)
    assert "self_check('cuda', backends=['native'])" in (machine.stand_in / "calls").read_text()
    assert "cuda_tests: AFA_SELF_CHECK=1" in machine.left(".log")
    assert "operators: AFA_SELF_CHECK=0" in machine.left(".log")


# --- its tests ---


def test_a_hung_kernel_ends_its_test_and_not_the_run(machine):
    machine.run("--first")
    for stage in ("cuda_tests", "operators"):
        (call,) = machine.calls(stage)
        assert " -v " in call and " --timeout=40 --timeout-method=thread " in call and "-n " in call


def test_tests_end_before_they_are_stopped(machine):
    """What is stopped from outside leaves no word of why its tests failed."""
    machine.run("--first", AFA_ON_GPU_SECONDS="100", AFA_ON_GPU_SKIP=" ".join(FIRST[:-1]))
    (seconds,) = map(int, re.findall(r"--session-timeout=(\d+)", machine.calls("operators")[0]))
    assert 50 <= seconds <= 75
    machine.does("SESSION_EXPIRE_KEY", "exit 1")  # an older pytest-timeout
    machine.run("--first")
    call = machine.calls("operators")[-1]
    assert "--session-timeout" not in call and "--timeout=40" in call


def test_without_plugins_the_stage_ends_a_hung_test_and_the_log_says_so(machine):
    for name in ("pytest_timeout", "xdist"):
        machine.does(name, "exit 1")
    machine.run("--first")
    (call,) = machine.calls("operators")
    assert " -o faulthandler_timeout=40" in call and "-timeout=" not in call and "-n " not in call
    assert "no pytest-timeout" in machine.left(".log")


def test_each_file_that_uses_the_device_is_run_once(machine):
    machine.run("--first")
    machine.run("--second")
    stages = ("cuda_tests", "operators", "suite")
    ran = {stage: set(re.findall(r"tests/\S+\.py", machine.calls(stage)[0])) for stage in stages}
    assert "tests/gpu/test_cuda.py" in ran["cuda_tests"] and "tests/ops/test_par.py" in ran["operators"]
    names = {Path(file).name for file in set.union(*ran.values())}
    assert "test_model.py" in {Path(file).name for file in ran["suite"]}
    assert sum(map(len, ran.values())) == len(names), "no file twice"
    for name in ("on_gpu", "cuda_emulator", "triton_bounds", "cli", "benchmarks_gpu"):
        assert f"test_{name}.py" not in names, name
    assert all(file in machine.left("second.log") for file in ran["suite"])


def test_files_are_told_apart_by_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    files = {
        "support/cases.py": "from conftest import DEVICE\ndef put(x): return x.to(DEVICE)\n",
        "support/more.py": "from support.cases import put\n",
        "ops/test_direct.py": "from conftest import DEVICE\nx = make(device=DEVICE)\n",
        "ops/test_helped.py": "from support.more import put\n",
        "test_network.py": "import conftest\nfrom afa_model import model\nx = model.to(conftest.DEVICE)\n",
        "test_marked.py": "@pytest.mark.cuda\ndef test(): pass\n",
        "test_all_marked.py": "pytestmark = [pytest.mark.cuda]\n",
        "test_emulated.py": "pytestmark = [pytest.mark.cuda_emulator]\n",
        "test_compares.py": "from conftest import DEVICE\n@mark.skipif(DEVICE != 'cpu', reason='')\ndef test(): pass\n",
        "test_host.py": "from support.cases import put\npytestmark = mark.skipif(DEVICE != 'cpu', reason='')\n",
        "test_names.py": "x = 'DEVICE'  # AFA_TEST_DEVICE, torch.cuda\n",
    }
    for name, text in files.items():
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).write_text(text)
    found = importlib.import_module("device_tests").device_tests(tmp_path / "tests")
    assert found == {
        "cuda": ["tests/test_all_marked.py", "tests/test_marked.py"],
        "operators": ["tests/ops/test_direct.py", "tests/ops/test_helped.py"],
        "model": ["tests/test_network.py"],
    }


def test_no_file_found_is_a_failure_and_not_the_whole_suite(machine):
    (machine.root / "benchmarks" / "device_tests.py").write_text("")
    machine.run("--first")
    assert machine.calls("operators")[0].endswith(" no-test-files")


# --- its checkers ---


def test_checkers_watch_our_kernels_only_and_see_the_planted_fault(machine):
    """PyTorch's kernels are not ours to check, and instrumenting them took most of the time."""
    assert machine.run("--first").returncode == machine.run("--second").returncode == 0
    calls = machine.calls("checker")
    assert [re.search(r"--tool (\w+)", call)[1] for call in calls] == ["memcheck", "memcheck", "racecheck"]
    assert all("--kernel-name kns=_ZN3afa --kernel-name kns=write_past" in call for call in calls)
    assert results(machine)["stages"]["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"


def test_a_checker_that_does_not_see_the_planted_fault_fails(machine):
    (machine.stand_in / "compute-sanitizer").write_text("#!/bin/sh\necho ERROR SUMMARY: 0 errors\n")
    machine.run("--first")
    ran = results(machine)["stages"]
    assert ran["planted_fault"]["exit"] == 1 and ran["memcheck"]["exit"] == 0


def test_a_gpu_without_a_checker_is_no_success(machine):
    (machine.stand_in / "compute-sanitizer").unlink()
    assert machine.run("--first").returncode == 1
    ran = results(machine)["stages"]
    assert ran["memcheck"]["exit"] == 127 and ran["planted_fault"]["exit"] != 0


def test_every_kernel_has_the_name_that_the_checkers_watch_for():
    """A kernel outside namespace afa would be checked by nobody."""
    native = afa_kernels.core.native_module.native
    if native is None or not native.cuda:
        pytest.skip("no CUDA kernels were built")
    mangled = set(re.findall(rb"_Z[\w.$]+", Path(native.__file__).read_bytes()))
    text = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    found = 0
    for kernel in kernels:
        named = [name for name in mangled if f"{len(kernel)}{kernel}".encode() in name]
        found += bool(named)  # what was written after the last build is not in there
        assert all(b"_ZN3afa" in name for name in named), kernel
    assert found > 10
