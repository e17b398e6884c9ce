"""python benchmarks/bench_large_photos.py [--backbone mit_b0] [--megapixels 3 12 24] [--classes 21 81] [--json FILE]

All label maps of one large photograph as `afa predict` makes them, with three classes in it: seconds, and memory beyond
the model's. ``bands`` is what is done (``afa_model/labels/large.py``); ``whole`` holds every class at the photograph's
size, as is done with ordinary ones. Each case has a process of its own. Floor of the memory: the photograph itself,
normalised, 12 bytes a pixel, and one byte a pixel for each of the five label maps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import as_the_command  # noqa: F401
import torch
from rich.console import Console
from rich.table import Table

from afa_kernels.bench.machine import commit, device_name
from afa_model.data.transforms import normalize
from afa_model.labels import large
from afa_model.labels.evidence import MapSettings
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA


def resident() -> float:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Peak(threading.Thread):
    """The most that the process held while this ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = resident(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident())


def case(pipe: Any, backbone: str, height: int, width: int, classes: int, whole: bool) -> None:
    torch.manual_seed(0)
    model = AFA(backbone, classes).eval()
    coarse = torch.rand(1, 3, height // 40, width // 40)
    cls_labels = torch.zeros(classes - 1)
    cls_labels[[0, classes // 2, classes - 2]] = 1
    how = MapSettings(), LabelSettings(), cls_labels
    small = torch.nn.functional.interpolate(coarse, (300, 400), mode="bilinear")[0]
    label_maps(model, normalize((255 * small).to(torch.uint8)), *how)  # what is allocated once
    start = resident()
    photo = (255 * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]).to(torch.uint8)
    if whole:
        large.PIXELS = height * width
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    label_maps(model, normalize(photo), *how)
    seconds = time.perf_counter() - begin
    peak.done.set()
    pipe.send({"seconds": round(seconds, 1), "mib": round(peak.most - start)})


def run(*what: Any) -> dict[str, float] | None:
    """The case in a process of its own; None where memory did not suffice."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=case, args=(theirs, *what))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = None
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--backbone", default="mit_b0")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[3, 12, 24])
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 81])
    parser.add_argument("--bands-only", action="store_true", help="leave out what takes several times the memory")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    table = Table(title=f"label maps of one photograph, {options.backbone}, {device_name('cpu')}")
    for column in ("megapixels", "classes", "way", "seconds", "MiB over the model", "floor, MiB"):
        table.add_column(column, justify="right")
    rows = []
    for megapixels in options.megapixels:
        height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
        size = height, round(megapixels * 1e6 / height)
        for classes in options.classes:
            for way in ("bands",) if options.bands_only else ("bands", "whole"):
                if way == "bands" and not large.is_large(size):
                    continue
                result = run(options.backbone, *size, classes, way == "whole")
                floor = round(17 * size[0] * size[1] / 2**20)
                rows.append({"size": size, "classes": classes, "way": way, "floor_mib": floor, **(result or {})})
                shown = ("out of memory", "") if result is None else (f"{result['seconds']}", f"{result['mib']}")
                table.add_row(f"{megapixels:g}", f"{classes}", way, *shown, f"{floor}")
                print(rows[-1], flush=True)
    Console(width=120).print(table)
    if options.json:
        about = {"device": device_name("cpu"), "torch": torch.__version__, "commit": commit()}
        result = {**about, "backbone": options.backbone, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
