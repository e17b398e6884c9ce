"""Several processes: how they meet, also after a restart, what they agree on, and how one learns of another's end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from afa_model.errors import ConfigError, DataError, ProcessError
from afa_model.runtime.collectives import Ballot, Notice, agreeing
from afa_model.runtime.processes import Here, _Laid, processes


class Launcher:
    """Starts processes as torchrun does: all attempts have one store, which the launcher serves."""

    def __init__(self):
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def start(
        self, function: Callable[[Here], None], attempts: tuple[int, int] = (0, 0), timeout: float = 0.5
    ) -> list[int]:
        """Process ids of ``function(here)`` in two processes, which are told of so many restarts."""
        count = 2
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    torch.set_num_threads(1)
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port)}
                    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempts[rank])}
                    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
                    with processes("cpu", timeout) as here:
                        function(here)
                    status = 0
                except ProcessError as error:
                    print(error, flush=True)
                    status = 3
                finally:
                    os._exit(status)
            children.append(child)
        return children

    @staticmethod
    def wait(children: list[int]) -> list[int]:
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


def sums(here: Here) -> None:
    values = torch.tensor([1.0, here.rank])
    dist.all_reduce(values)
    assert values.tolist() == [2, 1]


def dies_of_kill(here: Here) -> None:
    sums(here)
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sums(here)


def test_restarted_processes_do_not_meet_the_dead(launcher, capfd):
    """Of those the launcher's store still has the addresses."""
    started = time.monotonic()
    assert launcher.wait(launcher.start(dies_of_kill)) == [3, -signal.SIGKILL]
    told = capfd.readouterr().out
    assert "process 0: another process ended, or did not answer within 0.5 minutes (process_timeout): " in told
    assert "[/" not in told, "where in gloo's sources is nobody's business"
    for attempt in (1, 2):
        assert launcher.wait(launcher.start(dies_of_kill, (attempt, attempt))) == [3, -signal.SIGKILL]
    assert launcher.wait(launcher.start(sums, (3, 3))) == [0, 0]
    assert time.monotonic() - started < 20


def test_machines_that_count_restarts_differently_meet(launcher):
    """torchrun's count goes up on the machine whose process died; the others restart theirs to meet it again."""
    assert launcher.wait(launcher.start(dies_of_kill)) == [3, -signal.SIGKILL]
    assert launcher.wait(launcher.start(dies_of_kill, (0, 1))) == [3, -signal.SIGKILL]
    assert launcher.wait(launcher.start(sums, (1, 1), timeout=0.1)) == [0, 0]


def hangs(here: Here) -> None:
    if here.rank == 1:
        time.sleep(60)
    sums(here)


def test_silence_ends_after_the_timeout(launcher, capfd):
    first, second = launcher.start(hangs, timeout=1 / 60)
    assert launcher.wait([first]) == [3]
    assert "within 0.0166667 minutes" in capfd.readouterr().out
    os.kill(second, signal.SIGKILL)
    launcher.wait([second])


def test_a_process_that_nobody_meets_says_so(launcher, capfd, monkeypatch):
    real, calls = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: calls.append(1) or (real() if len(calls) == 1 else 10**7))
    (child, _) = launcher.start(sums, timeout=1 / 60)
    assert launcher.wait([child]) == [3]
    assert "another process ended, or did not answer" in capfd.readouterr().out


def fails_otherwise(here: Here) -> None:
    raise RuntimeError("the sum of zero elements timed") if here.rank else ValueError("timed out")


def test_other_errors_stay_what_they_are(launcher, capfd):
    assert launcher.wait(launcher.start(fails_otherwise)) == [1, 1]


def disagree(here: Here) -> None:
    for wrong in (0, 1):
        with pytest.raises(DataError, match=f"^of {wrong}$"), agreeing():
            if here.rank == wrong:
                raise DataError(f"of {wrong}")
    with pytest.raises(ConfigError, match=f"^own {here.rank}$"), agreeing():
        raise ConfigError(f"own {here.rank}")
    with agreeing():
        pass
    ballot = Ballot(here.device)
    assert [ballot.cast(number) for number in ((0, 7)[here.rank], 0, (15, 2)[here.rank])] == [7, 0, 15]
    notice = Notice("lunch")
    assert not notice.seen()
    dist.barrier()
    if here.rank == 1:
        notice.give()
    dist.barrier()
    assert notice.seen()
    assert not Notice("dinner").seen()


def test_what_one_finds_all_find(launcher):
    assert launcher.wait(launcher.start(disagree)) == [0, 0]


def test_alone_everything_is_agreed_at_once():
    with pytest.raises(DataError), agreeing():
        raise DataError("mine")
    assert Ballot(torch.device("cpu")).cast(5) == 5
    notice = Notice("lunch")
    notice.give()
    assert not notice.seen(), "there is nobody to tell"


def test_a_gradient_has_its_parameters_strides():
    """Where a side is 1 any stride is as good; where it is not, nothing is touched."""
    gradient = torch.arange(18.0).as_strided((2, 1, 3, 3), (9, 1, 3, 1))
    laid = _Laid((9, 9, 3, 1))(gradient)
    assert laid.stride() == (9, 9, 3, 1) and torch.equal(laid, gradient) and laid.data_ptr() == gradient.data_ptr()
    assert _Laid((9, 1, 3, 1))(gradient) is None
    assert _Laid((9, 9, 1, 3))(gradient) is None
