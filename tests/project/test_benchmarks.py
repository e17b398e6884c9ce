"""The benchmarks: every provider gives the same numbers, peaks are what they say, wrong results are not timed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.common import ROOT, available, relative_error

from afa_kernels.bench import command
from afa_kernels.ops.affinity import native as affinity_native

pytest_plugins = ["support.benchmark_modules"]  # the fixture bench


def providing() -> torch.Tensor:
    return torch.ones(3)


@pytest.mark.parametrize("table", ["affinity", "path_affinity", "random_walk", "feature_affinity", "pcm", "sinkhorn"])
def test_smallest_cases_run_and_make_a_report(bench, table, tmp_path, monkeypatch):
    assert table in vars(bench.tables)
    monkeypatch.setattr(bench.harness, "describe", lambda device: bench.MACHINE)
    cases = getattr(bench.tables, table).cases("cpu", quick=True)[:1]
    report = bench.harness.run(table, cases, "cpu", seconds=0.0)
    path = bench.result_files.write(report, tmp_path)
    content = json.loads(path.read_text())
    assert [row["provider"] for row in content["rows"]][:2] == ["dense", "reference"]
    assert all(row["floor_ms"] > 0 and row["error"] <= 1e-4 for row in content["rows"])
    assert path.with_suffix(".csv").stat().st_size and path.with_suffix(".png").stat().st_size
    (line,) = (line for line in bench.reports.markdown([content]).splitlines() if line.startswith(f"| {table}"))
    assert cases[0].name in line


def test_backends_that_are_not_wanted_are_not_timed(bench, monkeypatch, capsys):
    def row(backend: str) -> SimpleNamespace:
        return SimpleNamespace(operator="par", device="cuda", backend=backend, available=True)

    monkeypatch.setattr(bench.harness, "backends", lambda: [row("reference"), row("native"), row("triton")])
    monkeypatch.setattr(bench.harness, "OURS", bench.harness.OURS)  # back to what it was behind this
    both = ["native", "triton"]
    for asked, timed in (([], both), (["--backends", "native"], ["native"]), ([], both)):
        command.parsed(command.parser(), ["par", *asked])
        assert bench.harness.kernels("par", "cuda") == timed
    with pytest.raises(SystemExit):
        command.parsed(command.parser(), ["par", "--backends", "naive"])
    assert "--backends: expected native, triton or both, got naive" in capsys.readouterr().err


def test_the_bilateral_filters_cases_run(bench, tmp_path, monkeypatch):
    """Each kind of them, on few pixels; the floor of the exact one counts pairs."""
    table, few = bench.tables.bilateral, (18, 24)
    monkeypatch.setattr(table, "QUICK", few)
    monkeypatch.setitem(table.SIGMAS, few, (15.0, 5.0))
    monkeypatch.setitem(table.CRF, "num_iter", 1)
    monkeypatch.setattr(bench.harness, "describe", lambda device: bench.MACHINE)
    cases = table.cases("cpu", quick=True)
    assert [case.name.split(",")[0] for case in cases] == ["exact", "lattice", "gaussian", "CRF lattice"]
    assert "bilateral" in vars(bench.tables)
    report = bench.harness.run("bilateral", cases, "cpu", seconds=0.0)
    assert report.failures == {} and all(row.floor_ms > 0 for row in report.rows)
    assert {row.provider for row in report.rows} >= {"reference", *available("dense_crf")}
    image, few_pairs = table.photograph(*few), table.pairs_that_matter
    assert few_pairs(image, 1e-3, 1e-3) == 18 * 24 and few_pairs(image, 1e6, 1e6) == (18 * 24) ** 2
    threads = torch.get_num_threads()
    assert table.one_thread(torch.get_num_threads) == 1 and torch.get_num_threads() == threads


def test_the_photograph_is_compared_with_what_ends(bench):
    """On a CPU there is nothing that takes 3.5e10 pairs one by one: no exact filter, no exact CRF."""
    names = [case.name for case in bench.tables.bilateral.cases("cpu", quick=False)]
    assert [name for name in names if "exact" in name] == [next(name for name in names if "exact, 160x160" in name)]
    assert sum("375x500" in name for name in names) == 3 and len(names) == 7


def test_what_fails_or_differs_is_not_timed_and_the_run_goes_on(bench, tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("out of something")

    providers = {"one": lambda: torch.ones(3), "two": lambda: torch.full((3,), 1.01), "three": fail, "four": providing}
    table = [
        bench.harness.Case("a", providers, bytes=1.0),
        bench.harness.Case("b", {"one": fail, "two": providing}),
        bench.harness.Case("c", {"one": providing}, bytes=1.0),
    ]
    monkeypatch.setattr(bench.harness, "describe", lambda device: bench.MACHINE)
    monkeypatch.setattr(bench.tables.par, "cases", lambda *_, **__: table)
    with pytest.raises(SystemExit) as stopped:
        bench.run.main(["par", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    wrong = {
        "a: two": "differs from one by 0.01, not timed",
        "a: three": "RuntimeError: out of something",
        "b: one": "RuntimeError: out of something",
        "b: two": "not timed: there is no one to compare it with",
    }
    assert str(stopped.value).splitlines() == [f"{name}: {reason}" for name, reason in wrong.items()]
    content = json.loads((tmp_path / "par-cpu.json").read_text())
    assert content["failures"] == wrong
    assert [(row["case"], row["provider"]) for row in content["rows"]] == [("a", "one"), ("a", "four"), ("c", "one")]


def test_a_run_that_is_stopped_keeps_its_cases(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.harness, "describe", lambda device: bench.MACHINE)
    cases = [
        bench.harness.Case("a", {"one": providing}, bytes=1.0),
        bench.harness.Case("b", {"one": lambda: (_ for _ in ()).throw(KeyboardInterrupt)}),
    ]
    with pytest.raises(KeyboardInterrupt):
        bench.harness.run("par", cases, "cpu", 0.0, tmp_path)
    assert [row["case"] for row in json.loads((tmp_path / "par-cpu.json").read_text())["rows"]] == ["a"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_peaks_are_those_of_the_call(bench):
    mebi = 1 << 20
    peak = bench.harness.peak_memory(lambda: torch.ones(64 * mebi // 4) + torch.ones(1), "cpu")
    assert 0.98 * 128 < peak / mebi < 1.1 * 128, "the operand and the result"
    assert bench.harness.peak_memory(lambda: None, "cpu") < mebi


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.skipif("native" not in available("window_affinity"), reason="no native kernels")
def test_scratch_of_the_kernels_counts_at_every_call(bench, monkeypatch):
    """Kept or not: a peak holds the result and the scratch."""
    table, asked = bench.tables.affinity, []
    original = affinity_native.workspace
    monkeypatch.setattr(affinity_native, "workspace", lambda size, *rest: asked.append(size) or original(size, *rest))
    call = table.window_case(2, 20, "cpu", torch.float32, False).providers["native"]
    result = call()
    for _ in range(3):
        peak = bench.harness.peak_memory(call, "cpu")
        assert result.nbytes + 0.7 * asked[0] < peak < 1.5 * (result.nbytes + asked[0])


def test_pairs_in_the_window_are_counted(bench):
    window = bench.tables.affinity.window_mask(20, 20, bench.tables.affinity.RADIUS)
    assert bench.tables.affinity.pairs(20) == int(window.sum())


def test_heads_of_a_vision_transformer_are_a_case(bench):
    table = bench.tables.affinity
    names = [case.name for case in table.cases("cpu", quick=False)]
    assert [name for name in names if "24 heads" in name] == [
        "loss and gradients, N=784, B=2, 24 heads", "window, N=784, B=2, 24 heads"
    ]  # fmt: skip
    for make in (table.loss_case, table.window_case):
        few, many = (make(1, 8, "cpu", torch.float32, False, heads) for heads in (16, 24))
        assert many.operations == 1.5 * few.operations and few.bytes < many.bytes <= 1.5 * few.bytes
        want = next(iter(many.providers.values()))()
        for call in many.providers.values():
            assert all(relative_error(got, wanted) < 1e-4 for got, wanted in zip(call(), want))


def test_dense_arithmetic_by_rows_is_that_of_the_whole(bench):
    table = bench.tables.affinity
    inputs, labels = table.make_inputs(2, 24, "cpu", torch.float32)
    window = table.window_mask(24, 24, table.RADIUS)
    want = table.with_gradients(table.dense_loss, inputs, labels, window)
    for got, wanted in zip(table.loss_by_rows(inputs, labels), want):
        assert relative_error(got, wanted) < 2e-5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.skipif("native" not in available("attention_affinity_loss"), reason="no native kernels")
def test_loss_and_gradients_of_a_large_grid_take_little_memory(bench):
    """N = 9216, where each of 16 score maps would be 340 MB: all of it under 400 MB over the inputs."""
    case = bench.tables.affinity.loss_case(*bench.tables.affinity.LARGE, "cpu", torch.float32, False)
    case.providers["native"]()
    assert bench.harness.peak_memory(case.providers["native"], "cpu") < 400e6


# --- python -m afa_kernels.bench ---


def test_the_command_prints_one_block_to_paste(bench, tmp_path, monkeypatch, capsys):
    """The environment and the table alone on the standard output; what went wrong in it and in the exit code."""
    asked, providers = [], {"one": providing, "native": lambda: torch.zeros(3)}

    def cases(device, quick, compiling):
        asked.append((device, quick, compiling))
        return [bench.harness.Case("a", providers, bytes=1.0)]

    monkeypatch.setattr(bench.harness, "describe", lambda device: bench.MACHINE)
    monkeypatch.setattr(bench.tables.par, "cases", cases)
    options = ["par", "--device", "cpu", "--seconds", "0"]
    assert bench.command.main([*options, "--json", str(tmp_path / "par.json")]) == 1
    out, err = capsys.readouterr()
    assert "median ms" in err and "median ms" not in out
    wrong = "- par: a: native: differs from one by 1, not timed"
    for line in ("- afa 0, commit 0, on a machine", "- Python 3, ", "- torch 2, ", "| par | a | ", wrong):
        assert f"\n{line}" in f"\n{out}"
    assert "- native CPU kernels " in out and "copies 10.0 GB/s, products float32 50.0, bfloat16 500.0" in out
    (report,) = json.loads((tmp_path / "par.json").read_text())
    assert report["operator"] == "par" and [row["provider"] for row in report["rows"]] == ["one"]
    del providers["native"]
    assert bench.command.main([*options, "--full", "--compile"]) == 0
    assert "Not timed" not in capsys.readouterr().out
    assert asked == [("cpu", True, False), ("cpu", False, True)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["parr"], "no case table for parr; there are affinity, bilateral,"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_the_command_says_what_was_asked_wrongly(bench, options, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bench.command.main(options)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_every_operator_with_kernels_has_a_table(bench):
    folders = {path.parent.name for path in (ROOT / "afa_kernels" / "ops").glob("*/functional.py")}
    assert set(vars(bench.tables)) == folders - {"diffusion"}  # which is what PAR's and the random walk's run on


def test_a_commit_is_that_of_a_checkout(bench, tmp_path, monkeypatch):
    """An installed package may lie within somebody else's."""
    (tmp_path / "csrc").mkdir()
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*run, *words], check=True)
    monkeypatch.setattr(bench.machine, "ROOT", tmp_path)
    here = bench.machine.commit()
    assert len(here) > 6 and bench.machine.built_from({"afa": "1", "commit": here}) == f"afa 1, commit {here}"
    (tmp_path / "csrc").rmdir()
    assert bench.machine.commit() == "unknown"
    assert bench.machine.built_from({"afa": "1", "commit": "unknown"}) == "afa 1"


