"""python benchmarks/bfloat16_deviation.py RUN [--steps 8] [--images N] [--device auto] [--json FILE]

What bfloat16 (``--amp bf16``) changes in a run that `afa train` or `afa demo` made, on the CPU or a GPU: from its best
checkpoint both precisions are given the same batches with the same random numbers. Told are losses and gradient norm
(deviation over the size, the largest and the mean of the steps), the pixels of the training labels that differ, the
seconds of a step, and the mIoU of every label map on the validation set. Weights are never changed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import as_the_command  # noqa: F401
import torch
from rich.console import Console
from rich.table import Table

from afa_kernels.bench.machine import commit, device_name
from afa_model.config import Config
from afa_model.runs import checkpoint
from afa_model.runs.restore import load_model
from afa_model.runs.trainer import Trainer
from afa_model.runtime.processes import choose_device, processes

LABELS = ("refined_label", "aff_label")


def measure_one(config: Config, state: dict[str, Any], amp: str, steps: int) -> dict[str, Any]:
    """The steps' numbers and labels, seconds, and scores."""
    config.amp = config.eval.amp = amp
    config.eval.every = config.eval.every or 1  # or there is no validation set
    with processes(config.device) as here:
        trainer = Trainer(config, here)
        trainer.restore(state)
        trainer.start()
        found, labels, seconds = [], [], []
        for step in range(steps):
            torch.manual_seed(step)  # the same drop path in both
            start = time.perf_counter()
            _, result, numbers = trainer.losses()
            found.append({name: float(value.detach()) for name, value in numbers.items()})  # waits for a GPU
            seconds.append(time.perf_counter() - start)
            labels.append({name: label.cpu() for name in LABELS if (label := getattr(result, name)) is not None})
        trainer.close()
        scores = trainer.evaluate(lambda: False)
    miou = scores[0] if scores else {}
    return {"numbers": found, "labels": labels, "seconds": sorted(seconds)[len(seconds) // 2], "miou": miou}


def compared(exact: dict[str, Any], half: dict[str, Any], device: str) -> dict[str, Any]:
    deviation = {}
    for name, value in exact["numbers"][0].items():
        pairs = [(a[name], b[name]) for a, b in zip(exact["numbers"], half["numbers"])]
        far = [abs(b - a) / abs(a) for a, b in pairs if a]
        if far:
            deviation[name] = {"mean": sum(far) / len(far), "largest": max(far), "first": value}
    pixels = {}
    for name in exact["labels"][0]:
        differ = sum(int((a[name] != b[name]).sum()) for a, b in zip(exact["labels"], half["labels"]))
        pixels[name] = {"differ": differ, "of": sum(labels[name].numel() for labels in exact["labels"])}
    miou = {kind: {"off": score, "bf16": half["miou"][kind]} for kind, score in exact["miou"].items()}
    return {
        "device": device_name(device),
        "commit": commit(),
        "seconds": {"off": exact["seconds"], "bf16": half["seconds"]},
        "deviation": deviation,
        "labels": pixels,
        "miou": miou,
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("number", "first", "mean deviation", "largest", title=f"bfloat16 beside float32, {result['device']}")
    for name, far in result["deviation"].items():
        table.add_row(name, f"{far['first']:.4g}", f"{far['mean']:.1e}", f"{far['largest']:.1e}")
    console.print(table)
    table = Table("labels", "pixels that differ", "of")
    for name, found in result["labels"].items():
        table.add_row(name, f"{found['differ']} ({found['differ'] / found['of']:.2%})", str(found["of"]))
    console.print(table)
    if result["miou"]:
        table = Table("mIoU", "float32", "bfloat16")
        for kind, score in result["miou"].items():
            table.add_row(kind, f"{score['off']:.2f}", f"{score['bf16']:.2f}")
        console.print(table)
    seconds = result["seconds"]
    console.print(f"seconds of forward and backward, the median: {seconds['off']:.3g} and {seconds['bf16']:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, help="of the validation set that are scored; default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE too")
    options = parser.parse_args()
    restored = load_model(options.run)
    state = checkpoint.read(restored.path)
    both = []
    for amp in ("off", "bf16"):
        config = restored.config
        config.device, config.eval.limit = options.device, options.images
        both.append(measure_one(config, state, amp, options.steps))
    result = compared(*both, choose_device(options.device).type)
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
