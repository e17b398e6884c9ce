"""How long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def timed(work: Callable[[], Made], device: torch.device | str = "cpu") -> tuple[Made, float]:
    """What ``work`` gives, and the seconds until the device had it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    made = work()
    wait()
    return made, time.perf_counter() - start


def in_words(seconds: float) -> str:
    """``0.4 ms``, ``23 ms``, ``1.4 s``."""
    if seconds < 0.00995:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"
