"""Times the operators on this machine and prints one block to paste into an issue: the environment and the table.

It needs no checkout. What is run stands on the standard error, the block on the standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import harness, machine, reports, tables


def parser() -> argparse.ArgumentParser:
    """What can be asked; benchmarks/run.py takes the same and more."""
    made = argparse.ArgumentParser("python -m afa_kernels.bench", description=__doc__.splitlines()[0])
    made.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"among {', '.join(tables.NAMES)}; default: all")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    told = "about how long to time each way of a case (%(default)s)"
    made.add_argument("--seconds", type=float, default=0.3, help=told)
    made.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    told = "on a GPU: which of %(default)s to time; compiling Triton's kernels takes longer than timing them"
    made.add_argument("--backends", default="native,triton", metavar="NAME,...", help=told)
    made.add_argument("--compile", action="store_true", help="also time torch.compile of the reference")
    return made


def parsed(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends with a message where one is wrong. Sets the number of threads."""
    options = made.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(tables.NAMES))
    if unknown:
        made.error(f"no case table for {', '.join(unknown)}; there are {', '.join(tables.NAMES)}")
    if options.threads is not None:
        if options.threads < 1:
            made.error(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    names = options.backends.split(",")
    if not set(names) <= {"native", "triton"}:
        made.error(f"--backends: expected native, triton or both, got {options.backends}")
    harness.OURS = tuple(names)
    options.operators = options.operators or list(tables.NAMES)
    return options


def block(found: Sequence[reports.Report], seconds: float) -> str:
    """The environment, the table of all reports and what was not timed, in Markdown."""
    written: list[dict[str, Any]] = [asdict(report) for report in found]
    lines = [*(f"- {line}" for line in machine.environment(found[-1].machine)), "", reports.markdown(written)]
    for title, key in (("Not timed", "failures"), ("Notes", "notes")):
        said = [(report["operator"], *line) for report in written for line in report[key].items()]
        lines += [f"{title}:", "", *(f"- {': '.join(line)}" for line in said), ""] if said else []
    return "\n".join([*lines, f"`python -m afa_kernels.bench`, {seconds:.0f} s"])


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m afa_kernels.bench [OPERATOR...]`; returns 1 where a way to do a case failed or gave other numbers."""
    made = parser()
    made.add_argument("--full", action="store_true", help="the larger cases too, which take ten times as long")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the reports to a file")
    options, begin = parsed(made, arguments), time.perf_counter()
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no CUDA device")
    found = []
    for number, name in enumerate(options.operators, 1):
        print(f"[{number}/{len(options.operators)}] ", end="", file=sys.stderr)
        cases = tables.table(name).cases(options.device, quick=not options.full, compiling=options.compile)
        found.append(harness.run(name, cases, options.device, options.seconds, to=sys.stderr))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in found], indent=1) + "\n")
    print(block(found, time.perf_counter() - begin))
    return int(any(report.failures for report in found))
