"""A training step as published and as `afa train` does it, turn by turn, by phase: what ``bench_train_step.py`` runs.

Each way has a process of its own, as the C library's memory settings belong to a process; the other one sleeps
meanwhile. Before anything is timed both must give the same losses, labels and gradient norm.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from published_step import PublishedStep
from rich.console import Console
from rich.table import Table

from afa_kernels.bench.machine import commit, device_name
from afa_model.conventions import MEAN, STD
from afa_model.networks.afa import AFA
from afa_model.runs.memory import keep_freed_memory
from afa_model.runtime.phases import PhaseTimer
from afa_model.runtime.precision import autocast
from afa_model.training.losses import LossSettings
from afa_model.training.schedule import build_optimizer
from afa_model.training.step import StepSettings, TrainingStep

WAYS = ("published", "fused")
ITERATION = 10_000  # past aff_iters: everything is computed and has its weight
PHASES = ("forward", "CAM", "random walk", "PAR", "losses", "energy loss", "backward", "optimizer")
LOSSES = ("cls_loss", "seg_loss", "aff_loss")
# (losses and gradient norm, relative; share of pixels whose label may differ)
EXACT, HALF = (1e-3, 1e-3), (5e-2, 5e-2)


def make_batch(batch: int, crop: int, classes: int, device: str) -> dict[str, Any]:
    """Two-coloured pictures of one to three classes each; photographs fill the crop in one direction, as VOC's do."""
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    coarse = 0.2 * torch.rand(batch, 3, max(crop // 32, 2), max(crop // 32, 2), generator=generator)
    image = F.interpolate(coarse, (crop, crop), mode="bicubic")
    image[:, :, :, crop // 2 :] += torch.rand(batch, 3, 1, 1, generator=generator)  # an object and its surroundings
    image = (image + 0.05 * torch.randn(batch, 3, crop, crop, generator=generator)).clamp(0, 1)
    cls_labels = torch.zeros(batch, classes - 1)
    boxes = []
    for i in range(batch):
        cls_labels[i, torch.randperm(classes - 1, generator=generator)[: (1, 2, 1, 3)[i % 4]]] = 1
        margin = int(crop * (0.0, 0.1, 0.0, 0.2)[i % 4])
        boxes.append([margin, crop - margin, 0, crop] if i % 3 else [0, crop, margin, crop - margin])
    image = ((image - mean) / std).to(device)
    return {"image": image, "cls_labels": cls_labels.to(device), "img_box": torch.tensor(boxes)}


class Way:
    """One way to do the step, with weights and an optimizer of its own; ``exact`` leaves every option out."""

    def __init__(self, name: str, options: argparse.Namespace, exact: bool) -> None:
        self.device = torch.device(options.device)
        self.batch = make_batch(options.batch, options.crop, options.classes, options.device)
        torch.manual_seed(0)
        self.model = AFA(options.backbone, options.classes).to(self.device).train()
        self.amp = "off"
        if name == "published":
            self.step = PublishedStep(self.model, StepSettings())
        elif exact:
            self.step = TrainingStep(self.model, StepSettings())
        else:
            self.amp = options.amp
            if options.channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.step = TrainingStep(
                self.model,
                StepSettings(shared_refinement=options.shared_refinement),
                loss=LossSettings(options.regularisation),
                max_classes=int(self.batch["cls_labels"].sum(1).max()),
                compile=options.compile,
                cuda_graph=options.cuda_graph,
            )
        self.optimizer = build_optimizer(self.model, 1e-6)
        self.timer = PhaseTimer(self.device)

    def numbers(self) -> dict[str, Any]:
        """What must agree: losses, gradient norm, labels."""
        torch.manual_seed(0)  # the same drop path for both
        with autocast(self.amp, self.device):
            result = self.step(self.batch, ITERATION)
        result.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.optimizer.zero_grad()
        labels = {name: getattr(result, name).cpu().numpy() for name in ("refined_label", "aff_label")}
        return {"grad_norm": float(norm), **{name: float(getattr(result, name)) for name in LOSSES}, **labels}

    def timed(self) -> dict[str, float]:
        """Seconds by phase, of the whole ``step``, and of the processor, ``cpu`` (which a busy machine blurs less)."""
        timer = self.timer
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        cpu, start = time.process_time(), time.perf_counter()
        with timer, autocast(self.amp, self.device):
            result = self.step(self.batch, ITERATION)
        points = [timer.now()]
        result.loss.backward()
        points.append(timer.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        points.append(timer.now())
        timer.add("backward", *points[:2])
        timer.add("optimizer", *points[1:])
        seconds = timer.seconds()  # waits for a GPU
        return {**seconds, "step": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def serve(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """A process that does what it is told: ``exact`` or ``fast`` makes the step, then ``numbers`` or ``timed``."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if name == "fused" and options.device == "cpu":
        keep_freed_memory()  # as `afa train` does
    way = None
    while (order := pipe.recv()) != "stop":
        if order in ("exact", "fast"):
            torch.backends.cudnn.allow_tf32 = order == "fast"  # convolutions; products are exact unless asked otherwise
            way = Way(name, options, exact=order == "exact")
            pipe.send(None)
        elif order == "peak":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            pipe.send(torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else resident)
        else:
            pipe.send(getattr(way, order)())


class Workers:
    """The two processes; ``ask`` one and wait for its answer."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for name in WAYS:
            self.pipes[name], theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(name, options, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def ask(self, name: str, order: str) -> Any:
        self.pipes[name].send(order)
        return self.pipes[name].recv()

    def check(self, order: str, tolerance: tuple[float, float]) -> dict[str, float]:
        """Both give the same numbers, or AssertionError; -> the errors."""
        for name in WAYS:
            self.ask(name, order)
        want, got = (self.ask(name, "numbers") for name in WAYS)
        errors, wrong = {}, {}
        for name in want:
            label = name.endswith("label")
            errors[name] = float((got[name] != want[name]).mean()) if label else abs(got[name] / want[name] - 1)
            if not errors[name] <= tolerance[label]:
                wrong[name] = errors[name]
        if wrong:
            raise AssertionError(f"the two ways disagree, nothing is timed: {wrong}")
        return errors


def measure(options: argparse.Namespace) -> dict[str, Any]:
    workers = Workers(options)
    errors = workers.check("exact", EXACT)
    plain = options.amp == "off" and not options.shared_refinement and not options.regularisation
    errors_fast = workers.check("fast", EXACT if plain else HALF)
    for name in WAYS:
        for _ in range(options.warmup):
            workers.ask(name, "timed")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    loads = []
    for _ in range(options.rounds):
        loads.append(os.getloadavg()[0])
        for name in WAYS:
            runs[name].append(workers.ask(name, "timed"))
    peaks = {name: round(workers.ask(name, "peak")) for name in WAYS}
    for name in WAYS:
        workers.pipes[name].send("stop")

    def median(name: str, key: str) -> float:
        return statistics.median(run.get(key, 0.0) for run in runs[name])

    def rounded(values: dict[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.2g}") for name, value in values.items()}

    return {
        "device": device_name(options.device),
        **{key: value for key, value in vars(options).items() if key not in ("json", "device")},
        "torch": torch.__version__,
        "commit": commit(),
        "load": round(statistics.median(loads), 2),
        "errors": rounded(errors),
        "errors_with_options": rounded(errors_fast),
        "published_s": round(median("published", "step"), 4),
        "fused_s": round(median("fused", "step"), 4),
        "speedup": round(median("published", "step") / median("fused", "step"), 2),
        "speedup_processor_time": round(median("published", "cpu") / median("fused", "cpu"), 2),
        "phases": {key: {name: round(median(name, key), 4) for name in WAYS} for key in (*PHASES, "step", "cpu")},
        "peak_mb": peaks,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['backbone']}, crop {result['crop']}, batch {result['batch']}, {result['device']}")
    table.add_column("phase")
    for name in ("published s", "fused s", "speed-up"):
        table.add_column(name, justify="right")
    for name, row in result["phases"].items():
        if not any(row.values()):
            continue
        ratio = row["published"] / row["fused"] if row["fused"] else float("nan")
        name = {"step": "whole step", "cpu": "(processor time)"}.get(name, name)
        table.add_row(name, f"{row['published']:.3f}", f"{row['fused']:.3f}", f"{ratio:.1f}x")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"same results, errors {result['errors']}", soft_wrap=True)
    peaks = ", ".join(f"{name} {peak} MB" for name, peak in result["peak_mb"].items())
    console.print(f"medians of {result['rounds']}, load {result['load']}; highest memory: {peaks}")
