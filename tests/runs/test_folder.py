"""A run's folder: one run at a time, and what is refused leaves it alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support import forked
from support.tiny_run import tiny_args

from afa_model import cli
from afa_model.config import Config, parse
from afa_model.errors import ConfigError
from afa_model.runs import folder as module
from afa_model.runs.folder import LOCK, RunFolder


def config(out: Path, resume: str = "never") -> Config:
    return Config(out=str(out), resume=resume)


def child(function) -> int:
    """A forked process that runs ``function`` and then waits to be killed; it has begun when the file is there."""
    pid = os.fork()
    if pid == 0:
        kept = function()
        time.sleep(60)
        os._exit(bool(kept))
    return pid


def wait_for(path: Path, content: bool = True) -> None:
    started = time.monotonic()
    while not (path.is_file() and (path.stat().st_size or not content)):
        assert time.monotonic() - started < 10
        time.sleep(0.01)


@pytest.fixture
def busy(tmp_path):
    """A folder in which another process is at work -> (folder, its id)."""
    pid = child(lambda: RunFolder(config(tmp_path / "run")))
    wait_for(tmp_path / "run" / LOCK)
    yield tmp_path / "run", pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_run_in_a_folder_is_refused(busy, locks, monkeypatch):
    """Also before the first checkpoint; on a file system without locks by what the file says."""
    folder, pid = busy
    if not locks:
        monkeypatch.setattr(module, "fcntl", None)
    with pytest.raises(ConfigError, match=rf"^out: .*run is in use by process {pid} on {socket.gethostname()} \("):
        RunFolder(config(folder))
    assert json.loads((folder / LOCK).read_text())["process"] == pid


@pytest.mark.parametrize("locks", [True, False])
def test_the_folder_of_a_process_that_is_gone_is_taken_over(tmp_path, locks, monkeypatch):
    pid = child(lambda: RunFolder(config(tmp_path)))
    wait_for(tmp_path / LOCK)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not locks:
        monkeypatch.setattr(module, "fcntl", None)
    with RunFolder(config(tmp_path)) as taken:
        assert taken.notes == [f"process {pid} on {socket.gethostname()}, which had this folder, is gone: taken over"]
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()
    with RunFolder(config(tmp_path)) as again:
        assert again.notes == []


def test_what_was_never_written_to_its_end_is_no_owner(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "a", "proc')
    with RunFolder(config(tmp_path)) as folder:
        assert folder.notes == []


def test_the_lock_does_not_outlive_its_process_in_those_who_load_data(tmp_path):
    """They live on for a moment, and a run that is restarted at once must not stumble over them."""

    def killed() -> int:
        RunFolder(config(tmp_path))
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    forked.run(killed)
    with RunFolder(config(tmp_path)) as folder:
        assert "taken over" in folder.notes[0]


def test_only_the_first_process_locks(busy):
    RunFolder(config(busy[0]), first=False)


def test_a_folder_made_for_nothing_goes(tmp_path):
    with RunFolder(config(tmp_path / "run")):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with RunFolder(config(tmp_path / "run")) as folder:
        folder.accept(writes=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "changes",
    [
        {},  # it holds a run
        {"resume": "auto"},  # its only checkpoint is broken
        {"resume": "nowhere.pt"},
        {"resume": "auto", "readable": True},  # there are no data
        {"resume": "auto", "seed": 2**63},
    ],
)
def test_a_refused_run_leaves_the_settings_of_the_one_before(tmp_path, changes, capsys):
    (tmp_path / "config.yaml").write_text("of a finished run")
    whole = {"format": 1, "model": {}, "config": {}, "class_names": [], "progress": {}}
    torch.save(whole, tmp_path / "iter_00000004.pt")
    if "readable" not in changes:
        (tmp_path / "iter_00000004.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "train.csv").write_text("iteration\n1\n")
    changes = {key: value for key, value in changes.items() if key != "readable"}
    assert cli.main(["train", *tiny_args(Path("/nowhere"), tmp_path, **changes)]) == 2
    assert "error: " in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "of a finished run"
    assert (tmp_path / "train.csv").read_text() == "iteration\n1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "iter_00000004.pt", "train.csv"]


def test_home_is_understood_in_every_path_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("out: ~/runs\nmodel: {pretrained: ~/w.pth}\n")
    keys = ["--data.root", "~/voc", "--data.label_file=~/l.npy"]
    keys += ["--data.train_split", "~/a.txt", "--data.val_split=~/b.txt"]
    made = parse(["--config", "~/mine.yaml", *keys, "--resume", "~/runs"])
    paths = (made.data.root, made.data.label_file, made.data.train_split, made.data.val_split)
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("voc", "l.npy", "a.txt", "b.txt"))
    assert (made.out, made.resume, made.model.pretrained) == tuple(f"{tmp_path}/{n}" for n in ("runs", "runs", "w.pth"))


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30, -1])
def test_a_seed_that_no_generator_takes_is_named(seed):
    with pytest.raises(ConfigError, match=r"^seed: expected 0 \.\. 9223372036854775807, got"):
        parse([f"--seed={seed}"])


def test_the_largest_seed_is_taken_by_all_generators():
    from afa_model.data.order import ResumableBatchSampler
    from afa_model.runtime.processes import seed_everything

    largest = parse([f"--seed={2**63 - 1}"]).seed
    seed_everything(largest + 4096)  # the number of a process is added
    assert len(next(iter(ResumableBatchSampler(5, 2, largest)))) == 2
