"""What a benchmark measured: its rows, printed as a table, written as JSON, put together in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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


def as_table(rows: Sequence[Row], title: str) -> str:
    """The providers of a case, a line each."""
    names = ["median ms", "p20", "p80", "cold", "speed-up", "floor ms", "of floor", "peak MB", "error"]
    graphs = any(row.graph_ms is not None for row in rows)
    table = [["provider", *names, *(["graph ms", "host"] if graphs else [])]]
    for row in rows:
        numbers = [f"{value:.3g}" for value in (row.median_ms, row.p20_ms, row.p80_ms, row.cold_ms)]
        numbers += [f"{row.speedup:.1f}x", f"{row.floor_ms:.3g}", f"{100 * row.of_floor:.0f} %"]
        numbers += [f"{row.peak_mb:.1f}", f"{row.error:.1g}"]
        numbers += [_or_dash(row.graph_ms, "{:.3g}"), _or_dash(row.host_share, "{:.0%}")] if graphs else []
        table.append([row.provider, *numbers])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for first, *numbers in table:
        words = [first.ljust(widths[0]), *(word.rjust(width) for word, width in zip(numbers, widths[1:]))]
        lines.append("  " + "  ".join(words))
    return "\n".join([title, *lines])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_json(report: Report, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.operator}-{report.device}.json"
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return path


OURS = ("native", "triton")
OTHERS = ("pydensecrf",)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Tables of reports as they are written (`dataclasses.asdict`), one for each machine, which is its heading.

    One line a case: the first provider (plain PyTorch) against the fastest of ours, with the floor.
    """
    lines = []
    machines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in found:
        if "operator" not in report:  # of something else, as a training step
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
                theirs = "-" if alone else _short(base["median_ms"]) + f" ({base['provider']})" * other
                numbers = [theirs, f"{_short(ours['median_ms'])} ({ours['provider']})"]
                numbers += ["-" if alone else f"{ours['speedup']:.1f}x"]
                graph = ours.get("graph_ms")
                # The floor is the device's: without the host's part where that is known.
                share = ours["floor_ms"] / graph if graph else ours["of_floor"]
                numbers += [_short(ours["floor_ms"]), f"{100 * share:.0f} %"]
                numbers += [f"{'-' if alone else _megabytes(base['peak_mb'])} / {_megabytes(ours['peak_mb'])}"]
                numbers += [_short(graph) if graph is not None else ""] * graphs
                lines.append(f"| {report['operator']} | {case} | " + " | ".join(numbers) + " |")
        lines.append("")
    return "\n".join(lines)


def _megabytes(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.0f}"  # where the system does not tell


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
