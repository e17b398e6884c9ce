"""python benchmarks/run.py [par ...] [--device cpu|cuda] [--quick] [--compile] [--out FOLDER]

Runs the case tables ``bench_*.py`` in this folder and writes JSON, CSV and a plot for each to FOLDER.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import as_the_command  # noqa: F401
import torch

HERE = Path(__file__).resolve().parent


def tables() -> list[str]:
    """Operators with a case table: modules that define ``cases``."""
    stems = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return [stem for stem in stems if "\ndef cases(" in (HERE / f"bench_{stem}.py").read_text()]


def main(arguments: list[str] | None = None) -> None:
    import harness
    import reports

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("operators", nargs="*", help=f"among {', '.join(tables())}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the smaller cases only")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the reference")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to time each provider of a case")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where the results go")
    options = parser.parse_args(arguments)
    unknown = set(options.operators) - set(tables())
    if unknown:
        parser.error(f"no case table for {', '.join(sorted(unknown))}; there are {', '.join(tables())}")
    if options.threads:
        torch.set_num_threads(options.threads)
    failures: dict[str, str] = {}
    for operator in options.operators or tables():
        table = importlib.import_module(f"bench_{operator}")
        cases = table.cases(options.device, quick=options.quick, compiling=options.compile)
        report = harness.run(operator, cases, options.device, options.seconds, options.out)
        failures |= report.failures
        print(f"written: {reports.write(report, options.out)} (with .csv and .png)\n")
    if failures:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in failures.items()))


if __name__ == "__main__":
    main()
