"""PAR's two plans on a GPU, timed beside what csrc/diffusion/plan_table.h makes of them: whether the choice is right.

    python benchmarks/bench_plans.py [--device cuda|cpu] [--iterations 10]

Prints a row for each size: microseconds of an iteration, said and measured, of either plan, and which is chosen and
which was faster. Where these differ the card's row in plan_table.h is to be changed. On the CPU nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import as_the_command  # noqa: F401
import torch

import afa_kernels
from afa_kernels.bench.harness import Unable
from afa_kernels.bench.tables.par import PLANS, with_plan
from afa_kernels.ops.diffusion import plans

ROUNDS = 7


def measured(plan: str, size: tuple[int, ...], iterations: int) -> float | None:
    """Microseconds of one iteration, from the difference of two runs, so that making the weights is left out; None if
    the plan cannot take the size.
    """
    batch, channels, height, width = size
    images, masks = (torch.rand(batch, count, height, width, device="cuda") for count in (3, channels))

    def once(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with_plan(plan, lambda: afa_kernels.par(images, masks, num_iter=count, backend="native"))
        end.record()
        end.synchronize()
        return 1000 * begin.elapsed_time(end)

    try:
        once(2), once(2 + iterations)
    except Unable:
        return None
    few, many = (statistics.median(once(count) for _ in range(ROUNDS)) for count in (2, 2 + iterations))
    return (many - few) / iterations


def row(size: tuple[int, ...], device: str, iterations: int, card: plans.Card) -> str:
    said = plans.par_plan(size, num_iter=iterations, card=card)
    found = [measured(plan, size, iterations) if device == "cuda" else None for plan in PLANS]
    timed = {plan: value for plan, value in zip(PLANS, found) if value is not None}
    cells = ["x".join(map(str, size)), f"{said.resident_us:.1f}", f"{said.streaming_us:.1f}"]
    cells += ["-" if value is None else f"{value:.1f}" for value in found]
    return " | ".join([*cells, said.name, min(timed, key=timed.get) if timed else "-"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/bench_plans.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use")
    card = plans.device_card() if options.device == "cuda" else plans.CARDS["H100"]
    print("masks | resident, said | streaming, said | resident | streaming | chosen | faster")
    for size in plans.SIZES:
        print(row(size, options.device, options.iterations, card), flush=True)


if __name__ == "__main__":
    main()
