"""What this process may use of the machine, and that OpenMP is told before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.common import ROOT

from afa_model.runtime import machine


def cgroup(root, quotas: dict[str, str]) -> None:
    for folder, text in quotas.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "cpu.max").write_text(text)


def test_the_quota_is_the_smallest_of_this_group_and_those_above(tmp_path, monkeypatch):
    cgroup(tmp_path, {"": "max 100000\n", "pod": "350000 100000\n", "pod/one": "max 100000\n"})
    own = tmp_path / "own"
    real = machine.Path
    monkeypatch.setattr(machine, "Path", lambda path: own if path == "/proc/self/cgroup" else real(path))
    own.write_text("0::/pod/one\n")
    assert machine.cpu_quota(tmp_path) == 3.5
    own.write_text("0::/\n")
    assert machine.cpu_quota(tmp_path) is None
    own.write_text("0::/pod/gone\n")
    assert machine.cpu_quota(tmp_path) == 3.5
    assert machine.cpu_quota(tmp_path / "nowhere") is None


def test_the_quota_of_the_older_kind(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000")
    assert machine.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert machine.cpu_quota(tmp_path) is None


def test_usable_cpus(monkeypatch):
    monkeypatch.setattr(machine, "allowed_cpus", lambda: 8)
    for quota, cpus in ((None, 8), (2.5, 3), (0.2, 1), (64.0, 8)):
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        assert machine.usable_cpus() == cpus


def test_waiting_and_threads_are_set_unless_the_user_did(monkeypatch):
    monkeypatch.setattr(machine, "allowed_cpus", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.0)
    ours: dict[str, str] = {}
    machine.share_the_machine(ours)
    assert ours == {"GOMP_SPINCOUNT": machine.SPINS, "OMP_NUM_THREADS": "2"}
    for own in ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "5"}):
        theirs = dict(own)
        machine.share_the_machine(theirs)
        assert theirs == own
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    machine.share_the_machine(alone := {})
    assert "OMP_NUM_THREADS" not in alone


def test_threads_beside_workers(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 8)
    for workers, environment, threads in (
        (0, {}, 8),
        (3, {}, 8),
        (4, {}, 7),
        (64, {}, 1),
        (8, {"LOCAL_WORLD_SIZE": "2"}, 3),
        (8, {"OMP_NUM_THREADS": "5"}, None),
    ):
        assert machine.threads_beside(workers, environment) == threads


def test_the_command_says_so_before_torch_is_loaded():
    """libgomp reads its environment once, when it is loaded."""
    code = (
        "import os, sys; from afa_model import cli, commands; import afa_model.commands as c; import types;"
        "m = types.ModuleType('m'); m.main = lambda argv: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules);"
        "sys.modules['afa_model.commands.doctor'] = m; cli.main(['doctor'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert done.stdout.split() == [machine.SPINS, "False"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "not set: threads that wait spin"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY=PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "9"}, "OMP_WAIT_POLICY=ACTIVE, GOMP_SPINCOUNT=9"),
    ],
)
def test_doctor_shows_how_threads_wait(monkeypatch, environment, said):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert machine.waiting() == said
