"""Logs: tables that a kill and a resume leave whole, numbers per step, and a full disk that ends nothing."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from afa_model.runs import logs
from afa_model.runs.logs import RunLog, Table, Window, clock


def read(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_forgets_what_lies_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "train.csv"
    Table(path, 0).add([{"iteration": i, "loss": i / 3, "seg_loss": math.nan} for i in range(1, 6)])
    with open(path, "a") as file:
        file.write("6,1.99")  # the kill came in the middle of a row
    table = Table(path, 3)
    assert [row["iteration"] for row in read(path)] == ["1", "2", "3"]
    table.add([{"iteration": 4, "loss": 0.1, "seg_loss": 0.2, "later": 1}])
    assert read(path)[-1] == {"iteration": "4", "loss": "0.1", "seg_loss": "0.2"}
    assert read(path)[0]["seg_loss"] == ""  # not computed
    assert float(read(path)[0]["loss"]) == 1 / 3  # every digit


def test_a_fresh_run_starts_a_fresh_table(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("iteration,old\n1,2\n")
    Table(path, 0).add([{"iteration": 1, "loss": 0.5}])
    assert read(path) == [{"iteration": "1", "loss": "0.5"}]
    path.write_text("")  # nothing had been written when the run was killed
    Table(path, 7).add([{"iteration": 8, "loss": 0.5}])
    assert read(path) == [{"iteration": "8", "loss": "0.5"}]


def test_a_window_gives_each_step_and_the_time_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    window = Window()
    for iteration in (1, 2):
        now[0] += 3
        window.add(iteration, 1e-3, {"loss": torch.tensor(0.1 * iteration, requires_grad=True)})
    with window.pause():
        now[0] += 50
    rows = window.flush()
    assert [row["iteration"] for row in rows] == [1, 2]
    assert [row["seconds"] for row in rows] == [3, 3]
    assert rows[1]["loss"] == float(torch.tensor(0.2))
    assert window.flush() == []


def test_logs_that_cannot_be_written_warn_once_and_end_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", total=10, tensorboard=False)
    (tmp_path / "run" / "train.csv").mkdir()  # writing to it fails, as on a full disk
    (tmp_path / "run" / "pictures").write_text("")
    row = {"iteration": 1, "lr": 1e-5, "loss": 0.5, "seg_loss": math.nan, "seconds": 2.0}
    with log:
        log.train([row])
        log.train([{**row, "iteration": 2}])
        log.picture(2, "training", np.zeros((4, 4, 3), np.uint8))
    printed = capsys.readouterr().out
    assert printed.count("cannot be written") == 1
    assert "iter  2/10  loss 0.5000  lr 1.00e-05  2.00 s/it  ETA 0:00:16" in printed


def test_other_processes_are_silent(tmp_path, capsys):
    with RunLog(tmp_path / "run", total=10, writes=False) as log:
        log.say("hello")
        log.train([{"iteration": 1, "lr": 1.0, "loss": 0.5, "seconds": 2.0}])
        log.evaluation(1, {"cam": 1.0})
        log.picture(1, "training", np.zeros((4, 4, 3), np.uint8))
        with log.aside():
            log.advance(1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600 * 25 + 61)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "25:01:01",
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_bar_keeps_its_numbers_on_a_narrow_screen(tmp_path, monkeypatch, width):
    monkeypatch.setattr(logs, "Console", lambda **_: Console(file=io.StringIO(), width=width, force_terminal=True))
    with RunLog(tmp_path, 20000, tensorboard=False) as log:
        losses = {"loss": 1.2, "cls_loss": 0.7, "seg_loss": 3.1, "aff_loss": 0.4}
        log.train([{"iteration": 12345, "lr": 6e-5, "seconds": 0.25, **losses}])
        still = Console(file=io.StringIO(), width=width)
        still.print(log._bar.get_renderable())
    (line,) = still.file.getvalue().splitlines()
    assert "12345/20000" in line and "0:00:00" in line
    assert ("ETA 0:31" in line) == (width >= 80) and ("lr 6.00e-05" in line) == (width >= 160)
