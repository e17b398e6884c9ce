"""The benchmarks of a GPU, on a stand-in for one: float32 without TF32, CUDA graphs, both plans of PAR."""

from __future__ import annotations

import csv
import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest_plugins = ["support.benchmark_modules"]  # the fixture bench


def tf32_allowed() -> list[bool]:
    """In cuDNN's convolutions, in products as one flag says it, in products as the other does."""
    precision = torch.get_float32_matmul_precision()
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, precision != "highest"]


class Call:
    """A provider of known speed and result; notes whether TF32 was allowed each time it ran."""

    def __init__(self, seconds: float, graph: float | Exception = 0.0, value: float = 1.0, tf32: float = 1.0) -> None:
        self.seconds, self.graph, self.values, self.seen = seconds, graph, {False: value, True: tf32}, []

    def __call__(self) -> torch.Tensor:
        self.seen.append(tf32_allowed())
        return torch.full((3,), self.values[self.seen[-1][0]])


@pytest.fixture
def cuda(bench, monkeypatch) -> SimpleNamespace:
    """The harness on a GPU whose times are those of the `Call`s."""

    def seconds_of(call: Call, device: str, repeats: int = 1) -> float:
        call()
        return call.seconds

    def capture(call: Call) -> Call:
        if isinstance(call.graph, Exception):
            raise call.graph
        return Call(call.graph)

    harness = bench.harness
    monkeypatch.setattr(harness, "describe", lambda device: bench.MACHINE)
    monkeypatch.setattr(harness, "seconds_of", seconds_of)
    monkeypatch.setattr(harness, "peak_memory", lambda call, device: 0.0)
    monkeypatch.setattr(harness, "CacheFlush", lambda device: lambda: None)
    monkeypatch.setattr(bench.gpu, "capture", capture)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return bench


@pytest.fixture
def careless():
    """Somebody has allowed TF32 everywhere."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def test_float32_is_timed_as_float32_and_tf32_is_named(cuda, careless):
    """A speed-up over a "float32" reference that took TF32 would not be one over float32, nor its error."""
    dense, ours = Call(4e-4, tf32=1.003), Call(1e-4, value=1.000002)
    table = [cuda.harness.Case("a", {"dense": dense, "ours": ours}, bytes=1.0)]
    rows = cuda.harness.run("par", table, "cuda", seconds=0.0).rows
    assert [row.provider for row in rows] == ["dense", "dense TF32", "ours"]
    assert [row.error for row in rows] == pytest.approx([0, 3e-3, 2e-6], rel=0.1)
    assert not any(any(flags) for flags in ours.seen), "no TF32 while ours is checked and timed"
    assert {tuple(flags) for flags in dense.seen} == {(False,) * 3, (True,) * 3}
    assert tf32_allowed() == [True] * 3, "as it was before"


def test_tf32_is_restored_when_a_table_is_stopped(cuda, careless):
    def stop() -> None:
        assert not any(tf32_allowed())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.harness.run("par", [cuda.harness.Case("a", {"dense": stop})], "cuda")
    assert tf32_allowed() == [True] * 3


def test_tf32_is_no_base_of_a_speed_up_and_has_a_tolerance_of_its_own(cuda):
    class Faster(Call):
        seconds = property(lambda self: 1e-4 if tf32_allowed()[0] else 4e-4, lambda self, value: None)

    for off, timed in ((1e-3, True), (3e-2, False)):
        table = [cuda.harness.Case("a", {"dense": Faster(0, tf32=1 + off), "ours": Call(2e-4)}, bytes=1.0)]
        report = cuda.harness.run("par", table, "cuda", seconds=0.0)
        speedups = {row.provider: row.speedup for row in report.rows}
        assert speedups == {"dense": 1.0, "ours": 2.0} | ({"dense TF32": 4.0} if timed else {})
        assert list(report.failures) == ([] if timed else ["a: dense TF32"])


def test_tf32_is_timed_for_float32_on_a_gpu_only(cuda):
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        table = [cuda.harness.Case("a", {"dense": Call(1e-2)}, bytes=1.0, dtype=dtype)]
        assert [row.provider for row in cuda.harness.run("par", table, device, seconds=0.0).rows] == ["dense"]


def test_nothing_is_compared_with_another_first(cuda, monkeypatch):
    """Where the reference does not get through, a speed-up over whatever came next would be a lie."""

    def peak(call: Call, device: str) -> float:
        if call is dense:
            raise RuntimeError("out of memory")
        return 0.0

    dense = Call(1e-2)
    monkeypatch.setattr(cuda.harness, "peak_memory", peak)
    table = [cuda.harness.Case("a", {"dense": dense, "ours": Call(1e-2)}, bytes=1.0)]
    report = cuda.harness.run("par", table, "cuda", seconds=0.0)
    assert report.rows == [] and list(report.failures) == ["a: dense", "a: dense TF32", "a: ours"]


def test_peak_of_float32_is_measured_without_tf32(bench, careless, monkeypatch):
    """A floor of TF32's peak would be one that no float32 arithmetic reaches."""
    seen = []
    monkeypatch.setattr(bench.machine, "seconds_of", lambda call, device: seen.append(tf32_allowed()) or 1.0)
    _, peaks = bench.machine.limits("cpu")
    assert peaks == {torch.float32: 2 * 1024**3} and seen[-7:] == [[False] * 3] * 7
    assert tf32_allowed() == [True] * 3


