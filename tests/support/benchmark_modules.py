"""What measures, for the tests of it: afa_kernels.bench, and the modules of benchmarks/, which is no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from afa_kernels.bench import command, gpu, harness, machine, reports, tables
from support.common import ROOT

REAL = (
    "boundary_scores",
    "imagenet_cams",
    "quality_refinement",
    "readme_picture",
    "real_cams",
    "real_cams_why",
    "refined_labels",
)
SCRIPTS = ("run", "result_files", "published_step", "readme_table")
MACHINE = {
    "device": "a machine",
    "afa": "0",
    "python": "3",
    "date": "today",
    "instruction_set": None,
    "torch": "2",
    "commit": "0",
    "bandwidth_gb_s": 10.0,
    "peak_gflop_s": 50.0,
    "peak_gflop_s_bfloat16": 500.0,
}


def _imported(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Imported for one test, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def bench(monkeypatch) -> Iterator[SimpleNamespace]:
    """What measures time; ``tables`` are the operators' cases."""
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    for scripts in _imported(SCRIPTS, monkeypatch):
        parts = {"command": command, "gpu": gpu, "harness": harness, "machine": machine, "reports": reports}
        cases = SimpleNamespace(**{name: tables.table(name) for name in tables.NAMES})
        yield SimpleNamespace(MACHINE=MACHINE, tables=cases, **parts, **vars(scripts))


@pytest.fixture
def real(monkeypatch) -> Iterator[SimpleNamespace]:
    """What measures labels of real CAMs."""
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    yield from _imported(REAL, monkeypatch)
