"""`afa doctor`: everything a report of a problem needs, and a reason for whatever does not run."""

from __future__ import annotations

import json

import pytest
import torch

import afa_kernels
from afa_kernels.core import native_module as _native_module
from afa_kernels.core import self_check as _self_check
from afa_kernels.ops.random_walk import native as random_walk_native
from afa_model import cli
from afa_model.commands import doctor


def test_report_names_versions_machine_and_threads(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for text in (torch.__version__, afa_kernels.__version__, torch.backends.cpu.get_cpu_capability()):
        assert text in printed
    assert f"threads                          {torch.get_num_threads()}" in printed
    assert "native module" in printed


def test_every_operator_and_backend_is_there_with_a_reason_where_it_does_not_run(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    listed = {(row["operator"], row["backend"], row["device"]) for row in report["operators"]}
    assert listed == {(row.operator, row.backend, row.device) for row in afa_kernels.backends()}
    for row in report["operators"]:
        assert row["runs"] or row["reason"]
    reference = [
        row for row in report["operators"] if (row["backend"], row["device"]) == ("reference", "cpu")
    ]
    assert reference and all(row["runs"] for row in reference)


def test_a_reason_is_printed_once_and_pointed_to(capsys):
    doctor.main([])
    printed = capsys.readouterr().out
    assert "yes" in printed
    for row in afa_kernels.backends():
        if not row.available:
            reason = row.reason.replace(f"{row.operator} has no", "this operator has no")
            assert printed.count(f") {reason}\n") == 1


def test_a_missing_native_module_and_a_missing_device_are_explained(capsys):
    report = doctor.examine()
    report["build"] = {
        "native": False,
        "native_reason": "no C++ compiler",
        "cuda": False,
        "cuda_reason": "no nvcc",
    }
    report["cuda"] = {"torch": "built for CUDA 13.0", "devices": [], "no_device": "Found no NVIDIA driver"}
    report["AFA_BACKEND"] = "reference"
    doctor.show(report)
    printed = capsys.readouterr().out
    assert "CPU kernels   no: no C++ compiler" in printed
    assert "CUDA kernels  no: no nvcc" in printed
    assert "none (Found no NVIDIA driver)" in printed
    assert "AFA_BACKEND=reference" in printed


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_operator(monkeypatch):
    """The check of the CPU and one operator; nothing is known of any."""
    check = afa_kernels.self_check
    monkeypatch.setattr(_self_check, "_proven", set())
    monkeypatch.setattr(_self_check, "_failures", {})
    monkeypatch.setattr(afa_kernels, "self_check", lambda: check("cpu", ["random_walk"]))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if _native_module.native is None:
        pytest.skip("no native module")


def test_without_a_check_it_says_that_there_is_one(one_operator, capsys):
    assert cli.main(["doctor"]) == 0
    assert "`afa doctor --check` runs the backends" in capsys.readouterr().out
    assert not _self_check._proven
    doctor.main(["--json"])
    assert "check" not in json.loads(capsys.readouterr().out)


def test_check_prints_errors_beside_tolerances(one_operator, capsys):
    assert cli.main(["doctor", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 agree with the reference" in printed and "doctor --check" not in printed
    for kind, allowed in (("float32", "1.0e-04"), ("float16", "9.8e-04"), ("bfloat16", "7.8e-03")):
        for way in ("forward", "backward"):
            (line,) = (line.split() for line in printed.splitlines() if f" {kind} " in line and way in line)
            assert line[:5] == ["random_walk", "native", "cpu", kind, way]
            assert line[6] == allowed and line[8:] == ["yes"]
            assert 0 < float(line[5]) < float(allowed)


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_check_fails_where_a_backend_deviates(one_operator, factor, monkeypatch, capsys, recwarn):
    kernel = random_walk_native.random_walk_affinity_gradient
    monkeypatch.setattr(random_walk_native, "random_walk_affinity_gradient", lambda *args: kernel(*args) * factor)
    assert cli.main(["doctor", "--check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(report["check"]) == 6
    for row in report["check"]:
        assert row["ok"] == (row["direction"] == "forward") == (row["reason"] == "")
    assert report["check"][1]["error"] == (pytest.approx(0.02, rel=1e-3) if factor == 1.02 else None)
    (listed,) = (row for row in report["operators"] if list(row.values())[:3] == ["random_walk", "native", "cpu"])
    assert not listed["runs"] and listed["reason"].startswith("self check failed: float32 backward ")
    assert doctor.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "3 of 6 agree with the reference" in printed and printed.count("no: self check failed") == 3
    assert not recwarn  # the table says it


def test_what_has_failed_already_is_shown(one_operator, capsys):
    _self_check._failures["random_walk", "native", torch.device("cpu")] = "self check failed: it did"
    assert doctor.main([]) == 0
    assert ") self check failed: it did\n" in capsys.readouterr().out
