"""AFA in PyTorch: backbone, model, pseudo-labels, training, evaluation, prediction.

`AFA` is the network, `load_model` reads a checkpoint, `train`, `evaluate` and `predict` are what the commands of those
names call. Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "AFA": "networks.afa",
    "load_model": "runs.restore",
    "train": "runs.loop",
    "evaluate": "evaluation.evaluate",
    "predict": "evaluation.predict",
}

__all__ = ["AFA", "evaluate", "load_model", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