def test_short_calls_are_replayed_as_graphs_and_the_hosts_share_is_told(cuda, tmp_path, monkeypatch, capsys):
    """On a GPU a call of microseconds is timed with its launches, which a training loop in a graph does not pay."""
    waits = RuntimeError("operation not permitted when stream is capturing")
    providers = {"dense": Call(5e-2, graph=4e-2), "waits": Call(1e-4, graph=waits)}
    providers |= {"ours": Call(2e-4, graph=5e-5), "even": Call(1e-4, graph=1.1e-4)}
    table = [cuda.harness.Case("a", providers, bytes=1.0, dtype=torch.bfloat16)]
    monkeypatch.setattr(cuda.tables.par, "cases", lambda *_, **__: table)
    cuda.run.main(["par", "--device", "cuda", "--seconds", "0", "--out", str(tmp_path)])  # and does not exit with 1
    content = json.loads((tmp_path / "par-cuda.json").read_text())
    want = {"dense": (None, None), "waits": (None, None), "ours": (0.05, 0.75), "even": (0.11, 0.0)}
    assert {row["provider"]: (row["graph_ms"], row["host_share"]) for row in content["rows"]} == want
    assert content["failures"] == {}
    assert content["notes"] == {"a: waits": f"no CUDA graph: RuntimeError: {waits}"}
    with (tmp_path / "par-cuda.csv").open() as file:
        assert [row["host_share"] for row in csv.DictReader(file)] == ["", "", "0.75", "0.0"]
    printed = capsys.readouterr().out
    assert "graph ms" in printed and "75%" in printed and str(waits) in printed


def test_no_graphs_on_a_cpu(cuda, capsys):
    report = cuda.harness.run("par", [cuda.harness.Case("a", {"one": Call(1e-4, 5e-5)}, bytes=1.0)], "cpu", 0.0)
    assert [(row.graph_ms, row.host_share) for row in report.rows] == [(None, None)]
    assert "graph ms" not in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_warms_up_aside_and_gives_the_stream_back(bench, monkeypatch, fails):
    """Whatever becomes of the capture, the next call runs on the stream of the one before; and the reason is told."""
    events, current = [], ["main"]

    @contextmanager
    def on(stream: SimpleNamespace):
        before = list(current)
        current.append(stream.name)
        try:
            yield
        finally:
            current[:] = before

    class Graph:
        """As `torch.cuda.graph`, which leaves its stream the current one when its end raises."""

        def __init__(self, graph: object) -> None:
            pass

        def __enter__(self) -> None:
            current.append("capture")

        def __exit__(self, *raised: object) -> None:
            if raised[0]:
                raise RuntimeError("a previous error during capture")
            current.pop()

    def call() -> str:
        events.append(current[-1])
        if fails and current[-1] == "capture":
            raise ValueError("waits for the device")
        return "result"

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: None)

    fake = {"stream": on, "graph": Graph, "Stream": lambda: stream("side")}
    fake["current_stream"] = lambda: stream(current[-1])
    fake["CUDAGraph"] = lambda: SimpleNamespace(replay=lambda: events.append("replay"))
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    if fails:
        with pytest.raises(ValueError, match="waits for the device"):
            bench.gpu.capture(call)
    else:
        assert bench.gpu.capture(call)() == "result"
    assert events == ["side"] * 3 + ["capture"] + ["replay"] * (not fails)
    assert current == ["main"]


