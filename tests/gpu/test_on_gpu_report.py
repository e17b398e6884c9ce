"""The report of benchmarks/on_gpu.sh, joined from what its stages left behind, whole or broken off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.common import ROOT

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_par" name="good"/>
<testcase classname="tests.test_par" name="bad"><failure message="off by 3"/></testcase>
<testcase classname="tests.test_par" name="left"><skipped message="no second device"/></testcase>
</testsuite></testsuites>"""
MACHINE = {"device": "A GPU", "torch": "2.11", "python": "3.12", "driver": "580"}
ROW = {
    "case": "1x3x160x160",
    "provider": "native",
    "median_ms": 0.2,
    "floor_ms": 0.05,
    "of_floor": 0.25,
    "speedup": 30.04,
    "error": 2e-7,
}


class Run:
    """What on_gpu.sh left: a folder that is good unless a test breaks something in it."""

    def __init__(self, root: Path) -> None:
        self.folder, self.out = root / "work", root / "out"
        (self.folder / "benchmarks").mkdir(parents=True)
        self.out.mkdir()
        row = ROW | {"graph_ms": 0.15, "host_share": 0.25}
        notes = {"1x3x1024x2048: native resident": "not timed: does not fit"}
        report = {"operator": "par", "machine": {"device": "A GPU"}, "rows": [row], "notes": notes, "failures": {}}
        self.files = {
            "stages": "memcheck 0 12\noperators 1 34\nbuild - 0 AFA_ON_GPU_SKIP\npar 0 5\n",
            "machine.json": json.dumps(MACHINE),
            "memcheck.out": "========= ERROR SUMMARY: 0 errors\n",
            "operators.out": "every line of the run\n",
            "operators.xml": JUNIT,
            "par.out": "",
            "benchmarks/par-cuda.json": json.dumps(report),
            "log": "the short log\n",
        }

    def report(self, **changed: str | None) -> subprocess.CompletedProcess:
        """``changed``: text of files, None of one that is missing."""
        for name, text in (self.files | changed).items():
            if text is not None:
                (self.folder / name).write_text(text)
        command = [sys.executable, ROOT / "benchmarks" / "on_gpu_report.py", self.folder, self.folder / "log", self.out]
        return subprocess.run([*command, "second"], capture_output=True, text=True)

    def left(self) -> tuple[dict, str, str]:
        """JSON, log and table."""
        texts = [next(self.out.glob(f"a-gpu-*-second.{end}")).read_text() for end in ("json", "log", "md")]
        return json.loads(texts[0]), texts[1], texts[2]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("status", [0, 1])
def test_stages_become_one_json_one_log_and_one_table(run, status):
    done = run.report(stages=f"memcheck 0 12\noperators {status} 34\nbuild - 0 AFA_ON_GPU_SKIP\npar 0 5\n")
    assert done.returncode == status, done.stderr
    result, log, table = run.left()
    assert result["machine"] == MACHINE and result["half"] == "second" and result["broken"] == {}
    assert result["reports"] == [json.loads(run.files["benchmarks/par-cuda.json"])]
    assert result["stages"]["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert result["stages"]["build"] == {"left_out": "AFA_ON_GPU_SKIP"}
    assert result["stages"]["operators"] == {
        "exit": status,
        "seconds": 34,
        "tests": {"passed": 1, "failed": ["tests.test_par::bad"], "skipped": {"no second device": 1}},
    }
    assert "the short log" in log and "every line of the run" in log
    assert table in done.stdout


def test_the_table_has_what_a_reader_asks_for(run):
    run.report()
    table = run.left()[2]
    for line in (
        "| operators | 1 | 34 | 1 | 1 | 1 |  |",
        "| memcheck | 0 | 12 |  |  |  | ERROR SUMMARY: 0 errors |",
        "| build | | | | | | left out: AFA_ON_GPU_SKIP |",
        "- operators: `tests.test_par::bad`",
        "| par | 1x3x160x160 | native | A GPU | 0.05 | 0.2 | 25 % | 30.0x | 0.15 | 25 % | 2e-07 |",
        "- par, 1x3x1024x2048: native resident: not timed: does not fit",
    ):
        assert line in table.splitlines()
    assert table.startswith("**A GPU**, second half")


def test_results_without_graphs_are_tabled_too(run):
    old = {"operator": "par", "machine": {"device": "A GPU"}, "rows": [ROW]}
    run.report(**{"benchmarks/par-cuda.json": json.dumps(old)})
    assert "| 30.0x |  |  | 2e-07 |" in run.left()[2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("operators.xml", JUNIT[:150]),
        ("operators.xml", ""),
        ("benchmarks/par-cuda.json", '{"operator": "par", "ro'),
        ("operators.out", None),
        ("machine.json", ""),
        ("stages", None),
    ],
)
def test_a_broken_file_is_named_and_costs_nothing_else(run, name, text):
    """What a killed process was writing must not take along what the others have found out on borrowed time."""
    done = run.report(**{name: text})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (path,) = run.out.glob("*.json")
    result, table = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert list(result["broken"]) == [name] and f"- {name}: " in table and str(run.folder) not in table
    kept = {"operators.xml": "memcheck", "stages": "1x3x160x160"}.get(name, "operators")
    assert kept in table and "short log" in path.with_suffix(".log").read_text()


def test_a_report_with_less_in_it_than_the_table_needs_is_named(run):
    run.report(**{"benchmarks/par-cuda.json": '{"operator": "par", "rows": [{}]}'})
    table = run.left()[2]
    assert "- par: KeyError" in table and "tests.test_par::bad" in table


def test_the_log_keeps_the_end_of_every_stage(run):
    run.report(**{"operators.out": "x" * 900_000 + "the end", "memcheck.out": "y" * 900_000 + "another end"})
    log = run.left()[1]
    assert "the end" in log and "another end" in log and len(log) < 250_000


ENDED = "!!!!!!!! xdist.dsession.Interrupted: session-timeout: 60.0 sec exceeded !!!!!!!!!"


@pytest.mark.parametrize(("status", "text"), [(124, ""), (2, ENDED)])
def test_what_its_time_has_ended_is_marked(run, status, text):
    """Few tests that all passed are no success when there was no time for the others."""
    run.report(stages=f"operators {status} 9", **{"operators.out": f"many\n{text}\n"})
    result, _, table = run.left()
    assert result["stages"]["operators"]["stopped"] and "| stopped |" in table


TESTS = """
import time, pytest
def test_good(): pass
def test_bad(): assert 0
@pytest.mark.skip(reason="no")
def test_left(): pass
@pytest.mark.parametrize("size", ["a b"])
def test_hung(size): time.sleep(60)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_hung_test_is_named_without_a_junit_file(run, tmp_path, workers):
    """A test that waits for a kernel takes its process along when it is ended, and the file with it."""
    pytest.importorskip("pytest_timeout")
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_few.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout=2", "--timeout-method=thread"]
    done = subprocess.run([*command, *workers, "test_few.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    run.report(**{"operators.out": done.stdout + done.stderr, "operators.xml": None})
    result, _, table = run.left()
    counts = result["stages"]["operators"]["tests"]
    assert counts["passed"] == 1 and sum(counts["skipped"].values()) == 1
    assert "test_few.py::test_bad" in counts["failed"]
    assert "test_few.py::test_hung[a b]" in counts["failed"] + counts.get("unfinished", [])
    assert "test_hung[a b]" in table
