"""Signals: whichever process gets which, in whatever it does, all stop after the same step with a checkpoint.

The run is real but for its step, which is replaced by next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support.needs_command_line  # noqa: F401
import torch
import torch.distributed as dist
from support import forked
from support.tiny_run import rows, tiny_args

from afa_model import cli
from afa_model.config import parse, to_dict
from afa_model.data.order import CarefulLoader
from afa_model.evaluation.evaluate import gather_from_all
from afa_model.runs import checkpoint, guards, loop
from afa_model.runs.guards import Interrupt
from afa_model.runtime.processes import Here
from afa_model.runtime.signals import STOPPING, end_with_parent, held_back


class NoData:
    label_source, num_classes, class_names = "nowhere", 2, ("a", "b")

    def __len__(self) -> int:
        return 1


class Light:
    """In place of the trainer. ``happens(what, trainer)`` is called in the middle of everything it does; if ``slow``,
    an evaluation takes the first process three seconds.
    """

    happens: Callable[[str, Light], None] = staticmethod(lambda what, trainer: None)
    slow = False

    def __init__(self, config: Any, here: Here):
        self.config, self.here, self.notes, self.owes_evaluation = config, here, [], False
        self.progress = checkpoint.Progress()
        self.model = torch.nn.Linear(1, 1)
        self.data = NoData()
        self.numbers, self.compiles, self.graphs = ("loss",), False, False

    def restore(self, state: dict) -> None:
        self.progress = checkpoint.Progress(**state["progress"])
        self.owes_evaluation = state["owes_evaluation"]

    def start(self) -> None:
        self.happens("starting", self)

    def close(self) -> None:
        pass

    @property
    def validation(self) -> object:
        return self if self.config.eval.every else None

    def losses(self, everything: bool | None) -> tuple[dict, SimpleNamespace, dict]:
        gather_from_all(0)  # as gradients are, in every step
        self.happens("step", self)
        return {}, SimpleNamespace(), {"loss": torch.ones(()), "grad_norm": torch.ones(())}

    def update(self, norm: torch.Tensor) -> float:
        self.progress.iteration += 1
        return 0.1

    def evaluate(self, stop: Callable[[], bool]) -> tuple[dict, dict] | None:
        given_up = False
        for _image in range(300 if self.here.rank == 0 else 2):
            given_up = stop()
            if given_up:
                break
            self.happens("evaluating", self)
            time.sleep(0.01 if self.slow else 0)
        return None if any(gather_from_all(given_up)) else ({"cam": 50.0}, {})

    def state(self) -> dict[str, Any]:
        gather_from_all(0)
        self.happens("saving", self)
        progress = {"iteration": self.progress.iteration, "best": self.progress.best}
        about = {"config": to_dict(self.config), "class_names": ["a", "b"], "owes_evaluation": self.owes_evaluation}
        return {"format": 1, "model": {}, "progress": progress, **about}


def light_run(rank: int, count: int, folder: str, out: str, send: Callable | None, status: int, **settings) -> None:
    """`afa train` in one of ``count`` processes, of which those named get signals when ``send`` says."""
    loop.Trainer = Light
    loop._picture = lambda *_: Light.happens("drawing", Light.now) or torch.zeros(1, 1, 3, dtype=torch.uint8).numpy()

    def happens(what: str, trainer: Light) -> None:
        Light.now = trainer
        if send is not None:
            send(what, trainer)

    Light.happens, Light.slow = staticmethod(happens), send is not None
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    settings = {"schedule__max_iters": 6, "checkpoint__every": 100, **settings}
    with open(f"{folder}/said{rank}", "a") as file, contextlib.redirect_stdout(file):
        assert cli.main(["train", *tiny_args(Path("nowhere"), Path(out), **settings)]) == status


def sender(number: int, ranks: tuple[int, ...], when: str, times: int) -> Callable[[str, Light], None]:
    sent = []

    def send(what: str, trainer: Light) -> None:
        # In the third step, or what comes after it.
        if what == when and trainer.progress.iteration in (2, 3) and trainer.here.rank in ranks and not sent:
            sent.append(what)
            for _ in range(times):
                os.kill(os.getpid(), number)

    return send


PHASES = {
    "step": {},
    "saving": {"checkpoint__every": 3},
    "drawing": {"log__pictures_every": 3},
    "evaluating": {"eval__every": 3},
}
MIX = [
    (count, ranks, number, when)
    for count, ranks in ((1, (0,)), (2, (0, 1)), (2, (0,)), (2, (1,)))
    for number in STOPPING
    for when in PHASES
    if when != "drawing" or 0 in ranks  # which only the first does
]
QUICK = [
    (1, (0,), signal.SIGTERM, "drawing"), (1, (0,), signal.SIGUSR1, "evaluating"), (2, (0, 1), signal.SIGTERM, "step"),
    (2, (1,), signal.SIGINT, "evaluating"), (2, (0,), signal.SIGUSR1, "saving"), (2, (1,), signal.SIGTERM, "step"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "ranks", "number", "when"),
    [pytest.param(*mix, marks=() if mix in QUICK else pytest.mark.slow) for mix in MIX],
)
def test_all_stop_after_the_same_step_and_go_on_from_it(tmp_path, count, ranks, number, when):
    """The signal comes twice, as `timeout` and launchers send it."""
    out, settings = tmp_path / "run", PHASES[when]
    started = time.monotonic()
    send = sender(number, ranks, when, 2)

    def stopped(rank: int) -> None:
        light_run(rank, count, str(tmp_path), str(out), send, 130, **settings)

    forked.processes(stopped, count)
    said = (tmp_path / "said0").read_text()
    assert f"stopped by signal {int(number)} after step 3; `--resume auto` goes on from here" in said
    assert [path.name for path in checkpoint.checkpoints(out)] == ["iter_00000003.pt"]
    assert len(rows(out / "train.csv")) == 3 and not (out / "run.lock").exists()
    assert not (out / "eval.csv").exists()
    assert time.monotonic() - started < 2.5 + count, "an evaluation is not waited for"
    if when != "evaluating":
        return
    if count > 1:
        os.unlink(tmp_path / "meet")

    def resumed(rank: int) -> None:
        light_run(rank, count, str(tmp_path), str(out), None, 0, resume="auto", eval__every=3, schedule__max_iters=4)

    forked.processes(resumed, count)
    assert [row["iteration"] for row in rows(out / "eval.csv")] == ["3", "4"], "the one owed, too"
    assert checkpoint.read(out / "iter_00000004.pt")["owes_evaluation"] is False


@pytest.mark.parametrize("written", [True, False])
def test_nobody_leaves_before_the_checkpoint_is_written(tmp_path, written):
    """A launcher ends the others when one has left; and a code that means "go on from here" must be true."""
    out, real = tmp_path / "run", checkpoint.write_atomically
    send = sender(signal.SIGUSR1, (1,), "step", 1)

    def slowly(path: Path, value: Any) -> None:
        time.sleep(0.4)
        if not written:
            raise checkpoint.SavingError(f"could not write {path}: the disk is full")
        real(path, value)

    def stopped(rank: int) -> None:
        checkpoint.write_atomically = slowly
        light_run(rank, 2, str(tmp_path), str(out), send, 130 if written else 1)
        assert [path.name for path in checkpoint.checkpoints(out)] == ["iter_00000003.pt"] * written

    forked.processes(stopped, 2)


def test_a_signal_that_comes_late_changes_no_exit_code(tmp_path):
    """On another machine it may come when the run has stopped for it already."""
    send = sender(signal.SIGUSR1, (0,), "step", 1)

    def stopped(rank: int) -> None:
        light_run(rank, 2, str(tmp_path), str(tmp_path / "run"), send, 130)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    forked.processes(stopped, 2)


# --- what one process notes -------------------------------------------------------------------------------------------


ALONE = Here(0, 1, torch.device("cpu"))


def send(number: int) -> None:
    """To this thread, and handled when this returns: with other threads about Python may put that off for a while."""
    signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_BLOCK, [])  # looks for signals


@pytest.fixture
def hangs_up():
    """SIGHUP does what it does without nohup, under which this may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_every_stopping_signal_is_noted_and_handlers_come_back(hangs_up):
    before = [signal.getsignal(number) for number in STOPPING]
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP} == set(STOPPING)
    for number in STOPPING:
        with Interrupt(ALONE) as interrupt:
            assert interrupt.agreed() == 0 and not interrupt.asked()
            send(number)
            assert interrupt.asked() and interrupt.agreed() == number
            send(signal.SIGTERM)
            assert interrupt.agreed() == number, "the first one counts"
            interrupt.obeyed = True
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_ctrl_c_again_ends_a_run_of_one_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(guards.time, "monotonic", lambda: now[0])
    with Interrupt(ALONE) as interrupt:
        send(signal.SIGINT)
        now[0] += 0.9
        send(signal.SIGINT)  # `timeout` sends it twice
        now[0] += 0.2
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        interrupt._alone = False  # a launcher sends it again after the terminal did
        send(signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(ALONE) as interrupt:
            send(signal.SIGHUP)
            assert not interrupt.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_is_gone_counts_as_a_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interrupt(ALONE) as interrupt:
        assert not interrupt.asked()
        monkeypatch.setattr(guards.os, "getppid", lambda: 1)
        assert interrupt.agreed() == Interrupt.LAUNCHER_GONE
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with Interrupt(ALONE) as interrupt:  # started by a shell that has gone since
        monkeypatch.setattr(guards.os, "getppid", lambda: 2)
        assert not interrupt.asked()


def test_a_run_that_was_asked_before_its_first_step_saves_nothing(tmp_path):
    def asked(what: str, trainer: Light) -> None:
        if what == "starting":
            os.kill(os.getpid(), signal.SIGTERM)

    forked.processes(light_run, 1, 1, str(tmp_path), str(tmp_path / "run"), asked, 130)
    assert "stopped by signal 15 after step 0" in (tmp_path / "said0").read_text()
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_settings_that_differ_between_processes_are_told(tmp_path):
    def differing(rank: int) -> None:
        light_run(rank, 2, str(tmp_path), str(tmp_path / "run"), None, 2, checkpoint__every=5 + rank, seed=1)

    forked.processes(differing, 2)

    def told(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/again", rank=rank, world_size=2)
        config = parse(["--seed", str(rank), "--optim.lr", "1e-3"])
        words = r"processes 0 and 1 were started with different settings: seed \(0, 1\)$"
        with pytest.raises(guards.ConfigError, match=words):
            guards.same_in_all(config)

    forked.processes(told, 2)


# --- processes that load data -----------------------------------------------------------------------------------------


class Slow(torch.utils.data.Dataset):
    """Process ids."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return os.getpid()


def test_a_signal_to_the_group_leaves_those_who_load_data_at_work():
    def group() -> int:
        os.setsid()
        with Interrupt(ALONE) as interrupt:
            batches = iter(CarefulLoader(Slow(), num_workers=2, batch_size=2))
            next(batches)
            for number in STOPPING:
                os.killpg(0, number)
            pids = {int(pid) for _ in range(20) for pid in next(batches)}
            assert len(pids) == 2 and interrupt.asked()
            started = time.monotonic()
            batches.close()
            assert time.monotonic() - started < 2
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        return 0

    done = forked.run(group)
    assert done.returncode == 0, done.stderr


def test_they_end_with_the_one_who_trains():
    def killed() -> int:
        batches = iter(CarefulLoader(Slow(), num_workers=1, batch_size=1, worker_init_fn=end_with_parent))
        print(int(next(batches)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    pid = int(forked.run(killed).stdout)
    started = time.monotonic()
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() - started < 2, "torch's own look-out takes 5 s"
        time.sleep(0.02)


def test_signals_are_held_back_not_lost():
    with Interrupt(ALONE) as interrupt:
        with held_back():
            send(signal.SIGTERM)
            assert not interrupt.asked()
        assert interrupt.asked()
