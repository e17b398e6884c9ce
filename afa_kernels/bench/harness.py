"""One way to time every operator.

A case table (`tables`) gives, for each case, the inputs, what each provider does with them, and the bytes and
operations that no implementation can avoid. The harness checks every provider against the first one before it times it,
times them interleaved in one process (so that noise of the machine hits all alike), with the cache as the last provider
left it (warm) or emptied (cold), and reports medians with 20th and 80th percentiles beside the floor:

    floor = max(bytes / bandwidth, operations / peak)      of this machine, measured at the start of the run

On a GPU float32 is float32: TF32 is off, and the first provider is timed once more with it, in a row of its own. What
takes less than a millisecond is also replayed as a CUDA graph, which shows how much of its time was the host's.

A provider that fails or gives other numbers is not timed; the report says so and the run goes on, for the rest of it
may have taken hours, or a borrowed GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..core.backends import backends
from . import gpu
from .machine import built_from, describe, peak_key
from .reports import Report, Row, as_table, write_json
from .timing import CacheFlush, peak_memory, repeats_of, seconds_of, warm_up

TF32_TOLERANCE = 1e-2  # TF32 keeps 10 of float32's 23 bits
OURS = ("native", "triton")  # backends that are timed where there are any; command.parsed may leave some out
GRAPH_BELOW = 1e-3  # seconds: what takes longer has hidden its launches behind its kernels


class Unable(Exception):
    """Raised by a provider that cannot do this case: noted in the report, and no failure of the run."""


@dataclass
class Case:
    """One row of a case table. Providers are called without arguments and return a tensor or a tuple of them."""

    name: str
    providers: dict[str, Callable[[], Any]]  # the first is what the others are checked against and compared with
    bytes: float = 0.0  # that must cross memory at least once
    operations: float = 0.0  # multiply and add counted as two
    dtype: torch.dtype = torch.float32  # of the arithmetic: whose peak the operations are held against
    tolerance: float = 1e-5  # norm of the difference over norm of the first provider's result


# --- providers ---


def kernels(operator: str, device: str) -> list[str]:
    """Backends of ours to time: native, and on a GPU Triton (its interpreter is there to prove kernels)."""
    wanted = OURS if device == "cuda" else ("native",)
    here = [row for row in backends() if (row.operator, row.device) == (operator, device)]
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


@dataclass
class Provider:
    """One way to do a case, and how far it may be from the first."""

    call: Callable[[], Any]
    tolerance: float
    tf32: bool = False

    def precision(self) -> AbstractContextManager[None]:
        """To be around its calls, and outside what is timed."""
        return gpu.precision(tf32=True) if self.tf32 else nullcontext()


def providers_of(case: Case, device: str) -> dict[str, Provider]:
    """Those of the case; behind the first one, on a GPU and in float32, the same with TF32."""
    found: dict[str, Provider] = {}
    for name, call in case.providers.items():
        found[name] = Provider(call, case.tolerance)
        if len(found) == 1 and device == "cuda" and case.dtype == torch.float32:
            found[f"{name} TF32"] = Provider(call, max(case.tolerance, TF32_TOLERANCE), tf32=True)
    return found


# --- one case ---


@dataclass
class Measured:
    """What came of a case; ``failures`` and ``notes`` by "case: provider"."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def _tensors(result: Any) -> list[torch.Tensor]:
    items = result if isinstance(result, (tuple, list)) else (result,)
    return [item.detach().double() for item in items if isinstance(item, torch.Tensor)]


def relative_error(got: Any, want: Any) -> float:
    """Largest over the returned tensors of: norm of the difference over norm of what is wanted."""
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(_tensors(got), _tensors(want))]
    return max(errors)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def check(name: str, providers: dict[str, Provider], device: str, result: Measured) -> dict[str, tuple[float, float]]:
    """Runs every provider once -> error and peak of those that agree with the first; why not goes into ``result``."""
    first = next(iter(providers))
    good: dict[str, tuple[float, float]] = {}
    want = None
    for key, provider in providers.items():
        where = f"{name}: {key}"
        if key != first and first not in good:
            result.failures[where] = f"not timed: there is no {first} to compare it with"
            continue
        try:
            with provider.precision():
                got = provider.call()
                want = got if key == first else want
                error = relative_error(got, want)
                del got
                if error <= provider.tolerance:
                    good[key] = error, peak_memory(provider.call, device)
                else:
                    result.failures[where] = f"differs from {first} by {error:.2g}, not timed"
        except Unable as error:
            result.notes[where] = f"not timed: {error}"
        except Exception as error:  # whatever a compiler or a device may say
            result.failures[where] = _said(error)
    return good


