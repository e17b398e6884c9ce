"""The smallest run of `afa train` that still goes through all of its phases."""

from __future__ import annotations

import csv
from pathlib import Path

TINY = {
    "device": "cpu",
    "model.backbone": "mit_b0",
    "augment.crop": 64,
    "data.num_workers": 0,
    "schedule.max_iters": 4,
    "schedule.warmup_iters": 1,
    "step.cam_iters": 0,
    "step.aff_iters": 1,
    "loss.regularisation": 0.01,
    "labels.radius": 2,
    "labels.dilations": [1, 2],
    "labels.num_iter": 2,
    "eval.every": 0,
    "eval.long_side": 64,
    "eval.scales": [1.0],
    "eval.cam_scales": [1.0],
    "eval.limit": 2,
    "log.every": 1,
    "log.pictures_every": 0,
    "log.tensorboard": False,
    "checkpoint.every": 2,
}


def tiny_args(root: Path, out: Path, **changes: object) -> list[str]:
    """Arguments of a tiny run; ``changes`` are settings with ``__`` for the dot."""
    settings = {**TINY, "data.root": root, "out": out}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file as dicts, without the column that a clock filled."""
    with open(path, newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]