def test_a_peak_that_the_system_does_not_tell_is_a_question_mark(bench):
    machine = {"device": "a", "torch": "2"}
    rows = [row("dense", 8.0, peak_mb=float("nan")), row("native", 2.0, peak_mb=float("nan"))]
    table = bench.reports.markdown([{"operator": "par", "machine": machine, "rows": rows}])
    assert table.splitlines()[-1].endswith("| ? / ? |")


# --- the README's table ---


def row(provider: str, median: float, **more: object) -> dict:
    numbers = {"median_ms": median, "speedup": 8 / median, "floor_ms": 0.1, "of_floor": 0.1, "peak_mb": 1.0}
    return {"case": "a", "provider": provider, **numbers, **more}


def test_results_from_before_there_were_graphs_are_still_tabled(bench):
    machine = {"device": "a GPU", "torch": "2"}
    old = {"operator": "par", "machine": machine, "rows": [row("dense", 8.0), row("native", 2.0)]}
    line = "| par | a | 8 | 2 (native) | 4.0x | 0.1 | 10 % | 1 / 1 |"
    assert bench.reports.markdown([old]).splitlines()[-1] == line
    graphs = {"graph_ms": 0.75, "host_share": 0.5}
    rows = [row("dense", 8.0, graph_ms=None), row("dense TF32", 1.0), row("native", 1.5, **graphs)]
    new = {"operator": "walk", "machine": machine, "rows": [*rows, row("native streaming", 1.0)], "notes": {}}
    table = bench.reports.markdown([old, new]).splitlines()
    assert table[2].endswith("| ours in a CUDA graph ms |")
    assert table[4:6] == [
        f"{line}  |",
        "| walk | a | 8 | 1.5 (native) | 5.3x | 0.1 | 13 % | 1 / 1 | 0.75 |",
    ]


