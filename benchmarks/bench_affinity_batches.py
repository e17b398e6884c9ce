"""The fused affinity loss at a training step's batches: python benchmarks/bench_affinity_batches.py [--device cuda|cpu]

Microseconds of the loss alone, of the loss and all its gradients from what it keeps, and with scores that are computed
again. On a GPU those of a CUDA graph that holds 20 calls, for in eager code the host would be timed; on the CPU one
small size, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import as_the_command  # noqa: F401
import torch

import afa_kernels
from afa_kernels.bench.tables.affinity import HEADS, RADIUS, make_inputs

BATCHES, SIDE = (2, 8), 32  # of a crop of 512
CALLS, ROUNDS = 20, 15


def in_a_graph(call: Callable[[], object]) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()  # the first one also uploads it
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def on_the_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def row(batch: int, side: int, device: str, dtype: torch.dtype) -> str:
    inputs, labels = make_inputs(batch, side, device, dtype)
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def loss(**options: bool) -> torch.Tensor:
        return afa_kernels.attention_affinity_loss(*leaves, labels, RADIUS, backend="native", **options)[0]

    def alone() -> None:
        with torch.no_grad():
            loss()

    timed = in_a_graph if device == "cuda" else on_the_cpu
    calls = [
        alone,
        lambda: torch.autograd.grad(loss(), leaves),
        lambda: torch.autograd.grad(loss(recompute=True), leaves),
    ]
    case = f"B={batch}, {side}x{side}, {HEADS} heads"
    return " | ".join([case, str(dtype).removeprefix("torch."), *(f"{timed(call):.1f}" for call in calls)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/bench_affinity_batches.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use")
    print("case | queries | loss | and gradients | scores computed again")
    for batch, side in [(batch, SIDE) for batch in BATCHES] if device == "cuda" else [(1, 12)]:
        for dtype in (torch.bfloat16, torch.float32):
            print(row(batch, side, device, dtype), flush=True)


if __name__ == "__main__":
    main()
