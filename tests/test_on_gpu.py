"""The report of benchmarks/on_gpu.sh: joined from what its stages left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_par" name="good"/>
<testcase classname="tests.test_par" name="bad"><failure message="off by 3"/></testcase>
<testcase classname="tests.test_par" name="left"><skipped message="no second device"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("status", [0, 1])
def test_stages_become_one_json_and_one_log(tmp_path, status):
    folder, out = tmp_path / "work", tmp_path / "out"
    (folder / "benchmarks").mkdir(parents=True)
    out.mkdir()
    (folder / "stages").write_text(f"memcheck 0 12\noperators {status} 34\n")
    (folder / "memcheck.out").write_text("========= ERROR SUMMARY: 0 errors\n")
    (folder / "operators.out").write_text("every line of the run\n")
    (folder / "operators.xml").write_text(JUNIT)
    report = {"operator": "par", "machine": {}, "rows": []}
    (folder / "benchmarks" / "par-cuda.json").write_text(json.dumps(report))
    (folder / "log").write_text("the short log\n")
    command = [sys.executable, ROOT / "benchmarks" / "on_gpu_report.py", folder, folder / "log", out]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    assert result["reports"] == [report] and result["stages"]["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert result["stages"]["operators"] == {
        "exit": status,
        "seconds": 34,
        "tests": {"passed": 1, "failed": ["tests.test_par::bad"], "skipped": {"no second device": 1}},
    }
    assert "every line of the run" in path.with_suffix(".log").read_text()


def test_script_asks_for_a_folder():
    script = ROOT / "benchmarks" / "on_gpu.sh"
    run = subprocess.run(["bash", script], capture_output=True, text=True)
    assert run.returncode == 2 and "OUTDIR" in run.stdout
    subprocess.run(["bash", "-n", script], check=True)


def test_script_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    script = ROOT / "benchmarks" / "on_gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(["bash", script, tmp_path], capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and "no GPU that PyTorch can use" in run.stdout
    assert list(tmp_path.iterdir()) == []
