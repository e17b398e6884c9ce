"""Joins what on_gpu.sh left in a folder to a JSON, a log and a table to paste: on_gpu_report.py FOLDER LOG OUTDIR HALF

Exits with 1 if a stage failed, after it has written all three. A file that is broken or missing, as one is that a
killed process was writing, is named in them and costs nothing else. With --machine cuda|cpu it prints the machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from readme_table import short, step

LOG_BYTES = 400_000
# pytest -v prints "FILE::NAME PASSED [ 5%]"; side by side first "FILE::NAME", then "[gw0] [ 5%] PASSED FILE::NAME".
OUTCOME = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
ALONE = re.compile(rf"^(\S+\.py::.+?)(?: {OUTCOME}\b.*| *\+{{9,}}.*| *)$")
BESIDE = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {OUTCOME} (\S+\.py::.*?) *$")


class Folder:
    """The files a run left; what is wrong with one goes into ``broken``."""

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, {}

    def read(self, name: str, parse: Callable[[str], Any], default: Any) -> Any:
        try:
            return parse((self.path / name).read_text(errors="replace"))
        except Exception as error:  # whatever is in it
            self.broken[name] = f"{type(error).__name__}: {error}".replace(str(self.path) + "/", "")
            return default


# --- tests ---


def junit(text: str) -> dict[str, Any]:
    """Counts of a JUnit file, with what failed and why things were skipped."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped").get("message", "") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": {reason: skipped.count(reason) for reason in sorted(set(skipped))},
    }


