"""`afa doctor`: everything a report of a problem needs, and a reason for whatever does not run."""

from __future__ import annotations

import json

import torch
from rich.console import Console

import afa_kernels
from afa_model import doctor


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


def test_a_missing_native_module_and_a_missing_device_are_explained(monkeypatch):
    report = doctor.examine()
    report["build"] = {
        "native": False,
        "native_reason": "no C++ compiler",
        "cuda": False,
        "cuda_reason": "no nvcc",
    }
    report["cuda"] = {"torch": "built for CUDA 13.0", "devices": [], "no_device": "Found no NVIDIA driver"}
    report["AFA_BACKEND"] = "reference"
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    doctor.show(report, console)
    printed = console.export_text()
    assert "CPU kernels   no: no C++ compiler" in printed
    assert "CUDA kernels  no: no nvcc" in printed
    assert "none (Found no NVIDIA driver)" in printed
    assert "AFA_BACKEND=reference" in printed
