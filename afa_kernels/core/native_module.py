"""The compiled module, if there is one, and how a tensor is handed to it."""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before the native module: both then share one OpenMP runtime and one thread pool

from .tracing import constant_when_traced

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INTEGER_CODES = {torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4}


def _load() -> tuple[Any, str | None]:
    for last in (False, True):
        try:
            return importlib.import_module("afa_kernels._native"), None
        except ImportError as error:
            if last or "undefined symbol" not in str(error) or not _openmp_for_all():
                reason = build_info().get("native_reason")
                return None, reason or f"the native module could not be loaded: {error}"
    raise AssertionError


def _openmp_for_all() -> bool:
    """Lets the native module find OpenMP's runtime, with which it is not linked: the one that torch has loaded, so that
    both share its threads, by whatever name; else the system's. The torch of PyPI has done it already.
    """
    try:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    except OSError:
        loaded = set()
    names = "libgomp", "libiomp5", "libomp"
    for path in [*sorted(path for path in loaded if os.path.basename(path).startswith(names)), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def build_info() -> dict[str, Any]:
    """What was compiled, and why something was not: ``native``, ``native_reason``, ``cuda``, ``cuda_reason``,
    ``cuda_archs``, and from which ``sources`` (a digest).

    Examples:
        >>> from afa_kernels import build_info
        >>> sorted(build_info())
        ['cuda', 'cuda_archs', 'cuda_reason', 'native', 'native_reason', 'sources']
    """
    try:
        info = importlib.import_module("afa_kernels._build_info")
    except ImportError:
        missing = "afa is used without having been installed (pip install -e .)"
        info = {"native": False, "native_reason": missing, "cuda": False, "cuda_reason": missing}
        return {**info, "cuda_archs": None, "sources": None}
    return {key: value for key, value in vars(info).items() if not key.startswith("_")}


native, native_reason = _load()


def _one_thread() -> None:
    """OpenMP's threads do not survive a fork: a child that asked for its parent's, here or in PyTorch, would wait for
    ever (joblib, ``multiprocessing.Pool``).
    """
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)


def cpu_reason(*tensors: torch.Tensor) -> str | None:
    """Why the native CPU kernels cannot take these tensors, or None if they can."""
    if native is None:
        return native_reason
    for tensor in tensors:
        if tensor.dtype not in DTYPE_CODES:
            return f"the native kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    return None


# What the driver says for good, and what can be done about it: no code for this device; PTX, or a runtime, that is too
# new for the driver. Anything else (no memory for the module, a busy device) may be over at the next call.
_NO_CODE, _PTX_TOO_NEW, _DRIVER_TOO_OLD = (209, 98), (222,), (35,)

_probed: dict[int, str | None] = {}  # by device


@constant_when_traced
def _probe(index: int | None) -> str | None:
    """Why a CUDA device cannot run the kernels that were built, or None; asked of the driver once for each device."""
    index = torch.cuda.current_device() if index is None else index
    if index in _probed:
        return _probed[index]
    code, said = native.cuda_probe(index)
    reason = _explained(code, said, index) if code else None
    if code in (0, *_NO_CODE, *_PTX_TOO_NEW, *_DRIVER_TOO_OLD):
        _probed[index] = reason
        if reason is not None:
            warnings.warn(f"the CUDA kernels cannot run on device {index}: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _explained(code: int, said: str, index: int) -> str:
    """What the driver says, and what a user can do about it."""
    if code in (*_PTX_TOO_NEW, *_DRIVER_TOO_OLD):
        driver, runtime = (f"{version // 1000}.{version % 1000 // 10}" for version in native.cuda_versions())
        return (
            f"{said}: the kernels were built with CUDA {runtime}, the driver is for {driver}; update the driver, or"
            f" install a CUDA toolkit of version {driver.split('.')[0]} and install afa again"
        )
    if code in _NO_CODE:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"{said}: the kernels were built for {build_info().get('cuda_archs')}, this device is of {major}.{minor};"
            f" install afa again with AFA_CUDA_ARCHS={major}{minor}"
        )
    return said


def cuda_reason(device: torch.device, *tensors: torch.Tensor) -> str | None:
    """Why the native CUDA kernels cannot run on a device and take these tensors, or None if they can."""
    reason = cpu_reason(*tensors)
    if reason is None and not native.cuda:
        reason = f"built without CUDA: {build_info().get('cuda_reason')}"
    if reason is None and not hasattr(native, "cuda_probe"):
        reason = "the native module is older than these Python files: pip install -e . once more"
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    if reason is None:
        reason = _probe(device.index)
    return reason


def native_can_run(operator: str, device: torch.device, *tensors: torch.Tensor) -> str | None:
    """Why the native backend cannot run an operator on a device, or None."""
    if device.type == "cpu":
        reason = cpu_reason(*tensors)
    elif device.type == "cuda":
        reason = cuda_reason(device, *tensors)
    else:
        return f"the native kernels run on cpu and cuda, not on {device.type}"
    if reason is None and not hasattr(native, f"{operator}_{device.type}"):
        reason = f"no native {device.type} kernel for {operator}"
    return reason


def view(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """A tensor as the kernels take it: address, element type, shape, strides in elements."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def integer_view(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """The same of integers, where a kernel takes any type of them."""
    return tensor.data_ptr(), INTEGER_CODES[tensor.dtype], tensor.shape, tensor.stride()


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor goes to the CUDA kernels rather than to the CPU's."""
    return tensor.device.type == "cuda"


# Without an object of PyTorch's for a stream; what its own compiled code asks for a stream.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def cuda_stream(device: torch.device) -> tuple[int, int]:
    """Where the CUDA kernels run, as they take it: the device's index and the handle of PyTorch's current stream
    there.
    """
    index = device.index
    return index, _raw_stream(index) if _raw_stream is not None else torch.cuda.current_stream(device).cuda_stream


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


KEPT_SCRATCH = 8 << 20  # bytes
_scratch = threading.local()


def workspace(size: int, device: torch.device) -> torch.Tensor:
    """Scratch memory of at least ``size`` bytes for one call; torch's allocators align it to 64 bytes.

    On the CPU every thread keeps what it used last, up to `KEPT_SCRATCH`: fresh memory costs a page fault for each
    4 KB, which is more than the random walk of a small grid takes. Under deterministic algorithms it is fresh,
    which PyTorch fills with NaN: a kernel that reads what it has not written shows.
    """
    size = max(int(size), 1)
    if device.type != "cpu" or size > KEPT_SCRATCH or torch.are_deterministic_algorithms_enabled():
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept = getattr(_scratch, "kept", None)
    if kept is None or kept.numel() < size:
        kept = _scratch.kept = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept


def forget_scratch() -> None:
    """Frees what this thread has kept."""
    _scratch.__dict__.clear()


def run_planned(device: torch.device, size: Callable[[], int], run: Callable[[tuple[int, int]], None]) -> None:
    """Runs a CUDA kernel whose plan is made anew at each call: ``size()`` bytes of scratch memory, ``run((address,
    bytes))``.

    Where the device turns a cooperative launch away (a part of it: green contexts, MPS, another process's share), the
    kernels no longer plan for one there, and the next time both take the plan that streams. Another thread's launch
    may be turned away between the two calls: then the kernel finds its memory too small, and is asked again as well.
    """
    for last in (False, False, True):
        scratch = workspace(size(), device)
        try:
            return run((scratch.data_ptr(), scratch.numel()))
        except native.NotResident:
            if last:
                raise
