"""python benchmarks/bench_host.py [--device stub|cuda] [--calls 200] [--rounds 15] [--json FILE]

What the host does in a call of an operator: kernels launched, memsets, operators of PyTorch, microseconds. Inputs are
so small that a GPU waits for the host, as it does for the small operators of an eager training step.

``stub``, where there is no GPU: the CUDA sources compiled as C++ (tests/support/cuda_emulator), whose launches are
counted and run nothing; tensors are the CPU's. So its microseconds are those of Python, PyTorch and the launchers,
without what the CUDA driver takes for a launch, a memset or memory, and no measurement of a GPU. ``cuda``, where there
is one: what the host takes until the call returns, the driver's part included, and what the profiler counts.

The last rows are floors: operators of as many arguments that do nothing but make their results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import as_the_command  # noqa: F401
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import afa_kernels
from afa_kernels.bench.machine import commit, device_name
from afa_kernels.core import native_module
from afa_kernels.core.registration import operator

ROOT = Path(__file__).resolve().parents[1]
COUNTED = 4  # calls, of which the counts are the mean
# Microseconds that a call should take on the host of a GPU.
TARGETS = {"par": 12, "random_walk": 12, "loss": 20, "loss + backward": 50}


# --- floors -----------------------------------------------------------------------------------------------------------


@operator("bench_nothing")
def _nothing(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, labels: Tensor, radius: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _scalars(query)


def _scalars(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = [torch.empty((), dtype=torch.int64, device=like.device) for _ in range(2)]
    return torch.empty((), dtype=torch.float32, device=like.device), *counts


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _gradients_of_nothing(ctx, grad, *_):
    return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:4]), None, None, None


_nothing.register_autograd(_gradients_of_nothing, setup_context=_save)


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """The calls by name, on inputs of a few pixels: three colours and four classes, 16 heads, radius 8."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    images, masks = random(1, 3, 16, 16), random(1, 4, 16, 16)
    affinity, cams = random(1, 289, 8, 8), random(1, 4, 8, 8)
    query, key, weight, bias = random(1, 16, 64, 64).bfloat16(), random(1, 16, 64, 64).bfloat16(), random(16), random(1)
    labels = torch.randint(3, (1, 8, 8), generator=generator).to(device)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, weight, bias)]
    quiet = query, key, weight, bias

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves)

    loss = afa_kernels.attention_affinity_loss
    return {
        "par": lambda: afa_kernels.par(images, masks),
        "random_walk": lambda: afa_kernels.random_walk(affinity, cams, 8),
        "loss": lambda: loss(*quiet, labels, 8),
        "loss + backward": lambda: backward(loss(*leaves, labels, 8)[0]),
        "nothing, as our operators": lambda: _nothing(*quiet, labels, 8, "native"),
        "nothing + backward, as our operators": lambda: backward(_nothing(*leaves, labels, 8, "native")[0]),
        "nothing, by the dispatcher": lambda: torch.ops.afa.bench_nothing(*quiet, labels, 8, "native"),
        "nothing + backward, by the dispatcher": lambda: backward(
            torch.ops.afa.bench_nothing(*leaves, labels, 8, "native")[0]
        ),
    }


# --- what is measured -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stubbed() -> Iterator[Callable[[], tuple[int, int]]]:
    """CPU tensors take the path of CUDA tensors, to launches that are counted; yields what reads and resets them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.cuda_emulator import build
    from support.cuda_emulator.operators import emulated

    # Scratch memory as on a GPU, where it is asked for at each call; on the CPU it is kept.
    with emulated(build.load("host")) as emulator, mock.patch.object(native_module, "KEPT_SCRATCH", 0):
        emulator.set_dry(True)
        emulator.set_device(multiprocessors=132)
        yield emulator.counts


def profiled(call: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """PyTorch's operators in a call, without those that they call themselves; kernels and memsets on a GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        for _ in range(COUNTED):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    def outermost(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        return parent is None

    events = found.events()
    operators = [event for event in events if event.name.startswith("aten::") and outermost(event)]
    cuda = torch.autograd.DeviceType.CUDA
    # What names a range of the host shows on the device's line too.
    on_device = [event.name for event in events if event.device_type == cuda and not event.is_user_annotation]
    memsets = sum(name.startswith("Memset") for name in on_device)
    return len(operators) / COUNTED, (len(on_device) - memsets) / COUNTED, memsets / COUNTED


def microseconds(call: Callable[[], Any], device: str, calls: int, rounds: int) -> list[float]:
    """Of one call, for each round; on a GPU the rounds are short, for its queue must not fill up."""
    found = []
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(rounds):
        begin = clock()
        for _ in range(calls):
            call()
        found.append(1e6 * (clock() - begin) / calls)
        if device == "cuda":
            torch.cuda.synchronize()
    return found


def measure(device: str, calls: int, rounds: int) -> dict[str, Any]:
    """A row for each case."""
    rows = []
    with stubbed() if device == "stub" else contextlib.nullcontext() as counts:
        for name, call in cases("cpu" if device == "stub" else device).items():
            for _ in range(10):
                call()
            operators, launches, memsets = profiled(call, device)
            if counts is not None:
                counts()
                call()
                launches, memsets = counts()
            times = sorted(microseconds(call, device, calls, rounds))
            row = {"case": name, "launches": launches, "memsets": memsets, "operators": operators}
            row |= {"us": round(statistics.median(times), 1), "least_us": round(times[0], 1)}
            rows.append(row | ({"target_us": TARGETS[name]} if name in TARGETS else {}))
    return {
        "device": device_name("cuda" if device == "cuda" else "cpu"),
        "launcher": "CUDA" if device == "cuda" else "a stub: launches run nothing and cost nothing",
        "clock": "wall clock" if device == "cuda" else "processor time",
        "calls": calls,
        "rounds": rounds,
        "torch": torch.__version__,
        "commit": commit(),
        "host": rows,
    }


def title(result: dict[str, Any]) -> str:
    what = "" if result["launcher"] == "CUDA" else ", launches stubbed: no measurement of a GPU"
    return f"the host's part of a call on {result['device']}{what}"


def show(result: dict[str, Any]) -> None:
    table = Table(title=title(result))
    for name in ("call", "launches", "memsets", "operators of PyTorch", "us", "least", "target"):
        table.add_column(name, justify="left" if name == "call" else "right")
    for row in result["host"]:
        numbers = [f"{row[key]:g}" for key in ("launches", "memsets", "operators", "us", "least_us")]
        table.add_row(row["case"], *numbers, f"{row.get('target_us', '')}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count and time what the host does in a call of an operator.")
    here = "cuda" if torch.cuda.is_available() else "stub"
    parser.add_argument("--device", choices=("stub", "cuda"), default=here)
    parser.add_argument("--calls", type=int, help="in a round (default: 200, 20 on a GPU)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = options.calls or (20 if options.device == "cuda" else 200)
    result = measure(options.device, calls, options.rounds)
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
