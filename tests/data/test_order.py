"""Loaders: what goes wrong in the processes that load data is told as if it had happened here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import forked
from support.voc_factory import make_voc

from afa_model.data import order
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.order import death_told, evaluation_loader, training_loader
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError, TrainingError
from afa_model.runtime.signals import held_back


@pytest.fixture
def data(tmp_path) -> TrainingSet:
    make_voc(tmp_path, count=4)
    return TrainingSet(DataSettings(str(tmp_path)), AugmentSettings(crop=32))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_named_in_one_line(data, tmp_path, workers):
    def broken() -> int:
        (tmp_path / "JPEGImages" / "2007_000002.jpg").write_bytes(b"\xff\xd8 no photograph")
        batches = iter(training_loader(data, 2, num_workers=workers))
        with pytest.raises(DataError, match=r"2007_000002") as error:
            [next(batches) for _ in range(4)]
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
        with pytest.raises(DataError, match=r"^[^\n]*2007_000002[^\n]*$"):
            list(evaluation_loader(EvaluationSet(replace(data.settings, check="off")), range(4), workers))
        batches.close()
        return 0

    assert forked.run(broken).returncode == 0


def test_a_loading_process_that_is_killed_ends_the_run_with_what_to_do(data):
    def killed() -> int:
        parent = os.getpid()
        real = data.transform

        def transform(*arguments):
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        data.transform = transform
        with pytest.raises(TrainingError, match=r"process that loads data ended: .*num_workers 0"):
            next(iter(training_loader(data, 2, num_workers=1)))
        return 0

    assert forked.run(killed).returncode == 0


def test_a_full_shared_memory_is_told_with_the_setting_that_does_without(data, monkeypatch):
    """torch collates into shared memory in a process that loads data, and says what it could not write there."""

    def full(samples: object) -> None:
        raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(order, "default_collate", full)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)

    def short() -> int:
        words = r"No space left on device \(28\); where shared memory \(/dev/shm\) is short, num_workers 0"
        with pytest.raises(TrainingError, match=words):
            next(iter(training_loader(data, 2, num_workers=1)))
        with pytest.raises(TrainingError, match=words):
            next(iter(evaluation_loader(EvaluationSet(data.settings), range(4), 1)))
        return 0

    assert forked.run(short).returncode == 0
    with pytest.raises(RuntimeError, match=r"^unable to write") as error:
        next(iter(training_loader(data, 2, num_workers=0)))
    assert not isinstance(error.value, TrainingError), "here there is no shared memory to be short of"


def test_the_death_of_a_process_is_told_wherever_it_is_noticed():
    told = r"process that loads data ended: DataLoader worker .*num_workers 0"
    with pytest.raises(TrainingError, match=told), death_told():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match=r"^out of luck$"), death_told():
        raise RuntimeError("out of luck")


def test_batches_that_are_left_take_their_processes_with_them(data):
    batches = iter(training_loader(data, 1, num_workers=1))
    next(batches)
    (process,) = batches._batches._workers
    del batches
    gc.collect()
    assert not process.is_alive()
    kept = iter(training_loader(data, 1, num_workers=1))
    (process,) = kept._batches._workers
    order._close_all()  # at the interpreter's end
    assert not process.is_alive() and list(kept) == []


def test_an_error_that_is_kept_keeps_no_process_waiting(data, tmp_path):
    """Its traceback holds the batches, as garbage that is a cycle; the queues among it are closed first."""
    (tmp_path / "JPEGImages" / "2007_000002.jpg").write_bytes(b"no photograph")

    def fails() -> int:
        try:
            for _ in training_loader(data, 1, num_workers=1):
                pass
        except DataError as error:
            error.itself = error
        gc.collect()
        return len(multiprocessing.active_children())

    assert forked.run(fails).returncode == 0


def test_a_process_that_does_not_answer_is_killed():
    with held_back():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        process.start()
    order._end_processes(SimpleNamespace(_shutdown_workers=process.terminate, _workers=[process]))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
