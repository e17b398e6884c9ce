"""The modules of the benchmarks' folder, which is no package, for the tests of what they measure."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from support.common import ROOT

TABLES = (
    "bench_par",
    "bench_affinity",
    "bench_path_affinity",
    "bench_random_walk",
    "bench_bilateral",
    "bench_feature_affinity",
    "bench_pcm",
    "bench_sinkhorn",
)
REAL = (
    "boundary_scores",
    "imagenet_cams",
    "quality_refinement",
    "readme_picture",
    "real_cams",
    "real_cams_why",
    "refined_labels",
)
MODULES = ("gpu", "harness", "machine", "reports", "run", "timing", "published_step", "readme_table", *TABLES)
MACHINE = {
    "device": "a machine",
    "torch": "2",
    "commit": "0",
    "bandwidth_gb_s": 10.0,
    "peak_gflop_s": 50.0,
    "peak_gflop_s_bfloat16": 500.0,
}


def _imported(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Imported for one test, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    yield SimpleNamespace(MACHINE=MACHINE, **{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def bench(monkeypatch) -> Iterator[SimpleNamespace]:
    """What measures time."""
    yield from _imported(MODULES, monkeypatch)


@pytest.fixture
def real(monkeypatch) -> Iterator[SimpleNamespace]:
    """What measures labels of real CAMs."""
    yield from _imported(REAL, monkeypatch)
