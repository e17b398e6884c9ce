"""What ends a run early without losing it: a loss that is not finite, and signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, TrainingError
from . import checkpoint


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
    """The first SIGINT or SIGTERM lets the step end and the run be saved; the second one kills as usual."""

    def __init__(self, active: bool):
        self.signal: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self._restore()
