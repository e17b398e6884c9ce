"""Joins what on_gpu.sh left in a folder to one JSON and one log: python on_gpu_report.py FOLDER LOG OUTDIR

Exits with 1 if a stage failed, after it has written both.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LOG_BYTES = 400_000


def tests(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, with what failed and why things were skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped").get("message", "") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": {reason: skipped.count(reason) for reason in sorted(set(skipped))},
    }


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in (folder / "stages").read_text().splitlines():
        name, status, seconds = line.split()
        found[name] = {"exit": int(status), "seconds": int(seconds)}
        if (folder / f"{name}.xml").exists():
            found[name]["tests"] = tests(folder / f"{name}.xml")
        text = (folder / f"{name}.out").read_text(errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        if summary:
            found[name]["summary"] = summary[-1]
    return found


def machine() -> dict[str, Any]:
    import torch

    info = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "no CUDA device"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info["device"] = properties.name
        info["multiprocessors"] = properties.multi_processor_count
        info["memory_gb"] = round(properties.total_memory / 2**30, 1)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        info["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        info["driver"] = None
    return info


def main(folder: Path, log: Path, out: Path) -> int:
    ran = stages(folder)
    reports = [json.loads(path.read_text()) for path in sorted((folder / "benchmarks").glob("*.json"))]
    now = datetime.now(timezone.utc)
    result = {"machine": machine(), "date": now.isoformat(timespec="seconds"), "stages": ran, "reports": reports}
    short = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    stem = out / f"{short}-{now:%Y%m%d}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = log.read_text(errors="replace") if log.exists() else ""
    for name in ran:
        text += f"\n===== {name}, in full\n" + (folder / f"{name}.out").read_text(errors="replace")
    stem.with_suffix(".log").write_text(text[:LOG_BYTES])
    for name, stage in ran.items():
        counts = stage.get("tests")
        said = f"{counts['passed']} passed, {len(counts['failed'])} failed" if counts else stage.get("summary", "")
        print(f"{name:20} exit {stage['exit']:3} {stage['seconds']:4} s  {said}")
        for failure in (counts or {}).get("failed", [])[:20]:
            print(f"    {failure}")
    print(f"written: {stem}.json and .log")
    return int(any(stage["exit"] for stage in ran.values()))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
