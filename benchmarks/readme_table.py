"""Writes the README's speed tables from benchmarks/results: python benchmarks/readme_table.py [--check]

Every JSON file there is a report of run.py or of bench_train_step.py, or has several (on_gpu.sh). Operators are as
`afa_kernels.bench.reports.markdown` has them; training steps have one line a phase.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
SHOWN = ("affinity", "par", "random_walk", "bilateral")  # the others' tables are on their pages of the documentation
START, END = "<!-- speed table: python benchmarks/readme_table.py -->", "<!-- end of speed table -->"


def reports(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: (not path.stem.endswith("cuda"), path)):
        content = json.loads(path.read_text())
        found += content if isinstance(content, list) else content.get("reports", [content])
    return found


def tables(found: list[dict[str, Any]]) -> str:
    """Of operators, then of training steps."""
    # Here, for on_gpu_report.py is to work where importing the kernels crashes.
    from afa_kernels.bench.reports import markdown

    return "\n".join([markdown(found), *(line for report in found if "phases" in report for line in step(report))])


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def step(report: dict[str, Any]) -> list[str]:
    """A training step as published and as it is here, by phases."""
    named = (("amp", report["amp"] != "off" and report["amp"]), *((key, key) for key in ("compile", "cuda_graph")))
    options = "".join(f", {text}".replace("_", " ") for key, text in named if report[key] and text)
    size = f"{report['backbone']}, crop {report['crop']}, batch {report['batch']}{options}"
    lines = [f"**A training step** ({size}; {report['device']}, torch {report['torch']}):", ""]
    lines += ["| phase | as published s | here s | speed-up |", "|---|---:|---:|---:|"]
    for name, times in report["phases"].items():
        if name == "cpu" or not times["fused"]:  # a phase that the settings leave out
            continue
        ratio = times["published"] / times["fused"]
        lines.append(f"| {name} | {short(times['published'])} | {short(times['fused'])} | {ratio:.1f}x |")
    peaks = report["peak_mb"]
    return [*lines, f"| peak MB | {peaks['published']} | {peaks['fused']} | |", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the README's table is not the one of the results")
    options = parser.parse_args()
    kept = [row for row in reports(HERE / "results") if row.get("operator", SHOWN[0]) in SHOWN]
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n\n{tables(kept)}\n{END}{after}"
    if options.check and new != text:
        sys.exit("README.md: the speed table is not that of benchmarks/results; run python benchmarks/readme_table.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
