"""docs/scaling.md: its SLURM script run as it stands there, its torchrun line on two "machines", its table counted."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support import forked
from support.common import ROOT
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.networks.afa import AFA
from afa_model.runs import checkpoint

TEXT = (ROOT / "docs" / "scaling.md").read_text()
TORCHRUN, SLURM = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.S | re.M)
STEPS = 12
SETTINGS = {"loader__batch_size": 1, "checkpoint__every": 3, "schedule__max_iters": STEPS, "resume": "auto"}

# SLURM on one machine: all tasks are started here, and their process ids written down.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & started+=($!)
done
echo "${started[@]}" > "$TASKS"
for process in "${started[@]}"; do
    wait "$process"; code=$?
    ((code > highest)) && highest=$code
done
exit "${highest:-0}"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost; echo elsewhere ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
AFA_COMMAND = """#!/bin/bash
exec "$PYTHON" -m afa_model "$@" $SMALL
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _as_launched(rank: int, port: int, arguments: list[str]) -> None:
    """`afa train` with what a launcher announces."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open(os.devnull, "w") as nobody, contextlib.redirect_stdout(nobody):
        assert cli.main(["train", *arguments]) == 0


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    make_voc(root, count=6)
    return root


@pytest.fixture(scope="module")
def whole(voc, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    forked.processes(_as_launched, 2, free_port(), ["--config=voc", *tiny_args(voc, out, **SETTINGS)])
    return out


def same(out: Path, whole: Path) -> None:
    """Two runs came to the same numbers and weights."""
    assert rows(out / "train.csv") == rows(whole / "train.csv")
    ends = [checkpoint.read(folder / f"iter_{STEPS:08d}.pt")["model"] for folder in (out, whole)]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def reached(process: subprocess.Popen, table: Path, step: int) -> None:
    """Wait until a run has written down a step."""
    while process.poll() is None and not (table.is_file() and f"\n{step}," in table.read_text()):
        time.sleep(0.02)


# --- SLURM ------------------------------------------------------------------------------------------------------------


class Cluster:
    """A place where the script runs as `sbatch` would start it, with stand-ins for SLURM's commands."""

    def __init__(self, folder: Path, voc: Path):
        self.folder, self.out, self.requeued = folder, folder / "run", folder / "requeued"
        commands = folder / "bin"
        commands.mkdir()
        for name, content in {"srun": SRUN, "scontrol": SCONTROL, "afa": AFA_COMMAND}.items():
            (commands / name).write_text(content)
            (commands / name).chmod(0o755)
        (folder / "job.sh").write_text(SLURM)
        small = [word for word in tiny_args(voc, self.out, **SETTINGS) if not word.startswith("--out")]
        self.environment = {
            **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
            "SMALL": " ".join(word.replace(" ", "") for word in small), "PYTHONPATH": str(ROOT),
            "TASKS": str(folder / "tasks"), "REQUEUED": str(self.requeued), "DATA": str(voc), "OUT": str(self.out),
            "WEIGHTS": "false", "SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_JOB_NODELIST": "some[1-2]", "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip

    def job(self, signalled: tuple[int, ...] = (), step: int = 0) -> tuple[int, str]:
        """The script's exit code and what was said, with SIGUSR1 to some tasks after a step."""
        with (self.folder / "said").open("w+") as said:
            script = subprocess.Popen(
                ["bash", str(self.folder / "job.sh")], env=self.environment, stdout=said, stderr=subprocess.STDOUT
            )
            if signalled:
                reached(script, self.out / "train.csv", step)
                tasks = (self.folder / "tasks").read_text().split()
                for rank in signalled:
                    os.kill(int(tasks[rank]), signal.SIGUSR1)
            code = script.wait(timeout=300)
            said.seek(0)
            return code, said.read()

    def queued_again(self) -> int:
        return len(self.requeued.read_text().split()) if self.requeued.exists() else 0


@pytest.mark.parametrize("signalled", [(0, 1), pytest.param((1,), marks=pytest.mark.slow)])
def test_the_slurm_script_goes_on_where_it_was_stopped(voc, whole, tmp_path, signalled):
    """Signalled in both tasks, or in one: to the end it comes to what it comes to at one go."""
    cluster = Cluster(tmp_path, voc)
    code, said = cluster.job(signalled, 2)
    assert code == 130 and cluster.queued_again() == 1, said
    newest = checkpoint.checkpoints(cluster.out)[0]
    assert f"stopped by signal {int(signal.SIGUSR1)} after step" in said and "batch 1 x 2 on cpu" in said
    done = checkpoint.read(newest)["progress"]["iteration"]
    assert 2 <= done < STEPS, "else it was over before the signal came"
    code, said = cluster.job()
    assert code == 0 and cluster.queued_again() == 1, said
    assert f"resumed from {newest}: {done} steps are done" in said and "warning" not in said
    same(cluster.out, whole)


@pytest.mark.parametrize("codes", [(0, 0), (130, 130), (1, 130), (2, 2), (137, 1), (143, 130)])
def test_the_slurm_script_queues_itself_again_for_130_alone(voc, tmp_path, codes):
    """srun gives the largest code of all tasks."""
    cluster = Cluster(tmp_path, voc)
    (tmp_path / "bin" / "afa").write_text(f'#!/bin/bash\ncodes=({" ".join(map(str, codes))})\nexit ${{codes[RANK]}}\n')
    assert cluster.job()[0] == max(codes)
    assert cluster.queued_again() == (max(codes) == 130)


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun_words() -> list[str]:
    return shlex.split(TORCHRUN.replace("\\\n", " "))


def test_torchrun_knows_the_options_of_the_line():
    from torch.distributed.run import get_args_parser

    words = torchrun_words()
    options = get_args_parser().parse_args(words[1:])
    assert (words[0], options.nnodes, options.rdzv_backend, options.max_restarts) == ("torchrun", "2", "c10d", 3)
    assert options.signals_to_handle.endswith(",SIGUSR1") and options.shutdown_timeout == 100
    assert (options.module, options.training_script) == (True, "afa_model")
    assert options.training_script_args[:3] == ["train", "--config", "voc"]
    assert options.training_script_args[-2:] == ["--resume", "auto"]


@contextlib.contextmanager
def machines(out: Path, voc: Path, said: list[Path]) -> Iterator[list[subprocess.Popen]]:
    """The line on two machines that are one, with a process on each; small settings follow those of the line."""
    port, words = free_port(), torchrun_words()
    options = {"node0:29400": f"localhost:{port}", "/data/VOC2012": str(voc), "/data/mit_b1.pth": "false"}
    words = [options.get(word, word) for word in words]
    words[words.index("--nproc-per-node") + 1] = "1"
    line = [sys.executable, "-m", "torch.distributed.run", *words[1:], *tiny_args(voc, out, **SETTINGS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in said]
        launchers = [subprocess.Popen(line, env=environment, stdout=file, stderr=file) for file in files]
        try:
            yield launchers
        finally:
            for launcher in launchers:
                launcher.kill()


def child(launcher: subprocess.Popen) -> int:
    """The process that a launcher has started."""
    tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    return int(next(process for task in tasks for process in task.read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [0, 1])
def test_a_process_killed_on_one_of_two_machines_is_started_again(voc, whole, tmp_path, machine):
    out, said = tmp_path / "run", [tmp_path / f"said{number}" for number in range(2)]
    with machines(out, voc, said) as launchers:
        reached(launchers[0], out / "train.csv", 5)
        os.kill(child(launchers[machine]), signal.SIGKILL)
        codes = [launcher.wait(timeout=300) for launcher in launchers]
    text = "".join(path.read_text() for path in said)
    assert codes == [0, 0], text
    assert re.search(r"resumed from \S+/iter_0000000[36]\.pt: [36] steps are done", text), text
    same(out, whole)


@pytest.mark.slow
def test_torchrun_hands_sigusr1_on(voc, whole, tmp_path):
    """To every torchrun, as `scancel --signal=USR1` sends it."""
    out, said = tmp_path / "run", [tmp_path / f"said{number}" for number in range(2)]
    with machines(out, voc, said) as launchers:
        reached(launchers[0], out / "train.csv", 2)
        for launcher in launchers:
            launcher.send_signal(signal.SIGUSR1)
        assert [launcher.wait(timeout=300) for launcher in launchers] == [1, 1]
    assert f"stopped by signal {int(signal.SIGUSR1)}" in "".join(path.read_text() for path in said)
    assert 2 <= checkpoint.read(checkpoint.checkpoints(out)[0])["progress"]["iteration"] < STEPS
    with machines(out, voc, said) as launchers:
        assert [launcher.wait(timeout=300) for launcher in launchers] == [0, 0]
    same(out, whole)


# --- what the document says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [TORCHRUN, SLURM])
def test_blocks_are_shell(code):
    assert subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True).stderr == ""


def test_the_script_asks_for_what_the_text_says():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SLURM, re.M))
    assert asked["signal"] == "USR1@120" and asked["ntasks-per-node"] == asked["gpus-per-node"] and "requeue" in asked


ROW = re.compile(r"^\| (mit_b\d) \| ([\d.]+) M \| ([\d.]+) MB \| ([\d.]+) MB \|$", re.M)


@pytest.mark.parametrize("row", ROW.findall(TEXT))
def test_the_bytes_of_a_step_are_those_of_the_parameters(row):
    name, millions, *megabytes = row
    for classes, said in zip((21, 81), megabytes):
        with torch.device("meta"):
            model = AFA(name, classes)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert float(said) == round(4 * count / 1e6, 1)
        if classes == 21:
            assert float(millions) == round(count / 1e6, 1)
            assert sum(b.numel() * b.element_size() for b in model.decoder.linear_fuse.bn.buffers()) == 2056


def test_all_backbones_are_in_the_table():
    assert [row[0] for row in ROW.findall(TEXT)] == [f"mit_b{number}" for number in range(6)]
