"""One way to time every operator.

A case table (``bench_*.py``) gives, for each case, the inputs, what each provider does with them, and the bytes and
operations that no implementation can avoid. The harness checks every provider against the first one before it times it,
times them interleaved in one process (so that noise of the machine hits all alike), with the cache as the last provider
left it (warm) or emptied (cold), and reports medians with 20th and 80th percentiles beside the floor:

    floor = max(bytes / bandwidth, operations / peak)      of this machine, measured at the start of the run

A provider that fails or gives other numbers is not timed; the report says so and the run goes on, for the rest of it
may have taken hours, or a borrowed GPU.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reports import Report, Row, as_table, write_json
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Case:
    """One row of a case table. Providers are called without arguments and return a tensor or a tuple of them."""

    name: str
    providers: dict[str, Callable[[], Any]]  # the first is what the others are checked against and compared with
    bytes: float = 0.0  # that must cross memory at least once
    operations: float = 0.0  # multiply and add counted as two
    dtype: torch.dtype = torch.float32  # of the arithmetic: whose peak the operations are held against
    tolerance: float = 1e-5  # norm of the difference over norm of the first provider's result


# --- the machine ---


def commit() -> str:
    """Short hash of the checkout, with + when it has uncommitted changes; "unknown" outside a checkout."""
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge a number: device, versions, commit, measured bandwidth and peak."""
    import afa_kernels

    native = afa_kernels._native_module.native
    bandwidth, peaks = limits(device)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "instruction_set": native.cpu_isa() if native is not None else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        **{peak_key(dtype): round(peak / 1e9, 1) for dtype, peak in peaks.items()},
    }


def peak_key(dtype: torch.dtype) -> str:
    """Where a machine's description has the operations per second of a dtype."""
    return "peak_gflop_s" if dtype == torch.float32 else f"peak_gflop_s_{str(dtype).removeprefix('torch.')}"


def limits(device: str) -> tuple[float, dict[torch.dtype, float]]:
    """Bytes per second of a copy (read and written counted) and operations per second of a matrix product.

    Products of float32 on the CPU, where half precision is not arithmetic but storage; of bfloat16 too on a GPU.
    """
    size = 1 << (28 if device == "cuda" else 25)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(7))
    n, peaks = 4096 if device == "cuda" else 1024, {}
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        a = torch.rand(n, n, device=device, dtype=dtype)
        out = torch.empty_like(a)
        product = partial(torch.mm, a, a, out=out)
        peaks[dtype] = 2 * n**3 / min(_seconds(product, device) for _ in range(7))
    return 2 * 4 * size / seconds, peaks


# --- providers ---


def kernels(operator: str, device: str) -> list[str]:
    """Backends of ours to time: native, and on a GPU Triton (its interpreter is there to prove kernels)."""
    import afa_kernels

    wanted = ("native", "triton") if device == "cuda" else ("native",)
    here = [row for row in afa_kernels.backends() if (row.operator, row.device) == (operator, device)]
    return [row.backend for row in here if row.available and row.backend in wanted]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile``, starting afresh at the first call: it gives up on a function after a few shapes."""
    ready = torch.compile(function, dynamic=False, fullgraph=True)
    fresh = True

    def call(*arguments: Any) -> Any:
        nonlocal fresh
        if fresh:
            torch._dynamo.reset()
            fresh = False
        return ready(*arguments)

    return call


# --- timing ---


def _seconds(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Of one call; on a GPU of one among ``repeats``, one behind the other as a training loop queues them."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def warm_up(call: Callable[[], Any], device: str, seconds: float = 0.002) -> None:
    """One call, or as many as fit into 2 ms: what the other providers have left in the caches is gone by then."""
    begin = time.perf_counter()
    while True:
        call()
        if device == "cuda" or time.perf_counter() - begin > seconds:
            return


class CacheFlush:
    """Writes over more memory than any cache holds."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty((256 if device == "cuda" else 128) << 20, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.fill_(1)


