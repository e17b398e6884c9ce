"""`afa bench`: operators, the throughput of the data loading, and the door to the other benchmarks of a checkout."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def benchmarks() -> dict[str, Path]:
    """The other benchmarks of a checkout by name; none in an installed package."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}


def measure_data(argv: Sequence[str], batches: int) -> dict[str, float | int]:
    """Images per second that come out of the training loader set up by the options of `afa train`.

    The first batch, in which the workers start, does not count.
    """
    # Here, for the operators are measured without what these need.
    from ..config import parse
    from ..data.datasets import TrainingSet
    from ..data.order import training_loader

    config = parse(argv, "afa bench data")
    dataset = TrainingSet(config.data, config.augment)
    size = config.loader.batch_size
    loader = iter(training_loader(dataset, size, config.seed))
    next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - start
    return {
        "images": batches * size,
        "seconds": round(seconds, 3),
        "images_per_second": round(batches * size / seconds, 2),
        "workers": config.data.num_workers,
        "crop": config.augment.crop,
    }


def _data_main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "afa bench data",
        description="Measure decoding and augmentation: images per second that the training loader gives."
        " All other options are those of `afa train`, such as --data.root DIR and --data.num_workers N.",
    )
    parser.add_argument("--batches", type=int, default=50, help="batches to measure (default: 50)")
    told = "also write the numbers as JSON; - prints them"
    parser.add_argument("--json", type=os.path.expanduser, metavar="FILE", help=told)
    options, rest = parser.parse_known_args(argv)
    if options.batches < 1:
        parser.error(f"--batches: expected at least 1, got {options.batches}")
    result = measure_data(rest, options.batches)
    if options.json == "-":
        print(json.dumps(result))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['images_per_second']} images/s ({result['images']} crops of {result['crop']} pixels"
        f" in {result['seconds']} s, {result['workers']} workers)"
    )
    return 0


def main(argv: Sequence[str]) -> int:
    """`afa bench data [OPTION...]` or `afa bench NAME [OPTION...]`: an operator, or a file bench_NAME.py."""
    from afa_kernels.bench import command, tables

    known = benchmarks()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: afa bench NAME [OPTION...]\n\n`afa bench NAME --help` lists the options of one.\n")
        print("  data        images per second of the training loader")
        print(f"  operators   as `python -m afa_kernels.bench`; or one: {', '.join(tables.NAMES)}")
        for name, path in known.items():
            print(f"  {name:10}  {path.name}")
        if not known:
            print(f"\n(the other benchmarks come with a checkout; there are none in {FOLDER})")
        return 0 if argv else 2
    name, *rest = argv
    if name == "data":
        return _data_main(rest)
    if name == "operators":
        return command.main(rest)
    if name in tables.NAMES:
        return command.main(argv)
    if name not in known:
        there = ", ".join(["data", "operators", *tables.NAMES, *known])
        print(f"afa bench: error: no benchmark {name!r} ({there})", file=sys.stderr)
        return 2
    return subprocess.call([sys.executable, str(known[name]), *rest])
