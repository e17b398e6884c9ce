"""Writes the README's speed tables from benchmarks/results: python benchmarks/readme_table.py [--check]

Every JSON file there is a report of `harness.write` or of bench_train_step.py, or has several (on_gpu.sh).
Operators: one line a case, the first provider (plain PyTorch) against the fastest of ours, with the floor, and the
machine in the heading. Training steps: one line a phase.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
OURS = ("native", "triton")
OTHERS = ("pydensecrf",)
START, END = "<!-- speed table: python benchmarks/readme_table.py -->", "<!-- end of speed table -->"


def reports(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        found += content if isinstance(content, list) else content.get("reports", [content])
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    lines = []
    machines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in found:
        if "operator" not in report:  # of something else, as large photographs
            continue
        machines.setdefault((report["machine"]["device"], report["machine"]["torch"]), []).append(report)
    for (device, torch_version), group in machines.items():
        lines += [f"**{device}**, torch {torch_version}:", ""]
        # Results of a CPU, and older ones, know nothing of CUDA graphs.
        graphs = any(row.get("graph_ms") is not None for report in group for row in report["rows"])
        columns = "operator | case | PyTorch ms | ours ms | speed-up | floor ms | of floor | peak MB, PyTorch / ours"
        lines += [f"| {columns} |" + " ours in a CUDA graph ms |" * graphs]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * graphs]
        for report in group:
            for case in dict.fromkeys(row["case"] for row in report["rows"]):
                rows = [row for row in report["rows"] if row["case"] == case]
                own = [row for row in rows if row["provider"] in OURS]
                base, ours = rows[0], min(own or rows[:1], key=lambda row: row["median_ms"])
                # Where PyTorch would take minutes there is no time of it, or one of another package.
                alone, other = base["provider"] in OURS, base["provider"] in OTHERS
                theirs = "-" if alone else short(base["median_ms"]) + f" ({base['provider']})" * other
                numbers = [theirs, f"{short(ours['median_ms'])} ({ours['provider']})"]
                numbers += ["-" if alone else f"{ours['speedup']:.1f}x"]
                numbers += [short(ours["floor_ms"]), f"{100 * ours['of_floor']:.0f} %"]
                numbers += [f"{'-' if alone else short(round(base['peak_mb']))} / {ours['peak_mb']:.0f}"]
                graph = ours.get("graph_ms")
                numbers += [short(graph) if graph is not None else ""] * graphs
                lines.append(f"| {report['operator']} | {case} | " + " | ".join(numbers) + " |")
        lines.append("")
    return "\n".join([*lines, *(line for report in found if "phases" in report for line in step(report))])


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
        if name == "cpu":
            continue
        ratio = times["published"] / times["fused"] if times["fused"] else float("nan")
        lines.append(f"| {name} | {short(times['published'])} | {short(times['fused'])} | {ratio:.1f}x |")
    peaks = report["peak_mb"]
    return [*lines, f"| peak MB | {peaks['published']} | {peaks['fused']} | |", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the README's table is not the one of the results")
    options = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n\n{markdown(reports(HERE / 'results'))}\n{END}{after}"
    if options.check and new != text:
        sys.exit("README.md: the speed table is not that of benchmarks/results; run python benchmarks/readme_table.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
