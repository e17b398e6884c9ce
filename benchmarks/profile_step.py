"""Where a training step's time goes, by torch.profiler: kernels, the gaps between them, the host, and our share.

``bench_train_step.py --profile`` runs it. On a GPU the rows are its kernels, and the rest of the step is time in which
it computes nothing, for the host has not yet told it what; on the CPU they are operators, without what they call.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import PHASES, Way

from afa_kernels.bench.machine import commit, device_name

ROWS = 20  # of the table; the JSON has all
_PARTS = ("computing", "gaps", "ours")


@dataclass(frozen=True)
class Span:
    """Something that ran: a kernel or a copy on a GPU, an operator on the CPU. Microseconds."""

    name: str
    start: float
    end: float


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(span.end - max(span.start, until), 0.0)
        until = max(until, span.end)
    return total


def totals(spans: Iterable[Span], steps: int) -> list[dict[str, Any]]:
    """By name, most time first: calls and microseconds of a step, and whether it is an operator of this package."""
    found: dict[str, list[float]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span.end - span.start)
    rows = [
        {"name": name, "calls": len(times) / steps, "us": sum(times) / steps, "ours": is_ours(name)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def is_ours(name: str) -> bool:
    """Whether a kernel or an operator is one of `afa_kernels`: of its C++, its library, or its Triton kernels."""
    return "afa::" in name or name in _triton_kernels()


@functools.cache  # asked for every event, and first when the step has imported what it uses
def _triton_kernels() -> set[str]:
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return set()
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("afa_kernels.")]
    return {value.__name__ for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}


def measure_profile(options: argparse.Namespace) -> dict[str, Any]:
    """Profile ``options.rounds`` steps of what `afa train` does, after ``options.warmup`` others (and one more)."""
    if options.threads:
        torch.set_num_threads(options.threads)
    way = Way("fused", options, exact=False)
    for _ in range(options.warmup + 1):
        way.timed()
    plain = statistics.median(way.timed()["step"] for _ in range(options.rounds))
    cuda = options.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        begun = time.perf_counter()
        for _ in range(options.rounds):
            way.timed()
        wall = (time.perf_counter() - begun) / options.rounds * 1e6
    events = list(profiler.events())
    on_gpu = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    # Of the ranges that a program names, phases for one, those are operators that our operators' eager calls are.
    cpu = [event for event in events if event.device_type == DeviceType.CPU]
    host = [event for event in cpu if is_ours(event.name) or not (event.is_user_annotation or event.name in PHASES)]
    operators = [Span(event.name, 0, event.self_cpu_time_total) for event in host]
    rows = totals(on_gpu if cuda else operators, options.rounds)
    computed = busy(on_gpu) / options.rounds if cuda else sum(row["us"] for row in rows)
    return {
        "device": device_name(options.device),
        **{key: value for key, value in vars(options).items() if key not in ("json", "device", "waiting", "profile")},
        "torch": torch.__version__,
        "commit": commit(),
        "step_ms": round(plain * 1e3, 3),
        "profiled_step_ms": round(wall / 1e3, 3),
        "computing_ms": round(computed / 1e3, 3),
        "gaps_ms": round((wall - computed) / 1e3, 3),
        "host_ms": round(sum(span.end for span in operators) / options.rounds / 1e3, 3),
        "launches": sum(row["calls"] for row in rows if not row["name"].startswith("Mem")) if cuda else None,
        "ours_ms": round(sum(row["us"] for row in rows if row["ours"]) / 1e3, 3),
        "rows": [{**row, "us": round(row["us"], 1)} for row in rows],
    }


def show_profile(result: dict[str, Any]) -> None:
    """The table, and what it adds up to."""
    title = f"{result['backbone']}, crop {result['crop']}, batch {result['batch']}, {result['device']}"
    table = Table(title=title)
    table.add_column("kernel" if result["launches"] is not None else "operator", overflow="fold", max_width=72)
    for name in ("calls", "ms a step", "share", "ours"):
        table.add_column(name, justify="right")
    step = result["profiled_step_ms"]
    for row in result["rows"][:ROWS]:
        ms = row["us"] / 1e3
        table.add_row(row["name"], f"{row['calls']:g}", f"{ms:.3f}", f"{ms / step:.1%}", "ours" if row["ours"] else "")
    console = Console(highlight=False)
    console.print(table)
    between = "the GPU waiting" if result["launches"] is not None else "between operators"
    part = {key: f"{result[f'{key}_ms']:.1f} ms ({result[f'{key}_ms'] / step:.1%})" for key in _PARTS}
    console.print(
        f"a step {result['step_ms']:.1f} ms, {step:.1f} ms while profiled: computing {part['computing']}, {between}"
        f" {part['gaps']}; our operators {part['ours']}; host {result['host_ms']:.1f} ms",
        soft_wrap=True,
    )
    if result["launches"] is not None:
        console.print(f"{result['launches']:g} kernels a step")