def forget_scratch() -> None:
    """Frees what our kernels keep for their next call on this thread: a peak that left it out would flatter them."""
    import afa_kernels

    kept = getattr(afa_kernels._native_module, "_scratch", None)
    if kept is not None:
        kept.__dict__.clear()


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Bytes at the peak of a call above the level before it: results and scratch, not the inputs.

    CUDA: what torch's allocator had handed out. CPU (Linux): resident pages of this process, its high-water mark
    set back by the kernel just before the call (``/proc/self/clear_refs``), when memory freed earlier has been
    returned to the system; what is allocated but never touched does not count, scratch that our kernels keep from
    call to call does. NaN where that is not to be had.
    """
    forget_scratch()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS:")
        call()
        return max(status("VmHWM:") - before, 0.0)
    except (OSError, AttributeError, StopIteration):
        return float("nan")


def _tensors(result: Any) -> list[torch.Tensor]:
    items = result if isinstance(result, (tuple, list)) else (result,)
    return [item.detach().double() for item in items if isinstance(item, torch.Tensor)]


def relative_error(got: Any, want: Any) -> float:
    """Largest over the returned tensors of: norm of the difference over norm of what is wanted."""
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(_tensors(got), _tensors(want))]
    return max(errors)


def check(case: Case, device: str) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Runs every provider once: error and peak of those that agree with the first, and why the others do not count."""
    first = next(iter(case.providers))
    good: dict[str, tuple[float, float]] = {}
    failures: dict[str, str] = {}
    want = None
    for name, call in case.providers.items():
        if name != first and want is None:
            failures[f"{case.name}: {name}"] = f"not timed: there is no {first} to compare it with"
            continue
        try:
            got = call()
            want = got if name == first else want
            error = relative_error(got, want)
            del got
            if error <= case.tolerance:
                good[name] = error, peak_memory(call, device)
            else:
                failures[f"{case.name}: {name}"] = f"differs from {first} by {error:.2g}, not timed"
        except Exception as error:  # whatever a compiler or a device may say
            failures[f"{case.name}: {name}"] = f"{type(error).__name__}: {error}"[:500]
    return good, failures


def measure(case: Case, device: str, seconds: float, machine: dict[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """Checks, then times, the providers of a case, about ``seconds`` for each; also gives what `check` found wrong."""
    good, failures = check(case, device)
    providers = {name: case.providers[name] for name in good}
    if not providers:
        return [], failures
    first = next(iter(providers))
    once = {name: _seconds(call, device) for name, call in providers.items()}
    repeats = {name: min(max(int(1e-3 / once[name]), 1), 50) if device == "cuda" else 1 for name in providers}
    rounds = int(min(max(seconds / max(sum(once.values()) / len(once), 1e-6), 5), 200))
    least = {name: 5 if once[name] < max(seconds, 0.5) else 3 for name in providers}
    warm: dict[str, list[float]] = {name: [] for name in providers}
    cold: dict[str, list[float]] = {name: [] for name in providers}
    flush = CacheFlush(device)
    for _ in range(rounds):
        for name, call in providers.items():
            # A slow provider is not repeated as often as a fast one.
            if len(warm[name]) >= least[name] and sum(warm[name]) > 2 * seconds / repeats[name]:
                continue
            warm_up(call, device)
            warm[name].append(_seconds(call, device, repeats[name]))
    for _ in range(min(rounds, 7)):
        for name, call in providers.items():
            if len(cold[name]) >= least[name] and sum(cold[name]) > 2 * seconds:
                continue
            flush()
            cold[name].append(_seconds(call, device))
    floor = max(
        case.bytes / (machine["bandwidth_gb_s"] * 1e9) if case.bytes else 0.0,
        case.operations / (machine[peak_key(case.dtype)] * 1e9) if case.operations else 0.0,
    )
    base = statistics.median(warm[first])
    rows = []
    for name, times in warm.items():
        median = statistics.median(times)
        ordered = sorted(times)
        p20, p80 = ordered[int(0.2 * (len(ordered) - 1))], ordered[int(0.8 * (len(ordered) - 1) + 0.5)]
        milliseconds = [round(1e3 * value, 4) for value in (median, p20, p80, statistics.median(cold[name]))]
        rows.append(
            Row(
                case.name,
                name,
                *milliseconds,
                speedup=round(base / median, 2),
                floor_ms=round(1e3 * floor, 4),
                of_floor=round(floor / median, 3),
                peak_mb=round(good[name][1] / 2**20, 2),
                error=float(f"{good[name][0]:.2g}"),
                rounds=len(times),
            )
        )
    return rows, failures


# --- a table of cases ---


def run(
    operator: str, cases: Sequence[Case], device: str = "cpu", seconds: float = 2.0, folder: Path | None = None
) -> Report:
    """Measures a case table, prints it as it goes and keeps what it has in ``folder``, should it be stopped."""
    console = Console()
    console.width = max(console.width, 110)  # a table that wraps is no table
    report = Report(operator, device, describe(device))
    console.print(f"[bold]{operator}[/bold] on {report.machine['device']}, commit {report.machine['commit']}")
    for case in cases:
        rows, failures = measure(case, device, seconds, report.machine)
        report.rows += rows
        report.failures |= failures
        if rows:
            console.print(as_table(rows, case.name))
        for name, reason in failures.items():
            console.print(f"{name}: {reason}", style="red", markup=False)
        if folder is not None:
            write_json(report, folder)
    return report
