"""The machine a number was measured on: its name, its versions, its bandwidth and its peak."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from timing import seconds_of

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Short hash of the checkout, with + when it has uncommitted changes; "unknown" outside a checkout."""
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge a number: device, versions, commit, measured bandwidth and peak."""
    from afa_kernels.core.native_module import native

    bandwidth, peaks = limits(device)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "instruction_set": native.cpu_isa() if native is not None else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        **{peak_key(dtype): round(peak / 1e9, 1) for dtype, peak in peaks.items()},
    }


def peak_key(dtype: torch.dtype) -> str:
    """Where a machine's description has the operations per second of a dtype."""
    return "peak_gflop_s" if dtype == torch.float32 else f"peak_gflop_s_{str(dtype).removeprefix('torch.')}"


def limits(device: str) -> tuple[float, dict[torch.dtype, float]]:
    """Bytes per second of a copy (read and written counted) and operations per second of a matrix product.

    Products of float32, never of TF32, on the CPU, where half precision is not arithmetic but storage; of bfloat16
    too on a GPU.
    """
    size = 1 << (28 if device == "cuda" else 25)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(7))
    n, peaks = 4096 if device == "cuda" else 1024, {}
    with gpu.precision():
        for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
            a = torch.rand(n, n, device=device, dtype=dtype)
            out = torch.empty_like(a)
            product = partial(torch.mm, a, a, out=out)
            peaks[dtype] = 2 * n**3 / min(seconds_of(product, device) for _ in range(7))
    return 2 * 4 * size / seconds, peaks
