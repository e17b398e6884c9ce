"""AFA in PyTorch: backbone, model, pseudo-labels, training, evaluation, prediction.

`AFA` is the network, `load_model` reads a checkpoint, `train`, `evaluate` and `predict` are what the commands of those
names call. Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import missing_named

if TYPE_CHECKING:
    from .evaluation.evaluate import evaluate
    from .evaluation.predict import predict
    from .networks.afa import AFA
    from .runs.loop import train
    from .runs.restore import load_model

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
    with missing_named():
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _refuse_parts(argv: list[str], original: list[str]) -> None:
    """`python -m afa_model.evaluate` and its like would end well without having done anything: say what runs.

    While the packages above a module are imported, Python calls the program ``-m``.
    """
    if argv[:1] != ["-m"] or "-m" not in original[:-1]:
        return
    module = original[original.index("-m") + 1]
    if module.startswith("afa_model.") and module not in ("afa_model.cli", "afa_model.__main__"):
        name = module.rpartition(".")[2]
        command = name if Path(__file__).with_name("commands").joinpath(f"{name}.py").exists() else "COMMAND"
        sys.exit(f"{module} is no command: run `afa {command} ...`, or `python -m afa_model {command} ...`")


_refuse_parts(sys.argv, sys.orig_argv)
