"""`afa doctor`: what is installed, what the machine has, which backend of which operator runs, or why not.

With --check the backends run, too, and are compared with the reference: what to send with a report of a problem.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import afa_kernels
from afa_kernels.bench.machine import cpu_name

from ..runtime import machine

_LIBRARIES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "torchmetrics", "jsonargparse", "rich",
    "matplotlib", "tensorboard",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _quota() -> str:
    quota = machine.cpu_quota()
    return "no limit" if quota is None else f"{quota:g}"


def _kernel_instruction_set() -> str:
    from afa_kernels.core import native_module as _native_module

    if _native_module.native is None:
        return f"none: {_native_module.native_reason}"
    return str(_native_module.native.cpu_isa())


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"torch": "this torch is a CPU build", "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor},"
            f" {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return {"torch": f"built for CUDA {torch.version.cuda}", "devices": devices}


def _reason_of_no_device() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0]
    return "the driver lists none"


def _check() -> afa_kernels.CheckTable:
    """Every operator, backend that can run, device, dtype and direction, compared with the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table says it all
        return afa_kernels.self_check()


def _plain(row: Any) -> dict[str, Any]:
    """A row of the check; JSON has no NaN."""
    return row._asdict() | {"error": row.error if math.isfinite(row.error) else None}


def examine(check: bool = False) -> dict[str, Any]:
    """All that the command prints, as plain data; ``check`` also runs the backends."""
    checked = {"check": [_plain(row) for row in _check()]} if check else {}
    build = afa_kernels.build_info()
    cuda = _cuda()
    if torch.version.cuda is not None and not cuda["devices"]:
        cuda["no_device"] = _reason_of_no_device()
    return {
        "versions": {
            "afa": afa_kernels.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _LIBRARIES},
            "torch": torch.__version__,  # names its build, too
        },
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "instruction set, torch": torch.backends.cpu.get_cpu_capability(),
            "instruction set, native kernels": _kernel_instruction_set(),
            "may be used": f"{machine.allowed_cpus()} by affinity, {_quota()} by quota",
            "threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
            "threads wait": machine.waiting(),
        },
        "cuda": cuda,
        "build": build,
        "AFA_BACKEND": os.environ.get("AFA_BACKEND", "not set"),
        "operators": [
            {"operator": row.operator, "backend": row.backend, "device": row.device, "runs": row.available}
            | ({} if row.available else {"reason": row.reason})
            for row in afa_kernels.backends()
        ],
        **checked,
    }


def _native_lines(build: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compiled, and why something was not."""
    lines = [("CPU kernels", "compiled" if build.get("native") else f"no: {build.get('native_reason')}")]
    if build.get("cuda"):
        lines.append(
            ("CUDA kernels", f"compiled by {build.get('cuda_reason')} for {build.get('cuda_archs')}")
        )
    else:
        lines.append(("CUDA kernels", f"no: {build.get('cuda_reason')}"))
    return lines


def _operator_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of yes, or the number of a reason, per operator and backend; and the reasons."""
    columns = list(dict.fromkeys((row["device"], row["backend"]) for row in rows))
    cells = {(row["operator"], row["device"], row["backend"]): row for row in rows}
    reasons: list[str] = []

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return ""
        if row["runs"]:
            return "yes"
        reason = row["reason"].replace(f"{row['operator']} has no", "this operator has no")
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    table = [["", *(backend for _, backend in columns)], ["operator", *(device for device, _ in columns)]]
    for operator in dict.fromkeys(row["operator"] for row in rows):
        table.append([operator, *(cell(cells.get((operator, *column))) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*table)]  # fits 80 columns
    lines = ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in table]
    return [*lines, "", *(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))]


def _check_lines(rows: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The rows of the check, or that there is one."""
    if rows is None:
        return ["`afa doctor --check` runs the backends on small cases and compares them with the reference"]
    table = afa_kernels.CheckTable(
        afa_kernels.CheckRow(**{**row, "error": math.nan if row["error"] is None else row["error"]}) for row in rows
    )
    failed = sum(not row["ok"] for row in rows)
    return ["", *str(table).splitlines(), "", f"{len(rows) - failed} of {len(rows)} agree with the reference"]


def show(report: Mapping[str, Any]) -> None:
    """Print what :func:`examine` found: by ``print`` alone, for the operators may be all that is installed."""
    cuda = report["cuda"]
    devices = cuda["devices"] or [f"none ({cuda.get('no_device', cuda['torch'])})"]
    sections: list[tuple[str, list[tuple[str, Any]]]] = [
        ("versions", list(report["versions"].items())),
        ("processor", list(report["cpu"].items())),
        ("CUDA", [("torch", cuda["torch"]), *(("device", device) for device in devices)]),
        ("native module", _native_lines(report["build"])),
    ]
    for title, lines in sections:
        print(title)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"  {name:{width}}  {value}")
    print("operators: the first of native, triton, reference that can run is taken")
    if report["AFA_BACKEND"] != "not set":
        print(f"  AFA_BACKEND={report['AFA_BACKEND']} asks for another")
    print(*_operator_lines(report["operators"]), *_check_lines(report.get("check")), sep="\n")


def main(argv: Sequence[str]) -> int:
    """`afa doctor [--check] [--json]`: returns 1 if a backend differs from the reference."""
    parser = argparse.ArgumentParser("afa doctor", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="run every backend on small cases and compare it with the reference"
    )
    parser.add_argument("--json", action="store_true", help="print it all as JSON")
    options = parser.parse_args(argv)
    report = examine(options.check)
    if options.json:
        print(json.dumps(report, indent=2, default=str))
    else:
        show(report)
    return int(any(not row["ok"] for row in report.get("check", ())))
