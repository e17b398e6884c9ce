"""The modules of the benchmarks' folder, which is no package, for the tests of what they measure."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from support.common import ROOT

TABLES = ("bench_par", "bench_affinity", "bench_random_walk", "bench_bilateral")
MODULES = ("gpu", "harness", "machine", "reports", "run", "timing", "published_step", "readme_table", *TABLES)
MACHINE = {
    "device": "a machine",
    "torch": "2",
    "commit": "0",
    "bandwidth_gb_s": 10.0,
    "peak_gflop_s": 50.0,
    "peak_gflop_s_bfloat16": 500.0,
}


@pytest.fixture
def bench(monkeypatch) -> SimpleNamespace:
    """Imported for one test, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    yield SimpleNamespace(MACHINE=MACHINE, **{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)
