"""What ends a run early without losing it: a loss that is not finite, and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, to_dict
from ..config.renamed import flatten
from ..errors import CheckpointError, ConfigError, TrainingError
from ..runtime.collectives import Ballot, Notice, gather_from_all
from ..runtime.processes import Here
from ..runtime.signals import STOPPING
from . import checkpoint


def same_in_all(config: Config) -> None:
    """Processes that were started with different settings would wait for each other for ever, or learn nonsense.

    Every process must call this.

    Raises:
        ConfigError: naming the settings that differ, in all of them.
    """
    first, *others = (flatten(to_dict(each)) for each in gather_from_all(config))
    for rank, other in enumerate(others, 1):
        differing = [f"{key} ({first.get(key)!r}, {other.get(key)!r})" for key in first if first[key] != other.get(key)]
        if differing:
            raise ConfigError(f"processes 0 and {rank} were started with different settings: {', '.join(differing)}")


class FiniteGuard:
    """Stops a run whose loss or gradient is not finite, and saves the batch that did it.

    On a GPU the answer is read one step later, so that no step waits for the host; call :meth:`settle` before
    the weights are saved.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.rank = rank
        self._open: tuple[int, Mapping[str, Any], dict[str, Tensor], Tensor] | None = None

    def watch(self, iteration: int, batch: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> None:
        """Look at the numbers of step ``iteration``, ``loss`` and ``grad_norm`` among them; raises TrainingError for it
        or (on a GPU) for the one before.
        """
        self.settle()
        values = {name: value.detach() for name, value in numbers.items()}
        finite = torch.isfinite(values["loss"] + values["grad_norm"])
        self._open = (iteration, batch, values, finite)
        if finite.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Wait for the verdict on the last step watched.

        Raises:
            TrainingError: its loss or gradient was NaN or infinite; the batch is saved.
        """
        if self._open is None:
            return
        (iteration, batch, values, finite), self._open = self._open, None
        if bool(finite):
            return
        numbers = {name: float(value) for name, value in values.items()}
        path = self.folder / f"not_finite_{iteration:08d}_rank{self.rank}.pt"
        content = {"iteration": iteration, "batch": _on_cpu(batch), "values": numbers}
        try:
            checkpoint.write_atomically(path, content)
            where = f"the batch is in {path} (torch.load)"
        except CheckpointError as error:
            where = f"and the batch was not saved: {error}"
        raise TrainingError(
            f"step {iteration}: not finite: "
            + ", ".join(f"{name} {value:g}" for name, value in numbers.items())
            + f"; images {', '.join(batch.get('name', []))}; {where}; the last checkpoint is from before it"
        )


def _on_cpu(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}


class Interrupt:
    """A signal lets the step end and the run be saved, in all processes after the same step.

    Repeated signals change nothing: launchers and ``timeout`` send them twice. Only who presses Ctrl-C again, a second
    or more later, at a run of one process ends it there and then. A launcher that is gone counts as a signal.

    Attributes:
        cause: the number of the first signal, or ``LAUNCHER_GONE``; 0 without any.
        obeyed: the run stops for it. Several processes ignore further signals from then on until they end: one that
            reaches them late, as on another machine, would else end them with another code than the others.
    """

    LAUNCHER_GONE = 1000

    def __init__(self, here: Here):
        self.cause, self.obeyed = 0, False
        self._ballot, self._notice = Ballot(here.device), Notice("afa stops")
        self._alone = here.world_size == 1
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        again = self.cause and time.monotonic() - self._since >= 1
        if number == signal.SIGINT and again and self._alone:
            raise KeyboardInterrupt
        if not self.cause:
            self.cause, self._since = number, time.monotonic()

    def asked(self) -> bool:
        """Whether this process was asked to stop, or another one said that it was; nobody waits for anybody.

        Long work looks here whether to go on at all.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.cause = self.cause or self.LAUNCHER_GONE
        if self.cause:
            self._notice.give()
        return bool(self.cause) or self._notice.seen()

    def agreed(self) -> int:
        """Why to stop now, the same in all processes: 0 (go on), the number of a signal or ``LAUNCHER_GONE``.

        Every process must call this after each step.
        """
        self.asked()
        return self._ballot.cast(self.cause)

    def __exit__(self, *exception: Any) -> None:
        deaf = self.obeyed and not self._alone
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if deaf else handler)
