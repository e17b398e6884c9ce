"""Seconds and peak memory of one call, warm or with emptied caches."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core import native_module


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Of one call; on a GPU of one among ``repeats``, one behind the other as a training loop queues them."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def repeats_of(once: float, device: str) -> int:
    """Calls between two events of a GPU, whose clock ticks in half microseconds: about a millisecond's worth."""
    return min(max(int(1e-3 / max(once, 1e-9)), 1), 50) if device == "cuda" else 1


def warm_up(call: Callable[[], Any], device: str, seconds: float = 0.002) -> None:
    """One call, or as many as fit into 2 ms: what the other providers have left in the caches is gone by then."""
    begin = time.perf_counter()
    while True:
        call()
        if device == "cuda" or time.perf_counter() - begin > seconds:
            return


class CacheFlush:
    """Writes over more memory than any cache holds."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty((256 if device == "cuda" else 128) << 20, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.fill_(1)


def forget_scratch() -> None:
    """Frees what our kernels keep for their next call on this thread: a peak that left it out would flatter them."""
    native_module.forget_scratch()


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Bytes at the peak of a call above the level before it: results and scratch, not the inputs.

    CUDA: what torch's allocator had handed out. CPU (Linux): resident pages of this process, its high-water mark
    set back by the kernel just before the call (``/proc/self/clear_refs``), when memory freed earlier has been
    returned to the system; what is allocated but never touched does not count, scratch that our kernels keep from
    call to call does. NaN where that is not to be had.
    """
    forget_scratch()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS:")
        call()
        return max(status("VmHWM:") - before, 0.0)
    except (OSError, AttributeError, StopIteration, TypeError):  # TypeError: Windows has no CDLL(None)
        return float("nan")