# --- PAR's two plans ---


def plans_of(bench, monkeypatch, par) -> SimpleNamespace:
    """PAR's smallest case as it is on a GPU, with ``par`` for the operator."""
    monkeypatch.setattr(bench.tables.par, "kernels", lambda operator, device: ["native"])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(bench.tables.par.afa_kernels, "par", par)
    return bench.tables.par.cases("cuda", quick=True)[0]


@pytest.mark.parametrize("before", [None, "kept"])
def test_both_plans_of_par_are_timed_beside_its_own_choice(bench, monkeypatch, before):
    """The choice between weights on chip and weights in memory can be judged only beside both."""
    monkeypatch.delenv("AFA_PLAN", raising=False)
    if before:
        monkeypatch.setenv("AFA_PLAN", before)
    case = plans_of(bench, monkeypatch, lambda *_, backend, **__: (backend, os.environ.get("AFA_PLAN")))
    assert list(case.providers) == ["reference", "native", "native resident", "native streaming"]
    assert case.providers["native resident"]() == ("native", "resident")
    assert case.providers["native streaming"]() == ("native", "streaming")
    assert case.providers["native"]() == ("native", before)


@pytest.mark.parametrize("error", [ValueError("the plan does not fit"), RuntimeError("par: not supported")])
def test_a_plan_that_does_not_fit_is_noted_and_fails_nothing(cuda, monkeypatch, tmp_path, error):
    """A photograph's weights fit on no chip: that is no reason for a run of hours to end with an error."""

    def par(*_: object, **__: object) -> torch.Tensor:
        if os.environ.get("AFA_PLAN") == "resident":
            raise error
        return torch.ones(3)

    case = plans_of(cuda, monkeypatch, par)
    monkeypatch.setattr(cuda.harness, "seconds_of", lambda call, device, repeats=1: 1e-2)
    monkeypatch.setattr(cuda.tables.par, "cases", lambda *_, **__: [case])
    cuda.run.main(["par", "--device", "cuda", "--seconds", "0", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "par-cuda.json").read_text())
    timed = [row["provider"] for row in content["rows"]]
    assert timed == ["reference", "reference TF32", "native", "native streaming"]
    assert content["notes"] == {f"{case.name}: native resident": f"not timed: {error}"} and content["failures"] == {}
    assert "AFA_PLAN" not in os.environ


def test_a_plan_that_breaks_the_device_is_a_failure(bench, monkeypatch):
    def par(*_: object, **__: object) -> None:
        raise RuntimeError("par: CUDA: an illegal memory access was encountered")

    monkeypatch.delenv("AFA_PLAN", raising=False)
    with pytest.raises(RuntimeError, match="illegal"):
        plans_of(bench, monkeypatch, par).providers["native resident"]()
    assert "AFA_PLAN" not in os.environ


def test_plans_are_a_gpus(bench):
    assert not any("resident" in name for case in bench.tables.par.cases("cpu", quick=True) for name in case.providers)


# --- the walk's two ways ---


def test_both_ways_of_the_walk_are_timed_and_a_dense_one_on_small_grids(bench, monkeypatch):
    monkeypatch.delenv("AFA_PLAN", raising=False)
    table = bench.tables.random_walk
    monkeypatch.setattr(table, "kernels", lambda operator, device: ["native"])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(table, "SIDES", [6, 31])
    small, _, large, _ = table.cases("cuda")
    plans = ["dense", "reference", "native", "native resident", "native streaming"]
    assert list(small.providers) == [*plans, "window made dense"] and list(large.providers) == plans
    want = small.providers["dense"]()
    torch.testing.assert_close(small.providers["window made dense"](), want, rtol=1e-5, atol=1e-6)


def test_the_walks_ways_are_a_gpus(bench):
    names = {name for case in bench.tables.random_walk.cases("cpu", quick=True) for name in case.providers}
    assert not any("resident" in name or "made" in name for name in names)
