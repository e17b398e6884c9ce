"""python benchmarks/bench_import.py [--runs 15]

Milliseconds that `import afa_kernels` takes after `import torch`, in processes of their own: wall clock and processor
time, least and median. It is to stay under 50. What is imported is a test's (tests/project/test_parts.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROGRAM = """
import time, torch
wall, processor = time.perf_counter(), time.process_time()
import afa_kernels
print(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor))
"""


def measure(runs: int) -> list[tuple[float, float]]:
    """Wall-clock and processor milliseconds of each run; a first one, which may have to compile, does not count."""
    found = []
    for _ in range(runs + 1):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        wall, processor = map(float, done.stdout.split())
        found.append((wall, processor))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.splitlines()[2:]))
    parser.add_argument("--runs", type=int, default=15, help="processes (default: 15)")
    for name, times in zip(("wall clock", "processor"), zip(*measure(max(parser.parse_args().runs, 1)))):
        print(f"{name:10}  least {min(times):.1f} ms, median {statistics.median(times):.1f} ms of {len(times)}")


if __name__ == "__main__":
    main()
