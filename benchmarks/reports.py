"""What a benchmark measured: its rows, printed as a table, written as JSON, CSV and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass
class Row:
    case: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    cold_ms: float
    speedup: float  # over the case's first provider, medians of interleaved runs
    floor_ms: float
    of_floor: float  # floor / median: 1 would be perfect
    peak_mb: float  # highest memory above what was in use before the call
    error: float  # against the first provider
    rounds: int
    graph_ms: float | None = None  # replayed as a CUDA graph; None on a CPU, where it is long, or cannot be captured
    host_share: float | None = None  # 1 - graph / median: of the time, what the kernels waited for their launches


@dataclass
class Report:
    operator: str
    device: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # by "case: provider", why it was not timed
    notes: dict[str, str] = field(default_factory=dict)  # likewise, what a provider cannot do and need not


def as_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("provider")
    names = ["median ms", "p20", "p80", "cold", "speed-up", "floor ms", "of floor", "peak MB", "error"]
    graphs = any(row.graph_ms is not None for row in rows)
    for name in [*names, *(["graph ms", "host"] if graphs else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.provider,
            *(f"{value:.3g}" for value in (row.median_ms, row.p20_ms, row.p80_ms, row.cold_ms)),
            f"{row.speedup:.1f}x",
            f"{row.floor_ms:.3g}",
            f"{100 * row.of_floor:.0f} %",
            f"{row.peak_mb:.1f}",
            f"{row.error:.1g}",
            *((_or_dash(row.graph_ms, "{:.3g}"), _or_dash(row.host_share, "{:.0%}")) if graphs else ()),
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_json(report: Report, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.operator}-{report.device}.json"
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return path


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
