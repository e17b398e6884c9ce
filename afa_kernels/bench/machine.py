"""The machine a number was measured on: its name, its versions, its bandwidth and its peak."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import afa_kernels

from ..core.native_module import build_info, native, native_reason
from . import gpu
from .timing import seconds_of

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """Short hash of the checkout, with + when it has uncommitted changes; "unknown" outside a checkout, which may be
    within another one.
    """
    if not (ROOT / "csrc").is_dir():
        return "unknown"
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def built_from(machine: dict[str, Any]) -> str:
    """What a report says of the package that was measured."""
    return f"afa {machine['afa']}" + f", commit {machine['commit']}" * (machine["commit"] != "unknown")


def cpu_name() -> str:
    """The model's name where Linux tells it; platform knows only the architecture there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge a number: device, versions, commit, measured bandwidth and peak."""
    bandwidth, peaks = limits(device)
    return {
        "device": device_name(device),
        "afa": afa_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "instruction_set": native.cpu_isa() if native is not None else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        **{peak_key(dtype): round(peak / 1e9, 1) for dtype, peak in peaks.items()},
    }


WAITING = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def environment(machine: dict[str, Any]) -> list[str]:
    """The lines above a table in a report of a problem: what was measured where, as `describe` and the build say."""
    build, waiting = build_info(), [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        triton = "no triton"
    cpu = f"compiled, here for {machine['instruction_set']}" if native is not None else f"no: {native_reason}"
    cuda = f"compiled for {build['cuda_archs']}" if build["cuda"] else f"no: {build['cuda_reason']}"
    peaks = {key: value for key, value in machine.items() if key.startswith("peak_gflop_s")}
    products = ", ".join(f"{key.removeprefix('peak_gflop_s_')} {value}" for key, value in peaks.items())
    products = products.replace("peak_gflop_s", "float32")
    processor = "" if machine["device"].startswith(cpu_name()) else f", processor {cpu_name()}"
    return [
        f"{built_from(machine)}, on {machine['device']}",
        f"Python {machine['python']}, {platform.platform()}{processor}",
        f"torch {machine['torch']}, {triton}; {', '.join(waiting) or 'nothing said of how OpenMP waits'}",
        f"native CPU kernels {cpu}; CUDA kernels {cuda}",
        f"measured {machine['date']}: copies {machine['bandwidth_gb_s']} GB/s, products {products} GFLOP/s",
    ]


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
