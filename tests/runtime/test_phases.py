"""The timer of a training step's phases: what it counts, and that a CUDA graph can be captured under it."""

from __future__ import annotations

import pytest
import torch

from afa_model.runtime.phases import PhaseTimer, phase


class Device:
    """A stream's clock and its capture, in place of a GPU's."""

    def __init__(self) -> None:
        self.clock, self.capturing, self.recorded = 0.0, False, 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.recorded += 1
                self.at = device.clock
                self.captured = device.capturing

            def elapsed_time(self, end: Event) -> float:
                assert not self.captured and not end.captured, "an event of a capture cannot be timed"
                return 1e3 * (end.at - self.at)

        self.Event = Event


@pytest.fixture
def device(monkeypatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_a_step_is_timed_on_the_device(device):
    timer = PhaseTimer("cuda")
    with timer:
        for seconds in (1.0, 2.0):
            with phase("PAR"):
                device.clock += seconds
    assert timer.seconds() == {"PAR": 3.0}


def test_a_step_that_is_captured_can_be_timed(device):
    """Under `--cuda-graph` a step captures its labels once: nothing is recorded then, and the rest still counts."""
    timer = PhaseTimer("cuda")
    with timer:
        with phase("forward"):
            device.clock += 1.0
        before = device.recorded
        device.capturing = True
        with phase("PAR"):
            device.clock += 5.0
        assert device.recorded == before
        device.capturing = False
    assert timer.seconds() == {"forward": 1.0}


def test_a_phase_with_a_capture_at_one_end_is_left_out(device):
    timer = PhaseTimer("cuda")
    with timer, phase("labels"):
        device.capturing = True
    device.capturing = False
    timer.add("backward", None, timer.now())
    assert timer.seconds() == {}


def test_the_cpu_knows_of_no_capture(monkeypatch):
    def fail() -> bool:
        raise AssertionError("a CPU build of PyTorch cannot be asked")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
    timer = PhaseTimer("cpu")
    with timer, phase("forward"):
        pass
    assert timer.seconds()["forward"] >= 0