def test_where_there_is_no_time_of_pytorch_none_is_shown(bench):
    machine = {"device": "a GPU", "torch": "2"}
    tables = {}
    for base in ("native", "pydensecrf", "reference"):
        rows = [row(base, 8.0), *([row("native", 2.0)] if base != "native" else [])]
        tables[base] = bench.reports.markdown([{"operator": "par", "machine": machine, "rows": rows}])
    lines = {base: table.splitlines()[-1] for base, table in tables.items()}
    assert lines["native"] == "| par | a | - | 8 (native) | - | 0.1 | 10 % | - / 1 |"
    assert lines["pydensecrf"] == "| par | a | 8 (pydensecrf) | 2 (native) | 4.0x | 0.1 | 10 % | 1 / 1 |"
    assert lines["reference"] == "| par | a | 8 | 2 (native) | 4.0x | 0.1 | 10 % | 1 / 1 |"


def test_a_reference_with_tf32_is_not_ours(bench):
    rows = [row("dense", 8.0), row("dense TF32", 1.0)]
    table = bench.reports.markdown([{"operator": "par", "machine": {"device": "a", "torch": "2"}, "rows": rows}])
    assert "TF32" not in table


def test_a_profile_adds_up_what_ran_at_once_and_names_ours(bench, monkeypatch):
    profiled = importlib.import_module("profile_step")
    spans = [profiled.Span(*given) for given in (("a", 0, 10), ("afa::b<4>", 5, 12), ("a", 6, 8), ("c", 20, 25))]
    assert profiled.busy(spans) == 17 and profiled.busy([]) == 0
    rows = profiled.totals(spans, 2)
    assert [(row["name"], row["calls"], row["us"], row["ours"]) for row in rows] == [
        ("a", 1.0, 6.0, False),
        ("afa::b<4>", 0.5, 3.5, True),
        ("c", 0.5, 2.5, False),
    ]


def test_a_step_is_profiled(tmp_path):
    script = ROOT / "benchmarks" / "bench_train_step.py"
    line = "--profile --device cpu --backbone mit_b0 --crop 64 --batch 1 --rounds 1 --warmup 0 --threads 1 --json"
    command = [sys.executable, str(script), *line.split(), str(tmp_path / "profile.json")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "profile.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert "aten::convolution_backward" in names and any(row["ours"] and row["us"] > 0 for row in found["rows"])
    assert not {"forward", "CAM", "PAR", "backward"} & set(names), "ranges are no operators"
    assert 0 < found["ours_ms"] < found["computing_ms"] <= found["profiled_step_ms"] * 1.01
    assert "our operators" in run.stdout and "aten::convolution_backward" in run.stdout
