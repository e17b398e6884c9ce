"""The tables of cases: a module for each operator, with ``cases(device, quick, compiling)``."""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("affinity", "bilateral", "feature_affinity", "par", "path_affinity", "pcm", "random_walk", "sinkhorn")


def table(name: str) -> ModuleType:
    """The module of one of `NAMES`."""
    return importlib.import_module(f".{name}", __name__)
