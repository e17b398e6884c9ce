"""Named phases of a training step: ranges in any profiler's trace, and seconds for the benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler import record_function

_timer: PhaseTimer | None = None


class PhaseTimer:
    """Sums up the seconds of each phase that ends while it is active.

        timer = PhaseTimer(device)
        with timer:
            step(batch, iteration)
        timer.seconds()                      {"forward": 0.4, "cam": 1.1, ...}

    On a GPU it marks the stream with events and waits only in :meth:`seconds`. What is being captured into a CUDA
    graph is not counted: it does not run then, and an event of a capture has no time. Phases do not nest. One timer
    is active at a time in a process.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    def now(self) -> object:
        """A point in time: seconds, or an event on the current stream; None while that is being captured."""
        if not self._cuda:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: object, end: object) -> None:
        """Count the time between two points of :meth:`now` to ``name``, if both have one."""
        if start is not None and end is not None:
            self._spans.append((name, start, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call, in the order of their first appearance."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, start, end in self._spans:
            took = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            total[name] = total.get(name, 0.0) + took
        self._spans.clear()
        return total

    def __enter__(self) -> PhaseTimer:
        global _timer
        self._outer, _timer = _timer, self
        return self

    def __exit__(self, *exception: object) -> None:
        global _timer
        _timer = self._outer


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Work inside belongs to phase ``name``."""
    timer = _timer
    with record_function(f"afa: {name}"):
        start = timer.now() if timer is not None else None
        yield
        if timer is not None:
            timer.add(name, start, timer.now())
