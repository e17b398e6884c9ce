"""What run.py leaves of a report: JSON, CSV and a plot."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

from afa_kernels.bench.reports import Report, write_json


def write(report: Report, folder: Path) -> Path:
    """``<operator>-<device>.json`` and ``.csv`` in the folder, and a plot beside them; returns the JSON's path."""
    path = write_json(report, folder)
    if not report.rows:
        return path
    stem = path.with_suffix("")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*asdict(report.rows[0]), "device", "torch", "commit"])
        writer.writeheader()
        machine = {key: report.machine[key] for key in ("device", "torch", "commit")}
        writer.writerows({**asdict(row), **machine} for row in report.rows)
    plot(report, stem.with_suffix(".png"))
    return path


def plot(report: Report, path: Path) -> None:
    """Bars of the medians on a logarithmic axis, whiskers from p20 to p80, a line at each case's floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in report.rows))
    providers = list(dict.fromkeys(row.provider for row in report.rows))
    figure, axes = plt.subplots(figsize=(max(7.0, 2.2 * len(cases)), 4.2), layout="constrained")
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        rows = [row for row in report.rows if row.provider == provider]
        at = [cases.index(row.case) + (index - (len(providers) - 1) / 2) * width for row in rows]
        spread = [[row.median_ms - row.p20_ms for row in rows], [row.p80_ms - row.median_ms for row in rows]]
        axes.bar(at, [row.median_ms for row in rows], width, yerr=spread, label=provider, capsize=2)
    for index, case in enumerate(cases):
        floor = next(row.floor_ms for row in report.rows if row.case == case)
        if floor > 0:
            label = "floor" if index == 0 else None
            axes.hlines(floor, index - 0.45, index + 0.45, colors="black", linestyles="dashed", label=label)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds (log)")
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    axes.set_title(f"{report.operator} on {report.machine['device']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
