"""How long a training step takes by how OpenMP's threads wait: alone, and beside other processes that want the cores.

Each way of waiting is an environment that a process starts with, so each has its own; they take turns, and so do an
idle machine and a busy one. ``bench_train_step.py --waiting`` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from afa_kernels.bench.machine import commit, device_name
from afa_model.runtime.machine import usable_cpus

# name -> environment. libgomp's own default is 300,000; it is said, for a process that is told nothing asks `afa`.
WAITS = {
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": count} for count in ("200", "2000", "5000", "10000", "300000")},
}
BESIDE = ("nothing", "one busy thread", "another step")
_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def _serve(options: argparse.Namespace, pipe: Any) -> None:
    """Steps when told to: ``once`` answers with its seconds, ``on`` goes on until told otherwise."""
    from train_step import Way

    from afa_model.runs.memory import keep_freed_memory

    keep_freed_memory()
    way = Way("fused", options, exact=False)
    way.timed()
    pipe.send(None)
    while (order := pipe.recv()) != "stop":
        if order == "on":
            while not pipe.poll():
                way.timed()
        else:
            pipe.send(way.timed()["step"])


def _spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(100_000))


class _Stepper:
    def __init__(self, options: argparse.Namespace, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        kept = {name: os.environ.pop(name, None) for name in _NAMES}
        os.environ.update(environment)
        try:
            process = context.Process(target=_serve, args=(options, theirs), daemon=True)
            process.start()
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        self.pipe.recv()

    def step(self) -> float:
        self.pipe.send("once")
        return self.pipe.recv()


@contextlib.contextmanager
def _beside(what: str, other: _Stepper) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    if what == "one busy thread":
        stop = context.Event()
        process = context.Process(target=_spin, args=(stop,), daemon=True)
        process.start()
        yield
        stop.set()
        process.join()
    elif what == "another step":
        other.pipe.send("on")
        yield
        other.pipe.send("once")  # ends it, and is answered when it has
        other.pipe.recv()
    else:
        yield


def measure_waiting(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, by way of waiting and by what runs beside it."""
    seconds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in BESIDE} for name in WAITS}
    steppers = {name: _Stepper(options, environment) for name, environment in WAITS.items()}
    others = {name: _Stepper(options, environment) for name, environment in WAITS.items()}
    for _ in range(options.rounds):
        for what in BESIDE:
            for name, stepper in steppers.items():
                with _beside(what, others[name]):
                    # several: how two processes fall on the cores differs from one to the next
                    seconds[name][what] += [stepper.step() for _ in range(3)]
    for stepper in (*steppers.values(), *others.values()):
        stepper.pipe.send("stop")
    return {
        "device": device_name("cpu"),
        "cpus": usable_cpus(),
        "backbone": options.backbone,
        "crop": options.crop,
        "batch": options.batch,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "commit": commit(),
        "step_s": {
            name: {what: round(statistics.median(values), 4) for what, values in row.items()}
            for name, row in seconds.items()
        },
    }


def show_waiting(result: dict[str, Any]) -> None:
    """A table: seconds, and how many times the idle machine's with the default."""
    what = f"{result['backbone']}, crop {result['crop']}"
    table = Table(title=f"seconds of a step ({what}) on {result['device']}, beside")
    table.add_column("threads wait")
    for what in BESIDE:
        table.add_column(what, justify="right")
    for name, row in result["step_s"].items():
        idle = row["nothing"]
        table.add_row(name, *(f"{row[what]:.3f} ({row[what] / idle:.2f}x)" for what in BESIDE))
    Console(width=120).print(table)