def time_eagerly(providers: dict[str, Provider], device: str, seconds: float) -> dict[str, tuple[list[float], float]]:
    """Seconds of each provider's warm calls, about ``seconds`` in all for each, and the median of its cold ones."""
    warm: dict[str, list[float]] = {name: [] for name in providers}
    cold: dict[str, list[float]] = {name: [] for name in providers}
    once = {}
    for name, provider in providers.items():
        with provider.precision():
            once[name] = seconds_of(provider.call, device)
    repeats = {name: repeats_of(once[name], device) for name in providers}
    rounds = int(min(max(seconds / max(sum(once.values()) / len(once), 1e-6), 5), 200))
    least = {name: 5 if once[name] < max(seconds, 0.5) else 3 for name in providers}
    flush = CacheFlush(device)
    for _ in range(rounds):
        for name, provider in providers.items():
            # A slow provider is not repeated as often as a fast one.
            if len(warm[name]) >= least[name] and sum(warm[name]) > 2 * seconds / repeats[name]:
                continue
            with provider.precision():
                warm_up(provider.call, device)
                warm[name].append(seconds_of(provider.call, device, repeats[name]))
    for _ in range(min(rounds, 7)):
        for name, provider in providers.items():
            if len(cold[name]) >= least[name] and sum(cold[name]) > 2 * seconds:
                continue
            flush()
            with provider.precision():
                cold[name].append(seconds_of(provider.call, device))
    return {name: (warm[name], statistics.median(cold[name])) for name in providers}


def time_graph(provider: Provider, device: str) -> float:
    """Seconds of a replay as a CUDA graph: the call without the host's share."""
    with provider.precision():
        replay = gpu.capture(provider.call)
        replay()  # the first one also uploads the graph
        repeats = repeats_of(seconds_of(replay, device), device)
        return statistics.median(seconds_of(replay, device, repeats) for _ in range(15))


def measure(case: Case, device: str, seconds: float, machine: dict[str, Any]) -> Measured:
    """Checks, then times, the providers of a case, about ``seconds`` for each."""
    result, providers = Measured(), providers_of(case, device)
    good = check(case.name, providers, device, result)
    providers = {name: providers[name] for name in good}
    if not providers:
        return result
    timed = time_eagerly(providers, device, seconds)
    medians = {name: statistics.median(times) for name, (times, _) in timed.items()}
    graphs: dict[str, float | None] = dict.fromkeys(providers)
    # Last, for a capture that fails may leave the device in a state that a time should not depend on.
    for name in providers if device == "cuda" else ():
        if medians[name] < GRAPH_BELOW:
            try:
                graphs[name] = time_graph(providers[name], device)
            except Exception as error:  # what waits for the device cannot be captured, for one
                result.notes[f"{case.name}: {name}"] = f"no CUDA graph: {_said(error)}"
    floor = max(
        case.bytes / (machine["bandwidth_gb_s"] * 1e9) if case.bytes else 0.0,
        case.operations / (machine[peak_key(case.dtype)] * 1e9) if case.operations else 0.0,
    )
    base = medians[next(iter(case.providers))]
    for name, (times, cold) in timed.items():
        ordered, median, graph = sorted(times), medians[name], graphs[name]
        p20, p80 = ordered[int(0.2 * (len(ordered) - 1))], ordered[int(0.8 * (len(ordered) - 1) + 0.5)]
        milliseconds = [round(1e3 * value, 4) for value in (median, p20, p80, cold)]
        result.rows.append(
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
                graph_ms=None if graph is None else round(1e3 * graph, 4),
                host_share=None if graph is None else round(max(1 - graph / median, 0.0), 3),
            )
        )
    return result


# --- a table of cases ---


def run(
    operator: str,
    cases: Sequence[Case],
    device: str = "cpu",
    seconds: float = 2.0,
    folder: Path | None = None,
    to: TextIO | None = None,
) -> Report:
    """Measures a case table, prints it as it goes (``to``: other than the standard output) and keeps what it has in
    ``folder``, should it be stopped.
    """
    with gpu.precision():
        report = Report(operator, device, describe(device))
        print(f"{operator} on {report.machine['device']}, {built_from(report.machine)}", file=to, flush=True)
        for case in cases:
            result = measure(case, device, seconds, report.machine)
            report.rows += result.rows
            report.failures |= result.failures
            report.notes |= result.notes
            lines = [f"{name}: {reason}" for name, reason in (result.failures | result.notes).items()]
            if result.rows:
                lines = [as_table(result.rows, case.name), *lines]
            print(*lines, sep="\n", file=to, flush=True)
            if folder is not None:
                write_json(report, folder)
    return report