def outcomes(text: str) -> dict[str, str | None]:
    """What `pytest -v` printed of each test; None of one that started and did not end."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        if match := ALONE.match(line):
            found[match[1]] = match[2] or found.get(match[1])
        elif match := BESIDE.match(line):
            found[match[2]] = match[1]
    return found


def printed(ended: dict[str, str | None]) -> dict[str, Any]:
    """As `junit`, from what was printed; reasons are not told there."""
    count = list(ended.values()).count
    skipped = count("SKIPPED") + count("XFAIL")
    return {
        "passed": count("PASSED") + count("XPASS"),
        "failed": [name for name, outcome in ended.items() if outcome in ("FAILED", "ERROR")],
        "skipped": {"(reasons not printed)": skipped} if skipped else {},
    }


def tests(folder: Folder, name: str, text: str) -> dict[str, Any] | None:
    """Of a stage, if it ran any: from its JUnit file, else from what it printed; and what did not end."""
    ended = outcomes(text)
    if not ended and not (folder.path / f"{name}.xml").exists():
        return None
    counts = folder.read(f"{name}.xml", junit, None) or printed(ended)
    unfinished = [test for test, outcome in ended.items() if outcome is None]
    return counts | ({"unfinished": unfinished} if unfinished else {})


# --- the run ---


def stages(folder: Folder) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in re.findall(r"^(\S+) (-|\d+) (\d+)(?: (.*))?$", folder.read("stages", str, ""), re.MULTILINE):
        name, status, seconds, why = line
        if status == "-":
            found[name] = {"left_out": why}
            continue
        found[name] = {"exit": int(status), "seconds": int(seconds)}
        text = folder.read(f"{name}.out", str, "")
        if counts := tests(folder, name, text):
            found[name]["tests"] = counts
        if int(status) in (124, 137) or re.search(r"^!+ .*session-timeout: ", text, re.MULTILINE):
            found[name]["stopped"] = True  # by its time
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        if summary:
            found[name]["summary"] = summary[-1]
    return found


def machine(device: str) -> dict[str, Any]:
    """Raises what PyTorch raises where there is no such device."""
    import torch

    info = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "no CUDA device", "driver": None}
    if device == "cuda":
        torch.zeros(1).cuda()
        properties = torch.cuda.get_device_properties(0)
        info["device"] = properties.name
        info["multiprocessors"] = properties.multi_processor_count
        info["memory_gb"] = round(properties.total_memory / 2**30, 1)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        info["driver"] = run.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    return info


def in_full(ran: dict[str, Any], folder: Folder, beginning: str) -> str:
    """The log: the short one, then the end of what each stage said, as much as there is room for."""
    room = LOG_BYTES // (len(ran) + 1)

    def end(text: str) -> str:
        return text if len(text) <= room else f"[{len(text) - room} characters left out]\n{text[-room:]}"

    parts = [end(beginning)]
    for name in ran:
        if (folder.path / f"{name}.out").exists():
            parts.append(f"\n===== {name}\n" + end(folder.read(f"{name}.out", str, "")))
    return "".join(parts)


# --- the table ---


def tables_of_stages(ran: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """One line for each; then the tests that failed."""
    lines = ["| stage | exit | seconds | passed | failed | skipped | |", "|---|---:|---:|---:|---:|---:|---|"]
    failures = []
    for name, stage in ran.items():
        if "left_out" in stage:
            lines.append(f"| {name} | | | | | | left out: {stage['left_out']} |")
            continue
        counts = stage.get("tests")
        numbers = ["", "", ""]
        if counts:
            numbers = [str(counts["passed"]), str(len(counts["failed"])), str(sum(counts["skipped"].values()))]
            failures += [f"- {name}: `{test}`" for test in counts["failed"]]
            failures += [f"- {name}: `{test}` did not end" for test in counts.get("unfinished", [])]
        remark = "stopped" if stage.get("stopped") else stage.get("summary", "")
        lines.append(f"| {name} | {stage['exit']} | {stage['seconds']} | {' | '.join(numbers)} | {remark} |")
    return lines, failures


def rows_of_cases(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in report["rows"]:
        graph, host = row.get("graph_ms"), row.get("host_share")
        cells = [report["operator"], row["case"], row["provider"], report["machine"]["device"]]
        cells += [short(row["floor_ms"]), short(row["median_ms"]), f"{100 * row['of_floor']:.0f} %"]
        cells += [f"{row['speedup']:.1f}x", "" if graph is None else short(graph)]
        cells += ["" if host is None else f"{100 * host:.0f} %", f"{row['error']:.1g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def host(report: dict[str, Any]) -> list[str]:
    """What the host does in a call, of bench_host.py."""
    lines = ["| call | launches | memsets | operators of PyTorch | host us | least |", "|---|" + "---:|" * 5]
    for row in report["host"]:
        numbers = [row[key] for key in ("launches", "memsets", "operators", "us", "least_us")]
        lines.append(f"| {' | '.join([row['case'], *map(short, numbers)])} |")
    return [*lines, ""]


def remarks(report: dict[str, Any]) -> list[str]:
    told = [*report.get("failures", {}).items(), *report.get("notes", {}).items()]
    return [f"- {report['operator']}, {name}: {' '.join(reason.split())}" for name, reason in told]


def markdown(result: dict[str, Any]) -> str:
    described, broken = result["machine"], dict(result["broken"])

    def each(key: str, lines_of: Callable[[dict[str, Any]], list[str]]) -> list[str]:
        """Of the reports that have the key; one that lacks another is named."""
        lines = []
        for report in result["reports"]:
            try:
                lines += lines_of(report) if key in report else []
            except Exception as error:
                broken[report.get("operator", key)] = f"{type(error).__name__}: {error}"
        return lines

    columns = ["operator", "case", "provider", "device", "floor ms", "ms", "of floor", "speed-up", "graph ms"]
    columns += ["host's share", "error"]
    header = [f"| {' | '.join(columns)} |", "|---|---|---|---|" + "---:|" * 7]
    cases = each("rows", rows_of_cases)
    notes, steps, hosts = each("rows", remarks), each("phases", step), each("host", host)
    versions = f"torch {described.get('torch')}, driver {described.get('driver')}, Python {described.get('python')}"
    parts = [
        [f"**{described['device']}**, {result['half']} half, {result['date']}; {versions}"],
        *tables_of_stages(result["stages"]),
        [f"- {name}: {reason}" for name, reason in broken.items()],
        [*header, *cases] if cases else [],
        notes,
        hosts,
        steps,
    ]
    return "\n\n".join("\n".join(part).rstrip() for part in parts if part) + "\n"


def main(path: Path, log: Path, out: Path, half: str) -> int:
    folder = Folder(path)
    ran = stages(folder)
    found = sorted((path / "benchmarks").glob("*.json"))
    read = [folder.read(f"benchmarks/{file.name}", json.loads, None) for file in found]
    now = datetime.now(timezone.utc)
    result = {
        "machine": {"device": "unknown"} | folder.read("machine.json", lambda text: dict(json.loads(text)), {}),
        "date": now.isoformat(timespec="seconds"),
        "half": half,
        "stages": ran,
        "reports": [report for report in read if isinstance(report, dict)],
        "broken": folder.broken,
    }
    short_name = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    stem = f"{out}/{short_name}-{now:%Y%m%d}-{half}"
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    beginning = log.read_text(errors="replace") if log.exists() else ""
    Path(f"{stem}.log").write_text(in_full(ran, folder, beginning))
    (path / "reported").touch()
    table = markdown(result)
    Path(f"{stem}.md").write_text(table)
    print(f"{table}\nwritten: {stem}.json, .log and .md")
    return int(bool(folder.broken) or any(stage.get("exit") for stage in ran.values()))


if __name__ == "__main__":
    if sys.argv[1] == "--machine":
        print(json.dumps(machine(sys.argv[2])))
    else:
        sys.exit(main(*map(Path, sys.argv[1:4]), sys.argv[4]))
