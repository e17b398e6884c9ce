"""python benchmarks/run.py [par ...] [--device cpu|cuda] [--quick] [--compile] [--out FOLDER]

Runs the case tables of `afa_kernels.bench` and writes JSON, CSV and a plot for each to FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import as_the_command  # noqa: F401

from afa_kernels.bench import command, harness, tables

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    import result_files

    parser = command.parser()
    parser.prog, parser.description = "benchmarks/run.py", __doc__.splitlines()[2]
    parser.set_defaults(seconds=2.0)
    parser.add_argument("--quick", action="store_true", help="the smaller cases only")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where the results go")
    options = command.parsed(parser, arguments)
    failures: dict[str, str] = {}
    for operator in options.operators:
        cases = tables.table(operator).cases(options.device, quick=options.quick, compiling=options.compile)
        report = harness.run(operator, cases, options.device, options.seconds, options.out)
        failures |= report.failures
        print(f"written: {result_files.write(report, options.out)} (with .csv and .png)\n")
    if failures:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in failures.items()))


if __name__ == "__main__":
    main()
