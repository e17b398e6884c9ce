"""How often the stand-ins of whole packages are called, and how long that takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import wraps
from unittest import mock

from . import rloss
from .pydensecrf import densecrf

# What takes time: whose attribute it is, its name, and how it is called in reports.
WATCHED = (
    (densecrf.DenseCRF, "inference", "pydensecrf's inference"),
    (densecrf.DenseCRF, "stepInference", "pydensecrf's stepInference"),
    (rloss, "bilateralfilter_batch", "bilateralfilter_batch"),
)


def packages() -> dict[str, list[float]]:
    """Nothing called yet: for each of them the seconds of its calls."""
    return {label: [] for _, _, label in WATCHED}


@contextlib.contextmanager
def counted(counts: dict[str, list[float]]) -> Iterator[None]:
    """Within the block each call adds its seconds."""
    with contextlib.ExitStack() as stack:
        for owner, name, label in WATCHED:
            stack.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), counts[label])))
        yield


def _timed(function, spent: list[float]):
    @wraps(function)
    def call(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            spent.append(time.perf_counter() - start)

    return call
